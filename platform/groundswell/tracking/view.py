"""How MLflow's page shows a sweep: its runs flat, best first, with the axes and the metrics that matter as columns.

MLflow keeps shared views as JSON in a tag of the experiment; the page is asked for one with `viewStateShareKey`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from groundswell.tracking.names import key_name

KEY = "groundswell"
TAG = f"mlflow.sharedViewState.{KEY}"
MAX_METRICS = 4
WIDTHS = {"attributes": 330, "params": 120, "metrics": 200}  # pixels


def table_view(description: Mapping[str, Any], metrics: Iterable[str]) -> str:
    """The tag's value. `description` is sweep.json; `metrics` are names that the runs have measured."""
    own = description.get("metric")
    evaluated = sorted(name for name in metrics if name.startswith("eval/"))
    measure = str(own).rpartition("/")[2]  # on other splits too, then accuracies
    alike = [name for kind in (measure, "accuracy") for name in evaluated if name.endswith(f"/{kind}")]
    chosen = list(dict.fromkeys([*([own] if own else []), *alike]))[:MAX_METRICS]
    shown = [_column("params", path) for path in description.get("axes", {})]
    shown += [_column("metrics", name) for name in chosen]
    order = [_column("attributes", "Run Name"), *shown]
    state: dict[str, Any] = {
        "selectedColumns": shown,
        "columnOrder": order,
        "columnWidths": {column: WIDTHS[column.partition(".")[0]] for column in order},
        "runsHiddenMode": "SHOW_ALL",
    }
    if own:
        state |= {"orderByKey": _column("metrics", own), "orderByAsc": description.get("mode") == "min"}
    return json.dumps(state)


def page_address(base: str, experiment_id: str) -> str:
    return f"{base}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={KEY}"


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name if kind == 'attributes' else key_name(name)}`"
