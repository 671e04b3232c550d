"""blockdev-backup: its checks, in QEMU's order and with its texts, and what follows from its parameters.

Targets differ from QEMU's: what is written goes to ``TARGET.shmcbw-partial`` and gets the target's name at the end, so
until then, and after a failure, the target's file is what it was.  A backup of a bitmap brings its target forward in
place if that has a manifest, that is, if it is a backup of ours; into an empty file it writes an increment; anything
else is refused, since nothing says that the increment would fit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shmcbw.clusters import CLUSTER_SIZE_MAX

from ..completion import JobTransaction
from ..coordinator import Coordinator, CoordinatorSnapshot
from ..groups import Backup, take_group
from ..manifest import sidecar
from ..nodes import AccessNode, Graph, JobNodes, Node, Served, busy, well_formed
from .desk import Arguments, Desk, Handler
from .schema import QMPError

MAX_WORKERS = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Plan:
    """A backup that was checked: what the engine is asked for, and the nodes that the job will stand on."""

    served: Served
    backup: Backup
    nodes: JobNodes

    @property
    def job_id(self) -> str:
        return self.nodes.job_id


def plan_backup(
    desk: Desk, options: Arguments, *, transaction: JobTransaction | None = None, planned: tuple[Plan, ...] = ()
) -> Plan:
    """Check a backup; QMPError.  ``planned``: others of the same transaction, whose names and targets are taken.

    The bitmap is checked by the engine, when it has become what the transaction makes of it.
    """
    graph = desk.graph
    source, target = graph.find(options["device"]), graph.find(options["target"])
    check_source(source)
    served = graph.image(source)
    if source is target or source.file().identity() == target.file().identity():
        raise QMPError("Source and target cannot be the same")
    if options.get("compress", False):
        raise QMPError("Compression is not supported for this drive ")
    if options.get("discard-source", False) and not isinstance(source, AccessNode):
        raise QMPError("discard-source would discard the image itself: only a snapshot can be let go of")
    _check_target(graph, source, target, planned)
    perf = options.get("x-perf", {})
    if not 1 <= perf.get("max-workers", 64) <= MAX_WORKERS:
        raise QMPError(f"max-workers must be between 1 and {MAX_WORKERS}")
    if perf.get("max-chunk", 0) < 0:
        raise QMPError("max-chunk must be zero (which means no limit) or positive")
    if source.file().size_bytes() != target.file().size_bytes():
        raise QMPError("Source and target image have different sizes")
    filter_name = options.get("filter-node-name")
    if filter_name is not None:
        try:
            graph.check_name(filter_name)
        except QMPError as error:
            raise QMPError(f"Could not create node: {error.desc}") from None
    cluster_size = served.coordinator.segment.geometry.cluster_size
    if 0 < perf.get("max-chunk", 0) < cluster_size:
        raise QMPError(f"Required max-chunk ({perf['max-chunk']}) is less than backup cluster size ({cluster_size})")
    check_cluster_size_min(perf, cluster_size)
    job_id = options.get("job-id", served.node.name if served.device and served.node is source else "")
    if not well_formed(job_id):
        raise QMPError(f"Invalid job ID '{job_id}'")
    if job_id in {plan.job_id for plan in planned} or job_id in {job.id for _, job in desk.jobs()}:
        raise QMPError(f"Job ID '{job_id}' already in use")
    if options.get("speed", 0) < 0:
        raise QMPError("Parameter 'speed' expects a non-negative value")
    snapshot = source.snapshot if isinstance(source, AccessNode) else None
    backup = _backup(served, target.file().path, job_id, options, transaction, snapshot)
    return Plan(served, backup, JobNodes(job_id, source, target, filter_name))


def check_cluster_size_min(options: Arguments, cluster_size: int) -> None:
    """Whether clusters of an image are as large as ``min-cluster-size`` wants them; QMPError.

    QEMU makes them as large, for each job its own.  Here an image has one cluster size, chosen when it is served.
    """
    wanted = options.get("min-cluster-size", 0)
    if wanted >= 1 << 63:
        raise QMPError(f"min-cluster-size too large: {wanted} > {(1 << 63) - 1}")
    if wanted & (wanted - 1):
        raise QMPError("min-cluster-size needs to be a power of 2")
    if wanted > cluster_size:
        raise QMPError(
            f"min-cluster-size {wanted} is above the image's cluster size {cluster_size}: serve it with "
            f"--cluster-size {wanted} (at most {CLUSTER_SIZE_MAX})"
        )


def check_source(source: Node) -> None:
    """Whether a node can be backed up: an image, or a snapshot.  QMPError."""
    if source.driver not in ("file", "host_device", "raw", "snapshot-access"):
        raise QMPError(f"node '{source.name}' ({source.driver}) is no image that can be backed up")


def _check_target(graph: Graph, source: Node, target: Node, planned: tuple[Plan, ...]) -> None:
    if target.driver not in ("file", "host_device", "raw"):
        raise QMPError(f"node '{target.name}' ({target.driver}) can't be written")
    identity = target.file().identity()
    if graph.is_target(target) or identity in {plan.nodes.target.file().identity() for plan in planned}:
        raise busy(target)
    if target.file().read_only:
        raise QMPError("Block node is read-only")


def _backup(
    served: Served,
    path: str,
    job_id: str,
    options: Arguments,
    transaction: JobTransaction | None,
    snapshot: CoordinatorSnapshot | None,
) -> Backup:
    sync = options["sync"]
    perf = options.get("x-perf", {})
    by_bitmap = sync in ("bitmap", "incremental")
    return Backup(
        served.coordinator,
        path,
        sync=sync,
        speed=options.get("speed", 0),
        on_cbw_error=options.get("on-cbw-error", "break-guest-write"),
        cbw_timeout=options.get("cbw-timeout", 0),
        overwrite=True,
        bitmap=options.get("bitmap"),
        bitmap_mode=options.get("bitmap-mode"),
        in_place=by_bitmap and _is_backup(path),
        manifest=sync in ("full", "top"),
        job_id=job_id,
        auto_finalize=options.get("auto-finalize", True),
        auto_dismiss=options.get("auto-dismiss", True),
        on_source_error=options.get("on-source-error", "report"),
        on_target_error=options.get("on-target-error", "report"),
        max_workers=min(perf.get("max-workers", 64), MAX_WORKERS),
        max_chunk=perf.get("max-chunk", 0),
        copy_range=perf.get("use-copy-range", False),
        transaction=transaction,
        source=snapshot,
        discard_source=options.get("discard-source", False),
    )


def _is_backup(path: str) -> bool:
    """Whether a bitmap's target is brought forward in place; QMPError if it is neither a backup nor empty."""
    if os.path.lexists(sidecar(path)):
        return True
    if os.stat(path).st_blocks:
        raise QMPError(
            f"target {path} is not empty and has no manifest: it can't be told whether the bitmap's changes fit it"
        )
    return False


def _backup_command(desk: Desk, options: Arguments) -> dict[str, Any]:
    # Before everything else, as QEMU does: do sync, bitmap and bitmap-mode go together?
    check_bitmap(desk, options)
    plan = plan_backup(desk, options)
    start(desk, [plan])
    return {}


def check_bitmap(desk: Desk, options: Arguments) -> None:
    """Whether sync, bitmap and bitmap-mode of a backup go together; QMPError, BitmapError."""
    graph = desk.graph
    source, _ = graph.find(options["device"]), graph.find(options["target"])
    check_source(source)
    bitmaps = graph.image(source).coordinator.bitmaps
    bitmaps.check_job(options["sync"], options.get("bitmap"), options.get("bitmap-mode"))
    check_no_bitmap(source, options)


def check_no_bitmap(source: Node, options: Arguments) -> None:
    """Bitmaps are of images: a snapshot has none.  QMPError, as QEMU says it of one that the node has not."""
    if isinstance(source, AccessNode) and "bitmap" in options:
        raise QMPError(f"Bitmap '{options['bitmap']}' could not be found")


def start(desk: Desk, plans: list[Plan], *, also: Sequence[Coordinator] = ()) -> None:
    """Take one cut for all plans, which also is a boundary for the bitmaps of further images.

    Whatever the engine raises, nothing has changed.
    """
    # Before: events of the jobs may come before this returns.
    for plan in plans:
        desk.graph.stand(plan.nodes)
    try:
        take_group([plan.backup for plan in plans], also=also)
    except BaseException:
        for plan in plans:
            desk.graph.let_go(plan.job_id)
        raise


HANDLERS: dict[str, Handler] = {"blockdev-backup": _backup_command}
