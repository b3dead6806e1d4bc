"""One namespace as a recorder writes it: what a walk said, what each event changed, and what is there at the end."""

from __future__ import annotations

from typing import Final

import values

from snapbroker.contract import Event, Info

END: Final = "conformance-end"
"""The snapshot that ends a namespace."""
WAIT_SECONDS: Final = 120.0
"""How long a broker may be away."""


class Mirror:
    """The snapshots of a namespace by name; `gaps` that were healed."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.gaps = 0
        self._infos: dict[str, Info] = {}

    def walked(self, infos: list[Info], sequence: int) -> None:
        """Begin anew with what a walk answered."""
        self._infos = {info.name: info for info in infos}
        state = [values.value(info) for info in infos]
        values.write({"namespace": self.namespace, "state": state, "sequence": sequence})

    def apply(self, event: Event) -> None:
        """Write the event, and change what it says (RFC 2, section 6)."""
        values.write({"namespace": self.namespace, "event": values.value(event)})
        if event.verb in ("remove", "commit"):
            self._infos.pop(event.key, None)
        if event.info is not None:
            self._infos[event.info.name] = event.info

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be written but the end."""
        return END in self._infos

    def end(self) -> None:
        """Write what is there."""
        mirror = [values.value(self._infos[name]) for name in sorted(self._infos)]
        values.write({"namespace": self.namespace, "mirror": mirror, "gaps": self.gaps})
