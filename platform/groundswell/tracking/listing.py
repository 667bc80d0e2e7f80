"""Runs as rows, straight from their folders: fast, and right also while MLflow lags behind or is not there."""

from __future__ import annotations

import json
import operator
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from groundswell.config import ConfigError, parse_value, suggest
from groundswell.rundir import RunFolder, Status, SweepFolder
from groundswell.tracking.names import flatten
from groundswell.tracking.run_sync import MLFLOW_STATUS


@dataclass
class RunRow:
    sweep: str
    folder: RunFolder
    name: str
    number: int
    axes: dict[str, Any]
    status: Status
    last: dict[str, float] = field(
        default_factory=dict
    )  # each metric's last value (of those in evaluations, and the last line)
    lowest: dict[str, float] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)

    @cached_property
    def params(self) -> dict[str, Any]:
        return flatten(self.folder.experiment_dict())

    @property
    def seconds(self) -> float | None:
        """From the start to the end, or to now."""
        if self.status.started_ms is None:
            return None
        end = self.status.ended_ms if self.status.ended_ms is not None else time.time() * 1000
        return max(0.0, (end - self.status.started_ms) / 1000)


def read_rows(sweep: SweepFolder) -> list[RunRow]:
    return sorted((read_row(sweep.name, folder) for folder in sweep.runs()), key=lambda row: row.number)


def read_row(sweep: str, folder: RunFolder) -> RunRow:
    """Parses the lines with evaluations and the last one only: journals can be long."""
    d = folder.description()
    row = RunRow(sweep, folder, d["name"], d["number"], d["axes"], folder.status())
    try:
        lines = folder.journal_path.read_bytes().splitlines()
    except FileNotFoundError:
        return row
    last_step = row.status.step
    for number, text in enumerate(lines, start=1):
        if b'"eval/' not in text and number < len(lines) - 1:
            continue
        try:
            line = json.loads(text)
            last_step = max(last_step, line["step"])
            for name, value in line["metrics"].items():
                row.last[name] = value
                row.lowest[name] = min(value, row.lowest.get(name, value))
                row.highest[name] = max(value, row.highest.get(name, value))
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # the line that is being written right now
    if not row.status.is_final:  # status.json is written at the start and at the end
        row.status = Status(**{**row.status.__dict__, "step": last_step})
    return row


# ---- filters: "weight_decay >= 0.3 and state = finished", or MLflow's "params.`model.num_layers` = '2'" ----

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "==": operator.eq, "!=": operator.ne,
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_CONDITION = re.compile(
    r"""\s*(?:(?:params?|parameters?|metrics?|tags?|attributes?|run)\.)?   # MLflow's prefix
        (?P<key>`[^`]+`|"[^"]+"|[^\s=!<>`"]+)\s*
        (?P<operator>==|=|!=|>=|<=|>|<|\blike\b|\bilike\b)\s*
        (?P<value>'[^']*'|"[^"]*"|[^\s'"]+)\s*""",
    re.VERBOSE | re.IGNORECASE,
)


def filter_rows(rows: Sequence[RunRow], text: str) -> list[RunRow]:
    """Conditions joined by `and`. Raises ConfigError for what cannot be read and for a name that no run has."""
    conditions, position = [], 0
    while True:
        match = _CONDITION.match(text, position)
        if match is None:
            raise ConfigError(
                f"filter: cannot read {text[position:]!r}; write for instance: weight_decay >= 0.3 and state = finished"
            )
        conditions.append((match["key"].strip('`"'), match["operator"].lower(), match["value"]))
        position = match.end()
        if position == len(text):
            break
        joint = re.compile(r"and\b", re.IGNORECASE).match(text, position)
        if joint is None:
            raise ConfigError(f"filter: expected 'and' before {text[position:]!r}")
        position = joint.end()
    for key, _, _ in conditions:
        if rows and not any(key in _values(row) for row in rows):
            raise ConfigError(
                f"filter: no run has '{key}'; {suggest(key, sorted({k for row in rows for k in _values(row)}))}"
            )
    return [row for row in rows if all(_holds(_values(row), *condition) for condition in conditions)]


def _values(row: RunRow) -> dict[str, Any]:
    """Everything that can be asked for, the more particular meaning of a name last."""
    short = {path.rsplit(".", 1)[-1]: value for path, value in row.axes.items()}
    own = {
        "state": row.status.state, "status": MLFLOW_STATUS[row.status.state], "step": row.status.step, "name": row.name,
        "run_name": row.name, "run_id": row.folder.run_id, "sweep": row.sweep, "reason": row.status.reason,
        "duration_s": row.seconds,
    }  # fmt: skip
    return {**row.params, **short, **row.axes, **row.last, **own}


def _holds(values: dict[str, Any], key: str, operation: str, text: str) -> bool:
    if key not in values:
        return False
    actual, quoted = values[key], text[0] in "'\""
    wanted = text[1:-1] if quoted else parse_value(text)
    if operation in ("like", "ilike"):
        pattern = re.escape(str(wanted)).replace("%", ".*").replace("_", ".")
        return re.fullmatch(pattern, str(actual), re.IGNORECASE if operation == "ilike" else 0) is not None
    if quoted and not isinstance(actual, str):  # MLflow's params are texts: '0.3' means the number too
        wanted = parse_value(str(wanted))
    if _is_number(actual) and _is_number(wanted):
        return _OPERATORS[operation](actual, wanted)
    if operation in ("=", "==", "!="):
        return _OPERATORS[operation](actual, wanted)
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
