"""A grid of operand lengths against the published way of evaluating it.

    python tests/benchmarks/grid_eval.py [--width 64] [--layers 2] [--recurrences 1] [--samples 100] [--longest 30]

Operands of 1 to `--longest` digits, `--samples` sums a cell, on one thread, with random weights (cost does not depend
on them, because the published way never stops early). The published way: one cell at a time; as many greedy tokens as
the cell's longest answer has; all tokens so far computed again for each of them, through the same network. (Its own
code computes logits at all positions; here the rival, too, computes the last layer and the head at the last position
only.) It is timed on every `--stride`-th cell of the grid in order of length, and scaled up by its own FLOPs. Both say
the same of each answer, which is checked on those cells. `vs_original`: cells/s of the whole grid against its cells/s.

`decoding_vs_original`: greedy decoding with the key-value cache, no row leaving the batch, against the same rival.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import finish, print_table

from analysis.arithmetic_grid import LengthGrid
from analysis.arithmetic_grid_cells import Cell, evaluate_cells
from groundswell import Experiment
from groundswell.protocols import Model
from models.objectives import AnswerLoss
from models.recurrent import RecurrentDecoder
from tasks.arithmetic import Arithmetic
from tasks.arithmetic_grading import exact

BATCH_TOKENS = LengthGrid().batch_tokens


class Rig:
    """A network with random weights, and problems."""

    def __init__(self, layers: int, recurrences: int, width: int, samples: int) -> None:
        self.task, self.samples = Arithmetic(), samples
        self.model = RecurrentDecoder(
            num_layers=layers, num_recurrences=recurrences, width=width, num_heads=max(4, width // 64)
        )
        torch.manual_seed(0)
        self.parameters = {
            spec.name: torch.randn(1, *spec.shape) * spec.init_std
            if spec.init_std is not None
            else torch.full((1, *spec.shape), spec.init_value)
            for spec in self.model.parameters(self.task.vocab_size, self.task.max_length)
        }

    def count_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.parameters.values())

    def prompts(self, cell: Cell) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts [1, N, P] and targets [N, A]."""
        split = self.task.cell(*cell, self.samples, 0)
        return split.tokens[None, :, : int(split.positions[0, 0]) + 1], split.targets

    def flops_published(self, cell: Cell) -> float:
        """Of an example: its prompt and 0, 1, ... answer tokens, one pass each."""
        prompt, answer = self.task.cell_shape(*cell)
        lengths = range(prompt, prompt + answer)
        return sum(self.model.flops_per_example(self.task.vocab_size, length, 1) for length in lengths)

    @torch.no_grad()
    def published(self, cell: Cell) -> torch.Tensor:
        """Verdicts [N] by decoding with full recomputation."""
        prompts, targets = self.prompts(cell)
        return exact(Model.generate(self.model, self.parameters, prompts, targets.shape[1])[0], targets)

    @torch.no_grad()
    def cached(self, cell: Cell) -> torch.Tensor:
        prompts, targets = self.prompts(cell)
        return exact(self.model.generate(self.parameters, prompts, targets.shape[1])[0], targets)

    def ours(self, cells: list[Cell]) -> dict[Cell, dict[str, torch.Tensor]]:
        splits = {cell: self.task.cell(*cell, self.samples, 0) for cell in cells}
        return evaluate_cells(self.model, self.parameters, splits, BATCH_TOKENS)


def seconds(call) -> float:
    """CPU time of one thread, because other processes then disturb little."""
    start = time.process_time()
    call()
    return time.process_time() - start


def parts_of(rig: Rig, longest: int) -> list[list[Cell]]:
    """The grid as the probe divides it."""
    experiment = Experiment(task=rig.task, model=rig.model, objective=AnswerLoss())
    return [list(part.items) for part in LengthGrid(max_first=longest, samples=rig.samples).parts(experiment, [])]


def compare(rig: Rig, longest: int, stride: int, rounds: int) -> dict[str, float]:
    parts = parts_of(rig, longest)
    cells = [cell for part in parts for cell in part]  # by length
    sample = cells[stride // 2 :: stride]
    share = sum(map(rig.flops_published, sample)) / sum(map(rig.flops_published, cells))
    found = rig.ours(sample)
    for cell in sample[:: max(1, len(sample) // 4)]:
        assert torch.equal(found[cell]["accuracy"] > 0, rig.published(cell)), cell
        assert torch.equal(found[cell]["accuracy"] > 0, rig.cached(cell)), cell
    times: dict[str, list[float]] = {"ours": [], "published": [], "cached": []}
    for _ in range(rounds):  # in turns, because the machine's speed drifts
        times["ours"].append(seconds(lambda: [rig.ours(part) for part in parts]))
        times["published"].append(seconds(lambda: [rig.published(cell) for cell in sample]) / share)
        times["cached"].append(seconds(lambda: [rig.cached(cell) for cell in sample]) / share)

    def ratio(fast: str) -> float:
        return statistics.median(a / b for a, b in zip(times["published"], times[fast], strict=True))

    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        [label, f"{medians[name]:.1f} s", f"{len(cells) / medians[name]:.2f}", f"{ratio(name):.1f}"]
        for name, label in (("published", "published way"), ("cached", "cached decoding"), ("ours", "one pass"))
    ]
    print_table(
        f"{longest} x {longest} cells of {rig.samples} sums, {rig.count_parameters():,} parameters; published way and "
        f"cached decoding timed on {len(sample)} cells ({share:.1%} of the cost)",
        ["", "whole grid", "cells/s", "ratio"],
        rows,
    )
    return {
        "cells_per_s": len(cells) / medians["ours"],
        "original_cells_per_s": len(cells) / medians["published"],
        "vs_original": ratio("ours"),
        "decoding_vs_original": ratio("cached"),
    }


def growth(rig: Rig, lengths: list[int]) -> tuple[list[list[str]], float]:
    """Rows of a table: one cell of equal lengths in all three ways. -> and our CPU seconds a FLOP, of the longest."""
    rows, rate = [], 0.0
    for length in lengths:
        cell = length, length
        ours = seconds(lambda c=cell: rig.ours([c]))
        cached = seconds(lambda c=cell: rig.cached(c))
        published = seconds(lambda c=cell: rig.published(c)) if length <= 60 else float("nan")
        told = f"{published:.2f} s" if published == published else "-"
        rows.append([str(length), f"{ours:.3f} s", f"{cached:.3f} s", told])
        rate = ours / flops(rig, cell)
    return rows, rate


def flops(rig: Rig, cell: Cell) -> float:
    """Of a cell in one pass."""
    prompt, answer = rig.task.cell_shape(*cell)
    return rig.samples * rig.model.flops_per_example(rig.task.vocab_size, prompt + answer - 1, answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--recurrences", type=int, default=1)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--longest", type=int, default=30)
    parser.add_argument("--stride", type=int, default=45, help="the slow ways are timed on every so many-th cell")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rig = Rig(options.layers, options.recurrences, options.width, options.samples)
    figures = compare(rig, options.longest, options.stride, options.rounds)
    rows, rate = growth(rig, [10, 20, 40, 60, 100])
    print_table("One cell of equal lengths (CPU seconds of one thread)",
                ["digits", "one pass", "cached decoding", "published way"], rows)  # fmt: skip
    cells = [cell for part in parts_of(rig, 100) for cell in part]
    figures["hours_100x100"] = rate * sum(flops(rig, cell) for cell in cells) / 3600
    print(
        f"A 100 x 100 grid of {rig.samples} sums: {figures['hours_100x100']:.2f} hours on this core, from the FLOPs of "
        f"its cells at the speed of the longest one; the published way takes "
        f"{sum(map(rig.flops_published, cells)) * rig.samples / sum(flops(rig, c) for c in cells):.0f} times its FLOPs"
    )
    finish(figures)


if __name__ == "__main__":
    main()
