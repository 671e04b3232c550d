"""The commands about chains of backups: ``restore``, ``verify``, ``bitmap``; and what ``backup --since`` decides.

Part of the top layer, as `cli.py`: imports what runs only in the command that needs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import errno
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from .errors import CoordinatorRunningError, NoCoordinatorError, VerificationError
from .layout import Header
from .sizes import format_size, parse_size

if TYPE_CHECKING:
    from .workers import Coordinator
    from .workers.qmp.client import Client

VERBS = ("list", "add", "remove", "clear", "enable", "disable", "merge")
LIVE = (
    "bitmaps live with a running coordinator (shmcbw serve, or a Coordinator in a program); --state-dir keeps "
    "persistent ones beyond it"
)


def _sample(text: str) -> float:
    """A fraction of all, as ``10%`` or ``0.1``."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part of all (examples: 10%, 0.1)")
    return value


def _granularity(text: str) -> int:
    from .dirty import check_granularity

    try:
        return check_granularity(parse_size(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    restore = commands.add_parser(
        "restore",
        help="build an image from a full backup and its increments",
        description="Lay each INCREMENT over what is before it and write the result to OUT.  All is checked: that the "
        "backups follow each other, and every cluster against its checksum.",
    )
    restore.add_argument("chain", metavar="BACKUP", nargs="+", help="BASE, then its increments, oldest first")
    restore.add_argument("out", metavar="OUT")
    restore.add_argument("--overwrite", action="store_true", help="replace an existing OUT of the same size")
    restore.add_argument("--manifest", action="store_true", help="give OUT a manifest: it can be a base itself")
    restore.add_argument("--json", action="store_true", help="print one JSON object")
    restore.set_defaults(run=_restore)

    verify = commands.add_parser(
        "verify",
        help="re-read a backup and compare it with its checksums",
        description="Exit status: 0 right, 9 no manifest or a damaged one, 11 clusters differ, 1 it can't be read.",
    )
    verify.add_argument("target", metavar="TARGET")
    verify.add_argument("--sample", type=_sample, default=1.0, metavar="PART", help="look at a part only, as 10%%")
    verify.add_argument("--seed", type=int, default=0, metavar="N", help="which part (default 0)")
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    verify.set_defaults(run=_verify)

    bitmap = commands.add_parser(
        "bitmap",
        help="list and change dirty bitmaps",
        description=f"Dirty bitmaps tell what was written since they were made or last used; {LIVE}.",
    )
    bitmap.add_argument("verb", metavar="VERB", choices=VERBS, help=", ".join(VERBS))
    bitmap.add_argument("image", metavar="IMAGE")
    bitmap.add_argument("name", metavar="NAME", nargs="?")
    bitmap.add_argument("sources", metavar="SOURCE", nargs="*", help="merge: bitmaps to add to NAME")
    bitmap.add_argument("--granularity", type=_granularity, metavar="SIZE", help="add: 512 and up (default 64K)")
    bitmap.add_argument("--persistent", action="store_true", help="add: keep it in the state directory")
    bitmap.add_argument("--disabled", action="store_true", help="add: do not record yet")
    bitmap.add_argument("--state-dir", metavar="DIR", help="where persistent bitmaps are")
    bitmap.add_argument("--json", action="store_true", help="print one JSON object")
    bitmap.set_defaults(run=_bitmap)


def add_backup_options(backup: argparse.ArgumentParser) -> None:
    """The options of ``backup`` that are about bitmaps and manifests."""
    backup.add_argument(
        "--since",
        metavar="BITMAP",
        help="back up what has changed since this bitmap was made or last used; TARGET is an increment",
    )
    backup.add_argument(
        "--in-place", action="store_true", help="TARGET is an older backup, the bitmap's base: bring it forward"
    )
    backup.add_argument(
        "--bitmap-mode",
        choices=("on-success", "never", "always"),
        help="when the bitmap begins anew at this backup's cut (default on-success)",
    )
    backup.add_argument(
        "--manifest", action="store_true", help="take checksums while copying, into TARGET.shmcbw (for verify)"
    )
    backup.add_argument("--state-dir", metavar="DIR", help="where persistent bitmaps are while nobody serves the image")


def bitmap_options(options: argparse.Namespace) -> dict[str, Any]:
    """What ``backup`` was told about bitmaps and manifests, as `increments.backup_parameters` takes it."""
    names = ("since", "sync", "bitmap_mode", "in_place", "manifest", "overwrite")
    return {**{name: getattr(options, name) for name in names}, "persistent": options.state_dir is not None}


def bitmap_parameters(coordinator: Coordinator, options: argparse.Namespace) -> dict[str, Any]:
    """The parameters of a backup that are about its bitmap.  What ``--sync auto`` decides is said on stderr."""
    from .workers.increments import backup_parameters

    found, said = backup_parameters(coordinator.bitmaps, coordinator.path, **bitmap_options(options))
    if said:
        print(f"shmcbw backup: {said}", file=sys.stderr)
    return found


def _restore(options: argparse.Namespace) -> int:
    from .workers.restore import restore

    done = restore(options.chain, options.out, overwrite=options.overwrite, manifest=options.manifest)
    if options.json:
        print(json.dumps(dataclasses.asdict(done)))
    else:
        print(
            f"{done.path}: {format_size(done.size_bytes)}, {format_size(done.data_bytes)} of it data, as of "
            f"{_time(done.cut_time_ns)}"
        )
    return 0


def _time(time_ns: int) -> str:
    return datetime.datetime.fromtimestamp(time_ns / 1e9).astimezone().isoformat(" ", "seconds")


def _verify(options: argparse.Namespace) -> int:
    from .workers.verify import verify

    found = verify(options.target, sample=options.sample, seed=options.seed)
    if options.json:
        print(json.dumps({**dataclasses.asdict(found), "sample": options.sample, "seed": options.seed}))
    what = f"{found.path}: {found.kind} backup as of {_time(found.cut_time_ns)}: "
    if found.differing_bytes:
        for offset, length in found.differing if not options.json else []:
            print(f"differs: {length} bytes at {offset}")
        raise VerificationError(
            f"{what}{format_size(found.differing_bytes)} differ from what was copied", tuple(found.differing)
        )
    if not options.json:
        part = "" if options.sample == 1 else f" (a sample of {options.sample:.3%}, seed {options.seed})"
        print(
            f"{what}{format_size(found.checked_bytes)} of data and {format_size(found.zero_bytes)} of zeroes are "
            f"what was copied{part}"
        )
    return 0


def _bitmap(options: argparse.Namespace) -> int:
    if (options.name is None) != (options.verb == "list") or bool(options.sources) != (options.verb == "merge"):
        print(f"shmcbw bitmap: {options.verb} takes other arguments", file=sys.stderr)
        return 2
    found = _through_owner(options)
    if options.json:
        print(json.dumps({"bitmaps": found}))
    else:
        print("\n".join(map(_bitmap_text, found)) or f"{options.image} has no bitmaps")
    return 0


def _through_owner(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Do it where the bitmaps are: in the daemon that serves the image, or, if nobody does, as its coordinator for a
    moment; the bitmaps that the image has afterwards."""
    from .image import ImageFile
    from .segment import COORDINATOR, attach
    from .workers import Coordinator
    from .workers.qmp.client import connect_to_owner

    image = ImageFile.open(options.image, writable=False)
    try:
        segment = attach(image)
    except NoCoordinatorError:
        if options.state_dir is None:
            what = f"{options.image}: no coordinator serves this image; {LIVE}"
            raise NoCoordinatorError(errno.ENOENT, what) from None
    else:
        try:
            client = connect_to_owner(segment)
            if client is not None:
                with client:
                    return _over_qmp(client, options)
            if segment.locked(COORDINATOR):
                pid = segment.header(Header.coordinator_pid)
                what = (
                    f"{options.image} is served by pid {pid}, which is no daemon: its bitmaps can be changed only there"
                )
                raise CoordinatorRunningError(errno.EBUSY, what)
        finally:
            segment.close()
    finally:
        image.close()
    with Coordinator(options.image, state_dir=options.state_dir) as coordinator:
        return _apply(coordinator, options)


def _over_qmp(client: Client, options: argparse.Namespace) -> list[dict[str, Any]]:
    path = os.path.realpath(options.image)
    nodes = client.execute("query-named-block-nodes")
    node = next((each["node-name"] for each in nodes if os.path.realpath(each.get("file", "")) == path), None)
    if node is None:
        raise NoCoordinatorError(errno.ENOENT, f"{options.image} is no node of its daemon any more")
    command = f"block-dirty-bitmap-{options.verb}"
    if options.verb == "add":
        given = {"granularity": options.granularity, "persistent": options.persistent, "disabled": options.disabled}
        wanted = {name: value for name, value in given.items() if value}
        client.execute(command, node=node, name=options.name, **wanted)
    elif options.verb == "merge":
        client.execute(command, node=node, target=options.name, bitmaps=options.sources)
    elif options.verb != "list":
        client.execute(command, node=node, name=options.name)
    nodes = client.execute("query-named-block-nodes")
    found: list[dict[str, Any]] = next(each for each in nodes if each["node-name"] == node).get("dirty-bitmaps", [])
    return found


def _apply(coordinator: Coordinator, options: argparse.Namespace) -> list[dict[str, Any]]:
    bitmaps, name = coordinator.bitmaps, options.name
    if options.verb == "add":
        bitmaps.add(name, granularity=options.granularity, persistent=options.persistent, disabled=options.disabled)
    elif options.verb == "merge":
        bitmaps.merge(name, options.sources)
    elif options.verb != "list":
        {
            "remove": bitmaps.remove,
            "clear": bitmaps.clear,
            "enable": bitmaps.enable,
            "disable": bitmaps.disable,
        }[options.verb](name)
    return bitmaps.query()


def _bitmap_text(bitmap: dict[str, Any]) -> str:
    words = [word for word in ("recording", "busy", "persistent", "inconsistent") if bitmap.get(word)]
    return (
        f"{bitmap['name']}: {format_size(bitmap['count'])} dirty, granularity {format_size(bitmap['granularity'])}"
        + "".join(f", {word}" for word in words)
    )
