"""What fits a cluster at the same time: decided before anything starts, so that nothing waits for ever."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from groundswell.config import ConfigError
from groundswell.experiment import Scaling

# What the process that follows a run's workers reserves. No CPU: it would take from the workers what they wait for.
FOLLOWER = {"memory": 200 * 2**20}
ROUNDING = 1e-6  # fractions of CPUs, as Ray rounds them


@dataclass(frozen=True)
class Demand:
    """Processes of one run, and what each of them reserves."""

    num_workers: int
    cpus: float
    gpus: float

    @classmethod
    def of(cls, scaling: Scaling, on_gpu: bool) -> Demand:
        if not scaling.distributed:
            return cls(1, 1.0 if on_gpu else scaling.num_threads, float(on_gpu))
        return cls(scaling.num_workers, scaling.reserved_cpus, float(on_gpu))

    @property
    def per_worker(self) -> dict[str, float]:
        """As Ray's resources."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


@dataclass(frozen=True)
class Node:
    cpus: float
    gpus: float

    def slots(self, demand: Demand) -> int:
        """How many workers fit this machine."""
        by_cpu = int(self.cpus / demand.cpus + ROUNDING) if demand.cpus else 10**9
        by_gpu = int(self.gpus / demand.gpus + ROUNDING) if demand.gpus else 10**9
        return min(by_cpu, by_gpu)


def cluster_nodes() -> list[Node]:
    """The living machines of the cluster that this process is connected to."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in resources]


def concurrent_runs(nodes: Sequence[Node], demands: Iterable[Demand]) -> int:
    """How many runs can train side by side, whichever of them these are. Raises ConfigError where one cannot at all."""
    possible = []
    for demand in set(demands):
        slots = sum(node.slots(demand) for node in nodes)
        if slots < demand.num_workers:
            raise ConfigError(_does_not_fit(nodes, demand, slots))
        possible.append(slots // demand.num_workers)
    return min(possible, default=1)


def _does_not_fit(nodes: Sequence[Node], demand: Demand, slots: int) -> str:
    each = f"{demand.cpus:g} CPU" + (f" and {demand.gpus:g} GPU" if demand.gpus else "")
    there = ", ".join(f"{node.cpus:g} CPU and {node.gpus:g} GPU" for node in nodes) or "no machine"
    if demand.num_workers == 1:
        field, remedy = "scaling.num_threads", "lower it, or use a larger machine"
    else:
        field = f"scaling.num_workers {demand.num_workers}"
        remedy = f"use at most {slots} workers, a smaller scaling.cpus_per_worker, or a larger cluster"
    return f"{field}: {demand.num_workers} x {each} do not fit the cluster ({there}); {remedy}"
