"""TLS on a connection, as a plain socket.

OpenSSL's object may not be used by two threads at once, and a connection has several.  So it works on memory here,
under a lock that is never held while somebody waits; two threads, one for each direction, carry bytes between the
encrypted socket and one end of a socket pair.  The connection has the other end.  (One thread for both was rejected:
while it waits to hand on a write's data, it would not carry the replies that the connection must get rid of first.)
"""

from __future__ import annotations

import socket
import ssl
import threading

_PIECE_BYTES = 256 << 10


def server_context(certificate: str, key: str, authority: str | None = None) -> ssl.SSLContext:
    """TLS 1.2 or later with a certificate (PEM); with an authority, clients must show one signed by it.

    OSError: a file can't be read, or is none of that.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    files = f"certificate {certificate}, key {key}"
    try:
        context.load_cert_chain(certificate, key)
        if authority is not None:
            files = f"authority {authority}"
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(authority)
    except OSError as error:
        # ssl names no file.
        raise OSError(error.errno, f"TLS: {files}: {error.strerror or error}") from error
    return context


def encrypt(sock: socket.socket, context: ssl.SSLContext) -> socket.socket:
    """Shake hands as the server and return the plain side.

    ssl.SSLError, ConnectionError, or TimeoutError by the socket's own timeout.  From then on the socket is the
    tunnel's; closing the plain side closes it.
    """
    tunnel = _Tunnel(sock, context)
    tunnel.shake_hands()
    sock.settimeout(None)
    plain, tunnel.inner = socket.socketpair()
    for carry in (tunnel.carry_in, tunnel.carry_out):
        threading.Thread(target=carry, name=f"shmcbw-tls-{carry.__name__}", daemon=True).start()
    return plain


class _Tunnel:
    inner: socket.socket

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._lock = threading.Lock()
        self._sending = threading.Lock()

    def shake_hands(self) -> None:
        while True:
            try:
                self._object.do_handshake()
                return
            except ssl.SSLWantReadError:
                self._send()
                data = self._sock.recv(_PIECE_BYTES)
                if not data:
                    raise ConnectionResetError("the client left during the TLS handshake") from None
                self._incoming.write(data)
            finally:
                self._send()

    def _send(self) -> None:
        # Records must leave in the order in which they were made.
        with self._sending:
            with self._lock:
                data = self._outgoing.read()
            if data:
                self._sock.sendall(data)

    def _decrypt(self, data: bytes) -> bytes:
        pieces = []
        with self._lock:
            self._incoming.write(data)
            try:
                while piece := self._object.read(_PIECE_BYTES):
                    pieces.append(piece)
            except ssl.SSLWantReadError:
                pass
        return b"".join(pieces)

    def carry_in(self) -> None:
        try:
            # The client's first words may have come with the end of its handshake.
            self.inner.sendall(self._decrypt(b""))
            while data := self._sock.recv(_PIECE_BYTES):
                plain = self._decrypt(data)
                self._send()
                self.inner.sendall(plain)
        except OSError:
            # Either side is gone, or the peer sends no TLS; the other side sees the end of its stream.
            pass
        finally:
            self._end(self.inner, socket.SHUT_WR)

    def carry_out(self) -> None:
        try:
            while data := self.inner.recv(_PIECE_BYTES):
                with self._lock:
                    self._object.write(data)
                self._send()
        except OSError:
            pass
        finally:
            self._end(self._sock, socket.SHUT_RDWR)
            # The other direction has been woken by that; nobody uses the sockets' descriptors after it.
            self.inner.close()

    @staticmethod
    def _end(sock: socket.socket, how: int) -> None:
        try:
            sock.shutdown(how)
        except OSError:
            pass
