"""The command line: ``shmcbw``, also ``python -m shmcbw``.

Exit statuses: 0 done and right; 1 an error; 2 wrong usage; 3 no coordinator, another one, or its shared memory can't be
used; 4 the target was refused, nothing changed; 5 the snapshot broke or a copy failed; 6 cancelled; 7 no cut could be
taken; 8 a dirty bitmap can't be used; 9 a backup has no whole manifest; 10 increments do not follow each other; 11 a
backup differs from its checksums; 130 interrupted.  The top layer: it imports what runs (`shmcbw.workers`) only in the
command that needs it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from .chain_commands import add_backup_options, add_commands, bitmap_options, bitmap_parameters
from .clusters import check_cluster_size
from .errors import JobCancelledError, ShmcbwError
from .export_command import add_commands as add_export
from .sizes import format_ns, format_size, parse_size

if TYPE_CHECKING:
    from .workers import Job
    from .workers.remote import RemoteJob
    from .workers.settings import ImageOption

EPILOG = """\
exit status: 0 done and right, 1 error, 2 usage, 3 coordinator or its shared memory, 4 target refused,
5 snapshot broken or copy failed, 6 cancelled, 7 no cut taken, 8 bitmap can't be used, 9 manifest missing or
damaged, 10 increments don't fit, 11 backup differs from its checksums, 130 interrupted
"""


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _new_size(text: str) -> tuple[bool, int]:
    """(whether it is added to the size that there is, bytes)."""
    return text.startswith("+"), _size(text.removeprefix("+"))


def _cluster_size(text: str) -> int:
    try:
        return check_cluster_size(_size(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _image(text: str) -> ImageOption:
    from .workers.settings import ImageOption

    return ImageOption(text)


def _named_image(text: str) -> ImageOption:
    from .workers.settings import ImageOption

    try:
        return ImageOption.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    """The argument parser of all commands."""
    top = argparse.ArgumentParser(
        prog="shmcbw",
        description="Point-in-time backup of a disk image while many processes keep writing to it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="writers hammer an image, a backup runs, both are checked")
    demo.add_argument("--size", type=_size, default=parse_size("256M"), help="size of the image (default 256M)")
    demo.add_argument("--writers", type=_count, default=4, help="writer processes (default 4)")
    demo.add_argument("--workers", type=_count, default=2, help="copy workers (default 2)")
    demo.add_argument("--seconds", type=_seconds, default=5.0, help="how long they write (default 5)")
    demo.add_argument("--keep", metavar="DIR", help="work in DIR and leave image, backup and logs there")
    demo.add_argument("--json", action="store_true", help="print one JSON object")
    demo.set_defaults(run=_demo)

    backup = commands.add_parser(
        "backup",
        help="back up an image; be its coordinator as long as that takes",
        description="Take a point-in-time backup of IMAGE.  Writers (shmcbw.open) may attach while it runs.  "
        "Of several images all backups show the same instant, or there is none.",
    )
    backup.add_argument("image", metavar="IMAGE")
    backup.add_argument("target", metavar="TARGET")
    backup.add_argument("more", metavar="IMAGE TARGET", nargs="*", help="more images, in the same cut")
    backup.add_argument(
        "--sync",
        choices=("full", "top", "incremental", "bitmap", "auto"),
        help="all of it, only what is allocated, or what is dirty in the bitmap; auto: incremental where the bitmap "
        "can be trusted, else full (default: full, with --since incremental)",
    )
    add_backup_options(backup)
    backup.add_argument("--speed", type=_size, default=0, metavar="RATE", help="bytes a second, 0: no limit (default)")
    backup.add_argument("--workers", type=_count, default=2, help="copy workers (default 2)")
    backup.add_argument("--cluster-size", type=_cluster_size, metavar="SIZE", help="4K to 2M (default 64K)")
    backup.add_argument("--slots", type=_count, metavar="N", help="writing threads at once (default 64)")
    backup.add_argument(
        "--on-cbw-error",
        choices=("break-snapshot", "break-guest-write"),
        default="break-snapshot",
        help="what gives way when old content can't be copied (default break-snapshot)",
    )
    backup.add_argument(
        "--cbw-timeout", type=_seconds, default=30.0, metavar="S", help="longest wait of a write, 0: none (default 30)"
    )
    backup.add_argument("--overwrite", action="store_true", help="replace an existing TARGET of the same size")
    backup.add_argument(
        "--pre-cut", metavar="CMD", help="shell command that brings an application to rest; if it fails there is no cut"
    )
    backup.add_argument("--post-cut", metavar="CMD", help="shell command that lets it go on, also if there was no cut")
    backup.add_argument("--progress", choices=("auto", "never"), default="auto", help="progress bar (default auto)")
    backup.add_argument("--json", action="store_true", help="print one JSON object")
    backup.set_defaults(run=_backup)

    _add_daemon_verbs(commands)
    add_commands(commands)

    serve = commands.add_parser(
        "serve",
        help="serve images until SIGTERM, driven over QMP",
        description="Serve each IMAGE as a node and run backups on request over QMP (qmp-shell, shmcbw backup).",
    )
    serve.add_argument("images", metavar="IMAGE", nargs="*", type=_image, help="an image; its node is called like it")
    serve.add_argument(
        "--image",
        dest="named",
        metavar="filename=PATH,node-name=NAME",
        action="append",
        type=_named_image,
        default=[],
        help="an image with a node name of one's own",
    )
    serve.add_argument("--qmp", metavar="PATH", help="socket (default: qmp.sock in a runtime directory of our own)")
    serve.add_argument("--name", metavar="NAME", help="what query-name answers")
    serve.add_argument("--workers", type=_count, help="copy workers an image (default 2)")
    serve.add_argument("--cluster-size", type=_cluster_size, metavar="SIZE", help="4K to 2M (default 64K)")
    serve.add_argument("--slots", type=_count, metavar="N", help="writing threads at once (default 64)")
    serve.add_argument("--state-dir", metavar="DIR", help="where persistent bitmaps are saved at shutdown")
    serve.add_argument(
        "--detach-jobs",
        action="store_true",
        default=None,
        help="at the end leave jobs and snapshots to the next daemon, with their workers",
    )
    serve.add_argument("--nbd-listen", metavar="ADDRESS", help="serve the images over NBD: unix:PATH, or tcp:HOST:PORT")
    serve.add_argument("--nbd-tls", nargs=2, metavar=("CERTIFICATE", "KEY"), help="encrypt NBD; PEM files")
    serve.add_argument("--nbd-tls-authority", metavar="FILE", help="NBD clients must show a certificate signed by it")
    serve.add_argument("--config", metavar="FILE.toml", help="settings, named like these options; these win")
    serve.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="default info")
    serve.set_defaults(run=_serve)

    reference = commands.add_parser("qmp-reference", help="print the reference of the QMP commands, in Markdown")
    reference.set_defaults(run=_qmp_reference)

    add_export(commands)

    status = commands.add_parser("status", help="what is going on, for one image or all")
    status.add_argument("image", metavar="IMAGE", nargs="?")
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.set_defaults(run=_status)

    check = commands.add_parser("check", help="check the invariants on the live segment of an image")
    check.add_argument("image", metavar="IMAGE")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(run=_check)

    failpoints = commands.add_parser("failpoints", help="list the places where a test can make a process fail")
    failpoints.add_argument("--json", action="store_true", help="print one JSON object")
    failpoints.set_defaults(run=_failpoints)

    doctor = commands.add_parser("doctor", help="what this machine has of what shmcbw needs")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)
    return top


def _add_daemon_verbs(commands: Any) -> None:
    """Verbs on what a daemon has: jobs and snapshots."""
    job = commands.add_parser("job", help="jobs of an image that a daemon serves")
    job.add_argument(
        "verb",
        choices=("list", "pause", "resume", "cancel", "finalize", "dismiss", "set-speed", "wait"),
        help="what to do",
    )
    job.add_argument("image", metavar="IMAGE")
    job.add_argument("id", metavar="JOB", nargs="?", help="which one (all verbs but list)")
    job.add_argument("speed", metavar="RATE", nargs="?", type=_size, help="for set-speed: bytes a second, 0: no limit")
    job.add_argument("--json", action="store_true", help="print one JSON object")
    job.set_defaults(run=_job)

    resize = commands.add_parser(
        "resize",
        help="make an image larger, also one that is served",
        description="Make IMAGE larger; writers that are attached go on, and follow.  Refused while it has snapshots "
        "or jobs.  A block device must have its new size already.",
    )
    resize.add_argument("image", metavar="IMAGE")
    resize.add_argument("size", metavar="[+]SIZE", type=_new_size, help="its new size, or by how much it grows")
    resize.add_argument("--json", action="store_true", help="print one JSON object")
    resize.set_defaults(run=_resize)

    snapshot = commands.add_parser("snapshot", help="snapshots of an image that a daemon serves")
    snapshot.add_argument("verb", choices=("list", "add", "remove", "cat"), help="what to do; cat: to stdout")
    snapshot.add_argument("image", metavar="IMAGE")
    snapshot.add_argument("name", metavar="NAME", nargs="?", help="node name of the snapshot (all verbs but list)")
    snapshot.add_argument("scratch", metavar="SCRATCH", nargs="?", help="for add: where old data goes")
    snapshot.add_argument("--json", action="store_true", help="print one JSON object")
    snapshot.set_defaults(run=_snapshot)


def _version() -> str:
    from . import __version__

    return f"shmcbw {__version__}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    options = parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _report(options, KeyboardInterrupt("interrupted"))
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ShmcbwError as error:
        _report(options, error)
        return error.exit_status
    except (OSError, ValueError) as error:
        _report(options, error)
        return 1
    return status


def _report(options: argparse.Namespace, error: BaseException) -> None:
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if getattr(options, "json", False):
        number = error.errno if isinstance(error, OSError) else None
        print(json.dumps({"error": {"type": type(error).__name__, "message": message, "errno": number}}))
    print(f"shmcbw {options.command}: {message}", file=sys.stderr)


def _demo(options: argparse.Namespace) -> int:
    from .workers.demo import run_demo

    return run_demo(
        options.size, options.writers, options.workers, options.seconds, options.keep, options.json, sys.stdout
    )


# -- backup ------------------------------------------------------------------------------------------------------------


def _backup(options: argparse.Namespace) -> int:
    if len(options.more) % 2:
        print(f"shmcbw backup: {options.more[-1]} has no TARGET", file=sys.stderr)
        return 2
    names = [options.image, options.target, *options.more]
    pairs = list(zip(names[::2], names[1::2], strict=True))
    try:
        return _run_backup(options, pairs)
    except KeyboardInterrupt:
        # Leaving the coordinators' block has cancelled it, wherever it was.
        raise JobCancelledError(f"the backup to {', '.join(names[1::2])} was cancelled") from None


def _run_backup(options: argparse.Namespace, pairs: Sequence[tuple[str, str]]) -> int:
    from .workers import Coordinator
    from .workers.quiesce import QuiesceCommands

    # SIGTERM ends it as Ctrl-C does: cancelled, nothing left over.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    quiesce = QuiesceCommands(options.pre_cut, options.post_cut)
    remote = _run_at_daemon(options, pairs, quiesce)
    if remote is not None:
        return remote
    with ExitStack() as stack:
        coordinators = {
            image: stack.enter_context(
                Coordinator(
                    image,
                    workers=options.workers,
                    cluster_size=options.cluster_size,
                    slots=options.slots,
                    state_dir=options.state_dir,
                )
            )
            for image in dict.fromkeys(image for image, _ in pairs)
        }
        lost = [job for each in coordinators.values() for job in each.jobs if job.error is not None]
        jobs = _adopted_or_new(coordinators, options, pairs, quiesce)
        for job in jobs:
            _follow(job, options)
        for coordinator in coordinators.values():
            for other in coordinator.jobs:
                # One that had failed before we began has been told of.
                if other not in lost:
                    other.wait()
        statuses = [coordinator.status() for coordinator in coordinators.values()]
    if len(jobs) < len(pairs):
        missing = [target for _, target in pairs if os.path.realpath(target) not in {job.target for job in jobs}]
        raise ShmcbwError(
            f"{', '.join(missing)}: not among the unfinished backups that went on: finished or failed before; "
            "for one instant of all images take them anew"
        )
    targets = {job.target for job in jobs}
    described = [each for status in statuses for each in status["jobs"] if each["target"] in targets]
    return _report_backups(options, jobs, described, quiesce)


def _run_at_daemon(options: argparse.Namespace, pairs: Sequence[tuple[str, str]], quiesce: Any) -> int | None:
    """Have the daemon that serves the images do it; None if none does."""
    from .workers.remote import call_off, daemon_of, job_ids, start_backups

    client = daemon_of(dict.fromkeys(image for image, _ in pairs))
    if client is None:
        return None
    given = {
        "speed": options.speed,
        "on_cbw_error": options.on_cbw_error,
        "cbw_timeout": options.cbw_timeout,
        **bitmap_options(options),
    }
    parameters = {name.replace("_", "-"): value for name, value in given.items() if value is not None}
    ids = job_ids(len(pairs))
    with client:
        try:
            jobs = start_backups(client, pairs, ids, parameters, quiesce)
            for job in jobs:
                _follow(job, options)
            return _report_backups(options, jobs, [job.described for job in jobs], quiesce)
        finally:
            # As the coordinators of a backup without a daemon do: whatever it was, nothing of this command goes on.
            call_off(client.path, ids)


def _report_backups(
    options: argparse.Namespace, jobs: Sequence[Job | RemoteJob], described: list[dict[str, Any]], quiesce: Any
) -> int:
    if options.json:
        print(json.dumps(described[0] if len(jobs) == 1 else {"jobs": described}))
    for job in jobs if not options.json else []:
        progress = job.progress()
        print(
            f"{job.target}: {format_size(progress.total_bytes)}, right as of the cut; writes were held for "
            f"{format_ns(job.drained_ns)}\n"
            f"copied in background {format_size(progress.copied_in_background_bytes)}, "
            f"for writers {format_size(progress.copied_for_writers_bytes)}, zero {format_size(progress.zero_bytes)}, "
            f"left out {format_size(progress.skipped_bytes)}"
        )
    if quiesce.failure is not None:
        print(f"shmcbw backup: {quiesce.failure}", file=sys.stderr)
        return 1
    return 0


def _adopted_or_new(
    coordinators: dict[str, Any], options: argparse.Namespace, pairs: Sequence[tuple[str, str]], quiesce: Any
) -> list[Job]:
    """The same command after a kill goes on with the jobs that it had started, as many as there still are."""
    from .workers import Backup, backup_group

    unfinished: dict[str, Job] = {}
    for coordinator in coordinators.values():
        for adopted in coordinator.jobs:
            if adopted.ended:
                continue
            cut = datetime.datetime.fromtimestamp(adopted.cut_time_ns / 1e9).astimezone().isoformat(" ", "seconds")
            print(
                f"shmcbw backup: an unfinished backup to {adopted.target} goes on, with its cut of {cut}",
                file=sys.stderr,
            )
            unfinished[adopted.target] = adopted
    wanted = [os.path.realpath(target) for _, target in pairs]
    found = [unfinished[target] for target in wanted if target in unfinished]
    if found:
        return found
    return backup_group(
        [
            Backup(
                coordinators[image],
                target,
                speed=options.speed,
                on_cbw_error=options.on_cbw_error,
                cbw_timeout=options.cbw_timeout,
                **bitmap_parameters(coordinators[image], options),
            )
            for image, target in pairs
        ],
        quiesce=quiesce,
    )


def _follow(job: Job | RemoteJob, options: argparse.Namespace) -> None:
    """Wait for the job; on a terminal with a progress bar."""
    if options.progress == "never" or options.json or sys.stderr is None or not sys.stderr.isatty():
        job.wait()
        return
    from .workers.progress import follow

    follow(job)


# -- what a daemon has -------------------------------------------------------------------------------------------------


def _job(options: argparse.Namespace) -> int:
    from .workers.remote import job_verb

    return _verb(options, job_verb, options.id, speed=options.speed)


def _resize(options: argparse.Namespace) -> int:
    from .workers.remote import resize_image

    added, size = options.size
    size_bytes = resize_image(options.image, size, added=added)
    print(json.dumps({"image": options.image, "size_bytes": size_bytes}) if options.json else format_size(size_bytes))
    return 0


def _snapshot(options: argparse.Namespace) -> int:
    from .workers.remote import snapshot_verb

    return _verb(options, snapshot_verb, options.name, scratch=options.scratch, output=sys.stdout.buffer)


def _verb(options: argparse.Namespace, act: Any, name: str | None, **given: Any) -> int:
    """Run a verb at the daemon that serves the image, and show what it gives."""
    from .workers.remote import owner_of

    if name is None and options.verb != "list":
        print(f"shmcbw {options.command}: {options.verb} of which one?", file=sys.stderr)
        return 2
    with owner_of(options.image) as client:
        found = act(client, options.image, options.verb, name, **given)
    if options.json:
        print(json.dumps({options.command + "s": found} if options.verb == "list" else {}))
    elif options.verb == "list":
        for each in found:
            print("  ".join(f"{key} {value}" for key, value in each.items()))
    return 0


# -- serve -------------------------------------------------------------------------------------------------------------


def _serve(options: argparse.Namespace) -> int:
    from .workers.daemon import serve
    from .workers.settings import Options, read_config

    settings = read_config(options.config) if options.config else Options()
    names = ("qmp", "name", "workers", "cluster_size", "slots", "state_dir", "detach_jobs", "log_level")
    nbd = ("nbd_listen", "nbd_tls", "nbd_tls_authority")
    given = {name: getattr(options, name) for name in (*names, *nbd)}
    serve(settings.over({**given, "images": [*options.images, *options.named]}))
    return 0


def _qmp_reference(options: argparse.Namespace) -> int:
    from .workers.qmp.schema import reference
    from .workers.qmp.vocabulary import COMMANDS, EVENTS

    print(reference(COMMANDS, EVENTS))
    return 0


# -- status, check -----------------------------------------------------------------------------------------------------


def _attach(path: str) -> Any:
    from .image import ImageFile
    from .segment import attach

    image = ImageFile.open(path, writable=False)
    try:
        return attach(image)
    except ShmcbwError as error:
        if isinstance(error, OSError) and path not in str(error.strerror):
            raise type(error)(error.errno, f"{path}: {error.strerror}") from None
        raise
    finally:
        image.close()


def _status(options: argparse.Namespace) -> int:
    from .status import describe_all, describe_segment

    if options.image:
        segment = _attach(options.image)
        try:
            found = describe_segment(segment, options.image)
        finally:
            segment.close()
        print(json.dumps(found) if options.json else _status_text(found))
        return 0
    everything = describe_all()
    if options.json:
        print(json.dumps({"images": everything}))
    else:
        print("\n\n".join(map(_status_text, everything)) or "no image is served")
    return 0


def _status_text(status: dict[str, Any]) -> str:
    if "error" in status:
        return f"{status['segment']}: {status['error']}"
    image = status["image"]
    owner = f"coordinator pid {status['coordinator_pid']}" if status["coordinator_alive"] else "NO COORDINATOR"
    lines = [
        f"{image['path'] or status['segment']}: {format_size(image['size_bytes'])}, clusters of "
        f"{format_size(image['cluster_size_bytes'])}, epoch {status['epoch']}, {owner}"
    ]
    for slot in status["slots"]:
        lines.append(
            f"  writer {slot['program'] or '?'} pid {slot['pid']} (slot {slot['slot']}): {slot['writes']} writes, "
            f"{slot['wait_count']} waited, longest {format_ns(slot['wait_max_ns'])}"
            + (", waiting now" if slot["wanted_clusters"] else "")
        )
    for worker in status["workers"]:
        lines.append(
            f"  worker {worker['id']} pid {worker['pid']}: {worker['state']}, {worker['wanted_chunks']} copies for "
            f"writers, {worker['background_chunks']} in background, {worker['errors']} failed"
        )
    for snapshot in status["snapshots"]:
        lines.append(f"  snapshot {snapshot['snapshot']}: {snapshot['state']}, to {snapshot['target']}")
        counts = snapshot["clusters"]
        if counts:
            done = sum(counts.values()) - counts["pending"] - counts["copying"]
            lines.append(f"    {done} of {sum(counts.values())} clusters need no more copying")
        if snapshot["broken"]:
            broken = snapshot["broken"]
            lines.append(f"    BROKEN: {broken['error']} at cluster {broken['cluster']}; its job fails, take a new one")
    return "\n".join(lines)


def _check(options: argparse.Namespace) -> int:
    from .invariants import check

    segment = _attach(options.image)
    try:
        violations = check(segment)
    finally:
        segment.close()
    if options.json:
        found = [{"invariant": violation.invariant, "found": violation.found} for violation in violations]
        print(json.dumps({"image": options.image, "violations": found}))
    for violation in violations if not options.json else []:
        print(f"{violation.invariant}: {violation.found}")
    if not violations and not options.json:
        print(f"{options.image}: I1 to I6, I8 and I9 hold")
    return 1 if violations else 0


def _failpoints(options: argparse.Namespace) -> int:
    from .failpoints import POINTS

    if options.json:
        print(json.dumps({"failpoints": [vars(point) for point in POINTS]}))
    else:
        print("\n".join(f"{point.name:24} {point.protocol:10} {point.step}" for point in POINTS))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import examine

    findings = examine()
    if options.json:
        print(json.dumps({"checks": [finding.as_dict() for finding in findings]}))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.good else 'BAD ' if finding.needed else 'none'} {finding.name}: {finding.found}")
    return 0 if all(finding.good or not finding.needed for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
