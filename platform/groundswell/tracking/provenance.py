"""What a sweep ran on and from: code, packages, machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

PATCH_BYTES = 1_000_000  # a larger difference from the commit is cut
_COMMAND_SECONDS = 20.0


@dataclass(frozen=True)
class GitState:
    commit: str | None = None
    branch: str | None = None
    dirty: bool = False
    untracked: tuple[str, ...] = ()  # the first hundred
    patch: bytes = b""  # `git diff HEAD`, at most PATCH_BYTES

    def to_dict(self) -> dict[str, Any]:
        values = {"commit": self.commit, "branch": self.branch, "dirty": self.dirty, "untracked": list(self.untracked)}
        return {**values, "patch_truncated": len(self.patch) >= PATCH_BYTES}


def git_state(folder: str | Path = ".") -> GitState:
    """Of the repository around `folder`; an empty state outside of one."""
    status = _output("git", "-C", str(folder), "status", "--porcelain=v1", "--untracked-files=all")
    if status is None:
        return GitState()
    lines = status.decode(errors="replace").splitlines()
    commit = _text("git", "-C", str(folder), "rev-parse", "--verify", "-q", "HEAD")
    patch = _output("git", "-C", str(folder), "diff", "--binary", "HEAD") if commit else None
    return GitState(
        commit=commit,
        branch=_text("git", "-C", str(folder), "symbolic-ref", "--short", "-q", "HEAD"),
        dirty=bool(lines),
        untracked=tuple(line[3:] for line in lines if line.startswith("??"))[:100],
        patch=(patch or b"")[:PATCH_BYTES],
    )


def environment() -> dict[str, Any]:
    """Python, packages, processor, memory, GPUs of this machine."""
    packages = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "command": sys.argv,
        "platform": platform.platform(),
        "hostname": platform.node(),
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "memory_mib": _memory_mib(),
        "gpus": _gpus(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_mib() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    except (ValueError, OSError, AttributeError):
        return None


def _gpus() -> list[str]:
    """Name, memory, driver of each. Asks the driver's tool: torch would take a context on the device."""
    if shutil.which("nvidia-smi") is None:
        return []
    text = _text("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return text.splitlines() if text else []


def _text(*command: str) -> str | None:
    output = _output(*command)
    return output.decode(errors="replace").strip() or None if output is not None else None


def _output(*command: str) -> bytes | None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
