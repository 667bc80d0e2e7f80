"""Runs a sweep: folders, Ray Tune, tracking, progress, and at the end the table and the figures."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from groundswell import cluster
from groundswell.config import ConfigError
from groundswell.files import atomic_write, ensure_writable
from groundswell.interrupts import interruptible
from groundswell.mirror import Mirror
from groundswell.probe_pool import one_line
from groundswell.probing import Asking, LiveAnswers, Target, finish_asking, make_plan, print_failures
from groundswell.progress import Progress
from groundswell.report import finish_report
from groundswell.results import load_results
from groundswell.rundir import RunFolder, SweepFolder
from groundswell.scaling.capacity import FOLLOWER, Demand, cluster_nodes, concurrent_runs
from groundswell.stages import USABLE
from groundswell.storage import Storage
from groundswell.sweep import PlannedRun, Sweep, cost, make_packs, unique_runs
from groundswell.tracking import Tracker
from groundswell.training.run import TRAINING_SECONDS, seconds_trained

log = logging.getLogger(__name__)
WORKER_RETRIES = 3  # times a pack whose process died is started again from its checkpoint
LOCK_SECONDS = 1.0  # others hold a sweep's lock for a moment, to see whether it is held
STOPPING = "Stopping: saving the state of the running runs (Ctrl-C again to leave at once)"
TRACKING_DELAY_SECONDS = 15.0  # workers start sooner when the driver does not import MLflow at the same time
DRAIN_SECONDS = 60.0  # how long the end waits for a slow tracking store


@dataclass(frozen=True)
class SweepOptions:
    """How to run, as opposed to what to run."""

    output: Path = Path("results")
    search: Literal["grid", "random", "optuna"] = "grid"
    num_samples: int = 20
    search_seed: int = 0
    scheduler: Literal["none", "asha", "median"] = "none"
    pack: int | Literal["auto"] = "auto"
    address: str | None = None
    num_cpus: int | None = None
    storage: str | None = None  # URI of a place that outlives the machines


def listed_runs(sweep: Sweep, options: SweepOptions) -> list[PlannedRun]:
    """All runs of a grid or random sweep. Raises ConfigError for the first impossible combination."""
    settings = sweep.grid() if options.search == "grid" else sweep.sample(options.num_samples, options.search_seed)
    return unique_runs([run for setting in settings for run in sweep.runs(setting)])


def run_sweep(sweep: Sweep, options: SweepOptions, console: Console | None = None) -> int:
    """Train what is not yet trained, then report. Returns the exit code: 0, 1 when a run failed, 130 after Ctrl-C."""
    console = console or Console()
    if options.search == "optuna":
        sweep.runs(
            {path: axis.sample(_fixed_generator()) for path, axis in sweep.search_axes().items()}
        )  # checked early
    else:
        listed_runs(sweep, options)
    folder = SweepFolder(ensure_writable(options.output) / sweep.name)
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.path / "sweep.lock", timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"{folder.path}: another process is running this sweep; wait for it or choose another --output"
        ) from None
    with lock, _log_file(folder.path / "log" / "driver.log"):
        driver = Driver(sweep, options, folder, console)
        return driver.run()


class Driver:
    def __init__(self, sweep: Sweep, options: SweepOptions, folder: SweepFolder, console: Console) -> None:
        self.sweep, self.options, self.folder, self.console = sweep, options, folder, console
        self.interrupted = threading.Event()
        self.planned: dict[str, PlannedRun] = {}  # everything this sweep has asked for so far
        self._prepared: set[str] = set()
        self._cluster = contextlib.ExitStack()
        self._resources: cluster.Resources | None = None
        self.live: LiveAnswers | None = None
        self.mirror = self._open_mirror()
        atomic_write(folder.path / "sweep.json", json.dumps(sweep.describe(), indent=2) + "\n")

    def _open_mirror(self) -> Mirror | None:
        """Bring here what the storage has of this sweep."""
        if self.options.storage is None:
            return None
        mirror = Mirror(Storage(self.options.storage), self.folder)
        fetched = len(mirror.fetch_sweep(checkpoints=2))
        if fetched:
            self.console.print(f"{fetched} runs come from {self.options.storage}", soft_wrap=True, highlight=False)
        return mirror

    def _close_mirror(self) -> str | None:
        if self.mirror is None:
            return None
        self.mirror.publish_sweep(force=True)  # runs are published by who trains them
        return self.mirror.close()

    def run(self) -> int:
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        tracker = Tracker(self.folder, experiment_name=self.sweep.name)
        tracker.start(TRACKING_DELAY_SECONDS)
        self.asking = Asking(lambda job: tracker.look_again(job.run.run_id), looks_over_time=False)
        try:
            with interruptible(self.interrupted, self.console, STOPPING), self._cluster:
                self._train()
                self._probe()
            if self.interrupted.is_set():
                self._say_how_to_go_on()
            else:
                planned = list(self.planned.values())
                results = load_results(self.folder, planned, self.sweep.columns, self.sweep.replicate_axis)
                tracker.log_outputs(finish_report(self.sweep, results, self.folder, self.console))
        finally:
            for leftover in filter(None, [tracker.close(DRAIN_SECONDS), self._close_mirror()]):
                self.console.print(f"[yellow]{leftover}[/]", soft_wrap=True)
        return self._exit_code()

    def _ray(self) -> cluster.Resources:
        """Brought up when it is first needed, and left at the end of the sweep."""
        if self._resources is None:
            joined = cluster.connect(self.options.address, self.options.num_cpus)
            self._resources = self._cluster.enter_context(joined)
        return self._resources

    # ---- probes ----

    def _probe(self) -> None:
        """Ask what is left; neither a checkpoint nor a probe that is broken stops the sweep."""
        if not self.sweep.probes or self.interrupted.is_set():
            return
        try:
            plan = make_plan(self._probe_targets(), self.sweep.probes)
            num_gpus = (self._resources or cluster.local_resources()).num_gpus
            finish_asking(self.asking, plan, self.live, self._ray, num_gpus, self.console, self.interrupted)
            print_failures([*plan.failures, *self.asking.all_failures()], self.console)
        except Exception as error:
            log.exception("probing failed")
            self.console.print(f"[yellow]not probed:[/] {escape(one_line(error))}", soft_wrap=True, highlight=False)

    def _live_answers(self) -> contextlib.AbstractContextManager[Any]:
        if not self.sweep.probes or self.sweep.probe_steps == "last":
            return contextlib.nullcontext()
        self.live = LiveAnswers(self.asking, self.sweep.probes, self._probe_targets)
        self._cluster.callback(self.live.pool.close)  # Ray's handles must be gone when it is left
        return self.live

    def _probe_targets(self) -> list[Target]:
        """The runs' last checkpoints, or all that are there to stay."""
        targets: list[Target] = []
        for run in list(self.planned.values()):
            folder = self.folder.run(run.run_id)
            steps = folder.checkpoint_steps()
            chosen = set(steps[-1:]) if folder.status().is_final else set()
            if self.sweep.probe_steps == "all":
                chosen |= {step for step in steps if run.experiment.stays(step)}
            targets += [Target(self.folder, folder, tuple(sorted(chosen)))] if chosen else []
        return targets

    # ---- training ----

    def _train(self) -> None:
        """Bring Ray up only when something is left to train."""
        if self.options.search != "optuna" and self._all_final():
            return
        if self.options.scheduler != "none" and self.sweep.stages:
            raise ConfigError("--scheduler: the runs of a pipeline's stages cannot be compared; leave it out")
        if self.options.scheduler != "none" and self.sweep.base.budget.steps is None:
            raise ConfigError("budget.seconds: a scheduler compares runs at equal steps; set --budget.steps, too")
        where = f"the cluster at {self.options.address}" if self.options.address else "this machine"
        self.console.print(
            f"{self.sweep.name}: starting Ray on {where}; results go to {self.folder.path}",
            soft_wrap=True,
            highlight=False,
        )
        if self.options.search == "optuna":
            one = self._one_setting()
            total_runs = self.options.num_samples * len(one)
            total_work = cost(one) * self.options.num_samples
        else:
            self.planned = {run.run_id: run for run in listed_runs(self.sweep, self.options)}
            total_runs, total_work = len(self.planned), cost(list(self.planned.values()))
        unit = self.sweep.base.budget.unit
        self.progress = Progress(self.console, total_runs, total_work, self.sweep.metric, self.sweep.mode, unit)
        with self.progress:
            self._tune(self._ray())

    def _all_final(self) -> bool:
        runs = listed_runs(self.sweep, self.options)
        states = [self.folder.run(run.run_id).status() for run in runs if self.folder.has_run(run.run_id)]
        done = len(states) == len(runs) and all(s.is_final and s.state != "failed" for s in states)
        if done:
            self.planned = {run.run_id: run for run in runs}
        return done

    def _tune(self, resources: cluster.Resources) -> None:
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
        from ray import tune

        from groundswell.scheduling import MemberScheduler, make_scheduler
        from groundswell.search import PackSearcher
        from groundswell.trainable import PackTrainable
        from groundswell.tuning import InterruptStopper, RunEnds

        scaling = self.sweep.base.scaling
        on_gpu = resources.num_gpus > 0 and scaling.device != "cpu"
        if scaling.device == "cuda" and not on_gpu:
            raise ConfigError("scaling.device: the cluster has no GPU; use cpu or auto")
        self.on_gpu = on_gpu
        runs = list(self.planned.values()) or self._one_setting()
        if find_spec("deepspeed") is None and any(r.experiment.scaling.strategy == "deepspeed" for r in runs):
            raise ConfigError("scaling.strategy: DeepSpeed is not installed; pip install deepspeed, or use fsdp")
        demands = {Demand.of(run.experiment.scaling, on_gpu) for run in runs}
        self.workers = concurrent_runs(cluster_nodes(), demands)
        self.source = self._make_source(on_gpu)
        inner = make_scheduler(self.options.scheduler, self.sweep.metric, self.sweep.mode, self.sweep.base.budget.total)
        scheduler = MemberScheduler(inner, self._request_prune, self.folder.runs()) if inner else None
        tune_folder = self.folder.path / ".tune"
        shutil.rmtree(tune_folder, ignore_errors=True)
        tuner = tune.Tuner(
            tune.with_resources(PackTrainable, lambda config: tune.PlacementGroupFactory([config["reserves"]])),
            tune_config=tune.TuneConfig(
                search_alg=PackSearcher(self.source, self._prepare),
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=self.workers,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=".tune",
                storage_path=str(self.folder.path.resolve()),
                verbose=0,
                stop=InterruptStopper(self.interrupted),
                callbacks=[RunEnds(self)],
                failure_config=tune.FailureConfig(max_failures=WORKER_RETRIES),
            ),
        )
        with self._live_answers():
            tuner.fit()
        shutil.rmtree(tune_folder, ignore_errors=True)

    def _one_setting(self) -> list[PlannedRun]:
        return self.sweep.runs(
            {path: axis.sample(_fixed_generator()) for path, axis in self.sweep.search_axes().items()}
        )

    def _make_source(self, on_gpu: bool) -> Any:
        from groundswell.search import InOrder, ListedPacks, OptunaPacks
        from groundswell.sweep import pack_size

        pack = self.options.pack
        if self.options.search != "optuna":
            listed = ListedPacks(make_packs(list(self.planned.values()), self.workers, on_gpu, pack))
            return InOrder(listed) if self.sweep.stages else listed
        total = self.options.num_samples * len(self.sweep.replicates())
        size = pack_size(self.sweep.base, total, self.workers, on_gpu, pack)
        asked = OptunaPacks(
            self.sweep,
            self.folder.path / "study.db",
            self.options.num_samples,
            # Packs of one group must not wait for each other's workers: `num_workers` 1 fills them.
            lambda runs: make_packs(runs, 1, on_gpu, pack),
            group=max(1, size // len(self.sweep.replicates())),
            seed=self.options.search_seed,
        )
        return InOrder(asked) if self.sweep.stages else asked

    def _prepare(self, pack: list[PlannedRun]) -> dict[str, Any] | None:
        """Make the folders; leave out what is finished. What failed in an earlier session is tried again."""
        waiting: list[PlannedRun] = []
        pack_id = pack[0].run_id[:8]
        for run in pack:
            self.planned[run.run_id] = run
            folder = self.folder.create_run(run, pack_id, number=list(self.planned).index(run.run_id))
            if folder.status().state == "failed" and run.run_id not in self._prepared:
                folder.update_status(state="waiting")
            self._prepared.add(run.run_id)
            if not folder.status().is_final:
                self._check_inputs(run, folder)
            if folder.status().is_final:
                self.progress.skip(folder.status().state, cost([run]))
                self.source.complete(run.run_id, self._outcome(folder))
            else:
                waiting.append(run)
                e = run.experiment
                if e.budget.seconds is None:
                    self.progress.begin(run.run_id, run.name, folder.checkpoint_step(), e.budget.total, cost([run]))
                else:
                    trained = seconds_trained(folder)
                    self.progress.begin(run.run_id, run.name, trained, e.budget.seconds, cost([run]), TRAINING_SECONDS)
        if not waiting:
            return None
        scaling = waiting[0].experiment.scaling
        if self.mirror is not None:
            for run in waiting:
                self.mirror.announce(self.folder.run(run.run_id))
        return {
            "sweep": str(self.folder.path.resolve()),
            "storage": self.options.storage,
            "runs": [run.run_id for run in waiting],
            "inputs": sorted({source for run in waiting for source in run.inputs.values()}),
            "every_evaluation": self.options.scheduler != "none",
            "reserves": FOLLOWER if scaling.distributed else Demand.of(scaling, self.on_gpu).per_worker,
        }

    def _check_inputs(self, run: PlannedRun, folder: RunFolder) -> None:
        """A run whose inputs have not ended well cannot start."""
        for path, source in run.inputs.items():
            if (state := self.folder.run(source).status().state) not in USABLE:
                folder.fail(f"{path}: run {source}, which it starts from, is {state}")
                return

    def _request_prune(self, run_id: str, reason: str) -> None:
        folder = self.folder.run(run_id)
        folder.request_prune(reason)
        if self.mirror is not None:
            self.mirror.send_request(folder, "prune_request.json")

    # ---- what the callback tells ----

    def on_members(self, members: Sequence[dict[str, Any]]) -> None:
        for member in members:
            self.progress.report(member)
            if member["state"] != "running":
                if self.mirror is not None:  # the run may have been trained on a machine of its own
                    self.mirror.fetch(self.folder.run(member["run_id"]))
                self.source.complete(member["run_id"], self._outcome(self.folder.run(member["run_id"])))

    def on_trial_lost(self, run_ids: Sequence[str], error: str) -> None:
        """A pack whose process died more often than it is retried."""
        for run_id in run_ids:
            folder = self.folder.run(run_id)
            if not folder.status().is_final:
                self.on_members([folder.fail(error)])

    def _outcome(self, folder: RunFolder) -> dict[str, Any]:
        last: dict[str, float] = {}
        for line in folder.journal():
            last |= line["metrics"]
        status = folder.status()
        return {"state": status.state, "step": status.step, "values": [last.get(m) for m in self.sweep.objectives]}

    # ---- the end ----

    def _say_how_to_go_on(self) -> None:
        again = shlex.join(["python", *sys.argv])
        text = f"Stopped. Everything is saved in {self.folder.path}; go on with the same command: {again}"
        self.console.print(text, soft_wrap=True, highlight=False)

    def _exit_code(self) -> int:
        if self.interrupted.is_set():
            return 130
        return int(any(self.folder.run(run_id).status().state == "failed" for run_id in self.planned))


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Everything that libraries have to say goes to a file beside the runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    old_handlers, old_level = root.handlers[:], root.level
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers[:], root.level = old_handlers, old_level
        handler.close()


def _fixed_generator() -> Any:
    import numpy as np

    return np.random.default_rng(0)
