"""`groundswell submit`: run a sweep as a job of a Ray cluster, and look at, follow and stop such jobs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import logging
import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import tyro
from rich.console import Console
from rich.table import Table

from groundswell import cluster
from groundswell.config import ConfigError
from groundswell.project import STOP_SECONDS, check_package, find_project, runtime_env

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DASHBOARD_PORT = 8265  # Ray's default
SECOND_CTRL_C_SECONDS = 5.0  # after the first one
LOST_LOG_SECONDS = 30.0  # how long a log that broke off is tried again


@dataclasses.dataclass
class Options:
    """Run a sweep as a job of a Ray cluster, and follow its log until it ends.

    groundswell submit sweeps/NAME.py --address http://HEAD:8265 --output /shared/results -- OPTIONS OF THE SWEEP

    The exit code is the job's. Ctrl-C leaves the job running; a second one stops it.
    """

    sweep: tyro.conf.Positional[Path | None] = None
    """sweep file to run; what follows `--` is handed to it"""
    address: str | None = None
    """the cluster's dashboard, such as http://127.0.0.1:8265 (default: RAY_API_SERVER_ADDRESS, then RAY_ADDRESS)"""
    output: Path | None = None
    """folder for results, on a file system that all nodes see (default: ./results when the cluster is this machine)"""
    follow: bool = True
    """print the job's log until it ends"""
    env: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE for the job and its workers (may be given several times); everyone with the dashboard can read it"""
    python: str | None = None
    """Python of the cluster's nodes (default: `python`; this one when the cluster is this machine)"""
    attach: Annotated[str | None, tyro.conf.arg(metavar="JOB")] = None
    """follow a job that was submitted before"""
    stop: Annotated[str | None, tyro.conf.arg(metavar="JOB")] = None
    """stop a job; it saves its state first"""
    list: bool = False
    """list the cluster's jobs"""


def main(arguments: Sequence[str]) -> int:
    """Exit code: the job's (130 when it was stopped); 0 when it is not followed. Raises ConfigError."""
    cluster.prepare_environment(joining=True)
    own, sweep_arguments = _split(list(arguments))
    options = tyro.cli(Options, prog="groundswell submit", args=own)
    chosen = [name for name in ("sweep", "attach", "stop", "list") if getattr(options, name)]
    if len(chosen) != 1:
        raise ConfigError("submit: name a sweep file, or one of --attach JOB, --stop JOB, --list")
    address = dashboard_address(options.address)
    if options.attach:
        return Jobs(address).follow(options.attach)
    if options.stop:
        return Jobs(address).stop(options.stop)
    if options.list:
        return Jobs(address).show()
    assert options.sweep is not None
    root, sweep = find_project(options.sweep)
    check_package(root, sweep)  # before the cluster is asked
    jobs = Jobs(address)
    job = jobs.submit(options, root, sweep, sweep_arguments)
    return jobs.follow(job) if options.follow else 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """-> submit's own arguments, the sweep's."""
    position = arguments.index("--") if "--" in arguments else len(arguments)
    own, others = arguments[:position], arguments[position + 1 :]
    for name in ("--output", "--address"):
        if any(argument.partition("=")[0] == name for argument in others):
            raise ConfigError(f"{name}: belongs before the `--`, where it is about the cluster")
    return own, others


def _variables(assignments: Sequence[str]) -> dict[str, str]:
    for text in assignments:
        if not text.partition("=")[0].isidentifier() or "=" not in text:
            raise ConfigError(f"--env {text}: write NAME=VALUE")
    return dict(text.split("=", 1) for text in assignments)


# ---- the cluster ----


def dashboard_address(given: str | None) -> str:
    """URL of a dashboard from --address or the environment. Raises ConfigError."""
    text = given or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not text:
        raise ConfigError(f"--address: name the cluster's dashboard, for instance http://127.0.0.1:{DASHBOARD_PORT}")
    text = f"127.0.0.1:{DASHBOARD_PORT}" if text == "auto" else text
    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise ConfigError(f"--address {text}: write http://HOST:{DASHBOARD_PORT}, the address of the dashboard")
    if port is None and parts.scheme == "http":
        parts = parts._replace(netloc=f"{parts.netloc}:{DASHBOARD_PORT}")
    return parts.geturl().rstrip("/")


class Jobs:
    """The jobs of the cluster whose dashboard is at `url`. Raises ConfigError when it does not answer in 30 s."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True, highlight=False)
        self.client = self._connect()

    def _connect(self) -> JobSubmissionClient:
        end = time.monotonic() + cluster.CONNECT_SECONDS
        parts = urlsplit(self.url)
        advice = (
            f"no Ray dashboard answers at {self.url}: check --address (host and port of the dashboard, not of the head "
            "itself) and that the head was started with ray[default] installed"
        )
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), timeout=cluster.CONNECT_SECONDS / 3).close()
        except OSError:
            raise ConfigError(advice) from None
        os.environ["RAY_API_SERVER_ADDRESS"] = self.url  # RAY_ADDRESS would win over an argument
        os.environ["RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES"] = ""  # they are among ours; Ray warns of each
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        for name in (
            "ray.dashboard.modules.dashboard_sdk",
            "ray.dashboard.modules.job.sdk",
            "ray._private.runtime_env",
        ):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            return cluster.within(end - time.monotonic(), lambda: JobSubmissionClient(self.url))
        except AuthenticationError:
            raise ConfigError(f"the cluster at {self.url} refuses this user: {cluster.TOKEN_ADVICE}") from None
        except Exception as error:
            raise ConfigError(" ".join(f"{advice} ({error})".split())) from None

    def on_this_machine(self) -> bool:
        """Are all nodes this machine? A loopback address alone may be a tunnel."""
        from ray.util.state import list_nodes

        try:
            nodes = list_nodes(self.url, filters=[("state", "=", "ALIVE")], timeout=int(cluster.CONNECT_SECONDS))
        except Exception:  # a cluster of another version of Ray, say: then it is to be told
            return False
        return bool(nodes) and all(_is_own_address(node.node_ip) for node in nodes)

    def submit(self, options: Options, root: Path, sweep: Path, arguments: Sequence[str]) -> str:
        local = self.on_this_machine()
        output = options.output or (Path("results").resolve() if local else None)
        if output is None or not output.is_absolute():
            raise ConfigError("--output: name a folder by its absolute path, on a file system that all nodes see")
        python = options.python or (sys.executable if local else "python")
        # `exec`: the driver itself gets the signal of --stop.
        command = f"exec {shlex.join([python, str(sweep), *arguments, '--output', str(output)])}"
        name = f"{sweep.stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        job = self._ask(
            lambda: self.client.submit_job(
                entrypoint=command,
                submission_id=name,
                runtime_env=runtime_env(root, _variables(options.env)),
                metadata={"output": str(output)},
            )
        )
        self.console.print(f"job {job}: results go to {output}")
        self._say_how_to_look(job)
        return job

    def _ask(self, function: Any) -> Any:
        """Ray's errors in one line."""
        try:
            return function()
        except (RuntimeError, OSError) as error:
            raise ConfigError(" ".join(f"{self.url}: {error}".split())) from None

    def _say_how_to_look(self, job: str) -> None:
        again = f"groundswell submit --address {self.url}"
        self.console.print(f"look again: {again} --attach {job}\nstop:       {again} --stop {job}")

    # ---- following ----

    def follow(self, job: str) -> int:
        """Print the job's log until it ends; returns its exit code. Ctrl-C leaves it alone, a second one stops it."""
        self._info(job)
        printer = _LogPrinter(self.client, job)
        try:
            asyncio.run(printer.run())
        except KeyboardInterrupt:
            return self._leave(job)
        except Exception as error:
            self.console.print(f"the log of {job} broke off: {' '.join(str(error).split())}")
            self._say_how_to_look(job)
        return self._exit_code(job)

    def _leave(self, job: str) -> int:
        self.console.print(f"\nThe job goes on. Ctrl-C again within {SECOND_CTRL_C_SECONDS:.0f} s stops it, too.")
        self._say_how_to_look(job)
        try:
            time.sleep(SECOND_CTRL_C_SECONDS)
        except KeyboardInterrupt:
            self.stop(job)
        return 130

    def _exit_code(self, job: str) -> int:
        info = self._wait(job, LOST_LOG_SECONDS)
        if info.status == "SUCCEEDED":
            return 0
        if info.status == "STOPPED":
            self.console.print(f"{job} was stopped; the same command goes on from what it has saved")
            return 130
        code = info.driver_exit_code
        if code is None:  # it never came to run, or its node is gone
            self.console.print(f"{job} {info.status}: {' '.join(str(info.message).split())}")
        return 1 if code is None else code if code >= 0 else 128 - code

    def _info(self, job: str) -> Any:
        try:
            return self.client.get_job_info(job)
        except (RuntimeError, OSError) as error:
            if "404" in str(error):
                raise ConfigError(f"{job}: no such job at {self.url}; --list lists them") from None
            raise ConfigError(" ".join(f"{self.url}: {error}".split())) from None

    def _wait(self, job: str, seconds: float) -> Any:
        """The job's last state, or that after so many seconds."""
        end = time.monotonic() + seconds
        while not (info := self._info(job)).status.is_terminal() and time.monotonic() < end:
            time.sleep(0.5)
        return info

    # ---- others ----

    def stop(self, job: str) -> int:
        self._info(job)
        if not self._ask(lambda: self.client.stop_job(job)):
            self.console.print(f"{job} is not running")
            return 0
        self.console.print(f"stopping {job}: it may take {STOP_SECONDS} s to save its state")
        info = self._wait(job, STOP_SECONDS + LOST_LOG_SECONDS)
        self.console.print(f"{job} {info.status}")
        return 0 if info.status.is_terminal() else 1

    def show(self) -> int:
        table = Table("job", "state", "started", "took", "command", box=None, pad_edge=False, header_style="bold")
        jobs = [job for job in self._ask(self.client.list_jobs) if job.submission_id]
        for job in sorted(jobs, key=lambda job: job.start_time or 0):
            started = datetime.datetime.fromtimestamp((job.start_time or 0) / 1000)
            seconds = ((job.end_time or time.time() * 1000) - (job.start_time or 0)) / 1000
            command = job.entrypoint.removeprefix("exec ")
            table.add_row(job.submission_id, job.status, f"{started:%Y-%m-%d %H:%M:%S}", f"{seconds:.0f} s", command)
        self.console.print(table if jobs else f"no jobs at {self.url}")
        return 0


class _LogPrinter:
    """A log from its beginning, once, also when the connection breaks meanwhile."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self.client, self.job = client, job
        self.printed = 0  # characters

    async def run(self) -> None:
        lost = time.monotonic()
        while True:
            try:
                before = self.printed
                await self._tail()
            except Exception:
                if time.monotonic() - lost > LOST_LOG_SECONDS and self.printed == before:
                    raise
            if self.printed > before:
                lost = time.monotonic()
            status = await asyncio.to_thread(self.client.get_job_status, self.job)
            if status.is_terminal():
                await self._tail()  # what came after the connection had ended
                return
            await asyncio.sleep(1.0)

    async def _tail(self) -> None:
        """The server begins at the beginning each time."""
        seen = 0
        async with contextlib.aclosing(self.client.tail_job_logs(self.job)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                new = chunk[max(0, self.printed - seen) :]
                seen += len(chunk)
                self.printed = max(self.printed, seen)
                sys.stdout.write(new)
                sys.stdout.flush()


def _is_own_address(address: str) -> bool:
    """Only an address of this machine can be bound."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True
