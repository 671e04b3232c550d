"""Tools that others wrote, as clients: all read one instant, while others write, and what they write is there."""

from __future__ import annotations

import hashlib
import os
import ssl
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shmcbw
from shmcbw.workers import Coordinator
from shmcbw.workers.nbd.address import listen_tcp, listen_unix
from shmcbw.workers.nbd.server import Server
from shmcbw.workers.nbd.specification import ExportSpec, Tls
from tests.conftest import needs_root, wait_for
from tests.monitor import StorageDaemon
from tests.processes import running, write_pairs_forever

SIZE = 8 << 20
CLUSTER = 65_536


def run(*command: str, timeout: float = 60) -> str:
    """The output of a tool that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def server(coordinator: Coordinator, tmp_path: Path) -> Iterator[Server]:
    path = str(tmp_path / "nbd.sock")
    with Server(listen_unix(path), path=path) as server:
        server.add(ExportSpec("disk", coordinator.path, writable=True))
        yield server


@pytest.fixture
def uri(server: Server) -> Callable[[str], str]:
    return lambda name: f"nbd+unix:///{name}?socket={server.address}"


def test_nbdinfo_sees_what_is_offered(server: Server, uri: Callable[[str], str]) -> None:
    found = run("nbdinfo", "--list", uri(""))
    for line in (
        'export="disk"',
        f"export-size: {SIZE}",
        "can_multi_conn: true",
        "can_fast_zero: true",
        "can_df: true",
    ):
        assert line in found


def test_qemu_io_patterns_are_read_back(server: Server, uri: Callable[[str], str], image: Path) -> None:
    run(
        "qemu-io", "-f", "raw", uri("disk"),
        "-c", "write -P 0xaa 100 70000", "-c", "write -z 1M 100k", "-c", "write -zu 2M 64k", "-c", "discard 3M 128k",
        "-c", "write -f -P 0xbb 4M 512", "-c", "flush",
        "-c", "read -P 0xaa 100 70000", "-c", "read -P 0 1M 100k", "-c", "read -P 0 2M 64k", "-c", "read -P 0 3M 128k",
        "-c", "read -P 0xbb 4M 512",
    )  # fmt: skip
    assert image.read_bytes()[100:70100] == b"\xaa" * 70000


def test_nbdcopy_and_qemu_img_copy_an_image_in_and_out(
    server: Server, uri: Callable[[str], str], image: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_bytes(os.urandom(SIZE))
    run("nbdcopy", str(other), uri("disk"))
    assert image.read_bytes() == other.read_bytes()
    run("nbdcopy", uri("disk"), str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == other.read_bytes()
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri("disk"), str(tmp_path / "converted"))
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri("disk"), str(tmp_path / "converted"))


@pytest.mark.parametrize("tool", ["nbdcopy", "qemu-img convert"])
def test_a_sparse_copy_of_a_snapshot_is_the_cut_whatever_was_zeroed_since(
    coordinator: Coordinator, server: Server, uri: Callable[[str], str], image: Path, tmp_path: Path, tool: str
) -> None:
    """QEMU 7.2 answers block status from today's source: after these steps its sparse copies are silently wrong."""
    with image.open("r+b") as file:
        # A hole at the cut, too: it must be one in the map, and only it.
        file.truncate(SIZE // 2)
        file.truncate(SIZE)
    before = image.read_bytes()
    with coordinator.snapshot(tmp_path / "scratch") as snapshot, shmcbw.open(image) as disk:
        server.add(ExportSpec("snapshot", str(image), snapshot.serial))
        run(
            "qemu-io", "-f", "raw", uri("disk"),
            "-c", "write -zu 0 4k", "-c", "write -zu 64k 64k", "-c", "discard 256k 4k", "-c", "discard 512k 128k",
            "-c", "write -z 1M 4k", "-c", "write -P 1 5M 4k",
        )  # fmt: skip
        disk.pdiscard(3 * CLUSTER, 20 * CLUSTER)
        found = run("nbdinfo", "--map", uri("snapshot"))
        extents = [line.split()[:3] for line in found.splitlines()]
        assert all(kind == "0" for start, length, kind in extents if int(start) + int(length) <= SIZE // 2), found
        assert any(kind == "3" for start, _, kind in extents if int(start) >= SIZE // 2), found
        out = str(tmp_path / "out")
        command = ["nbdcopy"] if tool == "nbdcopy" else ["qemu-img", "convert", "-f", "raw", "-O", "raw"]
        run(*command, uri("snapshot"), out)
        assert Path(out).read_bytes() == before
        assert os.stat(out).st_blocks * 512 < SIZE, "holes stay holes"
        server.remove("snapshot", hard=True)


def begin_pair(image: Path) -> tuple[int, int]:
    """Where the two numbers of `write_pairs_forever` are: both begin at 0."""
    pair = 1 << 20, 6 << 20
    with image.open("r+b") as file:
        for offset in pair:
            file.seek(offset)
            file.write(bytes(8))
    return pair


def test_what_is_copied_while_others_write_is_one_instant(
    coordinator: Coordinator, server: Server, uri: Callable[[str], str], image: Path, tmp_path: Path
) -> None:
    """The second of a pair is never ahead of the first; and two copies by different tools are the same."""
    first, second = begin_pair(image)
    with running(write_pairs_forever, str(image), first, second):
        for count in range(4):
            with coordinator.snapshot(tmp_path / f"scratch{count}") as snapshot:
                name = f"snapshot{count}"
                server.add(ExportSpec(name, str(image), snapshot.serial))
                copies = [tmp_path / f"{tool}{count}" for tool in ("nbdcopy", "convert")]
                run("nbdcopy", uri(name), str(copies[0]))
                run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri(name), str(copies[1]))
                data = copies[0].read_bytes()
                assert data == copies[1].read_bytes()
                one, two = (int.from_bytes(data[at : at + 8], "little") for at in (first, second))
                assert one in (two, two + 1)
                server.remove(name, hard=True)


def test_fio_verifies_its_own_writes_while_cuts_are_taken(
    coordinator: Coordinator, server: Server, uri: Callable[[str], str], tmp_path: Path
) -> None:
    fio = subprocess.Popen(
        [
            "fio", "--name=verify", "--ioengine=nbd", f"--uri={uri('disk')}", "--rw=randwrite", "--bs=4k",
            "--size=2m", "--offset_increment=2m", "--numjobs=4", "--iodepth=8", "--verify=crc32c", "--loops=3",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
    )  # fmt: skip
    cuts = 0
    while fio.poll() is None and cuts < 100:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            assert snapshot.pread(SIZE, 0) == snapshot.pread(SIZE, 0)
            cuts += 1
    output, _ = fio.communicate(timeout=60)
    assert fio.returncode == 0, output
    assert cuts > 0


def test_qemu_img_converts_a_snapshot_to_qcow2(
    coordinator: Coordinator, server: Server, image: Path, tmp_path: Path
) -> None:
    before = image.read_bytes()
    with coordinator.snapshot(tmp_path / "scratch") as snapshot, shmcbw.open(image) as disk:
        server.add(ExportSpec("snapshot", str(image), snapshot.serial))
        disk.pwrite(os.urandom(SIZE), 0)
        options = f"driver=nbd,server.type=unix,server.path={server.address},export=snapshot"
        run("qemu-img", "convert", "--image-opts", options, "-O", "qcow2", str(tmp_path / "out.qcow2"))
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(tmp_path / "out.qcow2"), str(tmp_path / "out"))
        assert (tmp_path / "out").read_bytes() == before
        server.remove("snapshot", hard=True)


def test_a_storage_daemon_backs_up_from_our_snapshot(
    coordinator: Coordinator, server: Server, image: Path, tmp_path: Path
) -> None:
    """Its own blockdev-backup, with our snapshot as the source, while others write."""
    first, second = begin_pair(image)
    target = tmp_path / "target"
    target.touch()
    os.truncate(target, SIZE)
    with (
        StorageDaemon(tmp_path) as daemon,
        running(write_pairs_forever, str(image), first, second),
        coordinator.snapshot(tmp_path / "scratch") as snapshot,
    ):
        server.add(ExportSpec("snapshot", str(image), snapshot.serial))
        client = daemon.connect()
        address = {"type": "unix", "path": str(server.address)}
        client.execute(
            "blockdev-add", driver="nbd", node_name="source", server=address, export="snapshot", read_only=True
        )
        client.execute("blockdev-add", driver="file", node_name="target", filename=str(target))
        client.execute("blockdev-backup", job_id="j", device="source", target="target", sync="full", auto_dismiss=False)
        client.wait_status("j", "concluded")
        assert client.execute("query-jobs")[0].get("error") is None
        client.execute("job-dismiss", id="j")
        for node in ("source", "target"):
            client.execute("blockdev-del", node_name=node)
        assert target.read_bytes() == snapshot.pread(SIZE, 0)
        one, two = (int.from_bytes(target.read_bytes()[at : at + 8], "little") for at in (first, second))
        assert one in (two, two + 1)
        server.remove("snapshot", hard=True)


def test_a_mounted_snapshot_is_a_file_that_any_program_reads(
    coordinator: Coordinator, server: Server, uri: Callable[[str], str], image: Path, tmp_path: Path
) -> None:
    needs_root("mounting with FUSE")
    before = image.read_bytes()
    mounted = tmp_path / "mounted"
    mounted.touch()
    with coordinator.snapshot(tmp_path / "scratch") as snapshot, shmcbw.open(image) as disk:
        server.add(ExportSpec("snapshot", str(image), snapshot.serial))
        fuse = subprocess.Popen(["nbdfuse", "-r", str(mounted), uri("snapshot")])
        try:
            wait_for(lambda: os.path.ismount(mounted) or fuse.poll() is not None, "it is mounted", 30)
            disk.pwrite(os.urandom(SIZE), 0)
            # An archiver as any other.
            run("tar", "-C", str(tmp_path), "-cf", str(tmp_path / "archive.tar"), "mounted")
            assert run("sha256sum", str(mounted)).split()[0] == hashlib.sha256(before).hexdigest()
        finally:
            subprocess.run(["umount", str(mounted)], check=False)
            try:
                assert fuse.wait(30) == 0
            finally:
                fuse.kill()
        with tarfile.open(tmp_path / "archive.tar") as archive:
            member = archive.extractfile("mounted")
            assert member is not None and member.read() == before
        server.remove("snapshot", hard=True)


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A directory as libnbd wants it: an authority, and a certificate of it for this machine."""
    directory = tmp_path / "certificates"
    directory.mkdir()
    authority = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    run("openssl", "req", *authority, "-subj", "/CN=authority", "-keyout", f"{directory}/ca-key.pem", "-out",
        f"{directory}/ca-cert.pem")  # fmt: skip
    signed = ["-CA", f"{directory}/ca-cert.pem", "-CAkey", f"{directory}/ca-key.pem"]
    for name in ("server", "client"):
        run("openssl", "req", *authority, *signed, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
            "-addext", "basicConstraints=critical,CA:FALSE",
            "-keyout", f"{directory}/{name}-key.pem", "-out", f"{directory}/{name}-cert.pem")  # fmt: skip
    return directory


def test_over_tcp_everything_is_encrypted_and_clients_need_a_certificate(
    coordinator: Coordinator, certificates: Path, image: Path, tmp_path: Path
) -> None:
    tls = Tls(*(str(certificates / name) for name in ("server-cert.pem", "server-key.pem", "ca-cert.pem")))
    with Server(listen_tcp("127.0.0.1", 0), tls=tls) as server:
        server.add(ExportSpec("disk", str(image), writable=True))
        port = server.address[1]
        uri = f"nbds://localhost:{port}/disk?tls-certificates={certificates}"
        run("nbdcopy", uri, str(tmp_path / "out"))
        assert (tmp_path / "out").read_bytes() == image.read_bytes()
        other = tmp_path / "other"
        other.write_bytes(os.urandom(SIZE))
        run("nbdcopy", str(other), uri)
        assert image.read_bytes() == other.read_bytes()
        plain = subprocess.run(["nbdinfo", f"nbd://localhost:{port}/disk"], capture_output=True, text=True, timeout=30)
        assert plain.returncode != 0
        assert "opt_go" in plain.stderr
    with pytest.raises((ssl.SSLError, OSError)):
        Server(listen_tcp("127.0.0.1", 0), tls=Tls(str(image), str(image)))
