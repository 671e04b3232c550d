"""Increments, targets brought forward, manifests; restore and verify, through the command line."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shmcbw
from shmcbw import failpoints
from shmcbw.cli import main
from shmcbw.errors import ChainError, JobCancelledError, ManifestError, TargetRefusedError, VerificationError
from shmcbw.workers import Backup, Coordinator, Job, JobTransaction, backup_group
from shmcbw.workers.manifest import CHECKSUM_MIN, HEADER_BYTES, Manifest, checksum
from shmcbw.workers.verify import verify
from tests.chains import assert_never_wrong, change, restored
from tests.conftest import wait_for

CLUSTER = 65536
SIZE = 24 * CLUSTER + 5000


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@pytest.fixture
def coordinator(image: Path) -> Iterator[Coordinator]:
    with Coordinator(image, workers=1) as coordinator:
        coordinator.bitmaps.add("b")
        yield coordinator


@pytest.fixture
def disk(coordinator: Coordinator, image: Path) -> Iterator[shmcbw.Disk]:
    with shmcbw.open(image) as disk:
        yield disk


@pytest.fixture
def backups(tmp_path: Path) -> Path:
    directory = tmp_path / "backups"
    directory.mkdir()
    return directory


def base(coordinator: Coordinator, target: Path) -> Path:
    coordinator.backup(target, sync="full", bitmap="b", bitmap_mode="on-success").wait(20)
    return target


def increment(coordinator: Coordinator, target: Path, *, in_place: bool = False) -> Path:
    coordinator.backup(target, sync="incremental", bitmap="b", in_place=in_place).wait(20)
    return target


def words(target: Path) -> list[int]:
    manifest = Manifest.of(str(target))
    try:
        return list(manifest.words(0, manifest.description.clusters))
    finally:
        manifest.close()


# -- fresh targets -----------------------------------------------------------------------------------------------------


def test_an_increment_holds_only_what_changed_and_its_manifest_says_what(
    coordinator: Coordinator, disk: shmcbw.Disk, backups: Path
) -> None:
    full = base(coordinator, backups / "full")
    assert all(word >= CHECKSUM_MIN for word in words(full))
    disk.pwrite(b"x" * 100, 3 * CLUSTER)
    disk.pwrite_zeroes(2 * CLUSTER, 10 * CLUSTER)
    disk.pwrite(b"y", SIZE - 1)
    target = increment(coordinator, backups / "increment")
    content = Path(coordinator.path).read_bytes()
    expected = [2] * 25
    expected[10] = expected[11] = 1
    for cluster in (3, 24):
        expected[cluster] = checksum(content[cluster * CLUSTER : (cluster + 1) * CLUSTER])
    assert words(target) == expected
    assert target.stat().st_size == SIZE
    assert target.stat().st_blocks * 512 < 3 * CLUSTER
    found = Manifest.of(str(target))
    assert (found.description.data_clusters, found.description.zero_clusters) == (2, 2)
    assert str(found.description.since) == str(Manifest.of(str(full)).description.point)
    found.close()


def test_a_plain_backup_has_a_manifest_only_if_asked(
    coordinator: Coordinator, backups: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.backup(backups / "plain").wait(20)
    assert [path.name for path in backups.iterdir()] == ["plain"]
    assert main(["verify", str(backups / "plain")]) == ManifestError.exit_status
    assert "has no manifest" in capsys.readouterr().err
    coordinator.backup(backups / "plain", manifest=True, overwrite=True).wait(20)
    assert main(["verify", str(backups / "plain")]) == 0
    coordinator.backup(backups / "plain", overwrite=True).wait(20)
    assert [path.name for path in backups.iterdir()] == ["plain"], "the old manifest goes with the old backup"


def test_a_manifest_of_a_sparse_image_is_sparse(backups: Path, tmp_path: Path) -> None:
    """8 bytes a cluster for data: 0.012 % of it."""
    image = tmp_path / "sparse"
    with image.open("wb") as file:
        file.truncate(1 << 36)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        disk.pwrite(b"x", 1 << 35)
        coordinator.backup(backups / "full", manifest=True).wait(30)
    manifest = backups / "full.shmcbw"
    assert manifest.stat().st_size == HEADER_BYTES + 8 * (1 << 20)
    assert manifest.stat().st_blocks * 512 <= 16384
    assert main(["verify", str(backups / "full")]) == 0


def test_with_sync_top_holes_are_zeroes(backups: Path, tmp_path: Path) -> None:
    image = tmp_path / "sparse"
    with image.open("wb") as file:
        file.truncate(SIZE)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        coordinator.bitmaps.add("b")
        disk.pwrite(b"x", 0)
        coordinator.backup(backups / "top", sync="top", bitmap="b", bitmap_mode="on-success").wait(20)
        assert words(backups / "top")[1:] == [1] * 24
        disk.pwrite(b"x", CLUSTER)
        increment(coordinator, backups / "increment")
        expected = image.read_bytes()
    assert restored([backups / "top", backups / "increment"], tmp_path / "out") == expected


# -- in place ----------------------------------------------------------------------------------------------------------


def test_a_backup_is_brought_forward_in_place_with_its_zeroes(
    coordinator: Coordinator, disk: shmcbw.Disk, backups: Path, tmp_path: Path
) -> None:
    target = base(coordinator, backups / "full")
    inode = target.stat().st_ino
    disk.pwrite(b"x" * 100, 3 * CLUSTER)
    disk.pwrite_zeroes(2 * CLUSTER, 10 * CLUSTER)
    increment(coordinator, target, in_place=True)
    assert target.stat().st_ino == inode
    assert target.read_bytes() == Path(coordinator.path).read_bytes()
    assert main(["verify", str(target)]) == 0
    assert sorted(path.name for path in backups.iterdir()) == ["full", "full.shmcbw"]
    disk.pwrite(b"later", 20 * CLUSTER)
    chain = [target, increment(coordinator, backups / "increment")]
    assert restored(chain, tmp_path / "out") == Path(coordinator.path).read_bytes()


def test_in_place_in_a_group_that_fails_both_are_completed_by_the_next_one(
    make_image: Callable[..., Path], backups: Path
) -> None:
    images = [make_image(SIZE, name=f"{number}.img") for number in "12"]
    with Coordinator(images[0], workers=1) as one, Coordinator(images[1], workers=1) as two:
        owners = {"1": one, "2": two}
        targets = {}
        for (number, owner), image in zip(owners.items(), images, strict=True):
            owner.bitmaps.add("b")
            targets[number] = base(owner, backups / number)
            with shmcbw.open(image) as disk:
                disk.pwrite(b"changed" * 9999, 3 * CLUSTER)
        how: dict[str, Any] = {"sync": "incremental", "bitmap": "b", "in_place": True}
        transaction = JobTransaction()
        jobs = backup_group(
            [
                # The first one has done its work before the second one is cancelled.
                Backup(one, targets["1"], transaction=transaction, **how),
                Backup(two, targets["2"], transaction=transaction, speed=1, **how),
            ]
        )
        wait_for(lambda: jobs[0].status == "waiting", "the first one waits")
        jobs[1].cancel()
        for job in jobs:
            with pytest.raises(JobCancelledError):
                job.wait(20)
        for (number, owner), image in zip(owners.items(), images, strict=True):
            assert not targets[number].exists() and (backups / f"{number}.shmcbw-partial").exists()
            assert owner.bitmaps["b"].count_bytes(owner.bitmaps.epochs) == 2 * CLUSTER
            with shmcbw.open(image) as disk:
                disk.pwrite(b"later", 9 * CLUSTER)
        for job in backup_group([Backup(owner, targets[number], **how) for number, owner in owners.items()]):
            job.wait(20)
        for number, image in zip(owners, images, strict=True):
            assert targets[number].read_bytes() == image.read_bytes()
            assert not verify(str(targets[number])).differing


@pytest.mark.parametrize("how", ["by us", "before, by hand"])
def test_the_backup_of_an_image_that_has_grown_grows_in_place(
    coordinator: Coordinator, image: Path, disk: shmcbw.Disk, backups: Path, how: str
) -> None:
    """Also its last cluster, which was shorter and is not in the bitmap, has the right checksum."""
    target = base(coordinator, backups / "target")
    coordinator.resize(SIZE + 5 * CLUSTER + 77)
    disk.pwrite(b"changed", 3 * CLUSTER)
    disk.pwrite(b"in what is new", SIZE + 2 * CLUSTER)
    if how != "by us":
        os.truncate(target, SIZE + 5 * CLUSTER + 77)
    increment(coordinator, target, in_place=True)
    assert target.read_bytes() == image.read_bytes()
    assert not verify(str(target)).differing
    assert restored([target], backups / "restored") == image.read_bytes()
    assert coordinator.bitmaps["b"].count_bytes(coordinator.bitmaps.epochs) == 0


def test_a_failed_job_in_place_of_a_grown_image_is_completed_by_the_next_one(
    coordinator: Coordinator, image: Path, disk: shmcbw.Disk, backups: Path
) -> None:
    target = base(coordinator, backups / "target")
    coordinator.resize(SIZE + 5 * CLUSTER)
    disk.pwrite(b"new" * CLUSTER, SIZE - 9)
    job = coordinator.backup(target, sync="incremental", bitmap="b", in_place=True, speed=1)
    disk.pwrite(b"newer", SIZE)
    job.cancel()
    assert not target.exists()
    coordinator.resize(SIZE + 6 * CLUSTER)
    disk.pwrite(b"newest", SIZE + 6 * CLUSTER - 6)
    increment(coordinator, target, in_place=True)
    assert target.read_bytes() == image.read_bytes()
    assert not verify(str(target)).differing


@pytest.mark.parametrize("why", ["shorter", "data beyond", "data far beyond", "longer than the image"])
def test_what_is_no_backup_of_a_smaller_image_is_refused_and_stays_as_it_was(
    coordinator: Coordinator, backups: Path, why: str
) -> None:
    target = base(coordinator, backups / "target")
    coordinator.resize(SIZE + 2 * CLUSTER)
    with target.open("r+b") as file:
        if why.startswith("data"):
            file.seek(SIZE if why == "data beyond" else SIZE + CLUSTER)
            file.write(b"something")
        else:
            os.truncate(file.fileno(), SIZE - 1 if why == "shorter" else SIZE + 3 * CLUSTER)
    before = target.read_bytes()
    with pytest.raises(TargetRefusedError, match=r"there is data beyond|not its backup"):
        increment(coordinator, target, in_place=True)
    assert target.read_bytes() == before


def test_a_target_that_has_grown_shrinks_again_if_there_is_no_cut(
    image: Path, backups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMCBW_FAILPOINTS", "segment")
    with Coordinator(image, workers=1) as coordinator:
        coordinator.bitmaps.add("b")
        target = base(coordinator, backups / "target")
        before = target.read_bytes()
        coordinator.resize(SIZE + CLUSTER)
        failpoints.arm(coordinator.segment.memory, "coordinator.bitmap", "errno:ENOSPC*1")
        with pytest.raises(OSError, match="No space left"):
            increment(coordinator, target, in_place=True)
        assert target.read_bytes() == before
        assert not verify(str(target)).differing
        increment(coordinator, target, in_place=True)
        assert target.read_bytes() == image.read_bytes()


def test_a_failed_job_in_place_is_completed_by_the_next_one(
    coordinator: Coordinator, disk: shmcbw.Disk, backups: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = base(coordinator, backups / "full")
    for cluster in (1, 2, 3):
        disk.pwrite(b"x", cluster * CLUSTER)
    job = coordinator.backup(target, sync="incremental", bitmap="b", in_place=True, speed=1)
    disk.pwrite(b"y", 2 * CLUSTER)
    job.cancel()
    with pytest.raises(shmcbw.JobCancelledError, match="nothing is lost: the same backup in place"):
        job.wait(20)
    assert "is not finished and stays; nothing is lost" in caplog.text
    assert sorted(path.name for path in backups.iterdir()) == ["full.shmcbw", "full.shmcbw-partial"]
    calls: list[Callable[[], object]] = [
        lambda: coordinator.backup(target),
        lambda: coordinator.backup(target, sync="incremental", bitmap="b"),
    ]
    for call in calls:
        with pytest.raises(shmcbw.TargetRefusedError, match="is not finished: go on with it in place"):
            call()
    increment(coordinator, target, in_place=True)
    assert target.read_bytes() == Path(coordinator.path).read_bytes()
    assert_never_wrong(backups)


def test_a_cut_that_fails_gives_the_target_back(
    coordinator: Coordinator, disk: shmcbw.Disk, backups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shmcbw.workers import groups

    target = base(coordinator, backups / "full")
    disk.pwrite(b"x", CLUSTER)
    before = {path.name: path.read_bytes() for path in backups.iterdir()}

    def no_cut(*_: object, **__: object) -> None:
        raise shmcbw.CutAbandonedError("no cut was taken")

    monkeypatch.setattr(groups, "take_cut", no_cut)
    for in_place in (True, False):
        where = target if in_place else backups / "increment"
        with pytest.raises(shmcbw.CutAbandonedError):
            coordinator.backup(where, sync="incremental", bitmap="b", in_place=in_place)
        found = {path.name: path.read_bytes() for path in backups.iterdir()}
        assert {name: data[HEADER_BYTES:] if name.endswith(".shmcbw") else data for name, data in found.items()} == {
            name: data[HEADER_BYTES:] if name.endswith(".shmcbw") else data for name, data in before.items()
        }
        assert not coordinator.bitmaps.query()[0]["busy"]
    monkeypatch.undo()
    assert main(["verify", str(target)]) == 0
    increment(coordinator, target, in_place=True)


def test_only_the_base_of_the_bitmap_is_brought_forward(
    coordinator: Coordinator, disk: shmcbw.Disk, backups: Path, image: Path
) -> None:
    old = base(coordinator, backups / "old")
    disk.pwrite(b"x", 0)
    coordinator.backup(backups / "plain").wait(20)
    linked = base(coordinator, backups / "linked")
    os.link(linked, backups / "other-name")
    coordinator.backup(backups / "finer", sync="full", bitmap="b", bitmap_mode="on-success").wait(20)
    before = {path.name: path.stat().st_mtime_ns for path in backups.iterdir()}
    for name, why in (
        ("old", "is not the bitmap's base"),
        ("plain", "it has no manifest"),
        ("missing", "it has no manifest"),
        ("linked", "it is not the bitmap's base|it has 2 names"),
    ):
        with pytest.raises(shmcbw.TargetRefusedError, match=f"{name} can't be brought forward: .*({why})"):
            increment(coordinator, backups / name, in_place=True)
    with pytest.raises(shmcbw.BitmapError, match="only a backup of a bitmap"):
        coordinator.backup(old, in_place=True)
    coordinator.bitmaps.disable("b")
    with pytest.raises(shmcbw.TargetRefusedError, match="can't be sure"):
        increment(coordinator, backups / "finer", in_place=True)
    assert {path.name: path.stat().st_mtime_ns for path in backups.iterdir()} == before
    assert not coordinator.bitmaps.query()[0]["busy"]


# -- restore -----------------------------------------------------------------------------------------------------------


def test_any_point_of_a_chain_is_restored_and_can_be_a_base_again(
    coordinator: Coordinator, disk: shmcbw.Disk, backups: Path, tmp_path: Path
) -> None:
    chance = random.Random(7)
    chain, cuts = [base(coordinator, backups / "full")], [Path(coordinator.path).read_bytes()]
    for number in range(3):
        change(disk, chance, 4)
        chain.append(increment(coordinator, backups / f"increment{number}"))
        cuts.append(Path(coordinator.path).read_bytes())
    for end, content in enumerate(cuts, 1):
        assert restored(chain[:end], tmp_path / "out") == content
    assert main(["restore", "--manifest", *map(str, chain[:3]), str(backups / "middle")]) == 0
    assert restored([backups / "middle", chain[3]], tmp_path / "out") == cuts[3]


def test_what_does_not_follow_is_refused_and_nothing_is_written(
    coordinator: Coordinator, disk: shmcbw.Disk, backups: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = base(coordinator, backups / "full")
    disk.pwrite(b"1", 0)
    first = increment(coordinator, backups / "first")
    disk.pwrite(b"2", CLUSTER)
    second = increment(coordinator, backups / "second")
    coordinator.backup(backups / "plain").wait(20)
    coordinator.bitmaps.disable("b")
    coordinator.bitmaps.enable("b")
    gap = increment(coordinator, backups / "gap")
    later = coordinator.backup(backups / "later", manifest=True)
    later.wait(20)
    out = tmp_path / "out"
    for chain, status, text in (
        ([first], ChainError.exit_status, "is an increment"),
        ([full, second], ChainError.exit_status, "holds what changed since"),
        ([full, full], ChainError.exit_status, "is a full backup"),
        ([backups / "later", first], ChainError.exit_status, "shows an earlier time"),
        ([full, gap], ChainError.exit_status, "may have missed writes"),
        ([backups / "plain", first], ManifestError.exit_status, "has no manifest"),
    ):
        assert main(["restore", *map(str, chain), str(out)]) == status, chain
        assert text in capsys.readouterr().err
        assert not list(tmp_path.glob("out*"))
    assert main(["restore", str(full), str(first), str(full)]) == 4, "an existing file is not replaced"


def test_an_increment_of_an_older_bitmap_fits_a_newer_base(
    coordinator: Coordinator, disk: shmcbw.Disk, backups: Path, tmp_path: Path
) -> None:
    """It holds all that has changed since before the base, and up to after it."""
    disk.pwrite(b"1", 0)
    coordinator.backup(backups / "full", manifest=True).wait(20)
    disk.pwrite(b"2", CLUSTER)
    chain = [backups / "full", increment(coordinator, backups / "increment")]
    assert restored(chain, tmp_path / "out") == Path(coordinator.path).read_bytes()


def test_a_damaged_backup_ends_a_restore_and_nothing_has_the_name(
    coordinator: Coordinator, disk: shmcbw.Disk, backups: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = base(coordinator, backups / "full")
    with full.open("r+b") as file:
        file.seek(5 * CLUSTER + 77)
        file.write(b"\xff\x00\xff")
    assert main(["restore", str(full), str(tmp_path / "out")]) == VerificationError.exit_status
    assert f"{CLUSTER} bytes at {5 * CLUSTER} differ" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


# -- verify ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def verified(coordinator: Coordinator, disk: shmcbw.Disk, backups: Path) -> Path:
    disk.pwrite_zeroes(2 * CLUSTER, 10 * CLUSTER)
    return base(coordinator, backups / "full")


@pytest.mark.parametrize("offset", [0, 10 * CLUSTER + 5, SIZE - 1])
def test_verify_finds_every_changed_byte(verified: Path, offset: int, capsys: pytest.CaptureFixture[str]) -> None:
    with verified.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    capsys.readouterr()
    assert main(["verify", "--json", str(verified)]) == VerificationError.exit_status
    found = json.loads(capsys.readouterr().out.splitlines()[0])
    first = offset // CLUSTER * CLUSTER
    assert found["differing"] == [[first, min(CLUSTER, SIZE - first)]]


def test_verify_tells_a_sample_by_its_seed_and_a_truncated_or_unknown_backup(
    verified: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def checked(*arguments: str) -> int:
        capsys.readouterr()
        assert main(["verify", "--json", *arguments, str(verified)]) == 0
        size: int = json.loads(capsys.readouterr().out)["checked_bytes"]
        return size

    assert checked() == SIZE - 2 * CLUSTER
    sampled = {seed: checked("--sample", "30%", "--seed", str(seed)) for seed in range(8)}
    assert all(0 < size < SIZE // 2 + 6 * CLUSTER for size in sampled.values())
    assert len(set(sampled.values())) > 1
    assert sampled[3] == checked("--sample", "0.3", "--seed", "3")
    os.truncate(verified, SIZE - 1)
    assert main(["verify", str(verified)]) == ManifestError.exit_status
    (verified.parent / "full.shmcbw").unlink()
    assert main(["verify", str(verified)]) == ManifestError.exit_status


@pytest.mark.parametrize("offset", [0, 8, 16, 40, 140, 4090, HEADER_BYTES + 8 * 3, -1])
def test_a_damaged_manifest_is_never_believed(
    verified: Path, tmp_path: Path, offset: int, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = bytearray((verified.parent / "full.shmcbw").read_bytes())
    manifest[offset] ^= 0x40
    (verified.parent / "full.shmcbw").write_bytes(manifest)
    assert main(["verify", str(verified)]) == ManifestError.exit_status
    assert main(["restore", str(verified), str(tmp_path / "out")]) == ManifestError.exit_status


def test_a_source_that_is_truncated_while_it_is_hashed_fails_the_job_and_leaves_no_manifest(
    image: Path, backups: Path
) -> None:
    with Coordinator(image, workers=1) as coordinator:
        job = coordinator.backup(backups / "full", manifest=True, speed=CLUSTER)
        os.truncate(image, CLUSTER)
        job.set_speed(0)
        with pytest.raises(OSError):
            job.wait(20)
        assert list(backups.iterdir()) == []


# -- the command line's choice -----------------------------------------------------------------------------------------


def test_sync_auto_takes_an_increment_where_the_bitmap_can_be_trusted_and_else_a_full_backup(
    image: Path, backups: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    common = ["backup", "--sync", "auto", "--since", "nightly", "--state-dir", str(state), str(image)]

    def kind(name: str) -> tuple[str, str]:
        capsys.readouterr()
        assert main([*common, str(backups / name)]) == 0
        said = capsys.readouterr().err
        assert main(["verify", "--json", str(backups / name)]) == 0
        return json.loads(capsys.readouterr().out)["kind"], said

    first, said = kind("1")
    assert (first, "there is no such bitmap; taking a full backup" in said) == ("full", True)
    assert kind("2") == ("increment", "")
    with image.open("r+b") as file:
        file.write(b"behind our back")
    third, said = kind("3")
    assert (third, "it is inconsistent" in said) == ("full", True)
    assert kind("4") == ("increment", "")
    assert restored([backups / "1", backups / "2"], tmp_path / "out") != image.read_bytes()
    assert restored([backups / "3", backups / "4"], tmp_path / "out") == image.read_bytes()


def test_backup_since_a_bitmap_that_is_not_there_says_where_bitmaps_live(
    image: Path, backups: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["backup", "--since", "b", str(image), str(backups / "out")]) == 8
    assert "bitmaps live with a running coordinator" in capsys.readouterr().err
    assert main(["bitmap", "list", str(image)]) == 3
    assert "bitmaps live with a running coordinator" in capsys.readouterr().err
    assert main(["bitmap", "add", str(image)]) == 2


# -- bitmap-mode always ------------------------------------------------------------------------------------------------


def test_what_always_leaves_is_completed_by_the_next_backup_of_the_bitmap_or_laid_under_it(
    coordinator: Coordinator, disk: shmcbw.Disk, backups: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = base(coordinator, backups / "full")
    for cluster in (1, 2, 3):
        disk.pwrite(b"x", cluster * CLUSTER)
    target, rest = backups / "increment", backups / "increment.shmcbw-partial"

    def back_up(where: Path, speed: int = 0) -> Job:
        return coordinator.backup(where, sync="bitmap", bitmap="b", bitmap_mode="always", speed=speed)

    job = back_up(target, speed=1)
    disk.pwrite(b"y", 2 * CLUSTER)
    job.cancel()
    with pytest.raises(shmcbw.JobCancelledError, match="what was copied stays in"):
        job.wait(20)
    assert {1, 2} & {index for index, word in enumerate(rest_words(target)) if word >= CHECKSUM_MIN} == {2}
    assert list(coordinator.bitmaps.extents("b")) == [(CLUSTER, 3 * CLUSTER)]
    # Alone it shows no instant.
    assert main(["restore", str(full), str(rest), str(tmp_path / "out")]) == ChainError.exit_status
    assert "shows no instant" in capsys.readouterr().err
    # Another bitmap can't have it, and nothing may take its place.
    with pytest.raises(shmcbw.TargetRefusedError, match="is not finished"):
        coordinator.backup(target)
    copy = backups / "copy"
    back_up(copy).wait(20)
    assert restored([full, rest, copy], tmp_path / "out") == Path(coordinator.path).read_bytes()
    assert main(["restore", str(full), str(copy), str(tmp_path / "out")]) == ChainError.exit_status


def test_a_job_to_the_same_target_goes_on_in_what_always_has_left(
    coordinator: Coordinator, disk: shmcbw.Disk, backups: Path, tmp_path: Path
) -> None:
    full = base(coordinator, backups / "full")
    for cluster in (1, 2, 3):
        disk.pwrite(b"x", cluster * CLUSTER)
    target = backups / "increment"
    for number in range(3):
        job = coordinator.backup(target, sync="bitmap", bitmap="b", bitmap_mode="always", speed=1)
        disk.pwrite(b"y%d" % number, (number + 2) * CLUSTER)
        job.cancel()
        with pytest.raises(shmcbw.JobCancelledError):
            job.wait(20)
    coordinator.backup(target, sync="bitmap", bitmap="b", bitmap_mode="always").wait(20)
    assert restored([full, target], tmp_path / "out") == Path(coordinator.path).read_bytes()
    assert sorted(path.name for path in backups.iterdir()) == [
        "full", "full.shmcbw", "increment", "increment.shmcbw"
    ]  # fmt: skip


def rest_words(target: Path) -> list[int]:
    manifest = Manifest.of_rest(f"{target}.shmcbw-partial", str(target))
    try:
        return list(manifest.words(0, manifest.description.clusters))
    finally:
        manifest.close()
