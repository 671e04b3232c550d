"""QEMU's image lock, in both directions, with the real tools: who may open what beside whom."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

import shmcbw
from shmcbw.errors import ImageInUseError
from shmcbw.image import ImageFile
from shmcbw.workers import Coordinator
from shmcbw.workers.permissions import ImageLock
from tests.conftest import needs_root, wait_for
from tests.processes import running, write_forever

SIZE = 1 << 20

#: Commands on an image, and whether they work while a QEMU has it for a device of its own.
COMMANDS = {
    "qemu-img info -f raw {image}": True,
    "qemu-img info -U -f raw {image}": True,
    "qemu-img map -f raw {image}": True,
    "qemu-img measure -f raw -O raw {image}": True,
    "qemu-img compare -f raw -F raw {image} {image}": True,
    "qemu-img dd -f raw -O raw if={image} of={other}": True,
    "qemu-img convert -U -f raw -O raw {image} {other}": True,
    "qemu-img convert -f raw -O raw {image} {other}": False,
    "qemu-img convert -n -f raw -O raw {other} {image}": False,
    "qemu-img create -f raw {image} 1M": False,
    "qemu-img resize -f raw {image} 2M": False,
    "qemu-img bench -w -c 1 -f raw {image}": False,
    "qemu-io -r -f raw -c quit {image}": True,
    "qemu-io -f raw -c quit {image}": False,
}


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@contextmanager
def storage_daemon(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A qemu-storage-daemon that is ready."""
    ready = directory / "ready"
    daemon = subprocess.Popen(["qemu-storage-daemon", *arguments, "--pidfile", str(ready)])
    try:
        wait_for(lambda: ready.exists() or daemon.poll() is not None, "the storage daemon is ready")
        assert daemon.poll() is None
        yield daemon
    finally:
        daemon.kill()
        daemon.wait()
        ready.unlink(missing_ok=True)


def writing_qemu(directory: Path, image: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Its export has the right to write the image, and bears others that write it."""
    return storage_daemon(
        directory,
        f"--blockdev=driver=file,node-name=image,filename={image}",
        f"--nbd-server=addr.type=unix,addr.path={directory}/nbd",
        "--export=type=nbd,id=export,node-name=image,writable=on",
    )


def owning_qemu(directory: Path, image: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """A copy-before-write filter takes of the image what a virtual machine's device takes: nobody else may write."""
    scratch = directory / "scratch"
    scratch.touch()
    os.truncate(scratch, SIZE)
    return storage_daemon(
        directory,
        f"--blockdev=driver=file,node-name=image,filename={image}",
        f"--blockdev=driver=file,node-name=scratch,filename={scratch}",
        "--blockdev=driver=copy-before-write,node-name=filter,file=image,target=scratch",
        f"--nbd-server=addr.type=unix,addr.path={directory}/nbd",
        "--export=type=nbd,id=export,node-name=filter,writable=on",
    )


def locked_bytes(image: Path) -> set[int]:
    """The bytes of QEMU's image lock on which somebody has a lock."""
    inode = str(os.stat(image).st_ino)
    found = set()
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "OFDLCK" and fields[5].rpartition(":")[2] == inode and fields[7] != "EOF":
            found |= set(range(int(fields[6]), int(fields[7]) + 1))
    # Another file may have this inode's number, but not these bytes.
    return found & {*range(100, 104), *range(200, 204)}


def outcomes(image: Path, directory: Path) -> dict[str, bool]:
    """Which of the commands work on an image as it is served now."""
    other = directory / "other"
    found = {}
    for command in COMMANDS:
        done = subprocess.run(
            command.format(image=image, other=other).split(), capture_output=True, text=True, timeout=60
        )
        found[command] = done.returncode == 0
        assert done.returncode == 0 or "lock" in done.stderr, done.stderr
    return found


def test_with_a_served_image_works_what_works_with_an_image_that_a_qemu_has(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    with owning_qemu(tmp_path, image):
        of_qemu = locked_bytes(image)
        assert outcomes(image, tmp_path) == COMMANDS
    with Coordinator(image, workers=1), shmcbw.open(image) as disk:
        assert locked_bytes(image) == of_qemu
        assert outcomes(image, tmp_path) == COMMANDS
        assert disk.pread(SIZE, 0) == before
    assert locked_bytes(image) == set()


@pytest.mark.parametrize("start", [writing_qemu, owning_qemu])
def test_an_image_that_a_qemu_writes_is_refused_and_the_qemu_named(
    image: Path, tmp_path: Path, start: Callable[..., AbstractContextManager[subprocess.Popen[bytes]]]
) -> None:
    with start(tmp_path, image) as daemon:
        with pytest.raises(ImageInUseError, match=rf"pid {daemon.pid} \(qemu-storage-da"):
            Coordinator(image, workers=1)
        assert shmcbw.errors.ImageInUseError.exit_status == 3
        with pytest.raises(shmcbw.NoCoordinatorError):
            shmcbw.open(image)
    with Coordinator(image, workers=1):
        pass


def test_an_image_that_somebody_copies_who_bears_no_writer_is_refused_until_he_is_done(
    image: Path, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        # An NBD server that never says anything: qemu-img has opened the image and waits.
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        target = f"nbd+unix:///?socket={tmp_path}/silent"
        converter = subprocess.Popen(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(image), target])
        wait_for(lambda: 201 in locked_bytes(image), "qemu-img has opened the image")
        with pytest.raises(ImageInUseError, match=rf"pid {converter.pid} \(qemu-img\).*bears no other that may write"):
            Coordinator(image, workers=1)
        converter.kill()
        converter.wait()
    with Coordinator(image, workers=1):
        pass


def test_a_qemu_that_reads_and_bears_writers_is_no_reason_to_refuse(image: Path, tmp_path: Path) -> None:
    with storage_daemon(
        tmp_path,
        f"--blockdev=driver=file,node-name=image,filename={image},read-only=on",
        f"--nbd-server=addr.type=unix,addr.path={tmp_path}/nbd",
        "--export=type=nbd,id=export,node-name=image",
    ):
        with Coordinator(image, workers=1), shmcbw.open(image) as disk:
            disk.pwrite(b"x", 0)


def write_by_qemu(image: Path) -> int:
    return subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 512", str(image)], capture_output=True).returncode


DYING = """
import sys, time
from shmcbw.workers import Coordinator
coordinator = Coordinator(sys.argv[1], workers=1)
job = coordinator.backup(sys.argv[2], speed=1)
print(*coordinator._pool.pids.values(), flush=True)
time.sleep(60)
"""


def orphans(image: Path, directory: Path) -> list[int]:
    """The pids of the workers that a killed coordinator has left in the middle of a backup to "out"."""
    owner = subprocess.Popen([sys.executable, "-c", DYING, str(image), str(directory / "out")], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    workers = [int(pid) for pid in owner.stdout.readline().split()]
    owner.stdout.close()
    owner.kill()
    owner.wait()
    return workers


def test_a_dead_coordinators_image_is_locked_while_its_workers_live_and_adopted_from_them(
    image: Path, tmp_path: Path
) -> None:
    workers = orphans(image, tmp_path)
    assert write_by_qemu(image) != 0, "the workers that go on for the dead one's backup hold the image"
    with Coordinator(image, workers=1) as coordinator:
        assert write_by_qemu(image) != 0
        [job] = coordinator.jobs
        wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), "the old workers leave")
        assert write_by_qemu(image) != 0
        job.set_speed(0)
        job.wait(20)
    assert write_by_qemu(image) == 0


def test_a_worker_that_was_only_just_started_by_a_dead_coordinator_is_not_taken_for_a_qemu(image: Path) -> None:
    """It holds what it inherited, and nothing in the segment tells of it yet."""
    file = ImageFile.open(image, writable=False)
    dead, following = ImageLock(file), ImageLock(file)
    dead.take()
    starting = subprocess.Popen(["sleep", "60"], pass_fds=(dead.fd,))
    try:
        dead.close()
        assert write_by_qemu(image) != 0
        following.take()
        assert following.held
    finally:
        starting.kill()
        starting.wait()
        following.close()
        file.close()
    assert locked_bytes(image) == set()


def test_a_qemu_that_came_when_all_were_dead_keeps_the_next_coordinator_away(image: Path, tmp_path: Path) -> None:
    workers = orphans(image, tmp_path)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: locked_bytes(image) == set(), "all of them are dead")
    with writing_qemu(tmp_path, image) as daemon:
        with pytest.raises(ImageInUseError, match=str(daemon.pid)):
            Coordinator(image, workers=1)
    with Coordinator(image, workers=1) as coordinator:
        assert [job.target for job in coordinator.jobs] == [str(tmp_path / "out")]


def test_a_forked_child_does_not_keep_the_image_locked(image: Path) -> None:
    coordinator = Coordinator(image, workers=1)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        coordinator.close()
        assert locked_bytes(image) == set()
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)
        for end in (*ready, *go):
            os.close(end)


def test_writers_come_and_go_while_the_lock_is_the_coordinators(image: Path) -> None:
    with Coordinator(image, workers=1):
        with running(write_forever, str(image), 1):
            assert write_by_qemu(image) != 0
        held = locked_bytes(image)
        shmcbw.open(image).close()
        assert locked_bytes(image) == held


def test_a_memfd_is_locked_by_whatever_name_it_is_opened() -> None:
    fd = os.memfd_create("image", 0)
    try:
        os.truncate(fd, SIZE)
        path = Path(f"/proc/{os.getpid()}/fd/{fd}")
        with Coordinator(path, workers=1):
            assert write_by_qemu(path) != 0
        assert write_by_qemu(path) == 0
    finally:
        os.close(fd)


@contextmanager
def mounted(directory: Path, *arguments: str) -> Iterator[Path]:
    """A file system of its own."""
    place = directory / "mounted"
    place.mkdir()
    subprocess.run(["mount", *arguments, str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_an_image_on_a_read_only_file_system_is_locked_too(tmp_path: Path) -> None:
    needs_root("mounting")
    with mounted(tmp_path, "-t", "tmpfs", "shmcbw-test") as place:
        image = place / "disk.img"
        image.write_bytes(os.urandom(SIZE))
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        with Coordinator(image, workers=1) as coordinator:
            assert locked_bytes(image) == {100, 101, 201, 203}
            coordinator.backup(tmp_path / "out").wait(20)
            with pytest.raises(shmcbw.ReadOnlyImageError):
                shmcbw.open(image)
            with pytest.raises(OSError, match="Read-only file system"):
                coordinator.resize(2 * SIZE)
        assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_block_device_is_locked_by_its_node(image: Path) -> None:
    needs_root("a loop device")
    found = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=True)
    device = Path(found.stdout.strip())
    try:
        with Coordinator(device, workers=1):
            assert locked_bytes(device) == {100, 101, 201, 203}
            assert write_by_qemu(device) != 0
        assert write_by_qemu(device) == 0
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)


def test_locking_can_be_switched_off(image: Path, tmp_path: Path) -> None:
    with writing_qemu(tmp_path, image):
        with Coordinator(image, workers=1, locking="off"):
            pass
    with pytest.raises(ValueError, match="auto, on, off"):
        Coordinator(image, locking="maybe")


WITHOUT_LOCKS = """
import logging, sys
from shmcbw.image import ImageFile
from shmcbw.workers.permissions import ImageLock
logging.basicConfig(stream=sys.stdout, format="%(message)s")
image = ImageFile.open(sys.argv[1], writable=False)
lock = ImageLock(image, sys.argv[2])
print("ready", flush=True)
sys.stdin.read()
try:
    lock.take()
    print("held" if lock.held else "not held")
except OSError as error:
    print(error.errno, error)
"""


@pytest.mark.parametrize("locking", ["auto", "on"])
def test_where_the_file_system_has_no_locks_the_image_is_served_with_a_warning_or_refused(
    image: Path, locking: str
) -> None:
    """strace lets the kernel answer the locks with ENOLCK."""
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_LOCKS, str(image), locking],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    inject = "inject=fcntl:error=ENOLCK"
    tracer = subprocess.Popen(
        ["strace", "-p", str(process.pid), "-e", "trace=fcntl", "-e", inject], stderr=subprocess.PIPE, text=True
    )
    assert tracer.stderr is not None
    assert "attached" in tracer.stderr.readline()
    answer, _ = process.communicate("", timeout=20)
    tracer.communicate(timeout=20)
    if locking == "auto":
        assert answer.endswith("not held\n") and "QEMU is not kept" in answer
    else:
        assert answer.startswith(f"{errno.ENOLCK} ") and str(image) in answer


def test_a_lock_is_given_back_when_it_was_refused(image: Path, tmp_path: Path) -> None:
    file = ImageFile.open(image, writable=False)
    lock = ImageLock(file)
    try:
        with writing_qemu(tmp_path, image):
            with pytest.raises(ImageInUseError):
                lock.take()
            assert not lock.held
            assert locked_bytes(image) == {100, 101, 203}
    finally:
        lock.close()
        file.close()
