"""Tests of the daemon as a process: crashes, stops, bad input, limits, configuration."""

import pytest

pytest.register_assert_rewrite("tests.daemon.support")
