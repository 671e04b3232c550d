"""The NBD wire format without a socket: what it answers, how it cuts, and that nothing a client sends breaks it."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcbw.workers.nbd import wire
from shmcbw.workers.nbd.connection import merged
from shmcbw.workers.nbd.wire import ExportInfo, Handshake, ProtocolError, Requests

FLAGS = struct.pack(">I", 3)
DISK = ExportInfo("disk", 1 << 20, wire.HAS_FLAGS, "a disk", contexts=("base:allocation", "qemu:dirty-bitmap:b0"))
GREETING = b"NBDMAGICIHAVEOPT\0\3"


def handshake(*, tls: bool = False, tls_required: bool = False) -> Handshake:
    def find(name: str) -> ExportInfo | None:
        return DISK if name in ("disk", "") else None

    found = Handshake(find, lambda: ["disk"], tls, tls_required)
    assert bytes(found.outgoing) == GREETING
    found.outgoing.clear()
    return found


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def text(value: str) -> bytes:
    return struct.pack(">I", len(value.encode())) + value.encode()


def go(name: str = "disk", number: int = wire.OPTION_GO, *wanted: int) -> bytes:
    return option(number, text(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted))


def contexts(number: int, *queries: str, name: str = "disk") -> bytes:
    return option(number, text(name) + struct.pack(">I", len(queries)) + b"".join(map(text, queries)))


def replies(found: Handshake) -> list[tuple[int, int, bytes]]:
    """What was answered since the last look: (option, kind, data)."""
    data, answers = bytes(found.outgoing), []
    found.outgoing.clear()
    while data:
        magic, number, kind, length = struct.unpack_from(">QIII", data)
        assert magic == 0x3E889045565A9
        answers.append((number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return answers


def request(kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0, cookie: int = 7) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length) + data


def cut(stream: bytes, piece: int) -> list[tuple[int, int, int, bytes, int]]:
    """The requests of a stream that arrives in pieces."""
    found, requests, left = [], Requests(capacity_bytes=min(piece, 64 << 10)), memoryview(stream)
    while left:
        space = requests.space()
        taken = left[: min(piece, len(space))]
        space[: len(taken)] = taken
        left = left[len(taken) :]
        requests.received(len(taken))
        found += [(r.type, r.offset, r.length, bytes(r.data), r.refused) for r in requests]
    return found


def test_go_tells_size_flags_and_block_sizes_and_chooses() -> None:
    found = handshake()
    found.receive(FLAGS + go("disk", wire.OPTION_GO, wire.INFO_NAME, wire.INFO_DESCRIPTION) + b"rest")
    answers = replies(found)
    assert [kind for _, kind, _ in answers] == [wire.REPLY_INFO] * 4 + [wire.REPLY_ACK]
    assert answers[0][2] == struct.pack(">HQH", 0, 1 << 20, wire.HAS_FLAGS)
    assert [answer[2] for answer in answers[1:3]] == [b"\0\1disk", b"\0\2a disk"]
    assert answers[3][2] == struct.pack(">HIII", 3, 1, 4096, 32 << 20)
    assert found.chosen is DISK
    assert bytes(found.rest) == b"rest"


def test_info_tells_the_same_and_chooses_nothing() -> None:
    found = handshake()
    found.receive(FLAGS + go(number=wire.OPTION_INFO))
    assert [kind for _, kind, _ in replies(found)] == [wire.REPLY_INFO, wire.REPLY_INFO, wire.REPLY_ACK]
    assert found.chosen is None


@pytest.mark.parametrize(("client_flags", "zeroes"), [(1, 124), (3, 0)])
def test_export_name_is_answered_in_the_old_way(client_flags: int, zeroes: int) -> None:
    found = handshake()
    found.receive(struct.pack(">I", client_flags) + option(wire.OPTION_EXPORT_NAME, b"disk"))
    assert bytes(found.outgoing) == struct.pack(">QH", 1 << 20, wire.HAS_FLAGS) + bytes(zeroes)
    assert found.chosen is DISK


def test_an_unknown_export_is_refused_and_the_client_may_go_on() -> None:
    found = handshake()
    found.receive(FLAGS + go("nope") + go("disk"))
    assert replies(found)[0][1] == wire.REPLY_UNKNOWN
    assert found.chosen is DISK
    old = handshake()
    old.receive(FLAGS + option(wire.OPTION_EXPORT_NAME, b"nope"))
    assert old.ended, "the old way has no refusal"


def test_list_names_the_exports_and_abort_ends() -> None:
    found = handshake()
    found.receive(FLAGS + option(wire.OPTION_LIST) + option(wire.OPTION_ABORT) + option(wire.OPTION_LIST))
    assert [(kind, data) for _, kind, data in replies(found)] == [
        (wire.REPLY_SERVER, text("disk")),
        (wire.REPLY_ACK, b""),
        (wire.REPLY_ACK, b""),
    ]
    assert found.ended


@pytest.mark.parametrize(
    ("queries", "listed"),
    [
        ((), ["base:allocation", "qemu:dirty-bitmap:b0"]),
        (("base:",), ["base:allocation"]),
        (("qemu:",), ["qemu:dirty-bitmap:b0"]),
        (("qemu:dirty-bitmap:",), ["qemu:dirty-bitmap:b0"]),
        (("qemu:dirty-bitmap:b1", "x:y"), []),
    ],
)
def test_meta_contexts_are_listed_by_wildcards_but_set_by_whole_names(
    queries: tuple[str, ...], listed: list[str]
) -> None:
    found = handshake()
    found.receive(FLAGS + option(wire.OPTION_STRUCTURED_REPLY))
    found.receive(contexts(wire.OPTION_LIST_META_CONTEXT, *queries))
    answers = replies(found)[1:]
    assert [data[4:].decode() for _, kind, data in answers if kind == wire.REPLY_META_CONTEXT] == listed
    found.receive(contexts(wire.OPTION_SET_META_CONTEXT, *queries, "base:allocation") + go())
    assert found.contexts == {"base:allocation": 0}


def test_meta_contexts_need_structured_replies_and_are_of_one_export() -> None:
    found = handshake()
    found.receive(FLAGS + contexts(wire.OPTION_SET_META_CONTEXT, "base:allocation"))
    assert replies(found)[0][1] == wire.REPLY_INVALID
    found.receive(option(wire.OPTION_STRUCTURED_REPLY) + contexts(wire.OPTION_SET_META_CONTEXT, "base:allocation"))
    found.receive(go(""))
    assert found.contexts == {}, "set for another export than was chosen"


@pytest.mark.parametrize("data", [b"\0", text("disk"), text("disk") + b"\0\2\0\1", struct.pack(">I", 9999) + b"x"])
def test_options_that_make_no_sense_are_refused(data: bytes) -> None:
    found = handshake()
    for number in (wire.OPTION_GO, wire.OPTION_LIST_META_CONTEXT):
        found.receive((FLAGS if number == wire.OPTION_GO else b"") + option(number, data))
        assert replies(found)[0][1] == wire.REPLY_INVALID


def test_an_unknown_option_is_unsupported() -> None:
    found = handshake()
    found.receive(FLAGS + option(99, b"data") + go())
    assert replies(found)[0][1] == wire.REPLY_UNSUPPORTED
    assert found.chosen is DISK


def test_with_tls_required_nothing_is_told_before_it_and_all_is_void_after_it() -> None:
    found = handshake(tls=True, tls_required=True)
    found.receive(FLAGS + option(wire.OPTION_LIST) + go())
    assert [kind for _, kind, _ in replies(found)] == [wire.REPLY_TLS_REQUIRED] * 2
    found.receive(option(wire.OPTION_STARTTLS))
    assert replies(found)[0][1] == wire.REPLY_ACK
    assert found.starts_tls
    found.encrypted()
    found.receive(option(wire.OPTION_STARTTLS) + go())
    assert replies(found)[0][1] == wire.REPLY_INVALID
    assert found.chosen is DISK


def test_what_was_sent_in_the_clear_behind_starttls_is_not_taken_for_encrypted() -> None:
    found = handshake(tls=True)
    found.receive(FLAGS + option(wire.OPTION_STARTTLS) + go())
    with pytest.raises(ProtocolError, match="did not wait"):
        found.encrypted()


def test_without_a_certificate_tls_is_refused_and_the_client_may_go_on() -> None:
    found = handshake()
    found.receive(FLAGS + option(wire.OPTION_STARTTLS) + go())
    assert replies(found)[0][1] == wire.REPLY_POLICY
    assert found.chosen is DISK


@pytest.mark.parametrize("piece", [1, 7, 28, 1000])
def test_requests_are_the_same_however_they_arrive(piece: int) -> None:
    stream = (
        request(wire.WRITE, 5, 100, b"x" * 100)
        + request(wire.READ, 1, 2)
        + request(wire.WRITE, 0, 0)
        + request(wire.FLUSH)
        + request(wire.WRITE, 9, 300, b"y" * 300)
    )
    assert cut(stream, piece) == [
        (wire.WRITE, 5, 100, b"x" * 100, 0),
        (wire.READ, 1, 2, b"", 0),
        (wire.WRITE, 0, 0, b"", 0),
        (wire.FLUSH, 0, 0, b"", 0),
        (wire.WRITE, 9, 300, b"y" * 300, 0),
    ]


def test_a_write_that_is_too_long_is_refused_and_its_data_skipped() -> None:
    length = wire.MAXIMUM_BLOCK_BYTES + 1
    stream = request(wire.WRITE, 0, length) + bytes(length) + request(wire.READ, 3, 4)
    assert cut(stream, 1 << 20) == [(wire.WRITE, 0, length, b"", errno.EINVAL), (wire.READ, 3, 4, b"", 0)]


@pytest.mark.parametrize(("kind", "flags"), [(99, 0), (wire.READ, 128), (wire.WRITE, wire.FLAG_DF), (wire.FLUSH, 2)])
def test_unknown_commands_and_flags_are_the_clients_error(kind: int, flags: int) -> None:
    ((_, _, _, _, refused),) = cut(request(kind, flags=flags), 100)
    assert refused == errno.EINVAL


def test_a_stream_out_of_step_ends_the_connection() -> None:
    with pytest.raises(ProtocolError, match="begins with"):
        cut(b"x" * 28, 28)


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_no_bytes_break_the_handshake(pieces: list[bytes]) -> None:
    found = handshake(tls=True)
    try:
        for piece in (FLAGS, *pieces, *(option(number % 12, piece) for number, piece in enumerate(pieces))):
            found.receive(piece)
            if found.starts_tls or found.chosen or found.ended:
                return
    except ProtocolError:
        pass


@given(st.binary(max_size=2000), st.integers(1, 100))
def test_no_bytes_break_the_requests(stream: bytes, piece: int) -> None:
    try:
        cut(stream, piece)
    except ProtocolError:
        pass


def test_every_errno_has_a_number_that_the_protocol_knows() -> None:
    known = {1, 5, 12, 22, 28, 75, 95, 108}
    assert {wire.errno_on_wire(number) for number in range(1, 134)} == known
    assert wire.errno_on_wire(errno.ETIMEDOUT) == 5


def test_errors_carry_their_text_only_in_structured_replies() -> None:
    assert wire.error(False, 9, errno.ENOSPC, "full") == struct.pack(">IIQ", 0x67446698, 28, 9)
    structured = wire.error(True, 9, errno.EACCES, "gone", 4096)
    assert structured == struct.pack(">IHHQIIH", 0x668E33EF, 1, 0x8002, 9, 18, 1, 4) + b"gone" + struct.pack(">Q", 4096)


def test_neighbouring_extents_of_one_state_are_one() -> None:
    assert merged([(1, 0), (2, 0), (3, 3), (4, 3), (5, 0)]) == [(3, 0), (7, 3), (5, 0)]
