"""Data order: whole epochs, exact resume, independent streams."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groundswell.training.sampler import DataOrder, SequentialOrder, generator

BOTH = pytest.mark.parametrize("kind", [DataOrder, SequentialOrder])


@BOTH
@given(size=st.integers(1, 40), takes=st.lists(st.integers(1, 60), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_each_epoch_sees_every_row_once(kind, size, takes, seed):
    order = kind(size, generator(seed, "order"))
    rows = torch.cat([order.take(count) for count in takes])
    for start in range(0, len(rows) - size + 1, size):
        assert sorted(rows[start : start + size].tolist()) == list(range(size))


@BOTH
@given(size=st.integers(1, 40), before=st.integers(0, 100), after=st.integers(1, 100))
def test_resume_goes_on_with_the_same_rows(kind, size, before, after):
    order = kind(size, generator(3, "order"))
    if before:
        order.take(before)
    state = order.state()
    expected = order.take(after)
    resumed = kind(size, generator(3, "order"))  # its seed says where a sequence starts
    resumed.take(2)
    resumed.load_state(state)
    assert torch.equal(resumed.take(after), expected)


@BOTH
def test_how_the_rows_are_asked_for_does_not_matter(kind):
    one = kind(10, generator(0, "order"))
    many = kind(10, generator(0, "order"))
    assert torch.equal(one.take(35), torch.cat([many.take(n) for n in (1, 9, 10, 15)]))


def test_streams_of_a_run_differ():
    draws = {name: torch.rand(4, generator=generator(0, name)).tolist() for name in ("init", "order", "dropout")}
    assert len({tuple(values) for values in draws.values()}) == 3
