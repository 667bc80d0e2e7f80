"""Shared storage named by a URI: file://, s3://, gs://, abfs://, hdfs:// (Apache Arrow), others through fsspec.

A folder with a marker file is whole or not there: `push` writes the marker last, and `pull` wants it.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from groundswell.config import ConfigError
from groundswell.files import atomic_folder, atomic_write

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs")
SMALL_BYTES = 2**20  # files up to this size are compared by content, larger ones by size and time
CHUNK_BYTES = 8 * 2**20
TIMEOUT_SECONDS = 30  # for connections and answers
WHOLE_ON_CLOSE = ("s3", "gcs", "abfs")  # stores where a file appears, whole, when it is closed; others get a rename
# What is in Arrow's messages -> what to do. Only the first is worth another try by itself.
REMEDIES = (
    (("NETWORK_CONNECTION", "curlCode", "Couldn't connect", "timed out", "Timeout", "SLOW_DOWN", "INTERNAL_FAILURE",
      "SERVICE_UNAVAILABLE", "Retry policy exhausted", "Connection reset"),
     "it cannot be reached: check the network, and for s3 AWS_ENDPOINT_URL and AWS_REGION"),
    (("NO_SUCH_BUCKET", "NoSuchBucket", "bucket does not exist"), "make the bucket first, or correct the URI"),
    (("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "UNRECOGNIZED_CLIENT", "INVALID_CLIENT",
      "HTTP status 403", "HTTP response code 403", "Permission denied", "PERMISSION_DENIED", "UNAUTHENTICATED"),
     "it refuses this user: check credentials (for s3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) and their rights"),
)  # fmt: skip


class StorageError(ConfigError):
    """One line that names the URI and the remedy. `passing`: the same may well succeed a little later."""

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class Storage:
    """A place in shared storage. Raises StorageError when it cannot be used; so do all methods."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        parts = urlsplit(uri)
        if len(parts.scheme) < 2 or (parts.scheme == "file" and not parts.path.startswith("/")):
            raise StorageError(
                f"storage: '{uri}' is no URI; write file:///folder, s3://bucket/folder or gs://bucket/folder"
            )
        with self._errors():
            self._filesystem, self._root = _open(uri, parts.scheme)
            self._atomic = self._filesystem.type_name in WHOLE_ON_CLOSE
            self._check_root(parts.scheme)
        self._pushed: dict[str, tuple[int, int]] = {}  # path in the store -> size and time of the local file

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def _check_root(self, scheme: str) -> None:
        if self._filesystem.type_name in ("local", "hdfs"):
            self._filesystem.create_dir(self._root, recursive=True)
            if scheme == "file" and not os.access(self._root, os.W_OK):
                raise PermissionError("Permission denied")
            return
        bucket = PurePosixPath(self._root).parts[0]
        if not _is_there(self._filesystem.get_file_info(bucket)):
            raise FileNotFoundError(f"the bucket does not exist: {bucket}")

    # ---- looking ----

    def list(self, relative: str = "") -> Sequence[str]:
        """Names of what is directly below, sorted; nothing where there is nothing."""
        return sorted(PurePosixPath(info.path).name for info in self._infos(relative, recursive=False))

    def exists(self, relative: str) -> bool:
        """Is there a file or a folder of this name?"""
        with self._errors():
            return _is_there(self._filesystem.get_file_info(self._path(relative)))

    def read(self, relative: str) -> bytes | None:
        """A small file's content; None where there is none."""
        with self._errors():
            try:
                with self._filesystem.open_input_stream(self._path(relative)) as stream:
                    return stream.read()
            except FileNotFoundError:
                return None

    def _infos(self, relative: str, recursive: bool) -> Sequence[Any]:
        from pyarrow import fs

        selector = fs.FileSelector(self._path(relative), allow_not_found=True, recursive=recursive)
        with self._errors():
            return [i for i in self._filesystem.get_file_info(selector) if not _is_temporary(i.path)]

    def _files(self, relative: str) -> dict[str, Any]:
        """All files below: path relative to `relative` -> Arrow's FileInfo."""
        base = PurePosixPath(self._path(relative))
        return {
            str(PurePosixPath(info.path).relative_to(base)): info
            for info in self._infos(relative, recursive=True)
            if info.is_file
        }

    # ---- writing ----

    def push(self, folder: Path, relative: str, marker: str | None = None) -> int:
        """Upload what is new or changed; returns the number of files written.

        With a marker the folder in the store becomes an exact copy: the marker comes last, and when it changes it is
        taken away first. Nothing happens while the local folder has no marker.
        """
        local = local_files(folder)
        remote = self._files(relative)
        if marker is None:
            return sum(
                self._push_changed(local[name], f"{relative}/{name}", remote.get(name)) for name in sorted(local)
            )
        if marker not in local:
            return 0
        new_marker = local.pop(marker).read_bytes()
        same = marker in remote and self.read(f"{relative}/{marker}") == new_marker
        if marker in remote and not same:
            self.delete(f"{relative}/{marker}")
        written = sum(self._push_changed(local[name], f"{relative}/{name}", remote.get(name)) for name in sorted(local))
        for name in remote.keys() - local.keys() - {marker}:
            self.delete(f"{relative}/{name}")
        if not same:
            self.write(f"{relative}/{marker}", new_marker)
        return written + (not same)

    def push_file(self, path: Path, relative: str) -> bool:
        """Upload one file if it is new or changed. Returns whether it was."""
        with self._errors():
            info = self._filesystem.get_file_info(self._path(relative))
        return self._push_changed(path, relative, info if info.is_file else None)

    def _push_changed(self, path: Path, relative: str, remote: Any) -> bool:
        """`remote`: Arrow's FileInfo of the file in the store, or None."""
        stat = path.stat()
        signature = (stat.st_size, stat.st_mtime_ns)
        if remote is not None and self._pushed.get(relative) in (None, signature) and remote.size == stat.st_size:
            known = self._pushed.get(relative) == signature
            if known or self._is_same(path, stat, relative, remote):
                self._pushed[relative] = signature
                return False
        if stat.st_size <= SMALL_BYTES:  # read at once: a file that is being replaced is one or the other
            self.write(relative, path.read_bytes())
        else:
            with path.open("rb") as source:
                self._upload(relative, source)
        self._pushed[relative] = signature
        return True

    def _is_same(self, path: Path, stat: os.stat_result, relative: str, remote: Any) -> bool:
        """Is a file of equal size, which this process has not sent itself, the one in the store?"""
        if stat.st_size <= SMALL_BYTES:
            return path.read_bytes() == self.read(relative)
        return remote.mtime is not None and stat.st_mtime <= remote.mtime.timestamp()

    def write(self, relative: str, data: bytes) -> None:
        """Replace one file as a whole."""
        self._upload(relative, io.BytesIO(data))

    def _upload(self, relative: str, source: Any) -> None:
        target = self._path(relative)
        path = PurePosixPath(target)
        name = (
            target if self._atomic else str(path.with_name(f".{path.name}.tmp-{os.getpid()}-{threading.get_ident()}"))
        )
        with self._errors():
            if not self._atomic:
                self._filesystem.create_dir(str(path.parent), recursive=True)
            try:
                with self._filesystem.open_output_stream(name) as stream:
                    shutil.copyfileobj(source, stream, CHUNK_BYTES)
                if name != target:
                    self._filesystem.move(name, target)
            except BaseException:
                with contextlib.suppress(OSError):  # closing has made a whole file of a part
                    self._filesystem.delete_file(name)
                raise

    def delete(self, relative: str, marker: str | None = None) -> None:
        """Remove a file or a folder, its marker first. Nothing happens where there is none."""
        if marker is not None:
            self.delete(f"{relative}/{marker}")
        path = self._path(relative)
        self._pushed = {k: v for k, v in self._pushed.items() if k != relative and not k.startswith(f"{relative}/")}
        with self._errors(), contextlib.suppress(FileNotFoundError):
            info = self._filesystem.get_file_info(path)
            if info.is_file:
                self._filesystem.delete_file(path)
            elif _is_there(info):
                self._filesystem.delete_dir(path)

    def ray_place(self, relative: str) -> tuple[Any, str]:
        """-> file system, path in it: for Ray's own records."""
        return self._filesystem, self._path(relative)

    # ---- reading ----

    def pull(self, relative: str, folder: Path, marker: str | None = None) -> int:
        """Download what is missing or newer; returns the number of files written.

        With a marker the local folder appears as a whole, or not at all, and replaces one whose marker differs.
        """
        if marker is not None:
            return self._pull_whole(relative, folder, marker)
        files = self._files(relative)
        return sum(self._pull_newer(f"{relative}/{name}", folder / name, files[name]) for name in sorted(files))

    def pull_file(self, relative: str, target: Path) -> bool:
        """Download one file if there is one, and it is missing here or newer. Returns whether it was."""
        with self._errors():
            info = self._filesystem.get_file_info(self._path(relative))
        return info.is_file and self._pull_newer(relative, target, info)

    def _pull_newer(self, relative: str, target: Path, remote: Any) -> bool:
        time_s = (remote.mtime or datetime.now(UTC)).timestamp()
        if target.exists():
            stat = target.stat()
            if stat.st_size == remote.size and stat.st_mtime >= time_s:
                return False
        self._download(relative, target)
        os.utime(target, (time_s, time_s))
        return True

    def _pull_whole(self, relative: str, folder: Path, marker: str) -> int:
        wanted = self.read(f"{relative}/{marker}")
        if wanted is None or (folder.exists() and _content(folder / marker) == wanted):
            return 0
        try:
            with atomic_folder(folder) as new:
                names = sorted(self._files(relative).keys() - {marker})
                for name in names:
                    self._download(f"{relative}/{name}", new / name)
                atomic_write(new / marker, wanted)
                if self.read(f"{relative}/{marker}") != wanted:
                    raise InterruptedError("replaced meanwhile")
                shutil.rmtree(folder, ignore_errors=True)
        except InterruptedError:
            return 0
        return len(names) + 1

    def _download(self, relative: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.part-{os.getpid()}-{threading.get_ident()}")
        try:
            with (
                self._errors(),
                self._filesystem.open_input_stream(self._path(relative)) as stream,
                temporary.open("wb") as file,
            ):
                shutil.copyfileobj(stream, file, CHUNK_BYTES)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    # ---- details ----

    def _path(self, relative: str) -> str:
        path = PurePosixPath(relative)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{relative}: must stay below {self.uri}")
        return str(PurePosixPath(self._root) / path)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except (OSError, ValueError, ImportError) as error:
            raise _explained(self.uri, error) from error


def local_files(folder: Path) -> dict[str, Path]:
    """The files below a folder by relative name, without temporaries and locks."""
    found: dict[str, Path] = {}
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not hidden and path.suffix != ".lock" and path.is_file():
            found[relative.as_posix()] = path
    return found


def _open(uri: str, scheme: str) -> tuple[Any, str]:
    """-> Arrow's file system, path in it."""
    from pyarrow import fs

    parts = urlsplit(uri)
    if scheme == "s3" and not parts.query:
        return _open_s3(parts.netloc), f"{parts.netloc}{parts.path}".rstrip("/")
    if scheme in ("gs", "gcs") and not parts.query:
        uri = f"gs://{parts.netloc}{parts.path}?retry_limit_seconds={TIMEOUT_SECONDS}"
    if scheme in SCHEMES:
        filesystem, path = fs.FileSystem.from_uri(uri)
    else:
        import fsspec

        inner, path = fsspec.core.url_to_fs(uri)
        filesystem = fs.PyFileSystem(fs.FSSpecHandler(inner))
    return filesystem, path.rstrip("/") or "/"


def _open_s3(bucket: str) -> Any:
    """Credentials come from where Amazon's own tools take them; Arrow does not look for the endpoint by itself."""
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {"connect_timeout": TIMEOUT_SECONDS / 3, "request_timeout": TIMEOUT_SECONDS}
    if endpoint:
        where = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        options |= {"endpoint_override": where.netloc, "scheme": where.scheme}
    return fs.S3FileSystem(region=region or ("us-east-1" if endpoint else fs.resolve_s3_region(bucket)), **options)


def _explained(uri: str, error: Exception) -> StorageError:
    text = " ".join(str(error).split())
    if isinstance(error, ImportError) or "Unrecognized filesystem" in text or "Protocol not known" in text:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        return StorageError(f"storage {uri}: {text}; built in are {known}, others need their fsspec package installed")
    for position, (signs, remedy) in enumerate(REMEDIES):
        if any(sign in text for sign in signs):
            return StorageError(f"storage {uri}: {remedy} ({text})", passing=position == 0)
    return StorageError(f"storage {uri}: {text}; check the URI", passing=False)


def _is_there(info: Any) -> bool:
    from pyarrow import fs

    return info.type != fs.FileType.NotFound


def _is_temporary(path: str) -> bool:
    return PurePosixPath(path).name.startswith(".")


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
