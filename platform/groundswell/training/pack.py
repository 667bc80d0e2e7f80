"""A pack: runs of one shape trained as one program. Pure computation; files and schedules are the trainer's."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.experiment import Experiment, Scaling
from groundswell.protocols import Dataset, ParameterSpec, Split, Task
from groundswell.training.data import Made, training_data
from groundswell.training.evaluation_data import EvaluationData
from groundswell.training.flat import FlatParameters, PackedAdamW, assign_groups, initial_row
from groundswell.training.sampler import Order, data_order, generator
from groundswell.training.stopwatch import Stopwatch

# A pack's parameters are slices of rows, so torch remarks on their layout; accumulating into them is still the fastest.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


@functools.lru_cache(maxsize=4)
def dataset_of(canonical_task: str) -> Dataset:
    """As `build_dataset`, by the task's canonical JSON."""
    return Task.from_dict(json.loads(canonical_task)).build()


def build_dataset(experiment: Experiment) -> Dataset:
    """The task's data set; the last few are kept, because neighbouring runs of a sweep share them."""
    return dataset_of(experiment.task.canonical_json())


def resolve_device(scaling: Scaling) -> torch.device:
    """Raises ConfigError where the device is not there or does the precision badly."""
    name = scaling.device if scaling.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("scaling.device: no CUDA device here; use cpu or auto")
    Scaling.from_dict(scaling.to_dict() | {"device": name})  # the checks that depend on the device
    return torch.device(name)


def parameter_specs(experiment: Experiment) -> list[ParameterSpec]:
    """The network's tensors with the optimizer's groups."""
    e = experiment
    return assign_groups(e.model.parameters(e.task.vocab_size, e.task.max_length), e.optimizer)


@dataclass
class Member:
    """One run inside a pack."""

    experiment: Experiment
    dataset: Dataset
    order: Order
    dropout: torch.Generator

    @classmethod
    def create(cls, experiment: Experiment, device: torch.device) -> Member:
        dataset = build_dataset(experiment)
        order = data_order(dataset.train, generator(experiment.seed, "order"))
        return cls(experiment, dataset, order, generator(experiment.seed, "dropout", device))

    def initial_row(self) -> Tensor:
        e = self.experiment
        reader = e.model.initial_weights(e.task.vocab_size, e.task.max_length)
        return initial_row(parameter_specs(e), generator(e.seed, "init"), reader)


class Pack:
    """K members, their parameters [K, P] and their optimizer rows, all on one device, and their data."""

    def __init__(
        self, members: Sequence[Member], rows: Tensor | None = None, step: int = 0, elapsed: float = 0.0
    ) -> None:
        """`rows` [K, P]: parameters to start from; drawn from each member's seed when absent. `step`: steps done;
        `elapsed`: seconds of training done."""
        first = members[0].experiment
        self.members = list(members)
        self.model, self.objective, self.scaling = first.model, first.objective, first.scaling
        self.budget, self.batch_size = first.budget, first.budget.batch_size
        self.watch = Stopwatch(elapsed)
        self.updates_per_step = self._count_updates(first)
        self.device = resolve_device(self.scaling)
        self.dtype = torch.float64 if self.scaling.precision == "float64" else torch.float32
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self.scaling.precision in ("tf32", "bf16")
        if rows is None:
            rows = torch.stack([member.initial_row() for member in members])
        self.parameters = FlatParameters(parameter_specs(first), rows.to(self.device, self.dtype))
        optimizers = [m.experiment.optimizer for m in members]
        updates, timed = self.updates_per_step, self.budget.seconds is not None
        self.optimizer = PackedAdamW(self.parameters, optimizers, self.budget.total * updates, step * updates, timed)
        self._uses_generators = self.model.stochastic or self.objective.stochastic
        self._place_data()
        self._loss = torch.compile(self._forward, dynamic=False) if self.scaling.compile else self._forward
        self._graph: torch.cuda.CUDAGraph | None = None
        self._scheduled: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._summed = 0

    def _count_updates(self, first: Experiment) -> int:
        """Updates in one step of the run: 1, or those of an epoch."""
        self.epoch_size = 0
        if not first.budget.epochs:
            return 1
        sizes = {len(member.dataset.train) for member in self.members}
        if len(sizes) > 1:
            raise ConfigError(
                f"budget.epochs: the runs of a pack have {min(sizes)} to {max(sizes)} training examples; use --pack 1"
            )
        self.epoch_size = sizes.pop()  # examples of a step; 0: one batch
        if self.scaling.cuda_graph and self.epoch_size % self.batch_size:
            raise ConfigError(
                "scaling.cuda_graph: needs batches of one size; set budget.steps instead of budget.epochs"
            )
        return -(-self.epoch_size // self.batch_size)

    @property
    def step_count(self) -> int:
        """Steps done, in the unit of the budget."""
        return self.optimizer.step_count // self.updates_per_step

    def set_step(self, step: int) -> None:
        self.optimizer.set_step(step * self.updates_per_step)

    def _place_data(self) -> None:
        self.data = training_data([member.dataset for member in self.members], self.device)
        if self.scaling.cuda_graph and isinstance(self.data, Made):
            raise ConfigError("scaling.cuda_graph: this task makes its examples as they are read; leave it off")
        self.answer = self.members[0].dataset.answer.to(self.device)
        limit = self.members[0].experiment.evaluation.max_examples
        groups: dict[Any, list[int]] = {}  # members whose splits are of one size are evaluated together
        for row, member in enumerate(self.members):
            sizes = tuple((name, min(len(split), limit)) for name, split in member.dataset.evaluation.items())
            groups.setdefault(sizes, []).append(row)
        self._evaluation = [
            EvaluationData([self.members[row].dataset for row in rows], rows, limit, self.device)
            for rows in groups.values()
        ]

    # ---- training ----

    def _autocast(self) -> AbstractContextManager:
        if self.scaling.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _forward(self, parameters: dict[str, Tensor], batch: Split) -> tuple[Tensor, dict[str, Tensor]]:
        generators = [m.dropout for m in self.members] if self._uses_generators else None
        options: dict[str, Any] = {"scheduled": self._scheduled} if self._scheduled else {}
        with self._autocast():
            return self.objective.loss(self.model, parameters, batch, self.answer, generators, **options)

    def _schedule(self) -> None:
        """What the members' objectives schedule for the coming update, [K] each: in place, where a graph reads it."""
        update, total = self.optimizer.step_count, self.optimizer.total_updates
        for row, member in enumerate(self.members):
            self.optimizer.set_start(row, member.experiment.objective.optimizer_start(update, total))
        runs = [member.experiment.objective.scheduled(update, total) for member in self.members]
        for name in runs[0]:
            values = torch.tensor([run[name] for run in runs], dtype=self.dtype)
            if name not in self._scheduled:
                self._scheduled[name] = torch.empty_like(values, device=self.device)
            self._scheduled[name].copy_(values)

    def _update(self, rows: Tensor) -> dict[str, Tensor]:
        """One update on data rows [K, B]. Returns the metrics [K]."""
        self.parameters.grad.zero_()
        micro_batch = self.scaling.micro_batch or rows.shape[1]
        if micro_batch >= rows.shape[1]:
            loss, metrics = self._loss(self.parameters.views, self.data.batch(rows))
            loss.sum().backward()
            metrics = {"loss": loss.detach(), **metrics}
        else:
            metrics = self._accumulate([self.data.batch(piece) for piece in rows.split(micro_batch, dim=1)])
        self.optimizer.step()
        return metrics

    def _accumulate(self, batches: Sequence[Split]) -> dict[str, Tensor]:
        """Gradients and metrics of the batches as if they were one."""
        weights = torch.stack([self.objective.weight(batch) for batch in batches])
        shares = weights / weights.sum(0).clamp(min=1)
        sums: dict[str, Tensor] = {}
        for batch, share in zip(batches, shares, strict=True):
            loss, metrics = self._loss(self.parameters.views, batch)
            (loss * share).sum().backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums.get(name, 0.0) + value * share
        return sums

    def train(self, steps: int) -> None:
        """So many steps of the run, or fewer where its seconds are over. Metrics are summed on the device."""
        self.watch.start()
        for rows in self._batches(steps):
            if self.budget.seconds is not None:
                self.optimizer.set_done(self.watch.elapsed / self.budget.seconds)
            self._schedule()
            metrics = self._replay(rows) if self.scaling.cuda_graph else self._update(rows)
            for name, value in metrics.items():
                if name in self._sums:
                    self._sums[name] += value
                else:
                    self._sums[name] = value.clone()
            self._summed += 1
            self.watch.tick()
            if self.budget.is_over(self.step_count, self.watch.elapsed):
                break
        if self.device.type == "cuda":  # what is still under way counts
            torch.cuda.synchronize(self.device)
            self.watch.tick()

    def _batches(self, steps: int) -> Iterator[Tensor]:
        """Data rows [K, B] of each update of so many steps."""
        if self.budget.batch_ramp is not None:
            for _ in range(steps):
                done = self.budget.done(self.step_count, self.watch.elapsed)
                yield self._take(self.budget.ramped_batch(done, self.scaling.micro_batch))
        elif steps:
            size = self.epoch_size or self.batch_size
            taken = self._take(steps * size).view(len(self.members), steps, size)
            for chunk in taken.transpose(0, 1).contiguous():
                yield from chunk.split(self.batch_size, dim=1)

    def _take(self, count: int) -> Tensor:
        """Each member's next data rows [K, count]."""
        return self.data.place(torch.stack([member.order.take(count) for member in self.members]))

    def _replay(self, rows: Tensor) -> dict[str, Tensor]:
        """The update as one CUDA graph, captured after one eager update has warmed the allocator up."""
        if self._uses_generators:
            raise ConfigError(
                "scaling.cuda_graph: this model or objective draws random numbers in training; leave it off"
            )
        if self._graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                metrics = {name: value.clone() for name, value in self._update(rows).items()}
            torch.cuda.current_stream().wait_stream(stream)
            self._graph, self._graph_rows = torch.cuda.CUDAGraph(), rows.clone()
            with torch.cuda.graph(self._graph):
                self._graph_metrics = self._update(self._graph_rows)
            self.optimizer.step_count -= 1  # the capture records, it does not run
            return metrics
        self._graph_rows.copy_(rows)
        self._graph.replay()
        self.optimizer.step_count += 1
        return self._graph_metrics

    @torch.no_grad()
    def read_metrics(self) -> list[dict[str, float]]:
        """Each member's means since the last reading; the one place where training waits for the device."""
        names = list(self._sums)
        columns = [self._sums[name].double() / self._summed for name in names]
        columns += [self.optimizer.grad_norm.double(), torch.linalg.vector_norm(self.parameters.flat, dim=1).double()]
        names += ["grad_norm", "weight_norm"]
        table = torch.stack(columns, dim=1).tolist()
        self._sums, self._summed = {}, 0
        return [{f"train/{name}": value for name, value in zip(names, row, strict=True)} for row in table]

    # ---- evaluation ----

    @torch.no_grad()
    def evaluate(self) -> list[dict[str, float]]:
        """Each member's metrics on each split."""
        results: list[dict[str, float]] = [{} for _ in self.members]
        for data in self._evaluation:
            parameters = self.parameters.select(data.rows)
            for index, metrics in zip(data.rows, self._evaluate(parameters, data), strict=True):
                results[index] = metrics
        return results

    def _evaluate(self, parameters: dict[str, Tensor], data: EvaluationData) -> list[dict[str, float]]:
        batches: list[dict[str, Tensor]] = []
        size = self.members[0].experiment.evaluation.batch_size
        for start in range(0, data.examples.tokens.shape[1], size):
            batch = data.examples.select((slice(None), slice(start, start + size)))
            with self._autocast():
                batches.append(self.objective.evaluate(self.model, parameters, batch, data.answer))
        table = torch.stack([torch.cat([b[name] for b in batches], dim=1).double() for name in batches[0]])
        means = torch.stack([table[:, :, piece].mean(-1) for piece in data.pieces.values()])  # [splits, metrics, K]
        return [
            {
                f"eval/{split}/{name}": value
                for split, values in zip(data.pieces, per_member, strict=True)
                for name, value in zip(batches[0], values, strict=True)
            }
            for per_member in means.permute(2, 0, 1).tolist()
        ]

    # ---- membership and state ----

    def subset(self, rows: Sequence[int]) -> Pack:
        """A pack of these members alone, at the same point: their numbers go on as if the others were still here."""
        rows = list(rows)
        pack = Pack(
            [self.members[row] for row in rows], self.parameters.flat[rows], self.step_count, self.watch.elapsed
        )
        pack.optimizer.exp_avg.copy_(self.optimizer.exp_avg[rows])
        pack.optimizer.exp_avg_sq.copy_(self.optimizer.exp_avg_sq[rows])
        pack._sums, pack._summed = {name: value[rows] for name, value in self._sums.items()}, self._summed
        return pack

    def member_state(self, row: int) -> dict[str, Tensor]:
        """What besides the weights a run needs to go on bit for bit."""
        member = self.members[row]
        return {
            "exp_avg": self.optimizer.exp_avg[row].cpu(),
            "exp_avg_sq": self.optimizer.exp_avg_sq[row].cpu(),
            **member.order.state(),
            "dropout_generator": member.dropout.get_state().cpu(),
            "elapsed": torch.tensor(self.watch.elapsed, dtype=torch.float64),
        }

    def load_member_state(self, row: int, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        for name, view in self.parameters.views.items():
            view.data[row].copy_(weights[name])
        self.optimizer.exp_avg[row].copy_(state["exp_avg"])
        self.optimizer.exp_avg_sq[row].copy_(state["exp_avg_sq"])
        self.members[row].order.load_state(state)
        self.members[row].dropout.set_state(state["dropout_generator"])
        self.watch.elapsed = float(state.get("elapsed", 0.0))  # absent in states of earlier versions
