"""The backends that are installed, by the name of their entry point in the group `snapbroker.backends`.

A third party's backend is a distribution with such an entry point. One that cannot be imported is reported
under its name and does not keep the others from being used.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Final, cast

from backends.api import Backend, Options
from snapbroker.errors import FailedPrecondition, NotFound

if TYPE_CHECKING:
    from collections.abc import Mapping

    from backends.api import BackendType

GROUP: Final = "snapbroker.backends"

# `capabilities` and `root` may belong to the instance, and a class need not show them.
_MEMBERS = frozenset(name for name in vars(Backend) if not name.startswith("_")) | {"Options"}


@dataclass(frozen=True, slots=True)
class Registry:
    """What is installed: `backends` by name, and `errors` of those that could not be loaded, by name."""

    backends: Mapping[str, BackendType]
    errors: Mapping[str, str]


def available() -> Registry:
    """Load every installed backend."""
    backends: dict[str, BackendType] = {}
    errors: dict[str, str] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        if entry.name in backends or entry.name in errors:
            backends.pop(entry.name, None)
            errors[entry.name] = f"more than one installed distribution calls its backend {entry.name!r}"
            continue
        try:
            backends[entry.name] = _loaded(entry)
        except FailedPrecondition as error:
            errors[entry.name] = error.message
    return Registry(backends, errors)


def load(name: str) -> BackendType:
    """The backend of that name; NotFound says what is installed, FailedPrecondition why it is unusable."""
    installed = entry_points(group=GROUP)
    found = [entry for entry in installed if entry.name == name]
    if not found:
        names = ", ".join(sorted(installed.names)) or "none"
        raise NotFound(f"no backend {name!r} is installed; installed: {names}")
    if len(found) > 1:
        raise FailedPrecondition(f"more than one installed distribution calls its backend {name!r}")
    return _loaded(found[0])


def _loaded(entry: EntryPoint) -> BackendType:
    try:
        loaded = entry.load()
    except Exception as error:  # Whatever a third party's module does when imported is its author's to mend.
        reason = f"{type(error).__name__}: {error}"
        raise FailedPrecondition(f"backend {entry.name!r} ({entry.value}) cannot be loaded: {reason}") from error
    if complaint := _complaint(loaded):
        raise FailedPrecondition(f"backend {entry.name!r} ({entry.value}) {complaint}")
    return cast("BackendType", loaded)


def _complaint(loaded: object) -> str | None:
    if not isinstance(loaded, type):
        return "is not a class"
    if missing := sorted(name for name in _MEMBERS if not hasattr(loaded, name)):
        return f"lacks {', '.join(missing)}"
    options = vars(loaded).get("Options", getattr(loaded, "Options", None))
    if not (isinstance(options, type) and issubclass(options, Options)):
        return "has Options that are not a subclass of backends.api.Options"
    return None
