"""One run on several workers: the same moments, readings and checkpoints as in a pack, decided by the first worker.

Every worker draws the whole batch and computes its part, so results do not depend on the number of workers (but for
dropout, whose masks each worker draws for itself).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundswell.config import ConfigError
from groundswell.protocols import Split
from groundswell.rundir import RunFolder, State
from groundswell.scaling import portable, states
from groundswell.scaling.control import Control, Leaving, Wish
from groundswell.scaling.engines import engine_class
from groundswell.scaling.pieces import Piece, cut, micro_batches
from groundswell.training import checkpoint
from groundswell.training.data import training_data
from groundswell.training.pack import build_dataset, resolve_device
from groundswell.training.run import TRAINING_SECONDS, Ending, Run
from groundswell.training.sampler import data_order, generator, stream_seed
from groundswell.training.stopwatch import Stopwatch

RUN_STATE = "run_state.safetensors"


class Reporter(Protocol):
    """How training states leave the worker."""

    def __call__(self, step: int, part: Path, /) -> None:
        """`part`: this worker's part of the state of `step`, to be copied away before this returns."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a worker is."""

    rank: int
    world_size: int
    scratch: Path  # a folder on this machine for states on their way


class WorkerTrainer:
    """Trains one run together with the other workers, from the newest training state to the end of the run."""

    def __init__(self, folder: RunFolder, place: Place, report: Reporter, control: Control) -> None:
        self.experiment = e = folder.experiment()
        self.run, self.place, self.report, self.control = Run(folder, e), place, report, control
        self.leads = place.rank == 0
        torch.set_num_threads(e.scaling.num_threads)
        self.device = resolve_device(e.scaling)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = e.scaling.precision in ("tf32", "bf16")
        self.dataset = build_dataset(e)
        self.order = data_order(self.dataset.train, generator(e.seed, "order"))
        self.data = training_data([self.dataset], self.device)
        self.dropout = torch.Generator(self.device) if e.model.stochastic or e.objective.stochastic else None
        self._count_batches()
        answer = self.dataset.answer.to(self.device)
        self.engine = engine_class(e.scaling.strategy)(e, answer, self.device, self.micro_batches[1])
        self.step, self._saved_step = 0, -1
        self.watch = Stopwatch()  # what counts is the first worker's
        self._sums: dict[str, Tensor] = {}
        self._summed = 0

    def _count_batches(self) -> None:
        e, workers = self.experiment, self.place.world_size
        batch = e.budget.batch_size
        if batch < workers:
            raise ConfigError(
                f"budget.batch_size {batch} is less than scaling.num_workers {workers}; each worker needs an example"
            )
        self.step_size = len(self.dataset.train) if e.budget.epochs else batch  # examples in a step of the run
        self.updates_per_step = -(-self.step_size // batch)
        self.micro_batches = micro_batches(batch, workers, e.scaling.micro_batch)

    # ---- resume ----

    def resume(self, state: Path | None) -> None:
        """Go on from a training state, else from the beginning."""
        if state is not None:
            values = load_file(state / RUN_STATE)
            self._check_workers(state, int(values["world_size"]))
            self.engine.load(state)
            self.step = self._saved_step = int(values["step"])
            self._summed = int(values["summed"])
            self.order.load_state(values)
            self.run.elapsed = self.watch.elapsed = float(values.get("elapsed", 0.0))  # absent in earlier versions
            sums = {name[4:]: value for name, value in values.items() if name.startswith("sum/")}
            self._sums = {name: self._own_sum(value).to(self.device) for name, value in sums.items()}
        if self.leads:
            self.run.rewind(self.step if state is not None else -1)
            started = self.run.folder.status().started_ms or _now_ms()
            self.run.folder.update_status(state="running", step=self.step, started_ms=started)
        self._fresh = state is None
        self._last_checkpoint = self._last_reading = time.monotonic()
        self._last_step = self.step

    def _own_sum(self, parts: Tensor) -> Tensor:
        """This worker's part of a metric's sum [workers that saved it]; other workers than those share it anew."""
        if len(parts) == self.place.world_size:
            return parts[self.place.rank]
        return parts.sum() if self.leads else torch.zeros((), dtype=parts.dtype)

    def _check_workers(self, state: Path, saved: int) -> None:
        elastic = self.engine.elastic or portable.is_portable(state)
        if saved != self.place.world_size and not elastic:
            raise ConfigError(
                f"scaling.num_workers {self.place.world_size}: DeepSpeed's state of this run was saved by {saved} "
                f"workers and can be read by {saved} only; go on with {saved}, or convert it first: groundswell "
                f"convert {self.run.folder.path}"
            )

    # ---- the loop ----

    def train(self) -> None:
        """Until the run is over, or is to pause. Raises Leaving once the state is saved that others go on from."""
        if self._fresh:
            self._event(0)  # evaluation of the untrained model
        state: State = "running"
        if self.run.is_over(self.step):  # cut off after its last state
            state = "finished"
            self._end(state, None)
        while state == "running" and self.control.wish == Wish.GO_ON:
            event = self.run.next_event(self.step)
            self.watch.start()
            while self.step < event and not self.run.is_over(self.step) and self.control.wish == Wish.GO_ON:
                self._advance()
            self._settle()
            if self.step == event or self.run.is_over(self.step):
                state = self._event(self.step)
        self.control.finish()
        if state == "running":
            self._attend()

    def _attend(self) -> None:
        """Do what is wished between two events."""
        self._save_state()
        if self.control.wish == Wish.PRUNE:
            self._export()
            self._end("pruned", self.run.folder.prune_request() if self.leads else None)
        if self.control.wish == Wish.LEAVE:
            raise Leaving(f"state of {self.experiment.budget.unit} {self.step} saved before a worker goes")

    def _settle(self) -> None:
        """Before something is read: what is still under way on the device counts as training."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._agree_on_time()

    def _agree_on_time(self) -> None:
        """Each worker has a clock of its own; the first one's decides."""
        self.watch.tick()
        self.run.elapsed = self.control.broadcast_number(self.watch.elapsed)

    def _advance(self) -> None:
        """One step of the run: an update, or an epoch."""
        e = self.experiment
        for number, rows in enumerate(self._batches()):
            update = self.step * self.updates_per_step + number
            total = e.budget.total * self.updates_per_step
            done = None if e.budget.seconds is None else self.run.elapsed / e.budget.seconds
            factor = e.optimizer.lr_factor(update, total, done)
            self.engine.step_module.schedule(update, total, self.device)
            if self.dropout is not None:  # each update and worker has its own stream, so there is no state to keep
                rank = self.place.rank if e.model.noise_by_example else 0
                self.dropout.manual_seed(stream_seed(e.seed, f"dropout/{update}/{rank}"))
            if update > 0 and e.objective.optimizer_start(update, total) == update:
                self.engine.restart_optimizer()
            metrics = self.engine.update(self._pieces(rows), factor, self.dropout)
            for name, value in metrics.items():
                self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._summed += 1
        self.step += 1
        if e.budget.seconds is not None:
            self._agree_on_time()
        self.control.exchange()

    def _batches(self) -> Iterator[Tensor]:
        """Data rows [1, B] of each update of one step."""
        budget, size = self.experiment.budget, self.step_size
        if budget.batch_ramp is not None:
            done = budget.done(self.step, self.run.elapsed)
            size = budget.ramped_batch(done, self.experiment.scaling.micro_batch)
        yield from self.data.place(self.order.take(size)[None]).split(budget.batch_size, dim=1)

    def _pieces(self, rows: Tensor) -> list[Piece]:
        """This worker's micro-batches of data rows [1, B]."""
        e, workers = self.experiment, self.place.world_size
        sizes = self.micro_batches
        if e.budget.batch_ramp is not None and self.engine.free_accumulation:
            sizes = micro_batches(rows.shape[1], workers, e.scaling.micro_batch)
        batch = self.data.batch(rows)
        places = torch.arange(rows.shape[1], device=self.device)
        return cut(places, (self.place.rank, workers), sizes, e.objective, lambda chosen: _columns(batch, chosen))

    # ---- events ----

    def _event(self, step: int) -> State:
        """What is due at `step`: a reading, an evaluation, a checkpoint, the end. Returns the run's state."""
        e = self.experiment
        metrics = self._read()
        evaluates = self.run.evaluates(step)
        if evaluates:
            metrics |= self._evaluate()
        decision: tuple[Ending, bool] | None = None
        if self.leads:
            self.run.record(step, metrics, evaluates)
            by_clock = time.monotonic() - self._last_checkpoint >= e.checkpointing.every_s
            decision = self.run.ending(step, metrics), by_clock
        (state, reason), by_clock = self.control.broadcast(decision)
        if state != "diverged" and (e.saves(step) or by_clock or state != "running"):
            if e.saves(step) or state != "running":
                self._export()
            self._save_state()
        if state != "running":
            self._end(state, reason)
        return state

    def _end(self, state: State, reason: str | None) -> None:
        if self.leads:
            self.run.folder.sync_journal()
            self.run.folder.update_status(state=state, step=self.step, reason=reason, ended_ms=_now_ms())

    def _read(self) -> dict[str, float]:
        """Means over the updates since the last reading."""
        metrics: dict[str, float] = {}
        if self._summed:
            names = sorted(self._sums)
            sums = torch.stack([self._sums[name].double() for name in names])
            dist.all_reduce(sums)
            metrics = {f"train/{n}": v for n, v in zip(names, (sums / self._summed).tolist(), strict=True)}
        metrics["train/grad_norm"] = self.engine.grad_norm() if self._summed else 0.0
        metrics["train/weight_norm"] = self.engine.weight_norm()
        self._sums, self._summed = {}, 0
        metrics[TRAINING_SECONDS] = self.run.elapsed
        now = time.monotonic()
        if self.step > self._last_step:
            rate = (self.step - self._last_step) / max(now - self._last_reading, 1e-9)
            metrics[f"perf/{self.experiment.budget.unit}s_per_s"] = rate
        self._last_reading, self._last_step = now, self.step
        return metrics

    def _evaluate(self) -> dict[str, float]:
        """Means over the first examples of each split, each worker its part of every batch."""
        e = self.experiment.evaluation
        result: dict[str, float] = {}
        for name, split in self.dataset.evaluation.items():
            count = min(len(split), e.max_examples)
            sums: dict[str, Tensor] = {}
            for start in range(0, count, e.batch_size):
                rows = torch.arange(start, min(start + e.batch_size, count))
                mine = rows.tensor_split(self.place.world_size)[self.place.rank]
                chosen = split.select(mine if len(mine) else rows[:1]).to(self.device)
                batch = Split(chosen.tokens[None], chosen.positions[None], chosen.targets[None])
                for metric, values in self.engine.evaluate(batch).items():
                    total = values.double().sum() * bool(len(mine))
                    sums[metric] = sums[metric] + total if metric in sums else total
            if sums:
                stacked = torch.stack([sums[metric] for metric in sums])
                dist.all_reduce(stacked)
                result |= {f"eval/{name}/{m}": v / count for m, v in zip(sums, stacked.tolist(), strict=True)}
        return result

    # ---- states ----

    def _export(self) -> None:
        """The weights as a folder that others can load."""
        weights = self.engine.full_weights()
        if weights is not None:
            self.run.folder.sync_journal()
            folder = self.run.folder.checkpoints
            checkpoint.save(folder, self.step, self.experiment, weights, self.dataset.vocabulary, {})
            checkpoint.thin_out(self.run)
            self.run.saved_step = self.step
        self.control.barrier()

    def _save_state(self) -> None:
        """What is needed to go on bit for bit, each worker its part."""
        if self._saved_step == self.step:
            return
        self._saved_step = self.step
        if self.leads:
            self.run.folder.sync_journal()  # the journal must reach at least as far as the state
        folder = self.place.scratch / f"{checkpoint.folder_name(self.step)}-{self.place.rank}"
        folder.mkdir(parents=True, exist_ok=True)
        self.engine.save(folder)
        sums = self._all_sums()
        if self.leads:
            numbers = {"step": self.step, "summed": self._summed, "world_size": self.place.world_size}
            tensors = {name: torch.tensor(value) for name, value in numbers.items()}
            tensors["elapsed"] = torch.tensor(self.run.elapsed, dtype=torch.float64)
            save_file({**self.order.state(), **tensors, **sums}, folder / RUN_STATE)
        states.list_files(folder, self.place.rank, self.place.world_size)
        self.report(self.step, folder)
        self._last_checkpoint = time.monotonic()

    def _all_sums(self) -> dict[str, Tensor]:
        """Every worker's part of the metrics since the last reading: "sum/name" -> [workers]."""
        if not self._sums:
            return {}
        mine = torch.stack(list(self._sums.values()))
        parts = [torch.empty_like(mine) for _ in range(self.place.world_size)]
        dist.all_gather(parts, mine)
        columns = torch.stack(parts).cpu().T.contiguous()
        return {f"sum/{name}": column.clone() for name, column in zip(self._sums, columns, strict=True)}


def _columns(batch: Split, places: Tensor) -> Split:
    """Some rows of a batch [1, B, ...]."""
    return Split(*(x.index_select(1, places) for x in (batch.tokens, batch.positions, batch.targets)))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
