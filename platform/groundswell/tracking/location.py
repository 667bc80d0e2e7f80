"""Where the tracking store is. Always absolute: a relative one means another place in each working directory."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

_SQLITE = "sqlite:///"


def default_uri(output: str | Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else SQLite beside the sweeps."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return absolute_uri(uri) if uri else f"{_SQLITE}{Path(output).resolve() / 'mlflow.db'}"


def absolute_uri(uri: str) -> str:
    if uri.startswith(_SQLITE):
        return f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).resolve()}"
    return uri if "://" in uri or uri.startswith(("file:", "databricks")) else Path(uri).resolve().as_uri()


def artifact_root(uri: str, output: str | Path) -> str | None:
    """Where artifacts go (URI): beside an SQLite file, below the output for other databases; None: a server says."""
    if uri.startswith(_SQLITE):
        return (Path(uri.removeprefix(_SQLITE)).resolve().parent / "artifacts").as_uri()
    if uri.startswith(("http://", "https://", "databricks", "file:")):
        return None
    return (Path(output).resolve() / "artifacts").as_uri()


def local_path(artifact_uri: str) -> Path | None:
    """The folder behind an artifact URI, if it is one on this machine's file system."""
    parts = urlsplit(artifact_uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return Path(artifact_uri) if not parts.scheme and artifact_uri.startswith("/") else None
