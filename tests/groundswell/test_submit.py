"""Submission as far as it goes without a cluster: what is sent, where to, what is made of a job server's answers."""

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest
from aiohttp import web

from groundswell import project, submit
from groundswell.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Submission sets these; empty ones count as none."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://head:8265", "http://head:8265"),
        ("http://head:1234/", "http://head:1234"),
        ("head:1234", "http://head:1234"),
        ("10.0.0.1", "http://10.0.0.1:8265"),
        ("https://rays.example.org", "https://rays.example.org"),
        ("https://example.org/cluster/", "https://example.org/cluster"),
        ("auto", "http://127.0.0.1:8265"),
    ],
)
def test_dashboard_addresses(given, url):
    assert submit.dashboard_address(given) == url


def test_addresses_from_the_environment(monkeypatch):
    with pytest.raises(ConfigError, match="--address: name the cluster's dashboard"):
        submit.dashboard_address(None)
    monkeypatch.setenv("RAY_ADDRESS", "http://one:1")
    assert submit.dashboard_address(None) == "http://one:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://two:2")
    assert submit.dashboard_address(None) == "http://two:2"
    assert submit.dashboard_address("three") == "http://three:8265"


@pytest.mark.parametrize("address", ["ray://head:10001", "head:port", "http://", "ftp://head"])
def test_addresses_that_cannot_be_right(address):
    with pytest.raises(ConfigError, match="write http://HOST:8265"):
        submit.dashboard_address(address)


# ---- what is sent ----


def test_the_project_without_what_a_sweep_does_not_need():
    files = {path.as_posix() for path in project.package_files(ROOT)}
    assert {"platform/groundswell/submit.py", "models/decoder.py", "sweeps/grok_wd_layers.py"} <= files
    tops = {name.partition("/")[0] for name in files}
    assert not tops & {"tests", "docs", "results", ".git", ".venv"}
    assert not [name for name in files if "__pycache__" in name]


@pytest.fixture
def small_project(tmp_path):
    """A project of one sweep; also -> its sweep file."""
    (tmp_path / "pyproject.toml").touch()
    for name in ("sweeps", "data/large", "data/small"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "sweeps/one.py").write_text("print()")
    return tmp_path


def test_the_root_is_found_from_the_sweep(small_project, monkeypatch, tmp_path_factory):
    assert project.find_project(small_project / "sweeps/one.py") == (small_project, Path("sweeps/one.py"))
    monkeypatch.chdir(small_project / "sweeps")
    assert project.find_project(Path("one.py")) == (small_project, Path("sweeps/one.py"))
    with pytest.raises(ConfigError, match="sweep: there is no file 'two.py'"):
        project.find_project(Path("two.py"))
    lonely = tmp_path_factory.mktemp("lonely") / "sweep.py"
    lonely.touch()
    with pytest.raises(ConfigError, match=r"has a pyproject\.toml"):
        project.find_project(lonely)


def test_too_large_a_project_names_its_largest_folders(small_project):
    for name, mebibytes in (("data/large/a.bin", 90), ("data/small/b.bin", 11), ("c.bin", 3)):
        with (small_project / name).open("wb") as file:
            file.truncate(mebibytes * 2**20)  # takes no room on the disk
    with pytest.raises(ConfigError) as caught:
        project.check_package(small_project, Path("sweeps/one.py"))
    assert "the project is 104 MiB, and Ray takes 100 MiB" in str(caught.value)
    assert "(largest: data/large 90 MiB, data/small 11 MiB, c.bin 3 MiB)" in str(caught.value)
    (small_project / ".rayignore").write_text("/data/large\n")
    project.check_package(small_project, Path("sweeps/one.py"))


def test_a_sweep_that_is_left_out(small_project):
    (small_project / "tests").mkdir()
    (small_project / "tests/two.py").touch()
    with pytest.raises(ConfigError, match="sweep: 'tests/two.py' is not sent to clusters"):
        project.check_package(small_project, Path("tests/two.py"))


def test_the_environment_of_a_job(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    sent = project.runtime_env(ROOT, {"MINE": "1", "OMP_NUM_THREADS": "4"})
    assert sent["working_dir"] == str(ROOT)
    variables = sent["env_vars"]
    assert variables["PYTHONPATH"] == "platform:."
    assert (variables["MINE"], variables["OMP_NUM_THREADS"]) == ("1", "4")
    assert (variables["RAY_USAGE_STATS_ENABLED"], variables["HF_HUB_OFFLINE"]) == ("0", "0")
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > 60  # Ray's own 3 s do not do to save a state


# ---- the command line ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a sweep file, or one of --attach JOB, --stop JOB, --list"),
        (["--list", "--stop", "job"], "name a sweep file, or one of"),
        (["sweep.py", "--", "--output", "here"], "--output: belongs before the `--`"),
        (["sweep.py", "--", "--address=there"], "--address: belongs before the `--`"),
        (["none.py", "--address", "there"], "sweep: there is no file 'none.py'"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    with pytest.raises(ConfigError, match=message):
        submit.main(arguments)


@pytest.mark.parametrize("text", ["NAME", "=1", "a b=1"])
def test_variables_are_assignments(text):
    assert submit._variables(["A=1", "B=x=y"]) == {"A": "1", "B": "x=y"}
    with pytest.raises(ConfigError, match="write NAME=VALUE"):
        submit._variables([text])


def test_nobody_at_the_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(ConfigError, match=f"no Ray dashboard answers at {url}: check --address"):
        submit.main(["--list", "--address", url])
    assert time.monotonic() - start < 30


# ---- a job server's answers ----


class JobServer:
    """Speaks as Ray's job server does, for what does not depend on a cluster."""

    def __init__(self, **answers) -> None:
        self.answers = {
            "auth": 200,
            "status": "SUCCEEDED",
            "code": 0,
            "node": "127.0.0.1",
            "tails": [["log\n"]],
        } | answers
        self.tails = list(self.answers["tails"])
        self.loop = asyncio.new_event_loop()
        self.port = 0

    async def version(self, request):
        if self.answers["auth"] != 200:
            return web.Response(status=self.answers["auth"], text="no")
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})

    async def nodes(self, request):
        node = dict.fromkeys(["node_id", "node_name", "state_message", "start_time_ms", "end_time_ms"], None)
        node |= {"node_ip": self.answers["node"], "state": "ALIVE", "is_head_node": True, "resources_total": {}}
        result = dict.fromkeys(["total", "num_after_truncation", "num_filtered"], 1)
        result |= {"result": [node | {"labels": {}}], "warnings": None, "partial_failure_warning": ""}
        return web.json_response({"result": True, "msg": "", "data": {"result": result}})

    async def job(self, request):
        if request.match_info["job"] != "known":
            return web.Response(status=404, text="Job does not exist")
        status = "RUNNING" if len(self.tails) > 1 else self.answers["status"]
        values = {
            "type": "SUBMISSION",
            "submission_id": "known",
            "status": status,
            "entrypoint": "x",
            "message": "why\nnot",
        }
        return web.json_response(values | {"driver_exit_code": self.answers["code"]})

    async def tail(self, request):
        """All from the beginning each time; an unfinished log breaks off."""
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for chunk in self.tails[0]:
            await socket.send_str(chunk)
        if len(self.tails) > 1:
            self.tails.pop(0)
            request.transport.abort()
        await socket.close()
        return socket

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        application = web.Application()
        application.add_routes(
            [
                web.get("/api/version", self.version),
                web.get("/api/v0/nodes", self.nodes),
                web.get("/api/jobs/{job}", self.job),
                web.get("/api/jobs/{job}/logs/tail", self.tail),
            ]
        )
        runner = web.AppRunner(application)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.port = site._server.sockets[0].getsockname()[1]
        self.ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())

    @contextlib.contextmanager
    def running(self):
        self.ready = threading.Event()
        thread = threading.Thread(target=self._serve, daemon=True)
        thread.start()
        assert self.ready.wait(10)
        yield f"http://127.0.0.1:{self.port}"
        self.loop.call_soon_threadsafe(self.loop.stop)
        thread.join(10)


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_another_token(status):
    with JobServer(auth=status).running() as url, pytest.raises(ConfigError) as caught:
        submit.main(["--list", "--address", url])
    assert str(caught.value).startswith(f"the cluster at {url} refuses this user: put the cluster's token")
    assert "~/.ray/auth_token" in str(caught.value)


def test_something_else_at_the_address():
    with JobServer(auth=404).running() as url, pytest.raises(ConfigError, match=f"no Ray dashboard answers at {url}"):
        submit.main(["--list", "--address", url])


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", -9, 137),  # as a shell tells a signal
        ("FAILED", None, 1),  # it never came to run
        ("STOPPED", None, 130),
    ],
)
def test_the_exit_code_is_the_jobs(status, code, expected, capsys):
    with JobServer(status=status, code=code).running() as url:
        assert submit.main(["--attach", "known", "--address", url]) == expected
    printed = capsys.readouterr().out
    assert printed.startswith("log\n")
    assert ("FAILED: why not" in printed) == (status == "FAILED" and code is None)


def test_a_log_that_breaks_off_is_printed_once(capsys):
    tails = [["a\n"], ["a\n", "b\n"], ["a\nb\nc", "\nd\n"]]
    with JobServer(tails=tails).running() as url:
        assert submit.main(["--attach", "known", "--address", url]) == 0
    assert capsys.readouterr().out == "a\nb\nc\nd\n"


def test_no_such_job():
    with JobServer().running() as url, pytest.raises(ConfigError, match="unknown: no such job at"):
        submit.main(["--attach", "unknown", "--address", url])


@pytest.mark.parametrize("output", [[], ["--output", "results"]])
def test_results_of_another_machine_need_a_place(output, small_project):
    """A loopback address may be a tunnel: it is the nodes that count."""
    sweep = str(small_project / "sweeps/one.py")
    with JobServer(node="198.51.100.7").running() as url, pytest.raises(ConfigError, match="--output: name a folder"):
        submit.main([sweep, "--address", url, *output])
