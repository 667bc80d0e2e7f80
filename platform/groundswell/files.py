"""Writing to disk so that a reader, or the next start after a kill, never meets half a file."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from groundswell.config import ConfigError

FOREIGN_LEFTOVER_SECONDS = 24 * 3600.0  # a temporary of another machine is a leftover when it is older than this
# .<final name>.tmp-<host>-<process id>-<random>
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.tmp-(?P<host>[^-]+)-(?P<pid>\d+)-[0-9a-f]{8}")


def check_name(name: str, what: str = "name") -> str:
    """`name`, if it can be one component of a path on any system. Raises ConfigError."""
    bad = not name or name != name.strip() or name.startswith(".") or len(name.encode()) > 200
    if bad or any(c in '/\\:*?"<>|' or not c.isprintable() for c in name):
        raise ConfigError(
            f"{what}: {name!r} cannot name a file; use letters, digits, '-', '_' and '.', not starting with '.'"
        )
    return name


def ensure_writable(path: str | Path, field: str = "output") -> Path:
    """Make the folder where it is missing, and try to write there. Raises ConfigError."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary_sibling(folder / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{field}: cannot write to '{folder}' ({reason}); choose another folder") from None
    return folder


def atomic_write(path: str | Path, content: str | bytes, sync: bool = True) -> Path:
    """Replace the file as a whole. `sync` False saves the wait for the disk where losing the change does no harm.

    Inside an `atomic_folder` nothing waits: the folder syncs all its files at its end.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sync = sync and not _TEMPORARY.fullmatch(path.parent.name)
    temporary = _temporary_sibling(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        _sync_folder(path.parent)
    return path


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which gets its name only when the block ends without an error and all is on disk.

    Raises FileExistsError if there is one of that name. What killed writers have left beside it is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync_file(Path(folder) / name)
            _sync_folder(Path(folder))
        if path.exists():  # os.rename would silently replace an empty folder
            raise FileExistsError(f"{path} exists already")
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporaries of writers that are gone: dead processes of this machine, and very old ones of any."""
    for entry in list(os.scandir(folder)):
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None:
            continue
        with contextlib.suppress(OSError):  # another process may remove it at the same time
            old = time.time() - entry.stat(follow_symlinks=False).st_mtime > FOREIGN_LEFTOVER_SECONDS
            if not (old or (match["host"] == _host() and not _is_alive(int(match["pid"])))):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _host() -> str:
    return socket.gethostname().replace("-", "_") or "localhost"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make the entries themselves durable. Not every file system lets a folder be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
