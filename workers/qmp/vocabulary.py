"""The commands, types and events that we speak.

Names and types of QEMU's commands are QEMU's (7.2, with what later versions added where we have it); what is ours
begins with ``x-shmcbw-``.  What QEMU has and we do not is not declared, so asking for it is refused by name.
"""

from __future__ import annotations

from .schema import (
    ANY,
    BOOLEAN,
    EMPTY,
    INTEGER,
    NUMBER,
    STRING,
    UINT32,
    UINT64,
    Alternate,
    Command,
    Enum,
    Event,
    List,
    Member,
    Object,
    optional,
)

# -- types ------------------------------------------------------------------------------------------------------------

VERSION_TRIPLE = Object("VersionTriple", Member("major", INTEGER), Member("minor", INTEGER), Member("micro", INTEGER))
VERSION_INFO = Object("VersionInfo", Member("qemu", VERSION_TRIPLE), Member("package", STRING))
NAME_INFO = Object("NameInfo", optional("name", STRING))
COMMAND_INFO = Object("CommandInfo", Member("name", STRING))
RUN_STATE = Enum("RunState", "running", "shutdown")
STATUS_INFO = Object(
    "StatusInfo", Member("running", BOOLEAN), Member("singlestep", BOOLEAN), Member("status", RUN_STATE)
)

SYNC = Enum("MirrorSyncMode", "top", "full", "none", "incremental", "bitmap")
BITMAP_MODE = Enum("BitmapSyncMode", "on-success", "never", "always")
ON_ERROR = Enum("BlockdevOnError", "report", "ignore", "enospc", "stop", "auto")
ON_CBW_ERROR = Enum("OnCbwError", "break-guest-write", "break-snapshot")
JOB_STATUS = Enum(
    "JobStatus",
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
)
JOB_TYPE = Enum("JobType", "backup")
IO_STATUS = Enum("BlockDeviceIoStatus", "ok", "failed", "nospace")
COMPLETION_MODE = Enum("ActionCompletionMode", "individual", "grouped")

DRIVER = Enum("BlockdevDriver", "copy-before-write", "file", "host_device", "raw", "snapshot-access")
BLOCKDEV_REF = Alternate("BlockdevRef", STRING, EMPTY)
DISCARD = Enum("BlockdevDiscardOptions", "ignore", "unmap")
DETECT_ZEROES = Enum("BlockdevDetectZeroesOptions", "off", "on", "unmap")
CACHE = Object("BlockdevCacheOptions", optional("direct", BOOLEAN), optional("no-flush", BOOLEAN))
AIO = Enum("BlockdevAioOptions", "threads", "native", "io_uring")
ON_OFF_AUTO = Enum("OnOffAuto", "auto", "on", "off")
BITMAP_PLACE = Object("BlockDirtyBitmap", Member("node", STRING), Member("name", STRING))
BITMAP_OR_NAME = Alternate("BlockDirtyBitmapOrStr", STRING, BITMAP_PLACE)

_FILE = (
    Member("filename", STRING, "path of the image"),
    optional("locking", ON_OFF_AUTO, "no effect: a served image is always locked"),
    optional("aio", AIO, "no effect: nothing is read or written through a node"),
)
BLOCKDEV_OPTIONS = Object(
    "BlockdevOptions",
    Member("driver", DRIVER),
    optional("node-name", STRING, "begins with a letter, then letters, digits, `-`, `.`, `_`; at most 31 characters"),
    optional("read-only", BOOLEAN, "refused later as a target"),
    optional("auto-read-only", BOOLEAN, "no effect"),
    optional("discard", DISCARD, "no effect: what is let go of is always given back"),
    optional("cache", CACHE, "no effect"),
    optional("detect-zeroes", DETECT_ZEROES, "no effect: zeroes are always found"),
    optional("force-share", BOOLEAN, "no effect"),
    tag="driver",
    variants={
        "file": Object("BlockdevOptionsFile", *_FILE),
        "host_device": Object("BlockdevOptionsHostDevice", *_FILE),
        "raw": Object("BlockdevOptionsRaw", Member("file", BLOCKDEV_REF)),
        "copy-before-write": Object(
            "BlockdevOptionsCbw",
            Member("file", BLOCKDEV_REF, "the image; adding this node takes the snapshot"),
            Member("target", BLOCKDEV_REF, "scratch: a file of the image's size; old data goes to a file beside it"),
            optional("bitmap", BITMAP_PLACE, "the snapshot shows only what is in this bitmap"),
            optional("on-cbw-error", ON_CBW_ERROR, "default break-guest-write, as in QEMU"),
            optional("cbw-timeout", UINT32, "seconds, 0: none"),
            optional("min-cluster-size", UINT64, "a power of two, 0: none; refused above the image's cluster size"),
        ),
        "snapshot-access": Object(
            "BlockdevOptionsSnapshotAccess", Member("file", BLOCKDEV_REF, "a copy-before-write node")
        ),
    },
)
BLOCKDEV_REF.define(BLOCKDEV_OPTIONS)

BITMAP_INFO = Object(
    "BlockDirtyInfo",
    optional("name", STRING),
    Member("count", INTEGER, "bytes"),
    Member("granularity", UINT32),
    Member("recording", BOOLEAN),
    Member("busy", BOOLEAN),
    Member("persistent", BOOLEAN),
    optional("inconsistent", BOOLEAN),
)
CACHE_INFO = Object(
    "BlockdevCacheInfo", Member("writeback", BOOLEAN), Member("direct", BOOLEAN), Member("no-flush", BOOLEAN)
)
IMAGE_INFO = Object(
    "ImageInfo",
    Member("filename", STRING),
    Member("format", STRING),
    optional("dirty-flag", BOOLEAN),
    Member("actual-size", INTEGER),
    Member("virtual-size", INTEGER),
    optional("cluster-size", INTEGER),
)
NODE_INFO = Object(
    "BlockDeviceInfo",
    Member("file", STRING),
    Member("node-name", STRING),
    Member("ro", BOOLEAN),
    Member("drv", STRING),
    Member("backing_file_depth", INTEGER),
    Member("encrypted", BOOLEAN),
    Member("detect_zeroes", DETECT_ZEROES),
    *(Member(name, INTEGER, "always 0") for name in ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")),
    Member("write_threshold", INTEGER, "always 0"),
    Member("image", IMAGE_INFO),
    Member("cache", CACHE_INFO),
    optional("dirty-bitmaps", List(BITMAP_INFO)),
)
BLOCK_INFO = Object(
    "BlockInfo",
    Member("device", STRING),
    Member("type", STRING),
    Member("removable", BOOLEAN),
    Member("locked", BOOLEAN),
    optional("inserted", NODE_INFO),
)
JOB_INFO = Object(
    "JobInfo",
    Member("id", STRING),
    Member("type", JOB_TYPE),
    Member("status", JOB_STATUS),
    Member("current-progress", INTEGER, "bytes"),
    Member("total-progress", INTEGER, "bytes"),
    optional("error", STRING),
)
BLOCK_JOB_INFO = Object(
    "BlockJobInfo",
    Member("type", JOB_TYPE),
    Member("device", STRING, "the job's id"),
    Member("len", INTEGER, "bytes"),
    Member("offset", INTEGER, "bytes that need no more copying"),
    Member("busy", BOOLEAN),
    Member("paused", BOOLEAN),
    Member("speed", INTEGER),
    Member("io-status", IO_STATUS),
    Member("ready", BOOLEAN),
    Member("status", JOB_STATUS),
    Member("auto-finalize", BOOLEAN),
    Member("auto-dismiss", BOOLEAN),
    optional("error", STRING),
)

BACKUP_PERF = Object(
    "BackupPerf",
    optional("use-copy-range", BOOLEAN, "copy by copy_file_range, which can share the data, until that fails once"),
    optional("max-workers", INTEGER, "background copies at once, default 64"),
    optional("max-chunk", INTEGER, "bytes of a background copy, 0: no limit"),
    optional("min-cluster-size", UINT64, "a power of two, 0: none; refused above the image's cluster size"),
)
BLOCKDEV_BACKUP = Object(
    "BlockdevBackup",
    optional("job-id", STRING, "begins with a letter; needed unless `device` is the name of a served image"),
    Member("device", STRING, "node to back up: an image, or a snapshot-access node"),
    Member("sync", SYNC),
    optional("speed", INTEGER, "background bytes a second, 0: no limit"),
    optional("bitmap", STRING),
    optional("bitmap-mode", BITMAP_MODE),
    optional("compress", BOOLEAN, "refused: raw images can't be"),
    optional("on-source-error", ON_ERROR, "default report"),
    optional("on-target-error", ON_ERROR, "default report"),
    optional("on-cbw-error", ON_CBW_ERROR, "default break-guest-write, as in QEMU"),
    optional("cbw-timeout", UINT32, "ours: seconds that a write waits for a copy, 0: none"),
    optional("auto-finalize", BOOLEAN, "default true"),
    optional("auto-dismiss", BOOLEAN, "default true"),
    optional("filter-node-name", STRING, "name of the node that shows the job's filter"),
    optional("discard-source", BOOLEAN, "let go of what is copied; only of a snapshot-access node"),
    optional("x-perf", BACKUP_PERF),
    Member("target", STRING, "node of an existing file of the image's size"),
)
BITMAP_ADD = Object(
    "BlockDirtyBitmapAdd",
    Member("node", STRING),
    Member("name", STRING, "1 to 1023 characters"),
    optional("granularity", UINT32, "bytes, a power of two from 512; default 64 KiB"),
    optional("persistent", BOOLEAN, "kept over a clean shutdown"),
    optional("disabled", BOOLEAN),
)
BITMAP_MERGE = Object(
    "BlockDirtyBitmapMerge",
    Member("node", STRING),
    Member("target", STRING),
    Member("bitmaps", List(BITMAP_OR_NAME), "granularities may differ"),
)


def _wrapped(kind: Object) -> Object:
    return Object(f"{kind.name}Wrapper", Member("data", kind))


_ABORT = Object("Abort")
ACTIONS = {
    "abort": _ABORT,
    "block-dirty-bitmap-add": BITMAP_ADD,
    "block-dirty-bitmap-remove": BITMAP_PLACE,
    "block-dirty-bitmap-clear": BITMAP_PLACE,
    "block-dirty-bitmap-enable": BITMAP_PLACE,
    "block-dirty-bitmap-disable": BITMAP_PLACE,
    "block-dirty-bitmap-merge": BITMAP_MERGE,
    "blockdev-backup": BLOCKDEV_BACKUP,
}
_WRAPPERS: dict[str, Object] = {kind.name: _wrapped(kind) for kind in ACTIONS.values()}
TRANSACTION_ACTION = Object(
    "TransactionAction",
    Member("type", Enum("TransactionActionKind", *ACTIONS)),
    tag="type",
    variants={name: _WRAPPERS[kind.name] for name, kind in ACTIONS.items()},
)
TRANSACTION_PROPERTIES = Object(
    "TransactionProperties", optional("completion-mode", COMPLETION_MODE, "default individual")
)

EXPORT_TYPE = Enum("BlockExportType", "nbd")
EXPORT_OPTIONS = Object(
    "BlockExportOptions",
    Member("type", EXPORT_TYPE),
    Member("id", STRING, "begins with a letter, then letters, digits, `-`, `.`, `_`"),
    Member("node-name", STRING, "an image, or a snapshot-access node"),
    optional("writable", BOOLEAN, "of a snapshot: discards only, which let go of what was read"),
    optional("writethrough", BOOLEAN, "each write is on the disk before it is answered"),
    tag="type",
    variants={
        "nbd": Object(
            "BlockExportOptionsNbd",
            optional("name", STRING, "default the node's name"),
            optional("description", STRING),
            optional("bitmaps", List(BITMAP_OR_NAME), "shown as qemu:dirty-bitmap:NAME, and in use meanwhile"),
        )
    },
)
EXPORT_INFO = Object(
    "BlockExportInfo",
    Member("id", STRING),
    Member("type", EXPORT_TYPE),
    Member("node-name", STRING),
    Member("shutting-down", BOOLEAN),
)
SOCKET_ADDRESS = Object(
    "SocketAddressLegacy",
    Member("type", Enum("SocketAddressType", "inet", "unix")),
    tag="type",
    variants={
        "inet": _wrapped(
            Object(
                "InetSocketAddress",
                Member("host", STRING, "empty: this machine only"),
                Member("port", STRING, "a number; 0 takes any"),
            )
        ),
        "unix": _wrapped(Object("UnixSocketAddress", Member("path", STRING))),
    },
)
OBJECT_OPTIONS = Object(
    "ObjectOptions",
    Member("qom-type", Enum("ObjectType", "tls-creds-x509")),
    Member("id", STRING),
    tag="qom-type",
    variants={
        "tls-creds-x509": Object(
            "TlsCredsX509Properties",
            optional("verify-peer", BOOLEAN, "clients must show a certificate; default true"),
            optional("dir", STRING, "of server-cert.pem, server-key.pem and, to verify, ca-cert.pem"),
            optional(
                "endpoint", Enum("QCryptoTLSCredsEndpoint", "client", "server"), "default client, which is refused"
            ),
        )
    },
)

WAIT_BUCKET = Object(
    "ShmcbwWaitBucket",
    Member("below-ns", INTEGER, "waits shorter than this, and not in an earlier one"),
    Member("count", INTEGER),
)
WAITS = Object(
    "ShmcbwWaits",
    Member("count", INTEGER, "writes of today's writers that waited for a copy"),
    Member("total-ns", INTEGER),
    Member("max-ns", INTEGER),
    Member("histogram", List(WAIT_BUCKET)),
)
EXTENT = Object(
    "ShmcbwExtent",
    Member("offset", INTEGER),
    Member("length", INTEGER),
    Member("status", Enum("ShmcbwExtentStatus", "data", "zero", "inaccessible")),
)
FAILPOINT = Object("ShmcbwFailpoint", Member("name", STRING), Member("protocol", STRING), Member("step", STRING))

SHMCBW_BACKUP = Object(
    "ShmcbwBackup",
    Member("image", STRING, "path of a served image"),
    Member("target-file", STRING, "path of the target, which is made"),
    optional(
        "sync", Enum("ShmcbwSync", *SYNC.values, "auto"), "auto: incremental if the bitmap can be trusted, else full"
    ),
    optional("since", STRING, "a bitmap"),
    optional("bitmap-mode", BITMAP_MODE),
    optional("in-place", BOOLEAN, "bring an older backup forward"),
    optional("manifest", BOOLEAN, "take checksums, and say what the target holds"),
    optional("overwrite", BOOLEAN, "an existing target of the same size may be replaced"),
    optional("persistent", BOOLEAN, "of a bitmap that auto makes"),
    optional("job-id", STRING),
    optional("speed", INTEGER, "background bytes a second, 0: no limit"),
    optional("on-cbw-error", ON_CBW_ERROR, "default break-snapshot"),
    optional("cbw-timeout", NUMBER, "seconds, 0: none; default 30"),
)

# -- commands ---------------------------------------------------------------------------------------------------------

_NODE = Member("node-name", STRING)
_JOB = Member("id", STRING)
_DEVICE = Member("device", STRING, "the job's id")
_CHANGE = (_JOB, Member("type", JOB_TYPE, "that of the job"))
_RANGE = (Member("offset", INTEGER, "bytes"), Member("length", INTEGER, "bytes"))

COMMANDS = (
    Command(
        "qmp_capabilities",
        "Ends negotiation; must be the first command.",
        optional("enable", List(Enum("QMPCapability", "oob")), "there is none to enable"),
    ),
    Command(
        "query-version",
        "The version of shmcbw, in the place where clients look for QEMU's.",
        gives=VERSION_INFO,
        alters=False,
    ),
    Command("query-commands", "The names of all commands.", gives=List(COMMAND_INFO), alters=False),
    Command("query-qmp-schema", "Commands, events and their types.", gives=List(ANY), alters=False),
    Command("query-status", "Whether the daemon serves or is about to end.", gives=STATUS_INFO, alters=False),
    Command("query-name", "The name given with `--name`.", gives=NAME_INFO, alters=False),
    Command("quit", "Ends the daemon as SIGTERM does."),
    Command("blockdev-add", "Adds a node. `copy-before-write` takes a snapshot.", takes=BLOCKDEV_OPTIONS),
    Command("blockdev-del", "Removes a node that nothing uses.", _NODE),
    Command(
        "query-named-block-nodes",
        "All nodes, the youngest first, with their dirty bitmaps.",
        optional("flat", BOOLEAN, "no effect: there are no backing files"),
        gives=List(NODE_INFO),
        alters=False,
    ),
    Command("query-block", "The served images, each as a device.", gives=List(BLOCK_INFO), alters=False),
    Command(
        "block_resize",
        "Grows a served image, writers follow; refused while it has snapshots.  Another file may shrink too.",
        optional("device", STRING),
        optional("node-name", STRING),
        Member("size", INTEGER, "bytes"),
    ),
    Command("blockdev-backup", "Starts a backup; the cut is taken before it returns.", takes=BLOCKDEV_BACKUP),
    Command("job-pause", "Pauses background copying; writers' copies go on.", _JOB),
    Command("job-resume", "Goes on with a paused job.", _JOB),
    Command("job-cancel", "Cancels a job; its unfinished target is removed.", _JOB),
    Command("job-complete", "For a job in state `ready`, which no backup ever is.", _JOB),
    Command("job-change", "For a job of another type than backup, which there is none of.", *_CHANGE),
    Command("job-finalize", "Lets a job in state `pending` come to its end.", _JOB),
    Command("job-dismiss", "Forgets a concluded job.", _JOB),
    Command("query-jobs", "All jobs.", gives=List(JOB_INFO), alters=False),
    Command("block-job-pause", "As job-pause.", _DEVICE),
    Command("block-job-resume", "As job-resume.", _DEVICE),
    Command("block-job-cancel", "As job-cancel.", _DEVICE, optional("force", BOOLEAN, "also while it is paused")),
    Command("block-job-complete", "As job-complete.", _DEVICE),
    Command("block-job-change", "As job-change.", *_CHANGE),
    Command("block-job-finalize", "As job-finalize.", _JOB),
    Command("block-job-dismiss", "As job-dismiss.", _JOB),
    Command(
        "block-job-set-speed",
        "Changes a job's rate limit at once.",
        _DEVICE,
        Member("speed", INTEGER, "bytes a second, 0: no limit"),
    ),
    Command("query-block-jobs", "All jobs, with what block jobs have.", gives=List(BLOCK_JOB_INFO), alters=False),
    Command("block-dirty-bitmap-add", "Adds a dirty bitmap, which begins empty.", takes=BITMAP_ADD),
    Command("block-dirty-bitmap-remove", "Removes a dirty bitmap, also an inconsistent one.", takes=BITMAP_PLACE),
    Command("block-dirty-bitmap-clear", "Empties a dirty bitmap.", takes=BITMAP_PLACE),
    Command("block-dirty-bitmap-enable", "Has a dirty bitmap follow writes.", takes=BITMAP_PLACE),
    Command("block-dirty-bitmap-disable", "Has a dirty bitmap stay as it is, whatever is written.", takes=BITMAP_PLACE),
    Command("block-dirty-bitmap-merge", "Adds what is in other bitmaps.", takes=BITMAP_MERGE),
    Command(
        "x-debug-block-dirty-bitmap-sha256",
        "A hash of a bitmap's content, to compare by.",
        takes=BITMAP_PLACE,
        gives=Object("BlockDirtyBitmapSha256", Member("sha256", STRING)),
    ),
    Command(
        "transaction",
        "All of these or none; with one cut for all images.",
        Member("actions", List(TRANSACTION_ACTION)),
        optional("properties", TRANSACTION_PROPERTIES),
    ),
    Command(
        "nbd-server-start",
        "Listens for NBD clients.",
        Member("addr", SOCKET_ADDRESS),
        optional("tls-creds", STRING, "id of a tls-creds-x509 object: everything is encrypted"),
        optional("max-connections", UINT32, "clients at once, more of them wait; 0: no limit"),
    ),
    Command("nbd-server-stop", "Ends all exports, and listens no more."),
    Command("block-export-add", "Serves a node over NBD; restarted, the daemon serves it again.", takes=EXPORT_OPTIONS),
    Command(
        "block-export-del",
        "Ends an export.",
        Member("id", STRING),
        optional("mode", Enum("BlockExportRemoveMode", "safe", "hard"), "default safe: refused while clients use it"),
    ),
    Command("query-block-exports", "All exports, the youngest first.", gives=List(EXPORT_INFO), alters=False),
    Command("object-add", "Names certificates for nbd-server-start.", takes=OBJECT_OPTIONS),
    Command("object-del", "Forgets them; a server that runs keeps what it has.", Member("id", STRING)),
    Command(
        "x-shmcbw-backup",
        "Backups by path, with one cut for all; the command line's. Such jobs stay, the last 100 of them.",
        Member("backups", List(SHMCBW_BACKUP)),
        gives=Object(
            "ShmcbwStarted",
            Member("jobs", List(STRING), "ids, in order"),
            Member("notes", List(STRING), "what auto has decided"),
        ),
    ),
    Command("x-shmcbw-query-job", "All that is known of a job.", _JOB, gives=ANY, alters=False),
    Command(
        "x-shmcbw-find-image",
        "The node of a served image.",
        Member("filename", STRING),
        gives=Object("ShmcbwNode", Member("node-name", STRING)),
        alters=False,
    ),
    Command("x-shmcbw-query-image", "What `shmcbw status` shows of an image.", _NODE, gives=ANY, alters=False),
    Command("x-shmcbw-query-waits", "How long writes waited for copies.", _NODE, gives=WAITS, alters=False),
    Command("x-shmcbw-query-slots", "The writers of an image.", _NODE, gives=List(ANY), alters=False),
    Command("x-shmcbw-query-workers", "The copy workers of an image.", _NODE, gives=List(ANY), alters=False),
    Command(
        "x-shmcbw-query-snapshots",
        "The snapshots of an image; a broken one says why.",
        _NODE,
        gives=List(ANY),
        alters=False,
    ),
    Command("x-shmcbw-query-failpoints", "Where a test can make a process fail.", gives=List(FAILPOINT), alters=False),
    Command(
        "x-shmcbw-set-failpoint",
        "Arms a failpoint of an image, for processes started with `SHMCBW_FAILPOINTS=segment`.",
        _NODE,
        Member("name", STRING),
        Member("action", STRING, "`kill`, `stop`, `delay:MS`, `errno:NAME`, with `@SKIP` and `*TIMES`; empty: disarm"),
    ),
    Command(
        "x-shmcbw-snapshot-add",
        "Takes a snapshot of an image by its path, as a copy-before-write node; the command line's.",
        _NODE,
        Member("image", STRING, "path of a served image"),
        Member("scratch-file", STRING, "path of the scratch, which is made and goes with the snapshot"),
        optional("on-cbw-error", ON_CBW_ERROR, "default break-snapshot"),
        optional("cbw-timeout", NUMBER, "seconds, 0: none; default 30"),
    ),
    Command(
        "x-shmcbw-snapshot-read",
        "Reads a snapshot-access node: at most 1 MiB.",
        _NODE,
        *_RANGE,
        gives=Object("ShmcbwData", Member("data", STRING, "in base64")),
    ),
    Command(
        "x-shmcbw-snapshot-status",
        "The extents of a range of a snapshot-access node.",
        _NODE,
        *_RANGE,
        gives=List(EXTENT),
    ),
    Command(
        "x-shmcbw-snapshot-discard",
        "Lets go of the whole clusters inside a range of a snapshot-access node.",
        _NODE,
        *_RANGE,
    ),
)

# -- events -----------------------------------------------------------------------------------------------------------

_BLOCK_JOB = (
    Member("type", JOB_TYPE),
    Member("device", STRING, "the job's id"),
    Member("len", INTEGER),
    Member("offset", INTEGER),
    Member("speed", INTEGER),
)

EVENTS = (
    Event("JOB_STATUS_CHANGE", "A job has reached a state.", _JOB, Member("status", JOB_STATUS)),
    Event("BLOCK_JOB_COMPLETED", "A job has ended, well or with `error`.", *_BLOCK_JOB, optional("error", STRING)),
    Event("BLOCK_JOB_CANCELLED", "A job was cancelled.", *_BLOCK_JOB),
    Event(
        "BLOCK_JOB_ERROR",
        "Background copying met an error; at most once a second for a job that ignores them.",
        _DEVICE,
        Member("operation", Enum("IoOperationType", "read", "write")),
        Member("action", Enum("BlockErrorAction", "ignore", "report", "stop")),
        optional("x-shmcbw-count", INTEGER, "errors since the last event"),
    ),
    Event("BLOCK_JOB_PENDING", "A job waits for job-finalize.", Member("type", JOB_TYPE), _JOB),
    Event(
        "SNAPSHOT_BROKEN",
        "Ours: a snapshot can't be right any more, and every read of it fails.",
        Member("filename", STRING, "the image"),
        Member("snapshot", INTEGER, "its index, as in x-shmcbw-query-snapshots"),
        Member("serial", INTEGER, "its serial number"),
        optional("job", STRING, "the job that fails with it"),
        Member("errno", INTEGER),
        Member("error", STRING),
        Member("cluster", INTEGER),
        Member("offset", INTEGER, "bytes: where the first failure was"),
        Member("time", NUMBER, "seconds since 1970"),
    ),
    Event("BLOCK_EXPORT_DELETED", "An export has ended, and its clients are gone.", Member("id", STRING)),
    Event("SHUTDOWN", "The daemon ends.", Member("guest", BOOLEAN), Member("reason", STRING)),
)

BY_NAME = {command.name: command for command in COMMANDS}
