"""Probes for the tests of the pool: they leave a trace of each time that they are asked."""

import os
import time
from pathlib import Path
from typing import ClassVar

import pandas as pd
from pydantic import Field

from groundswell.probes import Findings, Probe, scalars


class Recorder(Probe):
    """Norm of the token embedding."""

    headlines: ClassVar[tuple[str, ...]] = ("recorded/n*",)

    log: str = Field(description="file that gets a line each time")
    pause_s: float = 0.0
    deadly_step: int = -1

    def objection(self, experiment):
        return None if experiment.model.width == 16 else "recorder: only networks of width 16"

    def run(self, opened):
        self.note("begin", opened.step)
        time.sleep(self.pause_s)
        if opened.step == self.deadly_step:
            os.kill(os.getpid(), 9)
        norm = float(opened.parameters["transformer.wte.weight"].norm())
        self.note("end", opened.step, opened.experiment.run_id)
        return Findings({"recorded/norm": norm, "recorded/step": opened.step}, texts={"note.json": "{}"})

    def over_time(self, folder, answers):
        rows = [{"step": step, "norm": scalars(path)["recorded/norm"]} for step, path in answers.items()]
        return Findings({"recorded/total": len(rows)}, tables={"norms": pd.DataFrame(rows)})

    def note(self, *words):
        idle = os.sched_getscheduler(0) == os.SCHED_IDLE
        with Path(self.log).open("a") as file:
            file.write(" ".join(map(str, (*words, os.getpid(), "idle" if idle else "normal"))) + "\n")


class Broken(Probe):
    """Answers at no step but the last."""

    def run(self, opened):
        if opened.step < opened.experiment.budget.total:
            raise RuntimeError(f"nothing to see at {opened.step}\n(a second line)")
        return Findings({"broken/step": opened.step})
