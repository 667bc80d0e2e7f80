"""What fits a cluster at once."""

import pytest

from groundswell import ConfigError, Scaling
from groundswell.scaling.capacity import Demand, Node, concurrent_runs

TWO_CORES = [Node(2.0, 0.0)]


def spread(workers, cpus=None, **fields):
    return Demand.of(Scaling(strategy="ddp", num_workers=workers, cpus_per_worker=cpus, **fields), on_gpu=False)


def test_fractions_of_cores_let_small_runs_share_them():
    assert concurrent_runs(TWO_CORES, [spread(2, 0.25)]) == 4
    assert concurrent_runs(TWO_CORES, [spread(2)]) == 1
    assert concurrent_runs(TWO_CORES, [spread(2, 0.1)]) == 10  # no slot is lost to rounding


def test_workers_fill_machines_one_by_one():
    """Three machines of two CPUs hold three workers of two CPUs, but only three of 1.5."""
    nodes = [Node(2.0, 0.0)] * 3
    assert concurrent_runs(nodes, [spread(3, 2)]) == 1
    assert concurrent_runs(nodes, [spread(1, 1.5)]) == 3


def test_the_most_demanding_run_decides():
    single = Demand.of(Scaling(), on_gpu=False)
    assert concurrent_runs(TWO_CORES, [single]) == 2
    assert concurrent_runs(TWO_CORES, [single, spread(2)]) == 1


def test_gpus_count_one_a_worker():
    nodes = [Node(16.0, 4.0), Node(16.0, 4.0)]
    demand = Demand.of(Scaling(strategy="fsdp", num_workers=3), on_gpu=True)
    assert demand.per_worker == {"CPU": 1, "GPU": 1.0}
    assert concurrent_runs(nodes, [demand]) == 2


@pytest.mark.parametrize(
    ("demand", "message"),
    [
        (spread(3), r"scaling.num_workers 3: 3 x 1 CPU do not fit the cluster \(2 CPU and 0 GPU\); use at most 2"),
        (spread(2, 3), "use at most 0 workers, a smaller scaling.cpus_per_worker"),
        (Demand.of(Scaling(num_threads=8), False), "scaling.num_threads: 1 x 8 CPU do not fit"),
        (Demand.of(Scaling(strategy="fsdp", num_workers=2), True), "2 x 1 CPU and 1 GPU do not fit"),
    ],
)
def test_what_never_fits_is_told_at_once(demand, message):
    with pytest.raises(ConfigError, match=message):
        concurrent_runs(TWO_CORES, [demand])
