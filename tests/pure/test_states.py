"""Sticky errors: the first one of a cut wins, and one of another cut does not count."""

from __future__ import annotations

import errno

from hypothesis import given
from hypothesis import strategies as st

from shmcbw import states

EPOCHS = st.integers(0, 2**31 - 1).map(lambda n: 2 * n + 1)


@given(st.integers(1, 4095), EPOCHS, st.integers(0, 2**32 - 1))
def test_an_error_word_holds_errno_and_cluster_for_its_cut(number: int, odd: int, cluster: int) -> None:
    word = states.error_word(number, odd, cluster)
    assert 0 < word < 2**64
    assert states.split_error(word, odd) == (number, cluster)


@given(EPOCHS, st.integers(1, 2**18).map(lambda n: 2 * n))
def test_an_error_of_another_cut_does_not_count(odd: int, later: int) -> None:
    word = states.error_word(errno.EIO, odd, 5)
    assert states.split_error(word, odd + later) is None
    assert states.split_error(0, odd) is None


@given(st.sampled_from(sorted(states.NAMES)), EPOCHS)
def test_a_state_word_carries_its_epoch(state: int, odd: int) -> None:
    word = states.state_word(state, odd)
    assert (word & 0xFFFFFFFF, word >> 32) == (state, odd)
