"""The training loop with readings, evaluations, checkpoints and journal against the bare step, interleaved.

python tests/benchmarks/loop_overhead.py [--steps 1500] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
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
    parser.add_argument("--steps", type=int, default=1_500, help="updates a run and round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sweep = build("demo")
    device = torch.device("cpu")
    loop, bare = [], []
    for number in range(options.rounds):
        # The demo's own run and schedules, only shorter; a new seed each round, so that nothing is resumed.
        experiment = sweep.base.with_overrides({"budget.steps": options.steps, "seed": number})
        with tempfile.TemporaryDirectory() as folder:
            run = SweepFolder(Path(folder) / "loop").create_run(
                PlannedRun(experiment, {"seed": number}, f"seed={number}"), "loop", 0
            )
            trainer = PackTrainer([run])
            start = time.process_time()
            while not trainer.finished:
                trainer.advance()
            loop.append(options.steps / (time.process_time() - start))
        pack = Pack([Member.create(experiment, device)])
        start = time.process_time()
        pack.train(options.steps)
        bare.append(options.steps / (time.process_time() - start))
    kept = statistics.median(a / b for a, b in zip(loop, bare, strict=True))
    rows = [
        ("bare step", f"{statistics.median(bare):.1f}", "1.000"),
        ("loop with readings, evaluations, checkpoints", f"{statistics.median(loop):.1f}", f"{kept:.3f}"),
    ]
    print_table("the demo's run (2 layers, width 64, batch 512)", ("", "steps a CPU second", "of bare"), rows)
    finish({"loop_vs_bare": kept})


if __name__ == "__main__":
    main()
