"""What a log loads, and what it looks like on a terminal."""

from __future__ import annotations

import subprocess
import sys


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_daemon_does_not_load_what_only_the_command_draws_with() -> None:
    """A fifth of each process's start; whoever wants it later finds it."""
    code = """
import sys, broker.main, broker.snapshotter.__main__
print("rich" in sys.modules)
import rich
print(rich.__name__)
"""
    assert python(code).split() == ["False", "rich"]


def test_an_exception_is_told_on_a_terminal() -> None:
    code = """
import sys
from broker import logs
sys.stderr = sys.stdout
logs.configure("info", "console")
try:
    1 / 0
except ZeroDivisionError:
    logs.get_logger().exception("it failed", what="a sum")
"""
    told = python(code)
    assert "it failed" in told
    assert "ZeroDivisionError: division by zero" in told
