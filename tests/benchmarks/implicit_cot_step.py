"""Whole train steps of student and emulator (implicit chain of thought) against the straightforward formulation with
hooks, interleaved on one thread; and decoding of many rows together against one by one.

A step: the teacher's states, forward, backward, clipping, AdamW (torch's fused kernel on both sides). Rows have the
form of 4 x 4 digit multiplication (71 tokens, 48 of them the chain), tokens are random. Both sides start from the same
weights and must have the same loss.

Steps visit a training set of four batches again and again. Ours keeps the teacher's states of the first visit, which is
not in the times; `..._uncached_vs_hooks` is the ratio without that, states computed at every visit, as the formulation
with hooks does. Memory is the most bytes alive that one step allocates, beside weights, gradients and moments.

    python tests/benchmarks/implicit_cot_step.py [--rounds 5] [--seconds 1] [--only L4H4d128]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import finish, interleaved, print_table, ratio, sgemm_peak
from implicit_cot_hooks import Hooked, HookedEmulator, HookedStudent, gpt2, teacher_states
from torch import Tensor

from groundswell.experiment import AdamW
from groundswell.planning.footprint import LiveBytes
from groundswell.protocols import Answer, Split
from groundswell.training.flat import FlatParameters, PackedAdamW, initial_row
from models.chain_coupled import CoupledStudent
from models.chain_emulator import ThoughtEmulator
from models.chain_model import TaughtModel
from models.chain_objective import StateRegression
from models.chain_student import MindReadingStudent
from models.chain_teacher import teacher_in
from models.decoder import Decoder
from models.objectives import AnswerLoss

SIZES = {"L4H4d128": (4, 4, 128, 32), "L12H8d256": (12, 8, 256, 8)}  # layers, heads, width, batch
VOCABULARY, SEPARATOR = 19, 0
FIRST, SECOND, LENGTH = 10, 58, 71  # of 4 x 4 digits: both separators' places, tokens with the last separator
NUM_BATCHES, ANSWERS = 4, LENGTH - 1 - SECOND
OPTIMIZER = AdamW(lr=1e-4, weight_decay=0.01, decay_all=True, clip_norm=1.0)
ANSWER = Answer(slice(None))
Step = Callable[[Split], float]


def make_decoder(name: str) -> Decoder:
    layers, heads, width, _ = SIZES[name]
    return Decoder(num_layers=layers, num_heads=heads, width=width, num_positions=LENGTH, init_scale=3.0)


def make_batches(name: str) -> list[Split]:
    """Of an epoch; rows of form hidden, without their last separator."""
    batch = SIZES[name][3]
    shape = NUM_BATCHES * batch, LENGTH
    tokens = torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    tokens[:, [FIRST, SECOND, LENGTH - 1]] = SEPARATOR
    positions = torch.arange(SECOND, LENGTH - 1).expand(len(tokens), -1)
    targets = tokens[:, SECOND + 1 :]
    parts = (x.unsqueeze(0).split(batch, 1) for x in (tokens[:, :-1], positions, targets))
    return [Split(*batch) for batch in zip(*parts, strict=True)]


class OurStep:
    """The step as a pack of one run has it."""

    def __init__(self, model: TaughtModel) -> None:
        self.model = model
        self.objective = StateRegression() if isinstance(model, ThoughtEmulator) else AnswerLoss()
        specs = model.parameters(VOCABULARY, LENGTH)
        row = initial_row(specs, torch.Generator().manual_seed(1))
        self.parameters = FlatParameters(specs, row[None])
        self.optimizer = PackedAdamW(self.parameters, [OPTIMIZER])

    def loss(self, batch: Split) -> Tensor:
        return self.objective.loss(self.model, self.parameters.views, batch, ANSWER, None)[0].sum()

    def update(self) -> None:
        self.optimizer.step()
        self.parameters.grad.zero_()

    def held(self) -> list[Tensor]:
        teacher = teacher_in(self.model.teacher, torch.device("cpu"))
        return [self.parameters.flat, self.parameters.grad, *teacher.parameters.values()]


class HookedStep:
    def __init__(self, ours: OurStep, teacher_folder: Path) -> None:
        decoder = ours.model.decoder
        self.is_student = isinstance(ours.model, MindReadingStudent)
        self.network: Hooked = (HookedStudent if self.is_student else HookedEmulator)(decoder, VOCABULARY)
        self.network.load(ours.parameters.row(0))
        self.teacher = gpt2(decoder, VOCABULARY)
        weights = decoder.load_folder(teacher_folder, VOCABULARY, LENGTH)
        self.teacher.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
        o = OPTIMIZER
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=o.lr, weight_decay=o.weight_decay, fused=True)

    def loss(self, batch: Split) -> Tensor:
        tokens = batch.tokens[0]
        first, second = torch.full((len(tokens),), FIRST), torch.full((len(tokens),), SECOND)
        states = teacher_states(self.teacher, tokens[:, : SECOND + 1], first, second)
        if not self.is_student:
            return self.network(tokens[:, : FIRST + 1], first, states)
        row = torch.cat([tokens[:, : FIRST + 1], batch.targets[0]], 1)
        labels = row.clone()
        labels[:, : FIRST + 1] = -100
        return self.network(row, labels, first, states)

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), OPTIMIZER.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held(self) -> list[Tensor]:
        return [*self.network.parameters(), *self.teacher.parameters()]


def write_teacher(decoder: Decoder, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(2)
    specs = decoder.parameters(VOCABULARY, LENGTH)
    weights = {s.name: s.init_value + 0.1 * torch.randn(s.shape, generator=generator) for s in specs}
    decoder.save_folder(weights, folder, [str(token) for token in range(VOCABULARY)])
    return folder


def make_steps(kind: type[TaughtModel], decoder: Decoder, teacher: Path) -> dict[str, OurStep | HookedStep]:
    """Steps with the same weights."""
    kept, uncached = (OurStep(kind(decoder=decoder, teacher=str(teacher), cache_megabytes=m)) for m in (512, 0))
    return {"hooks": HookedStep(kept, teacher), "uncached": uncached, "kept": kept}


def check_losses(steps: dict[str, OurStep | HookedStep], batches: list[Split]) -> None:
    """They compute the same. All batches are visited, so first visits are over."""
    for batch in batches:
        losses = torch.stack([step.loss(batch).detach() for step in steps.values()])
        torch.testing.assert_close(losses, losses[:1].expand_as(losses), rtol=1e-4, atol=1e-5)


def in_turn(step: OurStep | HookedStep, batches: list[Split]) -> Callable[[], None]:
    turn = itertools.cycle(batches)

    def call() -> None:
        step.loss(next(turn)).backward()
        step.update()

    return call


def peak_bytes(step: OurStep | HookedStep, batch: Split) -> int:
    """Most bytes alive in forward and backward pass, gradients apart."""
    step.loss(batch).backward()  # gradients are there now
    live = LiveBytes()
    live.ignore([*step.held(), *(x.grad for x in step.held() if x.grad is not None)])
    with live:
        step.loss(batch).backward()
    return live.peak


def measure_steps(name: str, rounds: int, seconds: float, folder: Path) -> tuple[dict[str, float], list[list[str]]]:
    decoder, batches, figures, rows = make_decoder(name), make_batches(name), {}, []
    teacher = write_teacher(decoder, folder / name)
    for role, kind in (("student", MindReadingStudent), ("emulator", ThoughtEmulator)):
        steps = make_steps(kind, decoder, teacher)
        check_losses(steps, batches)
        peaks = {form: peak_bytes(step, batches[0]) for form, step in steps.items()}
        times = interleaved({form: in_turn(step, batches) for form, step in steps.items()}, rounds, seconds)
        figures[f"{name}_{role}_vs_hooks"] = ratio(times, "hooks", "kept")
        figures[f"{name}_{role}_uncached_vs_hooks"] = ratio(times, "hooks", "uncached")
        figures[f"{name}_{role}_memory_vs_hooks"] = max(peaks["kept"], peaks["uncached"]) / peaks["hooks"]
        milliseconds = (f"{1e3 * statistics.median(own):.1f}" for own in times.values())
        ratios = (f"{figures[f'{name}_{role}_{end}vs_hooks']:.2f}" for end in ("uncached_", ""))
        rows.append(
            [name, str(SIZES[name][3]), role, *milliseconds, *ratios, *(f"{size / 1e6:.1f}" for size in peaks.values())]
        )
    return figures, rows


def measure_decoding(name: str, rounds: int) -> tuple[dict[str, float], list[str]]:
    """Rows a second of the coupled student, emulator pass included, of a whole batch and of batches of 1."""
    model = CoupledStudent(decoder=make_decoder(name))
    row = initial_row(model.parameters(VOCABULARY, LENGTH), torch.Generator().manual_seed(1))
    parameters = FlatParameters(model.parameters(VOCABULARY, LENGTH), row[None]).views
    prompts = make_batches(name)[0].tokens[:, :, : FIRST + 1]

    def speed(batch: int) -> float:
        start = time.process_time()
        for part in prompts.split(batch, 1):
            model.generate(parameters, part, ANSWERS)
        return prompts.shape[1] / (time.process_time() - start)

    whole = prompts.shape[1]
    speed(whole)
    found = [(speed(whole), speed(1)) for _ in range(rounds)]
    together, alone = (statistics.median(each) for each in zip(*found, strict=True))
    gain = statistics.median(a / b for a, b in found)
    figures = {f"{name}_decoding_batched_vs_single": gain, f"{name}_decoding_batched_rows_per_s": together}
    return figures, [name, str(whole), f"{alone:.1f}", f"{together:.1f}", f"{gain:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU seconds a variant and round")
    parser.add_argument("--only", choices=tuple(SIZES), help="one size and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [options.only] if options.only else list(SIZES)
    figures, steps, decoding = {}, [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found, rows = measure_steps(name, options.rounds, options.seconds, Path(folder))
            figures, steps = figures | found, steps + rows
    for name in names:
        found, row = measure_decoding(name, options.rounds)
        figures, decoding = figures | found, [*decoding, row]
    columns = ["size", "rows", "", "hooks ms", "uncached ms", "kept ms", "ratio uncached", "ratio"]
    columns += [f"{form} MB" for form in ("hooks", "uncached", "kept")]
    print_table(f"a step; sgemm peak {sgemm_peak() / 1e9:.0f} GFLOP/s", columns, steps)
    columns = ["size", "rows", "rows/s one by one", "rows/s together", "ratio"]
    print_table(f"greedy decoding of {ANSWERS} tokens, with a cache", columns, decoding)
    for role in ("student", "emulator"):  # the smallest of the sizes
        figures[f"{role}_vs_hooks"] = min(figures[f"{name}_{role}_vs_hooks"] for name in names)
    finish(figures)


if __name__ == "__main__":
    main()
