"""One guarded daemon for all tests that do it no harm, with a key of each role."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from snapbroker.keyfiles import Curve
from tests.access.guarded import Guarded, guarded


@pytest.fixture(scope="session")
def gate() -> Iterator[Guarded]:
    """A daemon with the snapshotters `memory` and `other`."""
    with guarded("memory", "other") as found:
        yield found


@pytest.fixture(scope="session")
def roles(gate: Guarded) -> dict[str, Curve]:
    """A key of each role in the namespaces red and blue."""
    return {role: gate.grant(f"role-{role}", role, "red", "blue") for role in ("read", "write", "admin")}


@pytest.fixture(scope="session")
def red(gate: Guarded) -> Curve:
    """A key that may write in the namespace red."""
    return gate.grant("red", "write", "red")


@pytest.fixture(scope="session")
def whole(gate: Guarded) -> Curve:
    """A key of an admin of everything."""
    return gate.grant("whole", "admin", "*")
