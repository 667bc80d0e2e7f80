"""A run's training states below <run>/training, on disk or in shared storage: which are recorded, which are whole.

Each worker lists the files of its part with their sizes, in `files-<worker>-of-<workers>.json`. A state whose files are
not all there in full (the power went before all was on disk) is passed over for the one before it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path, PurePosixPath
from typing import Any

from groundswell.config import ConfigError
from groundswell.files import check_name

log = logging.getLogger(__name__)
FOLDER = "training"  # below the run's folder: Ray Train's record, and the states to go on from
RECORD = "checkpoint_manager_snapshot.json"  # of Ray Train 2.60, in FOLDER
LISTS = "files-*-of-*.json"


def list_files(part: Path, rank: int, world_size: int) -> None:
    """Add the list to one worker's part of a state."""
    sizes = {path.relative_to(part).as_posix(): path.stat().st_size for path in part.rglob("*") if path.is_file()}
    (part / f"files-{rank}-of-{world_size}.json").write_text(json.dumps(sizes))


def damaged(path: object, reason: object) -> ConfigError:
    """What to say of a state that cannot be read."""
    text = " ".join(str(reason).split())
    return ConfigError(
        f"{path} cannot be read ({text}); the state is damaged: delete the run's folder {FOLDER} to train anew"
    )


class States:
    """The folder of a run's states. The methods raise ConfigError for a record or states that cannot be used."""

    def __init__(self, filesystem: Any, run: str) -> None:
        """filesystem: Apache Arrow's; `run`: path of the run's folder in it."""
        self._filesystem, self.path = filesystem, f"{run}/{FOLDER}"

    @classmethod
    def local(cls, run: Path) -> States:
        from pyarrow.fs import LocalFileSystem

        return cls(LocalFileSystem(), str(run))

    def newest(self) -> str | None:
        """Name of the state that training goes on from, by Ray Train's record: a folder beyond it may be half written.
        Without a record, the folder of the highest step."""
        try:
            record = self._record()
        except FileNotFoundError:
            return max(self._folders(), default=None)
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(f"{self.path}/{RECORD}", error) from None
        return _name(record["latest_checkpoint_result"]) if record["latest_checkpoint_result"] else None

    def mend(self) -> None:
        """Have Ray Train go on from the newest whole state: it insists on the newest that it has recorded, and on a
        record that it can read. Raises ConfigError when there were states, and none is whole."""
        try:
            record = self._record()
            names = [_name(result) for result in record["checkpoint_results"]]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s/%s is damaged (%s); made again from the states", self.path, RECORD, error)
            record, names = {}, sorted(self._folders())
        faults = {name: self.fault(name) for name in names}
        whole = [name for name in names if faults[name] is None]
        if names and not whole:
            raise damaged(f"{self.path}/{names[-1]}", faults[names[-1]])
        for name in set(self._folders()) - set(whole):  # else another number of workers would leave their files in it
            self._filesystem.delete_dir(f"{self.path}/{name}")
        if record and len(whole) == len(names):
            return
        for name in set(names) - set(whole):
            log.warning("%s/%s is damaged: %s; falling back to the state before it", self.path, name, faults[name])
        self._write_record(whole)

    def _write_record(self, names: list[str]) -> None:
        """As `_CheckpointManagerState` of Ray Train's checkpoint_manager.py has it."""
        import ray

        results = [{"version": 0, "checkpoint_dir_name": name, "metrics": {}} for name in names]
        record = {
            "ray_version": ray.__version__,
            "checkpoint_results": results,
            "checkpoint_report_indices": list(range(len(names))),
            "latest_checkpoint_result": results[-1] if results else None,
            "pending_training_results": [],
            "pending_validation_specs": [],
            "current_report_index": len(names),
            "validated_checkpoint_dir_names": [],
            "timed_out_validation_checkpoint_dir_names": [],
            "failed_validation_checkpoint_dir_names": [],
        }
        with self._filesystem.open_output_stream(f"{self.path}/{RECORD}") as stream:
            stream.write(json.dumps(record).encode())

    def fault(self, name: str) -> str | None:
        """What is wrong with a state; None for a whole one, and for one without lists (a converted one)."""
        sizes = self._sizes(name)
        lists = [path for path in sizes if PurePosixPath(path).match(LISTS)]
        if not lists:
            return None if sizes else "no files"
        num_workers = int(PurePosixPath(lists[0]).stem.rpartition("-")[2])
        if len(lists) != num_workers:
            return f"it has the parts of {len(lists)} of {num_workers} workers"
        for path in lists:
            try:
                wanted = json.loads(self._read(f"{name}/{path}"))
            except (OSError, ValueError) as error:
                return f"{path}: {error}"
            for file, size in wanted.items():
                if sizes.get(file) != size:
                    return f"{file} has {sizes.get(file, 0)} bytes, not {size}"
        return None

    # ---- files ----

    def _record(self) -> dict[str, Any]:
        record = json.loads(self._read(RECORD))
        if record["latest_checkpoint_result"] is not None:
            _name(record["latest_checkpoint_result"])
        return record

    def _read(self, relative: str) -> bytes:
        with self._filesystem.open_input_stream(f"{self.path}/{relative}") as stream:
            return stream.read()

    def _infos(self, relative: str, recursive: bool) -> list[Any]:
        from pyarrow.fs import FileSelector

        return self._filesystem.get_file_info(
            FileSelector(f"{self.path}/{relative}".rstrip("/"), allow_not_found=True, recursive=recursive)
        )

    def _folders(self) -> list[str]:
        return [info.base_name for info in self._infos("", recursive=False) if info.base_name.startswith("step-")]

    def _sizes(self, name: str) -> dict[str, int]:
        """Of a state's files, by their paths in it."""
        base = PurePosixPath(self.path) / name
        infos = [info for info in self._infos(name, recursive=True) if info.is_file]
        return {str(PurePosixPath(info.path).relative_to(base)): info.size for info in infos}


def _name(result: Any) -> str:
    return check_name(result["checkpoint_dir_name"], "checkpoint_dir_name")
