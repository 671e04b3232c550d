"""QMP's wire format: bytes in, JSON values out; values in, lines out.  Pure: no input or output, no waiting.

What QEMU takes is a little more than JSON: messages need nothing between them, strings may stand in single quotes,
and after an error the reader goes on at the next character that can begin or end something.  So this is a lexer, a
counter of braces and a parser as QEMU has them (texts and places of errors are equal, a test holds that), and not
``json.JSONDecoder``: on a buffer that is not complete it says the same as on one that is wrong.

Every byte is looked at once however the input is cut.  Limits bound what one message can cost; a message over one of
them is an error and the reader starts anew.  QEMU's are 64 MiB and 2 Mi tokens: here a message of the longest kind
that anybody sends (a transaction over many images) is a few KiB, and its parsing must not hold up other clients.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MESSAGE_BYTES_MAX = 1 << 20
TOKENS_MAX = 1 << 15
NESTING_MAX = 1024
_ECHO_CHARACTERS = 80

Token = tuple[str, bytes]

_SPACE = re.compile(rb"[ \t\r\n]*")
_KEYWORD = re.compile(rb"[a-z]*")
_DIGITS = re.compile(rb"[0-9]*")
_STRING = {quote: re.compile(rb"[^\\\x00-\x1f\xfe\xff" + quote + rb"]*") for quote in (b'"', b"'")}
# After an error nothing counts until something that can stand between tokens.
_LOST = re.compile(rb"[^\x00-\x20{}\[\]:,\xfe\xff]*")
_ESCAPE = re.compile(r"\\(?:u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|u(.{0,4})|(.))", re.DOTALL)
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", '"': '"', "'": "'", "\\": "\\", "/": "/"}
_KEYWORDS = {b"true": True, b"false": False, b"null": None}

# A number by its state: which bytes lead where; digits that stay where they are are read as a run.
_DIGIT = b"0123456789"
_NUMBER: dict[str, dict[bytes, str]] = {
    "sign": {b"0": "zero", _DIGIT[1:]: "digits"},
    "zero": {b".": "point", b"eE": "exponent", _DIGIT: "wrong"},
    "digits": {_DIGIT: "digits", b".": "point", b"eE": "exponent"},
    "point": {_DIGIT: "fraction"},
    "fraction": {_DIGIT: "fraction", b"eE": "exponent"},
    "exponent": {b"+-": "exponent sign", _DIGIT: "power"},
    "exponent sign": {_DIGIT: "power"},
    "power": {_DIGIT: "power"},
}
_NUMBER_MAY_END = {"zero", "digits", "fraction", "power"}
_RUNS = {"digits", "fraction", "power"}


class Malformed:
    """In the place of a message that is none: ``desc`` is QEMU's text."""

    __slots__ = ("desc",)

    def __init__(self, desc: str) -> None:
        self.desc = desc

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Malformed) and other.desc == self.desc

    def __hash__(self) -> int:
        return hash(self.desc)

    def __repr__(self) -> str:
        return f"Malformed({self.desc!r})"


class ParseError(Exception):
    """The tokens of a message are no JSON value."""


def encode(message: Any) -> bytes:
    """One line: ASCII, ended by CRLF.  ValueError for what JSON has no number for."""
    return json.dumps(message, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\r\n"


class Decoder:
    """Incremental: `feed` takes whatever has come and gives what is complete."""

    def __init__(self) -> None:
        self._state = "start"
        self._token = bytearray()
        self._quote = b'"'
        self._tokens: list[Token] = []
        self._bytes = 0
        self._braces = 0
        self._brackets = 0

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that end in ``data``, in order: JSON values, and `Malformed` for what is none."""
        for token in self._lex(data):
            if isinstance(token, Malformed):
                self._start_anew()
                yield token
                continue
            yield from self._collect(token)

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _lex(self, data: bytes) -> Iterator[Token | Malformed]:
        position = 0
        while position < len(data):
            if self._bytes + len(self._token) > MESSAGE_BYTES_MAX:
                self._forget()
                yield Malformed("JSON token size limit exceeded")
            if self._state == "start":
                position = _end(_SPACE, data, position)
                if position < len(data):
                    byte = data[position : position + 1]
                    position += 1
                    if byte in b"{}[]:,":
                        yield byte.decode(), byte
                    else:
                        yield from self._begin(byte)
            elif self._state == "lost":
                position = _end(_LOST, data, position)
                if position < len(data):
                    self._state = "start"
            elif self._state == "keyword":
                position = self._run(_KEYWORD, data, position)
                if position < len(data):
                    yield self._take("keyword")
            elif self._state in ("string", "escape"):
                position, token = self._string(data, position)
                if token is not None:
                    yield token
            else:
                position, token = self._number(data, position)
                if token is not None:
                    yield token

    def _begin(self, byte: bytes) -> Iterator[Malformed]:
        self._token += byte
        if byte in b"\"'":
            self._state, self._quote = "string", byte
        elif byte.isalpha() and byte.islower():
            self._state = "keyword"
        elif byte == b"-":
            self._state = "sign"
        elif byte == b"0":
            self._state = "zero"
        elif byte.isdigit():
            self._state = "digits"
        else:
            yield self._stray()

    def _run(self, pattern: re.Pattern[bytes], data: bytes, position: int) -> int:
        end = _end(pattern, data, position)
        self._token += data[position:end]
        return end

    def _string(self, data: bytes, position: int) -> tuple[int, Token | Malformed | None]:
        if self._state == "string":
            position = self._run(_STRING[self._quote], data, position)
            if position == len(data):
                return position, None
        byte = data[position : position + 1]
        self._token += byte
        position += 1
        if byte[0] < 0x20 or byte[0] >= 0xFE:
            return position, self._stray()
        if self._state == "escape":
            self._state = "string"
        elif byte == b"\\":
            self._state = "escape"
        else:
            return position, self._take("string")
        return position, None

    def _number(self, data: bytes, position: int) -> tuple[int, Token | Malformed | None]:
        if self._state in _RUNS:
            position = self._run(_DIGITS, data, position)
            if position == len(data):
                return position, None
        byte = data[position : position + 1]
        following = next((state for bytes_, state in _NUMBER[self._state].items() if byte in bytes_), "")
        if not following and self._state in _NUMBER_MAY_END:
            return position, self._take("number")
        self._token += byte
        position += 1
        if following in ("", "wrong"):
            return position, self._stray()
        self._state = following
        return position, None

    def _take(self, kind: str) -> Token:
        token = kind, bytes(self._token)
        self._token.clear()
        self._state = "start"
        return token

    def _stray(self) -> Malformed:
        text = bytes(self._token).partition(b"\0")[0].decode(errors="replace")[:_ECHO_CHARACTERS]
        self._forget()
        return Malformed(f"JSON parse error, stray '{text}'")

    def _forget(self) -> None:
        self._token.clear()
        self._bytes = 0
        self._state = "lost"

    # -- messages --------------------------------------------------------------------------------------------------

    def _start_anew(self) -> None:
        self._tokens.clear()
        self._bytes = self._braces = self._brackets = 0

    def _collect(self, token: Token) -> Iterator[Any]:
        """A message is complete when its braces and brackets are, each for itself; so ``[}`` is a (wrong) one."""
        kind, text = token
        self._braces += (kind == "{") - (kind == "}")
        self._brackets += (kind == "[") - (kind == "]")
        self._tokens.append(token)
        self._bytes += len(text)
        open_ones = self._braces + self._brackets
        if self._braces < 0 or self._brackets < 0 or open_ones == 0:
            tokens, self._tokens = self._tokens, []
            self._start_anew()
            try:
                yield parse(tokens)
            except ParseError as error:
                yield Malformed(str(error))
        elif open_ones > NESTING_MAX:
            self._start_anew()
            yield Malformed("JSON nesting depth limit exceeded")
        elif len(self._tokens) > TOKENS_MAX:
            self._start_anew()
            yield Malformed("JSON token count limit exceeded")
        elif self._bytes > MESSAGE_BYTES_MAX:
            self._start_anew()
            yield Malformed("JSON token size limit exceeded")


def _end(pattern: re.Pattern[bytes], data: bytes, position: int) -> int:
    found = pattern.match(data, position)
    assert found is not None
    return found.end()


def parse(tokens: list[Token]) -> Any:
    """The value of a message's tokens; ParseError with QEMU's text.  Without recursion: the input chooses the depth."""
    stack: list[tuple[dict[str, Any] | list[Any], str]] = []
    position = 0

    def take(wanted: str = "") -> Token:
        nonlocal position
        if position == len(tokens):
            raise ParseError("JSON parse error, premature EOI")
        token = tokens[position]
        if wanted and token[0] != wanted:
            return "", b""
        position += 1
        return token

    while True:
        kind, text = take()
        value: Any
        if kind in "{[":
            value = {} if kind == "{" else []
            if not take("}" if kind == "{" else "]")[0]:
                stack.append((value, _key(take) if kind == "{" else ""))
                continue
        else:
            value = _scalar(kind, text)
        # A value is complete: put it where it belongs, and close what it completes.
        while stack:
            container, key = stack.pop()
            if isinstance(container, dict):
                if key in container:
                    raise ParseError("JSON parse error, duplicate key")
                container[key] = value
            else:
                container.append(value)
            kind, _ = take()
            if kind == ",":
                stack.append((container, _key(take) if isinstance(container, dict) else ""))
                break
            if kind != ("}" if isinstance(container, dict) else "]"):
                where = "dict" if isinstance(container, dict) else "list"
                raise ParseError(f"JSON parse error, expected separator in {where}")
            value = container
        else:
            return value


def _key(take: Any) -> str:
    """A member's name and the colon behind it."""
    kind, text = take()
    key = None if kind in "{[" else _scalar(kind, text)
    if kind != "string" or not isinstance(key, str):
        raise ParseError("JSON parse error, key is not a string in object")
    if take()[0] != ":":
        raise ParseError("JSON parse error, missing : in object pair")
    return key


def _scalar(kind: str, text: bytes) -> Any:
    if kind == "string":
        return _unescape(text[1:-1])
    if kind == "number":
        return _number(text)
    if kind == "keyword":
        if text not in _KEYWORDS:
            raise ParseError(f"JSON parse error, invalid keyword '{text[:_ECHO_CHARACTERS].decode()}'")
        return _KEYWORDS[text]
    raise ParseError("JSON parse error, expecting value")


def _number(text: bytes) -> int | float:
    """An integer of 64 bits as it is, signed or not; any other number as a double.

    QEMU answers an ``id`` of 1e400 by ``inf``, which is no JSON; here it is an error.
    """
    if text.lstrip(b"-").isdigit() and len(text) <= 20:
        value = int(text)
        if -(1 << 63) <= value < 1 << 64:
            return value
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ParseError(f"JSON parse error, number '{text[:_ECHO_CHARACTERS].decode()}' is out of range")
    return number


def _unescape(raw: bytes) -> str:
    try:
        # A NUL may be written in two bytes, as Java does.
        text = raw.replace(b"\xc0\x80", b"\0").decode()
    except UnicodeDecodeError:
        raise ParseError("JSON parse error, invalid UTF-8 sequence in string") from None
    return _ESCAPE.sub(_character, text) if "\\" in text else text


def _character(found: re.Match[str]) -> str:
    high, low, code, letter = found.groups()
    if high:
        return chr(0x10000 + ((int(high, 16) & 0x3FF) << 10 | int(low, 16) & 0x3FF))
    if letter is not None:
        if letter not in _ESCAPES:
            raise ParseError("JSON parse error, invalid escape sequence in string")
        return _ESCAPES[letter]
    whole = len(code) == 4 and all(digit in "0123456789abcdefABCDEF" for digit in code)
    if not whole or 0xD800 <= int(code, 16) < 0xE000:
        raise ParseError(f"JSON parse error, \\u{code} is not a valid Unicode character")
    return chr(int(code, 16))
