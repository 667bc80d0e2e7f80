"""MLflow's limits on names and values, met before it can refuse a batch."""

from __future__ import annotations

import json
import posixpath
import re
from typing import Any

# What mlflow.utils.validation allows in names of metrics and params, and its length limits.
_REFUSED = re.compile(r"[^/\w.\- :]")
_MAX_KEY, _MAX_PARAM, _MAX_TAG = 250, 6_000, 8_000


def key_name(name: str) -> str:
    """The nearest name that MLflow takes for a metric or a param; ordinary names stay as they are."""
    clean = posixpath.normpath(_REFUSED.sub("_", name)).lstrip("/")
    parts = ["_" if part in ("", ".", "..") else part for part in clean.split("/")]
    clean = "/".join(parts)
    return "_" + clean[2:_MAX_KEY] if clean.startswith("..") else clean[:_MAX_KEY].rstrip("/")


def param_value(value: Any) -> str:
    return _shorten(value if isinstance(value, str) else json.dumps(value), _MAX_PARAM)


def tag_value(value: Any) -> str:
    return _shorten(value if isinstance(value, str) else json.dumps(value), _MAX_TAG)


def model_name(name: str) -> str:
    """Names of logged models may not hold / : . % or quotes."""
    return re.sub(r"[/:.%\"']", "_", name)[:_MAX_KEY] or "_"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> leaf (lists are leaves), as `Experiment.flatten` does, without importing its classes."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves.update(flatten(value, f"{path}.") if isinstance(value, dict) else {path: value})
    return leaves


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
