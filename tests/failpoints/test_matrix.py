"""All of the fail points in random order; `make soak` does the same."""

from __future__ import annotations

import os
import random

import pytest

from tests.failpoints.matrix import BACKENDS, crash_everywhere


@pytest.mark.root
@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("backend", BACKENDS)
def test_everywhere(backend: str) -> None:
    seed = int(os.environ.get("SNAPBROKER_SEED") or random.SystemRandom().getrandbits(32))
    print(f"SNAPBROKER_SEED={seed} makes the same choices again")
    figures, failures = crash_everywhere(backend, seed, print)
    assert failures == []
    assert figures["crashes"] >= figures["combinations"]
