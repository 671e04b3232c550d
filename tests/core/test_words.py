"""The core checks every offset and alignment: out of range is a ValueError, never a stray store."""

from __future__ import annotations

import threading

import pytest

from shmcbw import _core


@pytest.mark.parametrize("bits", [32, 64])
def test_store_then_load(bits: int) -> None:
    memory = bytearray(64)
    store, load = getattr(_core, f"store_u{bits}"), getattr(_core, f"load_u{bits}")
    store(memory, 8, 2**bits - 1)
    assert load(memory, 8) == 2**bits - 1
    assert memory[8 : 8 + bits // 8] == b"\xff" * (bits // 8)
    assert not any(memory[:8]) and not any(memory[8 + bits // 8 :])


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("offset", [-1, 1, 2, 61, 64, 2**63, 2**64 - 8])
def test_bad_offsets_are_value_errors(bits: int, offset: int) -> None:
    memory = bytearray(64)
    with pytest.raises((ValueError, OverflowError)):
        getattr(_core, f"load_u{bits}")(memory, offset % 2**64 if offset > 0 else 2**64 - 1)
    with pytest.raises(ValueError):
        getattr(_core, f"store_u{bits}")(memory, abs(offset) | 1, 1)
    assert not any(memory)


def test_a_value_that_does_not_fit_32_bits_is_refused() -> None:
    memory = bytearray(8)
    with pytest.raises(ValueError):
        _core.store_u32(memory, 0, 2**32)
    assert not any(memory)


def test_compare_exchange_changes_only_what_was_expected() -> None:
    memory = bytearray(8)
    assert not _core.compare_exchange_u64(memory, 0, 1, 2)
    assert _core.load_u64(memory, 0) == 0
    assert _core.compare_exchange_u64(memory, 0, 0, 2)
    assert _core.load_u64(memory, 0) == 2


def test_a_read_only_buffer_is_refused() -> None:
    with pytest.raises((BufferError, TypeError)):
        _core.store_u32(bytes(8), 0, 1)


def test_additions_of_threads_are_not_lost() -> None:
    memory = bytearray(8)

    def add() -> None:
        for _ in range(20_000):
            _core.add_u64(memory, 0, 1)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _core.load_u64(memory, 0) == 80_000
