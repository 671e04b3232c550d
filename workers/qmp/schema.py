"""The kinds of values that QMP commands take and give: checked, described, and drawn from one declaration.

`vocabulary.py` declares every command and event with these kinds.  From that come the check of arguments with QEMU's
texts (`Command.check`), the answers of query-commands and query-qmp-schema (`introspect`) and the reference page
(`reference`).  Pure.

Order and texts of the checks are QEMU's: members in the order of their declaration, each missing, of a wrong type or
out of range; after the last one, what is left over is unexpected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shmcbw.errors import ShmcbwError


class QMPError(ShmcbwError):
    """A command is refused: error class and text of the reply."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class


def message_of(error: BaseException) -> str:
    """What an error of ours or of the operating system says, without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _last(path: str) -> str:
    """What QEMU calls a value in errors about its content: the member's own name, and ``null`` in a list."""
    name = path.rpartition(".")[2]
    return "null" if name.endswith("]") else name


def _wrong_type(path: str, expected: str) -> QMPError:
    return QMPError(f"Invalid parameter type for '{path}', expected: {expected}")


class Kind:
    """Base: a name for schema and reference, and a check."""

    name = "any"
    json_type = "value"

    def check(self, value: Any, path: str) -> Any:
        """The value, as a handler wants it; QMPError if it is none of this kind.  ``path`` names it in errors."""
        return value

    def parts(self) -> Iterable[Kind]:
        """The kinds that this one is made of."""
        return ()

    def entry(self) -> dict[str, Any]:
        """Its entry in the answer of query-qmp-schema."""
        return {"meta-type": "builtin", "json-type": self.json_type}


class _Scalar(Kind):
    def __init__(self, name: str, json_type: str, python_type: type) -> None:
        self.name = name
        self.json_type = json_type
        self._python_type = python_type

    def check(self, value: Any, path: str) -> Any:
        if type(value) is not self._python_type:
            raise _wrong_type(path, self.json_type)
        return value


class _Integer(Kind):
    """An integer in a range; over 64 bits QEMU says what it says of a fraction."""

    json_type = "integer"

    def __init__(self, name: str, low: int, high: int, c_name: str = "") -> None:
        self.name = name
        self._low = low
        self._high = high
        self._c_name = c_name

    def check(self, value: Any, path: str) -> Any:
        if type(value) is not int or not -(1 << 63) <= value < (1 << 64 if self._high >= 1 << 63 else 1 << 63):
            raise _wrong_type(path, "integer")
        if not self._low <= value <= self._high:
            raise QMPError(f"Parameter '{_last(path)}' expects {self._c_name}")
        return value


class _Number(Kind):
    name = "number"
    json_type = "number"

    def check(self, value: Any, path: str) -> Any:
        if type(value) not in (int, float):
            raise _wrong_type(path, "number")
        return value


ANY = Kind()
STRING = _Scalar("str", "string", str)
BOOLEAN = _Scalar("bool", "boolean", bool)
INTEGER = _Integer("int", -(1 << 63), (1 << 63) - 1)
UINT32 = _Integer("uint32", 0, (1 << 32) - 1, "uint32_t")
UINT64 = _Integer("size", 0, (1 << 64) - 1, "uint64_t")
NUMBER = _Number()


class Enum(Kind):
    """One of a few words."""

    json_type = "string"

    def __init__(self, name: str, *values: str) -> None:
        self.name = name
        self.values = values

    def check(self, value: Any, path: str) -> Any:
        STRING.check(value, path)
        if value not in self.values:
            raise QMPError(f"Parameter '{_last(path)}' does not accept value '{value}'")
        return value

    def entry(self) -> dict[str, Any]:
        return {
            "meta-type": "enum",
            "values": list(self.values),
            "members": [{"name": value} for value in self.values],
        }


class List(Kind):
    json_type = "array"

    def __init__(self, element: Kind) -> None:
        self.name = f"[{element.name}]"
        self.element = element

    def check(self, value: Any, path: str) -> Any:
        if not isinstance(value, list):
            raise _wrong_type(path, "array")
        return [self.element.check(each, f"{path}[{index}]") for index, each in enumerate(value)]

    def parts(self) -> Iterable[Kind]:
        return (self.element,)

    def entry(self) -> dict[str, Any]:
        return {"meta-type": "array", "element-type": self.element.name}


class Member:
    """A member of an object: optional if it says so; ``meaning`` is for the reference."""

    def __init__(self, name: str, kind: Kind, meaning: str = "", *, optional: bool = False) -> None:
        self.name = name
        self.kind = kind
        self.meaning = meaning
        self.optional = optional

    def entry(self) -> dict[str, Any]:
        found: dict[str, Any] = {"name": self.name, "type": self.kind.name}
        if self.optional:
            found["default"] = None
        return found


def optional(name: str, kind: Kind, meaning: str = "") -> Member:
    """A member that may be left out."""
    return Member(name, kind, meaning, optional=True)


class Object(Kind):
    """Named members; with a ``tag``, also the members of the object that the tag's value names in ``variants``."""

    json_type = "object"

    def __init__(
        self,
        name: str,
        *members: Member,
        tag: str = "",
        variants: Mapping[str, Object] | None = None,
    ) -> None:
        self.name = name
        self.members = members
        self.tag = tag
        self.variants = dict(variants or {})

    def check(self, value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            raise _wrong_type(path, "object")
        prefix = f"{path}." if path else ""
        left = dict(value)
        checked: dict[str, Any] = {}
        self._check_members(self.members, left, checked, prefix)
        if self.tag:
            self._check_members(self.variants[checked[self.tag]].members, left, checked, prefix)
        if left:
            raise QMPError(f"Parameter '{prefix}{next(iter(left))}' is unexpected")
        return checked

    @staticmethod
    def _check_members(members: Iterable[Member], left: dict[str, Any], checked: dict[str, Any], prefix: str) -> None:
        for member in members:
            if member.name in left:
                checked[member.name] = member.kind.check(left.pop(member.name), prefix + member.name)
            elif not member.optional:
                raise QMPError(f"Parameter '{prefix}{member.name}' is missing")

    def parts(self) -> Iterable[Kind]:
        yield from (member.kind for member in self.members)
        yield from self.variants.values()

    def entry(self) -> dict[str, Any]:
        found: dict[str, Any] = {"meta-type": "object", "members": [member.entry() for member in self.members]}
        if self.tag:
            found["tag"] = self.tag
            found["variants"] = [{"case": case, "type": kind.name} for case, kind in self.variants.items()]
        return found


class Alternate(Kind):
    """A name or an object: which of them, the JSON type tells."""

    def __init__(self, name: str, text: Kind, structure: Kind) -> None:
        self.name = name
        self._text = text
        self._structure = structure

    def define(self, structure: Kind) -> None:
        """Give the object that could not be named before, since it contains this."""
        self._structure = structure

    def check(self, value: Any, path: str) -> Any:
        if isinstance(value, str):
            return self._text.check(value, path)
        if isinstance(value, dict):
            return self._structure.check(value, path)
        raise _wrong_type(_last(path), self.name)

    def parts(self) -> Iterable[Kind]:
        return self._text, self._structure

    def entry(self) -> dict[str, Any]:
        return {"meta-type": "alternate", "members": [{"type": kind.name} for kind in self.parts()]}


EMPTY = Object("q_empty")


class Command:
    """A command: what it takes and what it gives.

    ``alters``: it may change something or wait for something, so it runs after the others that do (of all clients, one
    at a time); the rest may run beside them.
    """

    def __init__(
        self,
        name: str,
        meaning: str,
        *members: Member,
        takes: Object | None = None,
        gives: Kind = EMPTY,
        alters: bool = True,
    ) -> None:
        self.name = name
        self.meaning = meaning
        self.takes = takes or Object(f"q_obj_{name}-arg", *members)
        self.gives = gives
        self.alters = alters

    def check(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments, checked; QMPError."""
        checked: dict[str, Any] = self.takes.check(arguments, "")
        return checked


class Event:
    def __init__(self, name: str, meaning: str, *members: Member) -> None:
        self.name = name
        self.meaning = meaning
        self.data = Object(f"q_obj_{name}-arg", *members)


def introspect(commands: Iterable[Command], events: Iterable[Event]) -> list[dict[str, Any]]:
    """The answer of query-qmp-schema.  Types keep their names (QEMU hides them behind numbers)."""
    kinds: dict[str, Kind] = {}
    found: list[dict[str, Any]] = []
    for command in commands:
        found.append(
            {
                "name": command.name,
                "meta-type": "command",
                "arg-type": command.takes.name,
                "ret-type": command.gives.name,
            }
        )
        _collect((command.takes, command.gives), kinds)
    for event in events:
        found.append({"name": event.name, "meta-type": "event", "arg-type": event.data.name})
        _collect((event.data,), kinds)
    return found + [{"name": name, **kind.entry()} for name, kind in kinds.items()]


def _collect(kinds: Iterable[Kind], found: dict[str, Kind]) -> None:
    for kind in kinds:
        if kind.name not in found:
            found[kind.name] = kind
            _collect(kind.parts(), found)
        assert found[kind.name] is kind or not isinstance(kind, (Object, Enum, Alternate)), kind.name


def reference(commands: Iterable[Command], events: Iterable[Event]) -> str:
    """The reference page, in Markdown."""
    lines = ["# QMP reference of shmcbw", ""]
    kinds: dict[str, Kind] = {}
    for command in commands:
        lines += [f"## {command.name}", "", command.meaning, ""]
        lines += _members(command.takes)
        if command.gives is not EMPTY:
            lines += [f"Gives {_linked(command.gives)}.", ""]
        _collect((*command.takes.parts(), command.gives), kinds)
    lines += ["# Events", ""]
    for event in events:
        lines += [f"## {event.name}", "", event.meaning, "", *_members(event.data)]
        _collect(event.data.parts(), kinds)
    lines += ["# Types", ""]
    for name, kind in sorted(kinds.items()):
        if isinstance(kind, Enum):
            lines += [f"## {name}", "", "One of " + ", ".join(f"`{value}`" for value in kind.values) + ".", ""]
        elif isinstance(kind, Alternate):
            lines += [f"## {name}", "", " or ".join(map(_linked, kind.parts())) + ".", ""]
        elif isinstance(kind, Object) and kind is not EMPTY:
            lines += [f"## {name}", "", *_members(kind)]
            if kind.tag:
                lines += [
                    f"By `{kind.tag}`: "
                    + ", ".join(f"`{case}`: {_linked(each)}" for case, each in kind.variants.items())
                    + ".",
                    "",
                ]
    return "\n".join(lines)


def _linked(kind: Kind) -> str:
    return f"a list of {_linked(kind.element)}" if isinstance(kind, List) else f"`{kind.name}`"


def _members(kind: Object) -> list[str]:
    lines = list(_rows(kind))
    return ["| member | type | meaning |", "| --- | --- | --- |", *lines, ""] if lines else []


def _rows(kind: Object) -> Iterator[str]:
    for member in kind.members:
        meaning = member.meaning if not member.optional else f"{member.meaning} (optional)".strip()
        yield f"| `{member.name}` | {_linked(member.kind)} | {meaning} |"
