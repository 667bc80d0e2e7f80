"""A grid of operand lengths on a real cluster: its parts go to several actors, and each cell is computed once."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from conftest import assert_tracked_once

from analysis.arithmetic_grid import LengthGrid, read_cells
from groundswell import Budget, Checkpointing, Evaluation, Every, Experiment, commands
from groundswell.probes import answers, ask, open_checkpoint
from groundswell.rundir import SweepFolder
from groundswell.training.trainer import PackTrainer
from models.objectives import AnswerLoss
from models.recurrent import RecurrentDecoder
from tasks.arithmetic import Arithmetic

GRID = {"max_first": 40, "max_second": 30, "samples": 20}


@pytest.fixture
def run(make_run):
    """With checkpoints at steps 2 and 4."""
    folder = make_run(
        Experiment(
            task=Arithmetic(max_first=2, max_second=2, num_examples=512, num_test=8),
            model=RecurrentDecoder(num_layers=1, num_recurrences=2, width=16, num_heads=2),
            objective=AnswerLoss(),
            budget=Budget(steps=4, batch_size=8),
            metrics_every=2,
            evaluation=Evaluation(schedule=Every(every=4)),
            checkpointing=Checkpointing(schedule=Every(every=2)),
        )
    )
    trainer = PackTrainer([folder])
    while not trainer.finished:
        trainer.advance()
    return folder


def told(sweep):
    """(process, part) of each part that the log tells of."""
    log = sweep.path / "log" / "probes.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(line.split()[2]), line.split(" cells-")[1].split(":")[0]) for line in lines if " cells-" in line]


@pytest.mark.slow
def test_a_grid_survives_the_death_of_an_actor(run, tmp_path, cluster, capsys):
    sweep = SweepFolder(tmp_path / "sweep")
    killed = []

    def kill():
        while not (parts := told(sweep)):
            time.sleep(0.01)
        killed.append(parts[0][0])
        os.kill(parts[0][0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    options = [text for name, value in GRID.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    common = ["grid", "--sweep", "sweep", "--output", str(tmp_path), "--address", cluster, "--workers", "2"]
    code = commands.main([*common, *options])
    killer.join()
    printed = capsys.readouterr()
    assert code == 0, printed
    assert "2 checkpoints of 1 runs to ask" in printed.out and "2 newly answered" in printed.out
    assert "out_of_distribution" in printed.out
    assert killed and len({process for process, _ in told(sweep)} - set(killed)) >= 2
    for step in (2, 4):
        parts = sorted(run.path.glob(f"probes/parts/step-{step:08d}/*/*"))
        cells = [cell for part in parts for cell in read_cells([part])]
        assert len(parts) > 4 and sorted(cells) == sorted(LengthGrid(**GRID).cells())
    assert_tracked_once(sweep)

    grown = [*common, *options, "--equal-lengths", "41", "42", "--steps", "last"]
    count = len(told(sweep))
    assert commands.main(grown) == 0
    assert len(told(sweep)) == count + 1  # one part with the two new cells
    again = LengthGrid(**GRID, equal_lengths=(41, 42))
    path = answers(run)[4, "length_grid"]
    pooled = np.load(path / "token_accuracy.npy")
    opened = open_checkpoint(run, 4)
    part = again.parts(run.experiment(), [])[-1]
    here = again.run_part(opened, part).tables["cells"].to_dict("records")
    assert [pooled[row["first"] - 1, row["second"] - 1] for row in here] == pytest.approx(
        [row["token_accuracy"] for row in here]
    )
    assert ask(run, 4, [again]) == {}
