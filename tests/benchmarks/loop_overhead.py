"""A whole run of the demo (readings, evaluations, checkpoints, journal) against the bare step, interleaved.

python tests/benchmarks/loop_overhead.py [--layers 1] [--chunk 100]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import finish, print_table

from groundswell.rundir import SweepFolder
from groundswell.sweep import PlannedRun
from groundswell.training.pack import Member, Pack
from groundswell.training.trainer import PackTrainer
from sweeps.grok_wd_layers import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1, help="depth of the demo's run to take")
    parser.add_argument("--chunk", type=int, default=100, help="steps of one before the other has its turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    changes = {"model.num_layers": options.layers, "evaluation.stop": []}  # all of its steps, early stop or not
    experiment = build("demo").base.with_overrides(changes)
    pack = Pack([Member.create(experiment, torch.device("cpu"))])
    pack.train(20)
    with tempfile.TemporaryDirectory() as folder:
        run = SweepFolder(Path(folder) / "loop").create_run(PlannedRun(experiment, {}, "run"), "loop", 0)
        trainer = PackTrainer([run])
        loop, bare, done = 0.0, 0.0, 0
        while not trainer.finished:
            start = time.process_time()
            step = done
            while not trainer.finished and step < done + options.chunk:
                step = trainer.advance()[0]["step"]
            loop += time.process_time() - start
            start = time.process_time()
            pack.train(step - done)
            bare += time.process_time() - start
            done = step
    kept = bare / loop
    rows = [
        ("bare step", f"{done / bare:.1f}", "1.000"),
        ("loop with readings, evaluations, checkpoints", f"{done / loop:.1f}", f"{kept:.3f}"),
    ]
    title = f"a run of the demo: {done} steps, {options.layers} layer(s), width 64, batch 512"
    print_table(title, ("", "steps a CPU second", "of bare"), rows)
    finish({"loop_vs_bare": kept})


if __name__ == "__main__":
    main()
