"""Workers of a run as bare processes of torch, without Ray: what Ray Train adds is tested elsewhere."""

import datetime
import os
import shutil
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from groundswell.rundir import RunFolder
from groundswell.scaling.control import Control
from groundswell.scaling.worker import Place, WorkerTrainer
from groundswell.training import checkpoint


def states(folder: RunFolder) -> list[Path]:
    return sorted((folder.path / "training").glob("step-*"))


def _work(rank: int, world_size: int, port: int, path: str, stop_after: int | None, failures) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    timeout = datetime.timedelta(seconds=60)
    folder = RunFolder(path)
    backend = "gloo"
    if folder.experiment().scaling.device == "cuda":
        backend = "cpu:gloo,cuda:nccl"  # what is offloaded is reduced and gathered on the CPU
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)

    def report(step: int, part: Path) -> None:
        shutil.copytree(part, folder.path / "training" / checkpoint.folder_name(step), dirs_exist_ok=True)
        dist.barrier()
        if stop_after is not None and step >= stop_after:
            raise KeyboardInterrupt

    try:
        with tempfile.TemporaryDirectory() as scratch:
            control = Control(folder, rank == 0)
            trainer = WorkerTrainer(folder, Place(rank, world_size, Path(scratch)), report, control)
            newest = states(folder)
            trainer.resume(newest[-1] if newest else None)
            trainer.train()
    except KeyboardInterrupt:
        pass
    except Exception:
        failures.put(traceback.format_exc())
        raise
    dist.destroy_process_group()


def run_workers(folder: RunFolder, world_size: int, stop_after: int | None = None) -> None:
    """Train the run with so many processes, from its newest state; with `stop_after`, until a state of that step."""
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # a free port
    port = store.port
    del store
    processes = [
        context.Process(target=_work, args=(rank, world_size, port, str(folder.path), stop_after, failures))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    for process in processes:
        process.kill()
    if not failures.empty():
        raise RuntimeError(failures.get())
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
