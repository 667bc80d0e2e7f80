"""The example files in cluster/: they parse, the tools they are for accept them, and they say what ours needs."""

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml

from groundswell import project
from groundswell.rundir import SweepFolder

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
SLURM = CLUSTER / "slurm.sh"
KUBERAY = ("kuberay-raycluster.yaml", "kuberay-rayjob.yaml")


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def ray_cluster(name: str) -> dict:
    """The RayClusterSpec, wherever the file has it."""
    found = [document["spec"] for document in documents(name) if document["kind"] in ("RayCluster", "RayJob")]
    assert len(found) == 1
    return found[0].get("rayClusterSpec", found[0])


def test_sweeps_in_the_examples_exist():
    for path in CLUSTER.iterdir():
        for sweep in re.findall(r"sweeps/\w+\.py", path.read_text()):
            assert (ROOT / sweep).exists(), f"{path.name}: {sweep}"


# ---- ray up ----


@pytest.fixture
def ray_up(monkeypatch) -> dict:
    from ray.autoscaler._private.util import prepare_config

    monkeypatch.chdir(ROOT)  # its file mounts are relative
    return prepare_config(documents("ray-up.yaml")[0])


def test_ray_accepts_its_file(ray_up):
    from ray.autoscaler._private.util import validate_config

    validate_config(ray_up)
    validate_config_of_types(ray_up)


def validate_config_of_types(config: dict) -> None:
    """What the schema leaves open: each type has resources and is within the limits."""
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert sum(kind.get("max_workers", 0) for kind in types.values()) <= config["max_workers"] * len(types)
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert any(kind["resources"].get("GPU") for kind in types.values())


def test_the_schema_finds_mistakes(ray_up):
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(jsonschema.ValidationError):
        validate_config(ray_up | {"max_workers": "many"})


def test_nodes_of_ray_up_have_what_they_need(ray_up):
    setup = "\n".join(ray_up["setup_commands"])
    assert "RAY_AUTH_MODE=token" in setup and "/shared" in setup
    assert "/home/ubuntu/.ray/auth_token" in ray_up["file_mounts"]
    (head,) = [command for command in ray_up["head_start_ray_commands"] if "ray start" in command]
    assert "--head" in head and "--dashboard-host=127.0.0.1" in head and "--autoscaling-config" in head
    (worker,) = [command for command in ray_up["worker_start_ray_commands"] if "ray start" in command]
    assert "--address=$RAY_HEAD_IP:6379" in worker


@pytest.mark.parametrize("field", ["setup_commands", "head_start_ray_commands", "worker_start_ray_commands"])
def test_commands_of_ray_up_are_shell(ray_up, field):
    for command in ray_up[field]:
        text = re.sub(r"<([a-z-]+)>", r"\1", command)
        assert subprocess.run(["bash", "-n", "-c", text]).returncode == 0, command


# ---- KubeRay ----


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_resources(name):
    for document in documents(name):
        assert document["apiVersion"] == ("v1" if document["kind"] == "PersistentVolumeClaim" else "ray.io/v1")
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
    spec = ray_cluster(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] >= "2.52.0"  # the first with tokens
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert len(groups) == 2
    for group in groups:
        pod = group["template"]["spec"]
        assert isinstance(group["rayStartParams"], dict)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = pod["containers"]
        assert container["name"] and container["image"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
        assert {volume["name"] for volume in pod["volumes"]} == mounts.keys()
    worker = spec["workerGroupSpecs"][0]
    assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
    assert worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert worker["template"]["spec"]["terminationGracePeriodSeconds"] >= project.STOP_SECONDS


def test_the_claim_is_made_where_it_is_used():
    claims = [d for name in KUBERAY for d in documents(name) if d["kind"] == "PersistentVolumeClaim"]
    assert [claim["spec"]["accessModes"] for claim in claims] == [["ReadWriteMany"]]
    for name in KUBERAY:
        volume = ray_cluster(name)["headGroupSpec"]["template"]["spec"]["volumes"][0]
        assert volume["persistentVolumeClaim"]["claimName"] == claims[0]["metadata"]["name"]


def test_the_job_runs_a_sweep_as_submit_does():
    (job,) = [document["spec"] for document in documents("kuberay-rayjob.yaml")]
    assert job["entrypoint"].startswith("exec python ") and "--output /shared/" in job["entrypoint"]
    assert job["shutdownAfterJobFinishes"] is True
    sent = yaml.safe_load(job["runtimeEnvYAML"])
    expected = project.runtime_env(ROOT, {})["env_vars"]
    assert {"PYTHONPATH", "RAY_JOB_STOP_SIGNAL", "RAY_JOB_STOP_WAIT_TIME_S"} <= sent["env_vars"].keys()
    assert sent["env_vars"].items() <= expected.items()


# ---- Slurm ----


def directives() -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", SLURM.read_text(), flags=re.MULTILINE)
    return dict(found)


def test_the_slurm_script_is_shell():
    assert subprocess.run(["bash", "-n", str(SLURM)]).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", "--severity=warning", str(SLURM)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_slurm_script_asks_for_what_it_uses():
    asked, text = directives(), SLURM.read_text()
    assert asked["signal"] == "B:USR1@120"  # to the script alone, as long before the end as `--stop` waits
    assert int(asked["signal"].partition("@")[2]) >= project.STOP_SECONDS
    assert {"nodes", "cpus-per-task", "gpus-per-node", "time", "requeue"} <= asked.keys()
    assert asked["ntasks-per-node"] == "1"
    assert "SLURM_CPUS_PER_TASK" in text and "SLURM_GPUS_ON_NODE" in text
    assert '--node-ip-address="$head_ip"' in text and "RAY_AUTH_MODE=token" in text and "umask 077" in text
    assert len(re.findall(r"^\s*srun .*\\$", text, flags=re.MULTILINE)) == 2  # head, workers


SRUN = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\n[[ $1 == requeue ]] && echo "$2" > "$REQUEUED" || hostname\n'


@pytest.fixture
def slurm_job(tmp_path):
    """arguments -> the script as a job of one node, on stand-ins for Slurm's two commands, which this machine lacks;
    all else is real. What it leaves running is ended."""
    if not (ROOT / ".venv/bin/activate").exists():
        pytest.skip("the script wants the project's .venv")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job_id = free.getsockname()[1]
    variables = {
        "SLURM_JOB_ID": str(job_id),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "REQUEUED": str(tmp_path / "requeued"),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        with (tmp_path / "log").open("wb") as log:
            command = ["bash", str(SLURM), *arguments]
            started.append(
                subprocess.Popen(command, env=environment | variables, stdout=log, stderr=log, start_new_session=True)
            )
        return started[-1]

    yield start
    for process in psutil.process_iter():
        mine = [f"/tmp/ray-{job_id}" in part for part in _command(process)]
        if any(mine) or (process.is_running() and _session(process) in {one.pid for one in started}):
            process.kill()
    for process in started:
        process.wait()
    shutil.rmtree(f"/tmp/ray-{job_id}", ignore_errors=True)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_slurm_job_saves_and_goes_back_to_the_queue(slurm_job, tmp_path):
    arguments = ["sweeps/grok_wd_layers.py", "--preset", "demo", "--checkpointing.schedule.every", "100000"]
    log, end = tmp_path / "log", time.monotonic() + 400
    for _ in range(3):  # Ray itself gives a node no more than 30 s to start
        job = slurm_job(*arguments, "--output", str(tmp_path / "results"))
        while "steps/s" not in log.read_text() and job.poll() is None and time.monotonic() < end:
            time.sleep(0.5)
        if "timed out during startup" not in log.read_text():
            break
    assert job.poll() is None and "steps/s" in log.read_text(), log.read_text()
    tokens = list(ROOT.glob(".ray-token-*"))
    assert len(tokens) == 1 and stat.S_IMODE(tokens[0].stat().st_mode) == 0o600
    job.send_signal(signal.SIGUSR1)
    assert job.wait(180) == 130
    assert (tmp_path / "requeued").exists(), (tmp_path / "log").read_text()
    assert "Everything is saved" in (tmp_path / "log").read_text()
    assert not list(ROOT.glob(".ray-token-*"))
    (folder,) = [SweepFolder(path) for path in (tmp_path / "results").iterdir() if (path / "runs").is_dir()]
    assert sum(run.checkpoint_step() > 0 for run in folder.runs()) == 2
