"""The NBD wire format, server's side: bytes in, bytes and requests out.  No socket, no thread, no clock.

`Handshake` takes what the client sends until an export is chosen; its answers collect in ``outgoing``.  Then `Requests`
cuts the stream into requests, and the functions at the end make replies.  Fixed newstyle only, the sole variant that
the protocol still recommends.

    handshake   client flags -> options -> chosen | ended (a STARTTLS starts it over, on the encrypted stream)
    requests    header 28 bytes, then the data of a write

A request that makes no sense is the client's error and gets an errno; only a stream that can't be cut into requests
any more (`ProtocolError`) ends the connection.

Source of all numbers: doc/proto.md of github.com/NetworkBlockDevice/nbd.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shmcbw.errors import ShmcbwError

_NBD_MAGIC = b"NBDMAGIC"
_OPTION_MAGIC = b"IHAVEOPT"
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2

OPTION_EXPORT_NAME, OPTION_ABORT, OPTION_LIST, OPTION_STARTTLS = 1, 2, 3, 5
OPTION_INFO, OPTION_GO, OPTION_STRUCTURED_REPLY = 6, 7, 8
OPTION_LIST_META_CONTEXT, OPTION_SET_META_CONTEXT = 9, 10

REPLY_ACK, REPLY_SERVER, REPLY_INFO, REPLY_META_CONTEXT = 1, 2, 3, 4
_ERROR = 1 << 31
REPLY_UNSUPPORTED, REPLY_POLICY, REPLY_INVALID = _ERROR + 1, _ERROR + 2, _ERROR + 3
REPLY_TLS_REQUIRED, REPLY_UNKNOWN, REPLY_TOO_BIG = _ERROR + 5, _ERROR + 6, _ERROR + 9

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM = 1, 2, 4, 8, 32
SEND_WRITE_ZEROES, SEND_DF, CAN_MULTI_CONN, SEND_CACHE, SEND_FAST_ZERO = 64, 128, 256, 1024, 2048

READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FLAG_FUA, FLAG_NO_HOLE, FLAG_DF, FLAG_REQ_ONE, FLAG_FAST_ZERO = 1, 2, 4, 8, 16
_ALLOWED_FLAGS = {
    READ: FLAG_FUA | FLAG_DF,
    WRITE: FLAG_FUA,
    DISCONNECT: 0,
    FLUSH: FLAG_FUA,
    TRIM: FLAG_FUA,
    CACHE: 0,
    WRITE_ZEROES: FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO,
    BLOCK_STATUS: FLAG_REQ_ONE,
}

_REQUEST_MAGIC, _SIMPLE_REPLY_MAGIC, _CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
_CHUNK_DONE = 1
_CHUNK_NONE, _CHUNK_DATA, _CHUNK_STATUS, _CHUNK_ERROR, _CHUNK_ERROR_OFFSET = 0, 1, 5, 0x8001, 0x8002

STATE_HOLE, STATE_ZERO = 1, 2
STATE_DIRTY = 1

_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE_REPLY = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_CHUNK_OF_DATA = struct.Struct(">IHHQIQ")
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")

#: Of one request's data; larger ones are refused with EINVAL and skipped.  What QEMU and nbdkit allow too.
MAXIMUM_BLOCK_BYTES = 32 << 20
_OPTION_LIMIT_BYTES = 64 << 10
_NAME_LIMIT_BYTES = 4096
_OPTIONS_LIMIT = 1000

#: What the protocol has a number for; everything else is EIO.  ESHUTDOWN: the snapshot or the server is gone.
_ERRNOS = {
    errno.EPERM: 1,
    errno.EACCES: 1,
    errno.EROFS: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EDQUOT: 28,
    errno.EFBIG: 28,
    errno.EOVERFLOW: 75,
    errno.ENOTSUP: 95,
    errno.ESHUTDOWN: 108,
}


class ProtocolError(ShmcbwError):
    """The peer's bytes are no NBD any more: the connection can only be closed."""


#: Queries of LIST that mean all that begin so.  No others: the name of a bitmap may end with a colon.
_WILDCARDS = ("base:", "qemu:", "qemu:dirty-bitmap:")


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client is told of an export.  ``flags``: transmission flags; block sizes in bytes."""

    name: str
    size_bytes: int
    flags: int
    description: str = ""
    minimum_block_bytes: int = 1
    preferred_block_bytes: int = 4096
    contexts: tuple[str, ...] = ()


Find = Callable[[str], ExportInfo | None]


@dataclass(slots=True)
class Handshake:
    """From the first byte to the choice of an export.

    find: the export of a name, or None; it decides alone what "" means.  names: what LIST tells, None to refuse it.
    tls: whether STARTTLS is offered; required: whether nothing else is served before it.
    """

    find: Find
    names: Callable[[], Iterable[str]] | None
    tls: bool = False
    tls_required: bool = False
    outgoing: bytearray = field(default_factory=lambda: bytearray(_NBD_MAGIC + _OPTION_MAGIC + b"\0\3"))
    #: Chosen by EXPORT_NAME or GO: transmission begins, ``rest`` is its first bytes.
    chosen: ExportInfo | None = None
    #: The client has ended, or must be: send what is outgoing, then close.
    ended: bool = False
    #: The stream must be encrypted now, after what is outgoing was sent; then `encrypted`.
    starts_tls: bool = False
    structured: bool = False
    #: Negotiated meta contexts of the chosen export: name and id.
    contexts: dict[str, int] = field(default_factory=dict)
    rest: bytearray = field(default_factory=bytearray)
    _flags: int | None = None
    _contexts_of: str = ""
    _options: int = 0
    _is_encrypted: bool = False

    def receive(self, data: bytes | memoryview) -> None:
        """Take what has come; ProtocolError if it is no NBD."""
        self.rest += data
        if self._flags is None:
            if len(self.rest) < 4:
                return
            self._flags = int.from_bytes(self._take(4), "big")
            if self._flags & ~(_FIXED_NEWSTYLE | _NO_ZEROES) or not self._flags & _FIXED_NEWSTYLE:
                raise ProtocolError(f"the client's flags are {self._flags:#x}: not fixed newstyle")
        while self.chosen is None and not self.ended and not self.starts_tls and len(self.rest) >= _OPTION.size:
            magic, option, length = _OPTION.unpack_from(self.rest)
            if magic != _OPTION_MAGIC:
                raise ProtocolError(f"an option begins with {magic!r}")
            if length > _OPTION_LIMIT_BYTES:
                raise ProtocolError(f"option {option} has {length} bytes")
            if len(self.rest) < _OPTION.size + length:
                return
            self._take(_OPTION.size)
            self._options += 1
            if self._options > _OPTIONS_LIMIT:
                raise ProtocolError(f"more than {_OPTIONS_LIMIT} options")
            self._answer(option, bytes(self._take(length)))

    def encrypted(self) -> None:
        """The stream is encrypted from here on: all that was negotiated before is void."""
        if self.rest:
            raise ProtocolError("the client did not wait for the encryption that it asked for")
        self.starts_tls = False
        self._is_encrypted = True
        self.structured = False
        self.contexts = {}

    def _take(self, count: int) -> bytearray:
        taken = self.rest[:count]
        del self.rest[:count]
        return taken

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.outgoing += _OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, kind, len(data)) + data

    def _refuse(self, option: int, kind: int, why: str) -> None:
        self._reply(option, kind, why.encode())

    def _answer(self, option: int, data: bytes) -> None:
        if option == OPTION_ABORT:
            self._reply(option, REPLY_ACK)
            self.ended = True
        elif option == OPTION_STARTTLS:
            self._start_tls(data)
        elif self.tls_required and not self._is_encrypted:
            if option == OPTION_EXPORT_NAME:
                raise ProtocolError("an export was asked for without encryption")
            self._refuse(option, REPLY_TLS_REQUIRED, "encrypt first: STARTTLS")
        elif option == OPTION_EXPORT_NAME:
            self._export_name(data)
        elif option in (OPTION_INFO, OPTION_GO):
            self._info(option, data)
        elif option == OPTION_LIST:
            self._list(data)
        elif option == OPTION_STRUCTURED_REPLY:
            if data:
                self._refuse(option, REPLY_INVALID, "STRUCTURED_REPLY has no data")
            else:
                self.structured = True
                self._reply(option, REPLY_ACK)
        elif option in (OPTION_LIST_META_CONTEXT, OPTION_SET_META_CONTEXT):
            self._meta_context(option, data)
        else:
            self._refuse(option, REPLY_UNSUPPORTED, f"option {option} is not known here")

    def _start_tls(self, data: bytes) -> None:
        if data or self._is_encrypted:
            self._refuse(OPTION_STARTTLS, REPLY_INVALID, "STARTTLS has no data, and is possible once")
        elif not self.tls:
            self._refuse(OPTION_STARTTLS, REPLY_POLICY, "this server has no certificate")
        else:
            self._reply(OPTION_STARTTLS, REPLY_ACK)
            self.starts_tls = True

    def _export_name(self, data: bytes) -> None:
        """The old way to choose: it can't be refused but by closing."""
        info = self.find(data.decode("utf-8", "replace"))
        if info is None:
            self.ended = True
            return
        if self._contexts_of != info.name:
            self.contexts = {}
        self.outgoing += struct.pack(">QH", info.size_bytes, info.flags)
        if self._flags is not None and not self._flags & _NO_ZEROES:
            self.outgoing += bytes(124)
        self.chosen = info

    def _info(self, option: int, data: bytes) -> None:
        try:
            name, position = _string(data, 0)
            (count,) = struct.unpack_from(">H", data, position)
            wanted = set(struct.unpack_from(f">{count}H", data, position + 2))
            if position + 2 + 2 * count != len(data):
                raise ValueError("more bytes than it says")
        except (struct.error, ValueError) as error:
            self._refuse(option, REPLY_INVALID, f"the option makes no sense: {error}")
            return
        info = self.find(name)
        if info is None:
            self._refuse(option, REPLY_UNKNOWN, f"export '{name}' is not there")
            return
        self._reply(option, REPLY_INFO, struct.pack(">HQH", INFO_EXPORT, info.size_bytes, info.flags))
        if INFO_NAME in wanted:
            self._reply(option, REPLY_INFO, struct.pack(">H", INFO_NAME) + info.name.encode())
        if INFO_DESCRIPTION in wanted and info.description:
            self._reply(option, REPLY_INFO, struct.pack(">H", INFO_DESCRIPTION) + info.description.encode())
        sizes = info.minimum_block_bytes, info.preferred_block_bytes, MAXIMUM_BLOCK_BYTES
        self._reply(option, REPLY_INFO, struct.pack(">HIII", INFO_BLOCK_SIZE, *sizes))
        self._reply(option, REPLY_ACK)
        if option == OPTION_GO:
            if self._contexts_of != name:
                self.contexts = {}
            self.chosen = info

    def _list(self, data: bytes) -> None:
        if data:
            self._refuse(OPTION_LIST, REPLY_INVALID, "LIST has no data")
            return
        if self.names is None:
            self._refuse(OPTION_LIST, REPLY_POLICY, "this server does not tell its exports")
            return
        for name in self.names():
            encoded = name.encode()
            self._reply(OPTION_LIST, REPLY_SERVER, struct.pack(">I", len(encoded)) + encoded)
        self._reply(OPTION_LIST, REPLY_ACK)

    def _meta_context(self, option: int, data: bytes) -> None:
        setting = option == OPTION_SET_META_CONTEXT
        if setting:
            self.contexts = {}
        if setting and not self.structured:
            self._refuse(option, REPLY_INVALID, "meta contexts need structured replies")
            return
        try:
            name, position = _string(data, 0)
            (count,) = struct.unpack_from(">I", data, position)
            position += 4
            queries = []
            for _ in range(count):
                query, position = _string(data, position)
                queries.append(query)
            if position != len(data):
                raise ValueError("more bytes than it says")
        except (struct.error, ValueError) as error:
            self._refuse(option, REPLY_INVALID, f"the option makes no sense: {error}")
            return
        info = self.find(name)
        if info is None:
            self._refuse(option, REPLY_UNKNOWN, f"export '{name}' is not there")
            return
        found = [context for context in info.contexts if _is_meant(context, queries, setting=setting)]
        for number, context in enumerate(found):
            self._reply(option, REPLY_META_CONTEXT, struct.pack(">I", number) + context.encode())
        if setting:
            self._contexts_of = name
            self.contexts = {context: number for number, context in enumerate(found)}
        self._reply(option, REPLY_ACK)


def _string(data: bytes, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from(">I", data, position)
    position += 4
    if length > _NAME_LIMIT_BYTES or position + length > len(data):
        raise ValueError(f"a string of {length} bytes")
    return data[position : position + length].decode("utf-8"), position + length


def _is_meant(context: str, queries: Sequence[str], *, setting: bool) -> bool:
    """LIST: no query means all, and see `_WILDCARDS`.  SET: whole names only."""
    if context in queries:
        return True
    return not setting and (not queries or any(query in _WILDCARDS and context.startswith(query) for query in queries))


class Request(NamedTuple):
    """One request.  ``data`` of a write is a view that is good until the next `Requests.received`.

    ``refused``: an errno that the wire itself found (unknown command or flags, too long); its data was skipped.
    """

    type: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: memoryview
    refused: int = 0


_NO_DATA = memoryview(b"")


class Requests:
    """Cuts the stream into requests; one buffer, into which the socket receives.

    ``space()`` -> where to receive; ``received(count)``; then iterate over what is complete.  The buffer grows to the
    longest write that comes, at most the maximum block and a header.
    """

    def __init__(self, first: bytes = b"", capacity_bytes: int = 256 << 10) -> None:
        self._buffer = bytearray(max(capacity_bytes, len(first) + 1))
        self._buffer[: len(first)] = first
        self._start = 0
        self._end = len(first)
        self._skip = 0

    def space(self) -> memoryview:
        """Room for what comes next, never empty.  Views handed out before are void."""
        needed = self._needed()
        if self._start == self._end:
            self._start = self._end = 0
        if self._start + needed > len(self._buffer) or self._end == len(self._buffer):
            rest = bytes(memoryview(self._buffer)[self._start : self._end])
            if needed > len(self._buffer):
                self._buffer = bytearray(needed)
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        return memoryview(self._buffer)[self._end :]

    def received(self, count: int) -> None:
        self._end += count

    def _needed(self) -> int:
        """Bytes of the request that is under way, as far as is known."""
        if self._skip or self._end - self._start < _REQUEST.size:
            return _REQUEST.size
        _, _, kind, _, _, length = _REQUEST.unpack_from(self._buffer, self._start)
        return _REQUEST.size + (length if kind == WRITE and length <= MAXIMUM_BLOCK_BYTES else 0)

    def __iter__(self) -> Iterator[Request]:
        """Every request that is complete.  ProtocolError for a wrong magic: where the next one begins is lost."""
        buffer, unpack, size = memoryview(self._buffer), _REQUEST.unpack_from, _REQUEST.size
        while True:
            if self._skip:
                skipped = min(self._skip, self._end - self._start)
                self._start += skipped
                self._skip -= skipped
            if self._end - self._start < size:
                return
            magic, flags, kind, cookie, offset, length = unpack(buffer, self._start)
            if magic != _REQUEST_MAGIC:
                raise ProtocolError(f"a request begins with {magic:#x}")
            position = self._start + size
            refused = 0
            if kind not in _ALLOWED_FLAGS or flags & ~_ALLOWED_FLAGS[kind]:
                refused = errno.EINVAL
            data = _NO_DATA
            if kind == WRITE:
                if length > MAXIMUM_BLOCK_BYTES:
                    refused = errno.EINVAL
                    self._skip = length
                elif self._end - position < length:
                    return
                else:
                    data = buffer[position : position + length]
                    position += length
            elif kind == READ and length > MAXIMUM_BLOCK_BYTES:
                refused = errno.EINVAL
            self._start = position
            yield Request(kind, flags, cookie, offset, length, data, refused)


# -- replies: buffers, to be sent in order ----------------------------------------------------------------------------


def errno_on_wire(number: int) -> int:
    """The protocol's number for an errno."""
    return _ERRNOS.get(number, 5)


def done(structured: bool, cookie: int) -> bytes:
    """Success without data."""
    if structured:
        return _CHUNK.pack(_CHUNK_MAGIC, _CHUNK_DONE, _CHUNK_NONE, cookie, 0)
    return _SIMPLE_REPLY.pack(_SIMPLE_REPLY_MAGIC, 0, cookie)


def data_header(structured: bool, cookie: int, offset: int, length: int, *, last: bool = True) -> bytes:
    """What goes before the data of a read.  ``last``: nothing follows it (structured only)."""
    if structured:
        flags = _CHUNK_DONE if last else 0
        return _CHUNK_OF_DATA.pack(_CHUNK_MAGIC, flags, _CHUNK_DATA, cookie, 8 + length, offset)
    return _SIMPLE_REPLY.pack(_SIMPLE_REPLY_MAGIC, 0, cookie)


def error(structured: bool, cookie: int, number: int, message: str, offset: int | None = None) -> bytes:
    """Failure; with structured replies its text too, and from which byte on."""
    code = errno_on_wire(number)
    if not structured:
        return _SIMPLE_REPLY.pack(_SIMPLE_REPLY_MAGIC, code, cookie)
    text = message.encode()[:1024]
    body = struct.pack(">IH", code, len(text)) + text
    if offset is not None:
        body += struct.pack(">Q", offset)
    kind = _CHUNK_ERROR if offset is None else _CHUNK_ERROR_OFFSET
    return _CHUNK.pack(_CHUNK_MAGIC, _CHUNK_DONE, kind, cookie, len(body)) + body


def block_status(cookie: int, context: int, extents: Sequence[tuple[int, int]], *, last: bool) -> bytes:
    """Extents (length, flags) of one context, at least one."""
    body = struct.pack(">I", context) + b"".join(struct.pack(">II", *extent) for extent in extents)
    return _CHUNK.pack(_CHUNK_MAGIC, _CHUNK_DONE if last else 0, _CHUNK_STATUS, cookie, len(body)) + body
