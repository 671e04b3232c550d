"""The command ``export``: an image or a snapshot over NBD, or a snapshot as a stream.

Part of the top layer, as `cli.py`: imports what runs only in the command itself.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from .errors import CoordinatorRunningError
from .reader import SnapshotReader, open_snapshot

if TYPE_CHECKING:
    from .workers import Coordinator

_PIECE_BYTES = 1 << 20


def add_commands(commands: Any) -> None:
    """Add the parser of this command."""
    export = commands.add_parser(
        "export",
        help="serve an image, or a snapshot of it, over NBD",
        description="Serve IMAGE over NBD: clients write through the filter, like any writer.  With --snapshot or "
        "--scratch serve it as it was at a cut, while others go on writing.  Where no coordinator serves the image, be "
        "it meanwhile.  Ends with Ctrl-C or SIGTERM.",
    )
    export.add_argument("image", metavar="IMAGE")
    which = export.add_mutually_exclusive_group()
    which.add_argument(
        "--snapshot", metavar="NAME", help="a snapshot that is there: its serial number, or its scratch or target"
    )
    which.add_argument(
        "--scratch", metavar="FILE", help="take a snapshot now; old content goes to FILE, which is removed at the end"
    )
    export.add_argument("--name", default="", help="the export's name (default: the empty one)")
    export.add_argument(
        "--listen",
        metavar="ADDRESS",
        default="",
        help="unix:PATH (default: IMAGE.nbd), or tcp:HOST:PORT; tcp::PORT is this machine only",
    )
    export.add_argument("--read-only", action="store_true", help="take no writes; of a snapshot: no discards")
    export.add_argument("--tls", nargs=2, metavar=("CERTIFICATE", "KEY"), help="encrypt; PEM files")
    export.add_argument("--tls-authority", metavar="FILE", help="clients must show a certificate signed by it")
    export.add_argument("--processes", type=int, default=2, metavar="N", help="processes that serve (default 2)")
    export.add_argument("--stdout", action="store_true", help="no NBD: write the snapshot to standard output, and end")
    export.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until told to end."""
    if options.stdout and options.snapshot is None and options.scratch is None:
        raise ValueError("--stdout needs --snapshot or --scratch: an image that others write is no one instant")
    if options.tls_authority is not None and options.tls is None:
        raise ValueError("--tls-authority needs --tls")
    if options.processes < 1:
        raise ValueError(f"--processes {options.processes}: at least one has to serve")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with ExitStack() as stack:
        snapshot: int | str | None = options.snapshot
        coordinator = _serve_if_nobody_does(options.image, stack, needed=options.scratch is not None)
        if options.scratch is not None:
            assert coordinator is not None
            snapshot = stack.enter_context(coordinator.snapshot(options.scratch)).serial
        if isinstance(snapshot, str) and snapshot.isdigit():
            snapshot = int(snapshot)
        if options.stdout:
            with open_snapshot(options.image, snapshot) as reader:
                _stream(reader)
            return 0
        _serve(options, snapshot, stack)
    return 0


def _serve_if_nobody_does(image: str, stack: ExitStack, *, needed: bool) -> Coordinator | None:
    from .workers import Coordinator

    try:
        return stack.enter_context(Coordinator(image))
    except CoordinatorRunningError:
        if needed:
            raise
        return None


def _stream(reader: SnapshotReader) -> None:
    """All of it, in order.  Broken on the way: an error, and what reads us sees too little."""
    out = sys.stdout.buffer
    for offset in range(0, reader.size_bytes, _PIECE_BYTES):
        out.write(reader.pread(min(_PIECE_BYTES, reader.size_bytes - offset), offset))
    out.flush()


def _serve(options: argparse.Namespace, snapshot: int | str | None, stack: ExitStack) -> None:
    from .workers.nbd.address import Address
    from .workers.nbd.server import Server
    from .workers.nbd.specification import ExportSpec, Tls

    tls = None
    if options.tls is not None:
        certificate, key = options.tls
        tls = Tls(certificate, key, options.tls_authority)
    listener, address = Address.parse(options.listen or f"unix:{options.image}.nbd").listen()
    path = address.path or None
    server = stack.enter_context(Server(listener, path=path, tls=tls, processes=options.processes))
    server.add(ExportSpec(options.name, os.path.abspath(options.image), snapshot, not options.read_only))
    print(f"shmcbw export: serving {address.uri(options.name, encrypted=tls is not None)}", file=sys.stderr, flush=True)
    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        # The way to end it.
        pass
