"""`python -m snapbroker.command`: the command where no script was installed for it."""

import sys

from snapbroker.command import main

sys.exit(main())
