"""Schedules are pure functions of the step."""

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from groundswell.schedule import DenseThenSparse, Every, LogSpaced


def test_every():
    assert Every(every=30).steps(100) == [0, 30, 60, 90, 100]


def test_dense_then_sparse_is_the_published_schedule():
    steps = [step for step in DenseThenSparse().steps(1_500_000) if step]
    assert len(steps) == 50  # 20 dense and 30 sparse checkpoints (Wang et al. 2024, code)
    assert steps[:3] == [2_000, 4_000, 6_000]
    assert steps[19:22] == [40_000, 50_000, 100_000]


@given(per_decade=st.integers(1, 40), first=st.integers(1, 200))
def test_log_spaced_covers_each_decade_evenly(per_decade, first):
    steps = LogSpaced(per_decade=per_decade, first=first).steps(first * 1_000)
    assert steps[0] == 0
    assert first in steps
    # Where marks are more than a step apart, no two neighbours are further apart than one mark (and rounding).
    ratio = 10 ** (1 / per_decade)
    for low, high in itertools.pairwise(steps[1:]):
        assert high <= math.ceil(low * ratio) + 1
    late = [step for step in steps if first * 100 <= step < first * 1_000]
    if first * 100 * (ratio - 1) > 2:
        assert abs(len(late) - per_decade) <= 1
