"""The Nth call on the daemon's sockets fails: that client is answered or parted from, and everybody else is served.

With the layer and the plan of `test_nth_call.py`; the daemon is ``shmcbw serve``, the client its command line's.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shmcbw.workers.qmp.client import Client
from tests.conftest import wait_for
from tests.faults.layer import Kind, Layer
from tests.faults.plan import faults, part
from tests.monitor import Connection, Monitored

SEED = int(os.environ.get("SHMCBW_SEED", "1"))
EVERYTHING = os.environ.get("SHMCBW_NTH_CALL") == "all"
PART_S = 2.0
#: For a client whose connection the daemon has no descriptor for.
PATIENCE_S = 2.0


class Impatient(Connection):
    def receive(self, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        return super().receive(timeout_s)


def converse(daemon: Monitored, bitmap: str) -> None:
    """What a client does: a question, a change, a question.  OSError, EOFError: it was parted from."""
    with Impatient(daemon.path, ours=True) as client:
        assert client.execute("query-name") == {}
        client.execute("block-dirty-bitmap-add", node="image", name=bitmap)
        assert bitmap in bitmaps(client)
        client.execute("block-dirty-bitmap-remove", node="image", name=bitmap)


def bitmaps(client: Client) -> list[str]:
    (node,) = [node for node in client.execute("query-named-block-nodes") if node["node-name"] == "image"]
    return [bitmap["name"] for bitmap in node.get("dirty-bitmaps", [])]


@pytest.mark.timeout(3600 if EVERYTHING else 120)
def test_a_call_on_a_socket_that_fails_costs_at_most_that_connection(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    print(f"SHMCBW_SEED={SEED}")
    chance = random.Random(SEED)
    image = make_image(1 << 20, "image")
    layer = Layer(tmp_path)
    layer.watch(image, tmp_path / "targets", tmp_path / "state")
    with Monitored(tmp_path, str(image), environment=layer.environment("coordinator")) as daemon:
        bystander = Connection(daemon.path, ours=True)
        layer.watch(image, tmp_path / "targets", tmp_path / "state")
        converse(daemon, "counted")
        expected = {Kind("coordinator", call, "socket") for call in ("accept", "recv", "send", "close", "getsockopt")}
        wait_for(lambda: expected <= set(layer.counts()), "the layer has seen what a conversation is made of")
        counts = {kind: count for kind, count in layer.counts().items() if kind.touched == "socket"}
        held = wait_for_quiet(daemon)
        deadline = time.monotonic() + (float("inf") if EVERYTHING else PART_S)
        fired = 0
        for number, fault in enumerate(part(faults(counts, chance), chance)):
            if time.monotonic() > deadline and fired:
                break
            layer.arm(fault)
            try:
                converse(daemon, f"b{number}")
            except TimeoutError:
                assert fault.kind.call == "accept", f"{fault}: the daemon says nothing"
            except (OSError, EOFError):
                pass
            fired += layer.fired > 0
            layer.disarm()
            # Whatever became of that client, the change was made or not, and the others are served.
            assert daemon.process.poll() is None, f"{fault}: the daemon died"
            if not is_served(bystander):
                bystander.close()
                bystander = Connection(daemon.path, ours=True)
            with Connection(daemon.path, ours=True) as client:
                for left in bitmaps(client):
                    client.execute("block-dirty-bitmap-remove", node="image", name=left)
            wait_for(lambda: len(holdings(daemon)) <= len(held), f"{fault}: nothing is held of clients that left")
        bystander.close()
        print(f"{fired} faults came to be")
    layer.close()


def is_served(client: Connection) -> bool:
    """A fault may hit any client: also one that does nothing but listen."""
    try:
        return client.ask("query-name") == {"return": {}}
    except (OSError, EOFError):
        return False


def holdings(daemon: Monitored) -> list[str]:
    return os.listdir(f"/proc/{daemon.process.pid}/fd")


def wait_for_quiet(daemon: Monitored) -> list[str]:
    """Its descriptors when only the bystander is there."""
    with Connection(daemon.path, ours=True):
        more = holdings(daemon)
    wait_for(lambda: len(holdings(daemon)) < len(more), "a client's descriptor is closed")
    return holdings(daemon)
