"""Which positions let a transformer calculate with numbers longer than it has seen? (arXiv 2405.17399): embeddings x
architectures x seeds, trained on short operands, asked on a grid of longer ones.

python sweeps/abacus_embeddings.py [--preset smoke|demo|small|paper] [--axis task=sorting]
python sweeps/abacus_embeddings.py --preset search --search optuna --num-samples 20
"""

from functools import partial
from typing import Any

from analysis.arithmetic_grid import LengthGrid
from analysis.arithmetic_plots import arithmetic_report
from groundswell import AdamW, Budget, Checkpointing, Evaluation, Every, Experiment, Scaling
from groundswell.cli import main
from groundswell.sweep import Axis, Sweep
from models.recurrent import RecurrentDecoder
from models.recurrent_objective import ProgressiveLoss
from tasks.arithmetic import Arithmetic
from tasks.positional_or import PositionalOr
from tasks.sorting import Sorting


def lengths(longest: int) -> tuple[int, ...]:
    return tuple(range(1, longest + 1))


TINY: dict[str, dict[str, Any]] = {
    "addition": {"task": Arithmetic(max_first=3, max_second=3, test_lengths=lengths(8))},
    "multiplication": {
        "task": Arithmetic(operation="multiplication", max_first=2, max_second=2, test_lengths=lengths(4))
    },
    "sorting": {"task": Sorting(max_digits=3, max_numbers=4, test_lengths=lengths(6))},
    "or": {"task": PositionalOr(max_first=10, max_second=10, test_lengths=lengths(16))},
}
SMALL = {
    "addition": {"task": Arithmetic(max_first=10, max_second=10, test_lengths=lengths(30))},
    "multiplication": {
        "task": Arithmetic(operation="multiplication", max_first=7, max_second=7, test_lengths=lengths(12))
    },
    "sorting": {"task": Sorting(max_digits=6, max_numbers=6, test_lengths=lengths(15))},
    "or": {"task": PositionalOr(max_first=20, max_second=20, test_lengths=lengths(40))},
}
PAPER = {
    "addition": {"task": Arithmetic()}, "sorting": {"task": Sorting(), "scaling.micro_batch": 32},
    "multiplication": {"task": Arithmetic(operation="multiplication", max_first=15, max_second=15)},
    "or": {"task": PositionalOr(), "budget.seconds": 3_600.0},
}  # fmt: skip
EMBEDDINGS: dict[str, dict[str, Any]] = {
    name: {"model.position_encoding": table, "model.attention_positions": attention}
    for name, table, attention in (
        ("abacus", "abacus", "null"), ("nope", "null", "null"), ("learned", "learned", "null"),
        ("fire", "null", "fire"), ("rope", "null", "rotary"), ("abacus_fire", "abacus", "fire"),
        ("abacus_rope", "abacus", "rotary"),
    )
}  # fmt: skip
DEMO = Experiment(
    task=TINY["addition"]["task"],
    model=RecurrentDecoder(num_layers=2, width=64, num_heads=4, abacus_max_offset=12),
    objective=ProgressiveLoss(),
    optimizer=AdamW(lr=3e-3, weight_decay=0.01, beta2=0.98, schedule="trapezoid", cooldown_fraction=0.3),
    budget=Budget(steps=1_500, batch_size=144),
    evaluation=Evaluation(schedule=Every(every=250), max_examples=200),
    checkpointing=Checkpointing(schedule=Every(every=500)),
)
GPU = Scaling(device="cuda", precision="bf16")
SIZES: dict[str, Any] = {  # what for, tasks, embeddings, depth, architectures, seeds, grid, and what else differs
    "smoke": ("does everything work", TINY, ("abacus", "nope"), 2, ("injection", "looped"), (0,), LengthGrid(
        max_first=4, samples=20), {"budget.steps": 40, "model.width": 32, "evaluation.schedule.every": 20}),
    "demo": ("four embeddings, three seeds, lengths 1-3, on 2 CPU cores", TINY, ("abacus", "nope", "learned", "fire"),
        2, ("standard",), (0, 1, 2), LengthGrid(max_first=8, samples=50), {}),
    "search": ("rate, offset and width of Abacus, with --search optuna", TINY, ("abacus",), 2, ("standard",), (0, 1),
        LengthGrid(max_first=8, samples=50), {"budget.steps": 1_000}),
    "small": ("all embeddings and architectures, lengths 1-10, on one GPU", SMALL, tuple(EMBEDDINGS), 4,
        ("standard", "injection", "looped"), (0, 1, 2), LengthGrid(max_first=40, samples=32), {
        "model.width": 256, "model.num_heads": 8, "model.abacus_max_offset": 40, "optimizer.lr": 1e-3,
        "budget": Budget(steps=10_000, batch_size=1_024), "checkpointing.schedule.every": 2_500, "scaling": GPU}),
    "paper": ("the paper's size, 24 hours a run", PAPER, ("abacus", "nope", "fire", "abacus_fire"), 16,
        ("standard", "injection", "looped"), (0, 1, 2), LengthGrid(max_first=100, equal_lengths=(101, 160)), {
        "model.width": 1_024, "model.num_heads": 16, "model.abacus_max_offset": 100, "optimizer.lr": 1e-4,
        "optimizer.clip_norm": 0.5, "optimizer.eps": 1e-12, "optimizer.cooldown_fraction": 0.1,
        "budget": Budget(seconds=86_400.0, batch_size=8_192, batch_ramp=0.6),
        "checkpointing": Checkpointing(schedule=Every(every=10_000), keep="last"),
        "scaling": GPU.with_overrides({"micro_batch": 512})}),
}  # fmt: skip


def build(preset: str) -> Sweep:
    _, tasks, embeddings, depth, architectures, seeds, grid, changes = SIZES[preset]
    shapes = {
        "standard": {"model.num_layers": depth, "model.num_recurrences": 1, "model.inject_every_layer": False},
        "injection": {"model.num_layers": depth, "model.num_recurrences": 1, "model.inject_every_layer": True},
        "looped": {"model.num_layers": depth // 2, "model.num_recurrences": 2, "model.inject_every_layer": False},
    }
    axes = {
        "task": Axis(values=("addition",), named=tasks),
        "embedding": Axis(values=embeddings, named=EMBEDDINGS),
        "architecture": Axis(values=architectures, named=shapes),
        "seed": Axis(values=seeds, also=("task.seed",)),
    }
    if preset == "search":
        axes |= {
            "optimizer.lr": Axis(values=(3e-3,), low=3e-4, high=1e-2, log=True),
            "model.abacus_max_offset": Axis(values=(12,), low=4, high=40, integer=True),
            "model.width": Axis(values=(32, 64, 96)),
        }
    report = partial(arithmetic_report, panel_axis="architecture", colour_axis="embedding")
    base, metric = (
        DEMO.with_overrides(changes),
        "eval/length_5/accuracy" if preset == "search" else "eval/test/accuracy",
    )
    return Sweep("abacus_embeddings", base, axes, metric, report=report, probes=(grid,), probe_steps="all")


if __name__ == "__main__":
    main(build, {preset: size[0] for preset, size in SIZES.items()})
