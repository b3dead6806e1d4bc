"""Debian's containerd, runc and ctr on a running broker: what only all of them together can show."""

import pytest

# Its assertions are to say what they compared, as those of a test do.
pytest.register_assert_rewrite("end_to_end.machine")
