"""The wire format: what QEMU takes, with its texts, however the bytes are cut; and nothing that stops the reader."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcbw.workers.qmp.wire import MESSAGE_BYTES_MAX, NESTING_MAX, TOKENS_MAX, Decoder, Malformed, encode


def decode(data: bytes) -> list[Any]:
    return list(Decoder().feed(data))


def bad(text: str) -> Malformed:
    return Malformed(f"JSON parse error, {text}")


VALUE = bad("expecting value")

# What qemu-storage-daemon 7.2.22 made of the same bytes.
LIVE = [
    (b"{]", [VALUE]),
    (
        b'{"execute": "a"} garbage {"execute":"b"}',
        [{"execute": "a"}, bad("invalid keyword 'garbage'"), {"execute": "b"}],
    ),
    (b"[1]", [[1]]),
    (b"1 ", [1]),
    (b"12", []),
    (b"true\n", [True]),
    (b"{'a':'it''s'}", [bad("expected separator in dict")]),
    (b"{'qu\\u0065ry':'\\'x\\\"'}", [{"query": "'x\""}]),
    (b'{"id":1.50e3}', [{"id": 1500}]),
    (b'{"id":18446744073709551615}', [{"id": 18446744073709551615}]),
    (b'{"id":99999999999999999999999}', [{"id": 99999999999999999999999.0}]),
    (b'{"id":-9223372036854775808}', [{"id": -9223372036854775808}]),
    (b'{"id":01}', [bad("stray '01'"), VALUE]),
    (b'{"id":"\xc3\xa9\xf0\x9f\x98\x80\x01"}', [bad("stray '\"é😀\x01'"), VALUE]),
    (b'{"id":"\\ud83d\\ude00"}', [{"id": "😀"}]),
    (b'{"id":"\\ud83d"}', [bad("\\ud83d is not a valid Unicode character")]),
    (b'["\\ud83d\\u0041"]', [bad("\\ud83d is not a valid Unicode character")]),
    (b'"\\uZZZZ"', [bad("\\uZZZZ is not a valid Unicode character")]),
    (b'{"id":"\xff"}', [bad("stray '\"\ufffd'"), VALUE]),
    (b'"\x80"', [bad("invalid UTF-8 sequence in string")]),
    (b'"\xed\xa0\x80"', [bad("invalid UTF-8 sequence in string")]),
    (b'"\xf4\x90\x80\x80"', [bad("invalid UTF-8 sequence in string")]),
    (b'"\xc0\x80"', ["\0"]),
    (b'{"id":"\\u0000"}', [{"id": "\0"}]),
    (b'{"id":"\\q"}', [bad("invalid escape sequence in string")]),
    (b'{"id":"a\nb"}', [bad("stray '\"a\n'"), VALUE]),
    (b'{"id":1,"id":2}', [bad("duplicate key")]),
    (b'{"a":1,}', [VALUE]),
    (b'{"a" "b"}', [bad("missing : in object pair")]),
    (b'{"a"}', [bad("missing : in object pair")]),
    (b'{execute:"a"}', [bad("invalid keyword 'execute'")]),
    (b'{"a":tru}', [bad("invalid keyword 'tru'")]),
    (b'{"id":tRUE}', [bad("stray 'R'"), VALUE]),
    (b'@ {"a":1}', [bad("stray '@'"), {"a": 1}]),
    (b"}", [VALUE]),
    (b"]", [VALUE]),
    (b"[[[}", [VALUE]),
    (b'{"a":1}{"b":2}', [{"a": 1}, {"b": 2}]),
    (b'{"a":%d}', [bad("stray '%'"), VALUE]),
    (b'["a",]', [VALUE]),
    (b'{"a":1 "b":2}', [bad("expected separator in dict")]),
    (b"[1 2]", [bad("expected separator in list")]),
    (b'["a":1]', [bad("expected separator in list")]),
    (b'{"a":[1}]', [bad("expected separator in list")]),
    (b'{"a":1]', [bad("expected separator in dict")]),
    (b"{1:2}", [bad("key is not a string in object")]),
    (b"{[1]:2}", [bad("key is not a string in object")]),
    (b"/*c*/ {}", [bad("stray '/'"), {}]),
    (b"\x00{}", [bad("stray ''"), {}]),
    (b"\x0c{}", [bad("stray '\x0c'"), {}]),
    (b'#a"b{}', [bad("stray '#'"), {}]),
    (b"#abc:1 ", [bad("stray '#'"), VALUE, 1]),
    (b"#ab\x01", [bad("stray '#'"), bad("stray '\x01'")]),
    (b'{"id":-}', [bad("stray '-}'")]),
    (b'{"id":1.}', [bad("stray '1.}'")]),
    (b'{"id":.5}', [bad("stray '.'"), VALUE]),
    (b'{"id":1e}', [bad("stray '1e}'")]),
    (b"--1 ", [bad("stray '--'")]),
    (b"12a ", [12, bad("invalid keyword 'a'")]),
    (b"1.5.6 ", [1.5, bad("stray '.'")]),
    (b"1E+a", [bad("stray '1E+a'")]),
    (b'{"id":-0}', [{"id": 0}]),
    (b'"abc\n{}', [bad("stray '\"abc\n'"), {}]),
    (b'"a""b"', ["a", "b"]),
    (b'"\x7f"', ["\x7f"]),
    (b'"\\\xff"', [bad("stray '\"\\\ufffd'")]),
    (b":", [VALUE]),
]


@pytest.mark.parametrize(("data", "expected"), LIVE, ids=[repr(data) for data, _ in LIVE])
def test_every_oddity_reads_as_it_does_in_qemu(data: bytes, expected: list[Any]) -> None:
    assert decode(data) == expected


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=30,
)


@given(st.lists(JSON, max_size=4), st.lists(st.integers(0, 500)))
def test_any_messages_come_out_as_they_went_in_however_they_are_cut(messages: list[Any], cuts: list[int]) -> None:
    # What follows a number or a keyword tells that it has ended.
    data = b" ".join(
        json.dumps(message, ensure_ascii=index % 2 == 0).encode() for index, message in enumerate(messages)
    )
    assert fed(data + b"\n", cuts) == messages


@given(
    st.binary(max_size=200) | st.text("{}[]:,\"'\\u0019eE+-.true nul", max_size=200).map(str.encode),
    st.lists(st.integers(0, 200)),
)
def test_any_bytes_read_the_same_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    assert fed(data, cuts) == decode(data)


def fed(data: bytes, cuts: list[int]) -> list[Any]:
    decoder = Decoder()
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [message for start, end in itertools.pairwise(places) for message in decoder.feed(data[start:end])]


@given(JSON)
def test_an_encoded_message_is_one_ascii_line(message: Any) -> None:
    line = encode(message)
    assert line.endswith(b"\r\n") and line.isascii() and b"\n" not in line[:-2] and decode(line) == [message]


def test_nesting_has_qemus_limit() -> None:
    assert decode(b"[" * NESTING_MAX + b"]" * NESTING_MAX) != []
    assert not isinstance(decode(b"[" * NESTING_MAX + b"]" * NESTING_MAX)[0], Malformed)
    assert decode(b"[" * (NESTING_MAX + 1))[0] == Malformed("JSON nesting depth limit exceeded")


def test_a_message_that_never_ends_is_an_error_and_not_kept() -> None:
    """D16."""
    for piece in (b"[0," + b"0," * 1000, b'["' + b"x" * 4096, b"9" * 4096, b"a" * 4096):
        decoder = Decoder()
        found: list[Any] = []
        fed_bytes = 0
        while not found:
            found += decoder.feed(piece if not fed_bytes else piece.lstrip(b'["') or piece)
            fed_bytes += len(piece)
            assert fed_bytes < 2 * MESSAGE_BYTES_MAX
        assert found[0].desc in ("JSON token count limit exceeded", "JSON token size limit exceeded")
        assert {"a": 1} in list(decoder.feed(b' ] {"a":1}')), "it goes on at the next message"


def test_the_dearest_message_is_parsed_in_a_moment() -> None:
    # What one client may cost the others: generous, for busy machines.
    data = b"[" + b"0," * (TOKENS_MAX // 2 - 2) + b"0]"
    started = time.process_time()
    assert not isinstance(decode(data)[0], Malformed)
    assert time.process_time() - started < 1.0


def test_an_infinite_number_is_refused_since_no_reply_could_carry_it() -> None:
    """D17."""
    assert decode(b"[1e400]") == [bad("number '1e400' is out of range")]
