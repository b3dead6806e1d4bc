"""Writes docs/schemas: the JSON Schema of every message, from the types of `snapbroker.protocol` alone.

The schemas speak of the JSON view of a message, as in clients/vectors: a MessagePack `bin` is a string in
base64. What a type does not say, a limit above all, is added from the constants of the contract. A length in
a schema counts characters and the limit counts bytes of UTF-8: the schema allows all that is legal and a
little more.
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import TYPE_CHECKING, Any, Final

import msgspec
from generated import ROOT, write_or_check

from snapbroker import contract, protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FOLDER: Final = ROOT / "docs" / "schemas"

_NAME: Final = {"minLength": 1, "maxLength": contract.NAME_BYTES_MAX, "pattern": "^[^\\u0000]*$"}
_PARENT: Final = {"maxLength": contract.NAME_BYTES_MAX, "pattern": "^[^\\u0000]*$"}
_LABELS: Final = {
    "maxProperties": contract.LABELS_MAX,
    "propertyNames": {"minLength": 1, "maxLength": contract.LABEL_BYTES_MAX},
}
_PAGE: Final = {"minimum": 1, "maximum": protocol.PAGE_MAX}
_CREDIT: Final = {"minimum": 1, "maximum": protocol.CREDIT_MAX}
_SEQUENCE: Final = {"minimum": 0, "maximum": 2**63 - 1}
_COUNT: Final = {"minimum": 0}

LIMITS: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    "Request": {
        "calls": {"minItems": 1, "maxItems": protocol.CALLS_MAX},
        "namespace": {"maxLength": contract.NAMESPACE_BYTES_MAX},
        "timeout_ms": _COUNT,
    },
    "Prepare": {"key": _NAME, "parent": _PARENT, "labels": _LABELS},
    "View": {"key": _NAME, "parent": _PARENT, "labels": _LABELS},
    "Commit": {"name": _NAME, "key": _NAME, "parent": _PARENT, "labels": _LABELS},
    "Remove": {"key": _NAME},
    "Mounts": {"key": _NAME},
    "Stat": {"key": _NAME},
    "Update": {"name": _NAME, "labels": _LABELS},
    "UsageOf": {"key": _NAME},
    "Walk": {"filters": {"maxItems": protocol.FILTERS_MAX}, "page": _PAGE, "credit": _CREDIT},
    "Events": {
        "topics": {"maxItems": protocol.FILTERS_MAX}, "since": _SEQUENCE, "page": _PAGE, "credit": _CREDIT,
    },
    "Audit": {"page": _PAGE, "credit": _CREDIT},
    "Repair": {"page": _PAGE, "credit": _CREDIT},
    "Why": {"key": _NAME},
    "Finding": {"id": _COUNT, "sequence": _SEQUENCE, "inodes": _COUNT, "size": _COUNT},
    "AuditPage": {"findings": {"maxItems": protocol.PAGE_MAX}, "looked": _COUNT},
    "WhyAnswer": {"id": _COUNT, "fence": _SEQUENCE, "children_count": _COUNT, "oldest": _SEQUENCE},
    "Info": {"name": _NAME, "parent": _PARENT, "labels": _LABELS},
    "Usage": {"inodes": _COUNT, "size": _COUNT},
    "Event": {"sequence": {**_SEQUENCE, "minimum": 1}, "previous": _SEQUENCE},
    "Heartbeat": {"sequence": _SEQUENCE, "previous": _SEQUENCE},
    "WalkPage": {"infos": {"maxItems": protocol.PAGE_MAX}, "sequence": _SEQUENCE},
    "EventsPage": {"events": {"maxItems": protocol.PAGE_MAX}, "next": _SEQUENCE, "newest": _SEQUENCE},
    "Outcome": {"call": _COUNT},
    "Progress": {"entries": _COUNT, "bytes": _COUNT},
}  # fmt: skip
"""Type to field to what its schema says beyond the field's type."""


def file_name(title: str) -> str:
    """`WalkPage` lies in `walk-page.json`."""
    return "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in title)[1:] + ".json"


def messages() -> dict[str, type[msgspec.Struct]]:
    """The name and type of every message that stands by itself: bodies, and the answers in a reply."""
    every: list[type[msgspec.Struct]] = [protocol.Request, _reply(), contract.Event, protocol.Heartbeat]
    every += protocol.answer_types().values()
    return {message.__name__: message for message in every}


def _reply() -> type[msgspec.Struct]:
    """Reply, with any value for `ok`: the type holds an answer back encoded, which no schema can say."""
    outcome = _retyped(protocol.Outcome, "ok", Any, msgspec.UNSET)
    return _retyped(protocol.Reply, "outcomes", tuple[outcome, ...], ())  # type: ignore[valid-type]


def _retyped(message: type[msgspec.Struct], name: str, type_: object, default: object) -> type[msgspec.Struct]:
    """The same message with another type and default for the field `name`."""
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for field in msgspec.structs.fields(message):
        if field.name == name:
            fields.append((field.name, type_, default))
        elif field.required:
            fields.append((field.name, field.type))
        else:
            fields.append((field.name, field.type, field.default))
    return msgspec.defstruct(message.__name__, fields, namespace={"__doc__": message.__doc__})


def schemas() -> dict[str, dict[str, Any]]:
    """File name to schema."""
    types = messages()
    _, components = msgspec.json.schema_components(types.values(), ref_template="#/$defs/{name}")
    for name, schema in components.items():
        _refine(name, schema)
    result = {file_name(name): _standalone(name, components) for name in types}
    result["answers.json"] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "answers.json",
        "title": "Answers",
        "description": "The `ok` of an outcome, by the verb of its call.",
        "type": "object",
        "properties": {verb: {"$ref": file_name(answer.__name__)} for verb, answer in protocol.answer_types().items()},
    }
    return result


def _refine(name: str, schema: dict[str, Any]) -> None:
    """Add the limits, and take the indentation of the source out of the description."""
    if "description" in schema:
        schema["description"] = inspect.cleandoc(schema["description"])
    for field, limits in LIMITS.get(name, {}).items():
        schema["properties"][field].update(limits)
    if name == "Outcome":
        schema["oneOf"] = [{"required": ["ok"]}, {"required": ["error"]}, {"required": ["progress"]}]


def _standalone(name: str, components: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The schema of one message with all it refers to."""
    needed = set(_references(components[name]))
    while more := {other for known in needed for other in _references(components[known])} - needed:
        needed |= more
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": file_name(name),
        **components[name],
        "$defs": {other: components[other] for other in sorted(needed)},
    }


def _references(schema: object) -> Iterable[str]:
    """The names of the definitions that a schema refers to."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].removeprefix("#/$defs/")
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def files() -> dict[str, str]:
    """File name to content."""
    return {name: json.dumps(schema, indent=2, ensure_ascii=False) + "\n" for name, schema in schemas().items()}


if __name__ == "__main__":
    sys.exit(write_or_check(FOLDER, files(), __doc__))
