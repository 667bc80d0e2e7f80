"""Sweeps as jobs of a real cluster: submitted, followed, failing, stopped, and on two nodes."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from clusters import start_head

from groundswell.rundir import SweepFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds; machines that run tests are slow at times
BROKEN_PART = """
from models.objectives import AnswerLoss


class Broken(AnswerLoss):
    def loss(self, *arguments, **named):
        raise RuntimeError("broken on purpose")
"""
FAILING_SWEEP = """
from dataclasses import replace

from groundswell.cli import main
from groundswell.sweep import Axis
from sweeps.broken_part import Broken
from sweeps.grok_wd_layers import build as original


def build(preset):
    sweep = original("smoke")
    base = sweep.base.with_overrides({"objective": Broken()})
    return replace(sweep, name="failing", base=base, axes={"seed": Axis(values=(0,))}, report=None)


if __name__ == "__main__":
    main(build, {"smoke": "one broken run"}, default="smoke")
"""
WHERE = """
import os
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from groundswell import cluster

with cluster.connect(os.environ["RAY_ADDRESS"]):
    @ray.remote(num_cpus=0.1)
    def where():
        import groundswell, tasks.reverse
        return groundswell.__file__, tasks.reverse.__file__
    for node in ray.nodes():
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        print("FOUND", *ray.get(where.options(scheduling_strategy=here).remote()), flush=True)
"""


@pytest.fixture(scope="module")
def head():
    """On two CPUs, with dashboard and job server. At its end nothing of it is left."""
    with start_head(num_cpus=2) as head:
        yield head
    assert not head.family()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project of its own with this one's code, so that what runs is what was sent."""
    root = tmp_path_factory.mktemp("project")
    for name in ("platform", "models", "tasks", "analysis", "sweeps"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for name, text in (("where", WHERE), ("broken_part", BROKEN_PART), ("failing", FAILING_SWEEP)):
        (root / f"sweeps/{name}.py").write_text(text)
    return root


def submit(head, *arguments, cwd=ROOT) -> subprocess.Popen:
    command = [sys.executable, "-m", "groundswell.commands", "submit", *map(str, arguments)]
    position = command.index("--") if "--" in command else len(command)
    command[position:position] = ["--address", head.dashboard]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_heed_interrupts,
    )


def _heed_interrupts() -> None:
    """A shell starts what runs in its background deaf to them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        printed, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, printed


def read_until(process: subprocess.Popen, text: str) -> str:
    """What was printed up to the line with `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} was never printed:\n{''.join(lines)}")


def trained_steps(folder: SweepFolder) -> dict[str, int]:
    return {run.run_id: run.checkpoint_step() for run in folder.runs()}


def test_a_sweep_as_a_job(head, tmp_path):
    output = tmp_path / "results"
    process = submit(head, "sweeps/grok_wd_layers.py", "--output", output, "--", "--preset", "smoke")
    code, printed = finish(process)
    assert code == 0, printed
    assert f"results go to {output}" in printed and "--attach grok_wd_layers-" in printed
    assert "starting Ray on the cluster at" in printed and "Grokking" in printed
    folder = SweepFolder(output / "grok_wd_layers-smoke")
    assert [run.status().state for run in folder.runs()] == ["finished"] * 4
    assert set(trained_steps(folder).values()) == {150}
    assert len(pd.read_csv(folder.path / "tables/runs.csv")) == 4
    with sqlite3.connect(output / "mlflow.db") as connection:
        states = connection.execute("select status from runs").fetchall()
    assert states == [("FINISHED",)] * 5

    code, printed = finish(submit(head, "--list"))
    assert code == 0 and "SUCCEEDED" in printed and "--preset smoke" in printed


def test_a_llama_on_two_workers_as_a_job(head, tmp_path):
    """FSDP2 under Ray Train in a submitted job; its checkpoint is a plain Hugging Face folder, its curves in MLflow."""
    from transformers import AutoModelForCausalLM

    output = tmp_path / "results"
    spread = ["--axis", "architecture=llama", "--scaling.strategy", "fsdp", "--scaling.num-workers", "2"]
    arguments = ["sweeps/llama_grokking.py", "--output", output, "--", "--preset", "smoke", *spread]
    code, printed = finish(submit(head, *arguments))
    assert code == 0, printed
    (run,) = SweepFolder(next(output.glob("llama_grokking-*"))).runs()
    assert run.status().state == "finished"
    model = AutoModelForCausalLM.from_pretrained(run.checkpoint_folder(60))
    assert model.config.model_type == "llama"
    with sqlite3.connect(output / "mlflow.db") as connection:
        query = "select count(*) from metrics where key = 'eval/test_inferred_iid/accuracy'"
        assert connection.execute(query).fetchone()[0] == sum(
            "eval/test_inferred_iid/accuracy" in line["metrics"] for line in run.journal()
        )


def test_a_sweep_with_a_failing_run(head, project, tmp_path):
    """Its exit code is the job's; so is that of a mistake in the sweep's own options."""
    code, printed = finish(submit(head, project / "sweeps/failing.py", "--output", tmp_path, "--", "--preset", "smoke"))
    assert code == 1, printed
    assert "broken on purpose" in printed
    code, printed = finish(submit(head, project / "sweeps/failing.py", "--output", tmp_path, "--", "--presett", "x"))
    assert code == 2, printed
    assert "--presett: no such option" in printed


def test_ctrl_c_leaves_the_job_and_stop_saves_it(head, tmp_path):
    arguments = ["--preset", "demo", "--checkpointing.schedule.every", "100000"]  # only a stop writes checkpoints
    process = submit(head, "sweeps/grok_wd_layers.py", "--output", tmp_path, "--", *arguments)
    job = read_until(process, "--attach").split("--attach ")[1].split()[0]
    read_until(process, "steps/s")
    process.send_signal(signal.SIGINT)
    code, printed = finish(process)
    assert code == 130 and "The job goes on. Ctrl-C again" in printed and f"--stop {job}" in printed
    (folder,) = [SweepFolder(path) for path in tmp_path.iterdir() if (path / "runs").is_dir()]
    assert not any(trained_steps(folder).values())

    attached = submit(head, "--attach", job)
    read_until(attached, "steps/s")
    code, printed = finish(submit(head, "--stop", job))
    assert code == 0 and f"{job} STOPPED" in printed, printed
    code, printed = finish(attached)
    assert code == 130 and "Everything is saved" in printed and "was stopped; the same command goes on" in printed
    assert sum(step > 0 for step in trained_steps(folder).values()) == 2

    code, printed = finish(submit(head, "--stop", job))
    assert code == 0 and "is not running" in printed


def test_two_nodes_use_what_was_sent_to_each(head, project):
    """Also by Ray's own command; a node's copy is in its own folder, as on another machine."""
    head.add_node()
    code, printed = finish(submit(head, project / "sweeps/where.py", "--output", "/tmp"))
    assert code == 0, printed
    assert_found_on_each_node(head, printed)
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard]
    command += ["--working-dir", ".", "--runtime-env-json", '{"env_vars": {"PYTHONPATH": "platform:."}}']
    command += ["--", sys.executable, "sweeps/where.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout
    assert_found_on_each_node(head, done.stdout)


def assert_found_on_each_node(head, printed: str) -> None:
    found = sorted(line.split()[1:] for line in printed.splitlines() if line.startswith("FOUND"))
    assert len(found) == 2
    for paths, node in zip(found, ("head", "node-1"), strict=True):
        copies = {path.partition("/working_dir_files/")[0] for path in paths}
        assert len(copies) == 1 and copies.pop().startswith(f"{head.folder}/{node}/session_"), printed


def test_nothing_is_left_of_a_cluster():
    before = {process.pid for process in psutil.process_iter()}
    with start_head(num_cpus=1) as other:
        started = {process.pid for process in other.family()}
        assert len(started) > 4  # control process, node, dashboard, agents
    end = time.monotonic() + 5
    while (left := {p.pid for p in psutil.process_iter()} & started) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left - before and not other.folder.exists()
