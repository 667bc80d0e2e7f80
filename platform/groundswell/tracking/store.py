"""The MLflow side: one client, large batches, and no chatter on the terminal. The only module that imports MLflow."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundswell.tracking.location import local_path

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The tracker retries by itself and must be able to stop.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
MAX_METRICS = 800  # MLflow takes 1,000 entities a call, up to 100 params and 100 tags among them
MAX_PARAMS = 100
EXPERIMENT_KIND = "custom_model_development"  # the UI then opens the experiment as model training, not as GenAI
_DATA_ERRORS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE"}

Reading = tuple[str, float, int, int]  # metric name, value, milliseconds since 1970, step


@dataclass(frozen=True)
class StoredRun:
    run_id: str
    artifact_uri: str
    tags: Mapping[str, str]


class Store:
    """Creating it imports MLflow (a second or two) and may create or wait for the database."""

    def __init__(self, uri: str, log_handler: logging.Handler) -> None:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient, entities

        for name in ("mlflow", "alembic", "sqlalchemy.engine", "huey"):
            logger = logging.getLogger(name)
            logger.handlers[:], logger.propagate = [log_handler], False
        self.uri = uri
        self._entities = entities
        self.client = MlflowClient(tracking_uri=uri)

    # ---- experiments and runs ----

    def experiment(self, name: str, artifact_location: str | None) -> str:
        """The experiment's id; made where it is missing, brought back where it was deleted."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            tags = {"mlflow.experimentKind": EXPERIMENT_KIND}
            return self.client.create_experiment(name, artifact_location=artifact_location, tags=tags)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        if "mlflow.experimentKind" not in found.tags:
            self.client.set_experiment_tag(found.experiment_id, "mlflow.experimentKind", EXPERIMENT_KIND)
        return found.experiment_id

    def find_runs(self, experiment_id: str, tags: Mapping[str, str]) -> list[StoredRun]:
        """Active runs that carry all these tags, the oldest first."""
        quoted = {key: value.replace("'", "''") for key, value in tags.items()}
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in quoted.items())
        found, token = [], None
        while True:
            page = self.client.search_runs(
                [experiment_id], query, max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
            )
            found += [_stored(run) for run in page]
            token = page.token
            if not token:
                return found

    def get_run(self, run_id: str) -> StoredRun | None:
        """None for a run that this store does not have, or that was deleted there."""
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return _stored(run) if run.info.lifecycle_stage == "active" else None

    def is_deleted(self, run_id: str) -> bool:
        """Was it deleted by somebody (as against never there)?"""
        with contextlib.suppress(Exception):
            return self.client.get_run(run_id).info.lifecycle_stage == "deleted"
        return False

    def create_run(self, experiment_id: str, name: str, tags: Mapping[str, str], start_ms: int | None) -> StoredRun:
        return _stored(self.client.create_run(experiment_id, start_time=start_ms, tags=dict(tags), run_name=name))

    def last_step(self, run_id: str, keys: Iterable[str]) -> int:
        """The highest step stored under any of these metrics; -1 without one."""
        steps = [metric.step for key in keys for metric in self.client.get_metric_history(run_id, key)]
        return max(steps, default=-1)

    # ---- writing ----

    def log_batch(
        self,
        run_id: str,
        readings: Sequence[Reading] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        model_id: str | None = None,
    ) -> None:
        """At most MAX_METRICS readings; more than MAX_PARAMS params take more calls. Equal readings are stored once."""
        e = self._entities
        param_list = [e.Param(key, value) for key, value in (params or {}).items()]
        while len(param_list) > MAX_PARAMS:
            self.client.log_batch(run_id, params=param_list[:MAX_PARAMS])
            param_list = param_list[MAX_PARAMS:]
        metric_list = [e.Metric(key, value, time, step, model_id=model_id) for key, value, time, step in readings]
        tag_list = [e.RunTag(key, value) for key, value in (tags or {}).items()]
        if metric_list or param_list or tag_list:
            self.client.log_batch(run_id, metrics=metric_list, params=param_list, tags=tag_list)

    def log_files(self, run: StoredRun, artifact_path: str, files: Iterable[Path], link: bool = False) -> None:
        """`link`: files that never change share their disk blocks with the artifacts, where both are on one disk."""
        root = local_path(run.artifact_uri)
        for file in files:
            if root is None:
                self.client.log_artifact(run.run_id, str(file), artifact_path or None)
            else:
                _place(file, root / artifact_path / file.name, link)

    def log_model(
        self, experiment_id: str, run: StoredRun, name: str, tags: Mapping[str, str], readings: Sequence[Reading]
    ) -> str:
        """A ready model of this run, for the UI's list of models: one a run. Returns its id."""
        query = f"source_run_id = '{run.run_id}'"
        found = list(self.client.search_logged_models([experiment_id], filter_string=query, max_results=1))
        if found:
            model_id = found[0].model_id
        else:
            model_id = self.client.create_logged_model(
                experiment_id, name=name, source_run_id=run.run_id, tags=dict(tags)
            ).model_id
        self.log_batch(run.run_id, readings, model_id=model_id)
        self.client.finalize_logged_model(model_id, "READY")
        return model_id


def is_data_error(error: Exception) -> bool:
    """Does the error lie in what was written, not in the store? Then other runs can go on."""
    return getattr(error, "error_code", None) in _DATA_ERRORS


def _stored(run: Any) -> StoredRun:
    return StoredRun(run.info.run_id, run.info.artifact_uri, run.data.tags)


def _place(source: Path, target: Path, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        if not (link and _link(source, temporary)):
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # replacing a file by another link to it leaves both names


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or a file system without links
        return False
    return True
