"""Daemons that are harmed here."""

from tests.daemon.conftest import unstarted_daemon

__all__ = ["unstarted_daemon"]
