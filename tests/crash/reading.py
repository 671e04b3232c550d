"""A snapshot's reader in a process of its own: ``python -m tests.crash.reading IMAGE OUT``.

Reads the only snapshot into OUT, then discards its last cluster.  Exit status 5: it is broken.
"""

from __future__ import annotations

import sys
from pathlib import Path

from shmcbw.errors import SnapshotBrokenError
from shmcbw.reader import open_snapshot


def main(image: str, out: str) -> int:
    try:
        with open_snapshot(image) as reader:
            cluster = reader.cluster_size_bytes
            data = b"".join(reader.pread(cluster, offset) for offset in range(0, reader.size_bytes, cluster))
            reader.discard(cluster, reader.size_bytes - cluster)
    except SnapshotBrokenError:
        return 5
    Path(out).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
