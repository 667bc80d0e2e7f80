"""Data order: whole epochs, exact resume, independent streams."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from groundswell.training.sampler import DataOrder, generator


@given(size=st.integers(1, 40), takes=st.lists(st.integers(1, 60), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_each_epoch_sees_every_row_once(size, takes, seed):
    order = DataOrder(size, generator(seed, "order"))
    rows = torch.cat([order.take(count) for count in takes])
    for start in range(0, len(rows) - size + 1, size):
        assert sorted(rows[start : start + size].tolist()) == list(range(size))


@given(size=st.integers(1, 40), before=st.integers(0, 100), after=st.integers(1, 100))
def test_resume_goes_on_with_the_same_rows(size, before, after):
    order = DataOrder(size, generator(3, "order"))
    if before:
        order.take(before)
    state = order.state()
    expected = order.take(after)
    resumed = DataOrder(size, generator(77, "order"))
    resumed.load_state(*state)
    assert torch.equal(resumed.take(after), expected)


def test_how_the_rows_are_asked_for_does_not_matter():
    one = DataOrder(10, generator(0, "order"))
    many = DataOrder(10, generator(0, "order"))
    assert torch.equal(one.take(35), torch.cat([many.take(n) for n in (1, 9, 10, 15)]))


def test_streams_of_a_run_differ():
    draws = {name: torch.rand(4, generator=generator(0, name)).tolist() for name in ("init", "order", "dropout")}
    assert len({tuple(values) for values in draws.values()}) == 3
