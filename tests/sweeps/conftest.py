"""Sweeps as processes of their own, started, hurt and looked at from outside."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pandas as pd
import psutil
import pytest

from groundswell import probes
from groundswell.cluster import QUIET
from groundswell.rundir import RunFolder, SweepFolder

SMALL_SWEEP = Path(__file__).with_name("small_sweep.py")
PATIENCE = 240.0  # seconds; machines that run tests are slow at times
MARK = "GROUNDSWELL_TEST_MARK"


class MarkedProcess:
    """A command in a session of its own, as a terminal starts it.

    All its descendants, Ray's daemons too, carry a mark in their environment, so that they are found when they have
    lost their parent.
    """

    def __init__(self, command: list[str], log: Path, with_token: bool = False) -> None:
        """`with_token`: of the tests' own clusters (clusters.py); else the user's."""
        self.mark = uuid.uuid4().hex
        self.log = log.with_name(f"{log.name}-{self.mark[:6]}.log")
        environment = {
            name: value for name, value in os.environ.items() if with_token or not name.startswith("RAY_AUTH")
        }
        environment |= {MARK: self.mark, "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def family(self) -> list[psutil.Process]:
        """The driver and everything that it has started, orphans too."""
        return [process for process in psutil.process_iter() if _environment(process).get(MARK) == self.mark]

    def workers(self) -> list[psutil.Process]:
        """Processes that train (Ray names them after their class)."""
        return [process for process in self.family() if "Trainable" in " ".join(_command(process))]

    def wait(self, seconds: float = PATIENCE) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the sweep did not end in {seconds:.0f} s:\n{self.text}") from None

    def wait_until(self, condition, seconds: float = PATIENCE) -> None:
        """Fails when the sweep ends, or the time does, before the condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the sweep ended too early:\n{self.text}"
            assert time.monotonic() < end, f"waited {seconds:.0f} s in vain:\n{self.text}"
            time.sleep(0.02)

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends it to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """kill -9 of the driver alone; Ray must notice by itself."""
        self.process.kill()
        self.process.wait()

    def assert_nothing_left(self, seconds: float = 180.0) -> None:
        """All of the family is gone soon."""
        end = time.monotonic() + seconds
        while (left := self.family()) and time.monotonic() < end:
            time.sleep(0.2)
        assert not left, f"still there: {[_command(process) for process in left]}"

    def clean_up(self) -> None:
        for process in self.family():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


class SweepProcess(MarkedProcess):
    """`python small_sweep.py ARGUMENTS --output ...`."""

    def __init__(self, output: Path, *arguments: str, script: Path = SMALL_SWEEP, with_token: bool = False) -> None:
        command = [sys.executable, str(script), "--output", str(output), "--num-cpus", "2", *arguments]
        super().__init__(command, output.parent / output.name, with_token)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except (psutil.Error, OSError):
        return {}


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def start():
    """output folder, arguments -> SweepProcess; whatever the test leaves running is ended with it."""
    started: list[SweepProcess] = []

    def start_sweep(output: Path, *arguments: str, **options) -> SweepProcess:
        started.append(SweepProcess(output, *arguments, **options))
        return started[-1]

    yield start_sweep
    for process in started:
        process.clean_up()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Address of a Ray head on two CPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--head", "--block", "--num-cpus", "2", "--include-dashboard", "false", "--disable-usage-stats"]
    options += ["--node-ip-address", "127.0.0.1", "--port", address.rpartition(":")[2]]
    log = (tmp_path_factory.mktemp("ray") / "ray.log").open("wb")
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", *options],
        env=os.environ | QUIET | {"OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while b"Ray runtime started" not in Path(log.name).read_bytes():
        assert head.poll() is None and time.monotonic() < end, Path(log.name).read_text()
        time.sleep(0.2)
    yield address
    head.terminate()
    head.wait(60)
    log.close()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> SweepFolder:
    """The small sweep, run in peace: what every disturbed one must arrive at."""
    output = tmp_path_factory.mktemp("undisturbed") / "results"
    sweep = SweepProcess(output, "--pack", "1")
    try:
        assert sweep.wait() == 0, sweep.text
    finally:
        sweep.clean_up()
    return SweepFolder(output / "small-paced")


def tables(folder: SweepFolder) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The final tables, without what depends on the clock."""
    runs, history = (pd.read_csv(folder.path / "tables" / f"{name}.csv") for name in ("runs", "history"))
    return runs, history[[column for column in history.columns if not column.startswith("perf/")]]


def assert_same_results(one: SweepFolder, other: SweepFolder) -> None:
    """Equal to the last digit."""
    for mine, others in zip(tables(one), tables(other), strict=True):
        pd.testing.assert_frame_equal(mine, others, check_exact=True)


def database(folder: SweepFolder) -> Path:
    return folder.path.parent / "mlflow.db"


def mlflow_runs(folder: SweepFolder) -> pd.DataFrame:
    """run_uuid, status, parent (empty for the sweep's own run), run_id of the folder, of all runs in the store."""
    query = """
        select r.run_uuid, r.status, coalesce(p.value, '') parent, coalesce(i.value, '') run_id from runs r
        left join tags p on p.run_uuid = r.run_uuid and p.key = 'mlflow.parentRunId'
        left join tags i on i.run_uuid = r.run_uuid and i.key = 'groundswell.run_id'"""
    with sqlite3.connect(database(folder)) as connection:
        return pd.read_sql(query, connection)


def assert_tracked_once(folder: SweepFolder) -> None:
    """One parent, one child a run, every journal line and every answer of a probe once and with its value.

    Steps that a resumed run repeats have the same values, except for what depends on the clock.
    """
    runs = mlflow_runs(folder)
    children = runs[runs.parent != ""]
    assert len(runs) - len(children) == 1
    assert sorted(children.run_id) == sorted(run.run_id for run in folder.runs())
    with sqlite3.connect(database(folder)) as connection:
        stored = pd.read_sql("select run_uuid, key, step, value from metrics where is_nan = 0", connection)
    assert not stored.duplicated(["run_uuid", "key", "step"]).any()
    for child in children.itertuples():
        mine = stored[stored.run_uuid == child.run_uuid]
        found = {(row.key, row.step): row.value for row in mine.itertuples()}
        journal = folder.run(child.run_id).journal_frame()
        expected = {(row.metric, row.step): row.value for row in journal.itertuples()}
        for (step, _), path in probes.answers(folder.run(child.run_id)).items():
            expected |= {(name, step): value for name, value in probes.scalars(path).items()}
        assert found.keys() == expected.keys()
        for clock in [key for key in expected if key[0].startswith("perf/")]:
            del found[clock], expected[clock]
        assert found == pytest.approx(expected)


def final_runs(folder: SweepFolder) -> list[RunFolder]:
    return [run for run in folder.runs() if run.status().is_final]


def half_done(folder: SweepFolder, at_least: int = 20, at_most: int = 60) -> list[RunFolder]:
    """Runs that are training, with a checkpoint and with a way to go."""
    return [run for run in folder.runs() if not run.status().is_final and at_least <= run.checkpoint_step() <= at_most]
