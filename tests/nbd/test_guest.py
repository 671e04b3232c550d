"""A virtual machine writes through NBD, as on any other disk, while cuts are taken."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from shmcbw.workers import Coordinator
from shmcbw.workers.nbd.address import listen_unix
from shmcbw.workers.nbd.server import Server
from shmcbw.workers.nbd.specification import ExportSpec
from tests.conftest import wait_for

SIZE = 8 << 20
SECTOR = 512
FIRST, SECOND = 2048, 12288
CUTS = 5


def boot_disk(directory: Path) -> Path:
    """A floppy disk with the guest of `guest.s`."""
    made, disk = directory / "guest.o", directory / "boot.img"
    sectors = ["--defsym", f"FIRST={FIRST}", "--defsym", f"SECOND={SECOND}"]
    subprocess.run(["as", "--32", *sectors, str(Path(__file__).with_name("guest.s")), "-o", str(made)], check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary"]
    subprocess.run([*link, str(made), "-o", str(disk)], check=True)
    with disk.open("r+b") as file:
        file.truncate(1440 << 10)
    return disk


def numbers(data: bytes) -> tuple[int, int]:
    first, second = (int.from_bytes(data[at * SECTOR : at * SECTOR + 4], "little") for at in (FIRST, SECOND))
    return first, second


def test_each_snapshot_of_a_guests_disk_is_one_instant(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(SIZE)
    with image.open("r+b") as file:
        for sector in (FIRST, SECOND):
            file.seek(sector * SECTOR)
            file.write(bytes(SECTOR))
    path = str(tmp_path / "nbd.sock")
    with Coordinator(image, workers=2) as coordinator, Server(listen_unix(path), path=path, processes=1) as server:
        server.add(ExportSpec("disk", str(image), writable=True))
        machine = subprocess.Popen(
            [
                "qemu-system-x86_64", "-accel", "tcg", "-display", "none", "-nodefaults", "-m", "32", "-boot", "a",
                "-drive", f"file={boot_disk(tmp_path)},format=raw,if=floppy,readonly=on",
                "-drive", f"file=nbd+unix:///disk?socket={path},format=raw,if=ide",
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            wait_for(lambda: numbers(image.read_bytes())[1] or machine.poll() is not None, "the guest writes", 60)
            seen = []
            for count in range(CUTS):
                with coordinator.snapshot(tmp_path / "scratch") as snapshot:
                    server.add(ExportSpec("snapshot", str(image), snapshot.serial))
                    then = numbers(image.read_bytes())[0]
                    wait_for(lambda then=then: numbers(image.read_bytes())[0] > then, "the guest goes on", 30)  # type: ignore[misc]
                    out = tmp_path / f"out{count}"
                    subprocess.run(["nbdcopy", f"nbd+unix:///snapshot?socket={path}", str(out)], check=True, timeout=60)
                    first, second = numbers(out.read_bytes())
                    assert second <= first <= second + 1
                    seen.append(first)
                    server.remove("snapshot", hard=True)
            assert seen == sorted(seen) and seen[0] < seen[-1]
        finally:
            machine.kill()
            output, _ = machine.communicate()
            print(output)
