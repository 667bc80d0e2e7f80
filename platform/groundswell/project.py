"""What of a project is sent to a cluster, and in which environment it runs there."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

from groundswell import cluster
from groundswell.config import ConfigError

MAX_PACKAGE_BYTES = 100 * 2**20  # what Ray's job server takes (ray_constants.DASHBOARD_CLIENT_MAX_SIZE)
# Not sent with a project, besides what .gitignore and .rayignore name (patterns as in .gitignore).
EXCLUDES = [
    ".git", ".venv", "venv", "/results", "/docs", "/tests", "/build", "/dist",
    "__pycache__", "*.pyc", "*.egg-info", ".*_cache", ".hypothesis", ".ipynb_checkpoints", "node_modules",
]  # fmt: skip
PYTHON_PATH = "platform:."  # from the folder that each node unpacks the project in
STOP_SECONDS = 120  # a stopped sweep has this long to save its state


def find_project(sweep: Path) -> tuple[Path, Path]:
    """-> project root (the nearest folder above with a pyproject.toml), sweep file relative to it."""
    path = sweep.resolve()
    if not path.is_file():
        raise ConfigError(f"sweep: there is no file '{sweep}'")
    for folder in path.parents:
        if (folder / "pyproject.toml").exists():
            return folder, path.relative_to(folder)
    raise ConfigError(f"sweep: no folder above '{sweep}' has a pyproject.toml; a project is sent as a whole")


def package_files(root: Path) -> dict[Path, int]:
    """The files that Ray sends, relative to the root -> bytes."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes  # what is measured is what is sent

    found: dict[Path, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            found[path.relative_to(root)] = path.stat().st_size

    _dir_travel(root, [_get_excludes(root, EXCLUDES)], add, include_gitignore=True, logger=_silent())
    return found


def check_package(root: Path, sweep: Path) -> None:
    """Raises ConfigError when the sweep is not part of what is sent, or that is more than Ray takes."""
    files = package_files(root)
    if sweep not in files:
        raise ConfigError(
            f"sweep: '{sweep}' is not sent to clusters ({sweep.parts[0]} is left out); move it to sweeps/"
        )
    total = sum(files.values())
    if total > MAX_PACKAGE_BYTES:
        folders = Counter[str]()
        for path, size in files.items():
            folders[str(Path(*path.parts[:2])) if len(path.parts) > 2 else path.parts[0]] += size
        largest = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in folders.most_common(3))
        raise ConfigError(
            f"the project is {total / 2**20:.0f} MiB, and Ray takes {MAX_PACKAGE_BYTES / 2**20:.0f} MiB: name in "
            f".rayignore what the sweep does not need, or put data on the shared file system (largest: {largest})"
        )


def runtime_env(root: Path, variables: dict[str, str]) -> dict[str, Any]:
    quiet = {name: os.environ.get(name, value) for name, value in cluster.QUIET.items()}
    # Ray's own SIGTERM handler ends a driver after three seconds, whatever it is doing.
    stop = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    env_vars = {"PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1", **stop, **quiet, **variables}
    return {"working_dir": str(root), "excludes": EXCLUDES, "env_vars": env_vars}


def _silent() -> logging.Logger:
    logger = logging.getLogger(f"{__name__}.silent")
    logger.disabled = True
    return logger
