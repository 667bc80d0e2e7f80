"""GPT-2 shaped networks to find circuits in, trained here on the tasks that circuits are known for: `edge_pruning.py`
prunes them, without any download.

python sweeps/circuit_networks.py [--preset smoke|demo|small] [--axis task=ioi,greater_than]
"""

from typing import Any

from groundswell import AdamW, Budget, Checkpointing, Evaluation, Every, Experiment, Scaling
from groundswell.cli import main
from groundswell.sweep import Axis, Sweep
from models.decoder import Decoder
from models.objectives import AnswerLoss
from tasks.boolean_expressions import BooleanExpressions
from tasks.gendered_pronoun import GenderedPronoun
from tasks.greater_than import GreaterThan
from tasks.ioi import Ioi

SIZES = {"validation_size": 500, "test_size": 500}
TASKS: dict[str, Any] = {  # the same texts as those of the pruning tasks, many more of them, and no corrupted ones
    "ioi": {"task": Ioi(pairs=False, train_size=20_000, **SIZES)},
    "greater_than": {"task": GreaterThan(pairs=False, split_by="text", train_size=20_000, **SIZES)},
    "gendered_pronoun": {"task": GenderedPronoun(pairs=False, train_size=3_000, **SIZES), "budget.steps": 500},
    "boolean": {"task": BooleanExpressions(pairs=False, prompt="zero_shot", train_size=1_500, validation_size=250,
                                           test_size=500), "optimizer.weight_decay": 1.0},
}  # fmt: skip
DEMO = Experiment(
    task=TASKS["ioi"]["task"],
    model=Decoder(num_layers=6, num_heads=8, width=64),
    objective=AnswerLoss(),
    optimizer=AdamW(lr=2e-3, weight_decay=0.1, warmup_steps=50, schedule="linear"),
    budget=Budget(steps=1_500, batch_size=128),
    evaluation=Evaluation(schedule=Every(every=100), max_examples=500),
    checkpointing=Checkpointing(schedule=Every(every=500), keep="last"),
)
PRESETS: dict[str, Any] = {  # what it is for, tasks, seeds, and what else differs from the demo
    "smoke": ("does everything work", ("ioi", "gendered_pronoun"), (0,), {"budget.steps": 20, "model.width": 32}),
    "demo": ("6 layers of 8 heads, width 64, on 2 CPU cores", tuple(TASKS), (0,), {}),
    "small": ("GPT-2 small's shape, on one GPU", tuple(TASKS), (0, 1, 2), {
        "model": Decoder(num_layers=12, num_heads=12, width=768), "optimizer.lr": 3e-4,
        "scaling": Scaling(device="cuda", precision="tf32")}),
}  # fmt: skip


def build(preset: str) -> Sweep:
    _, tasks, seeds, changes = PRESETS[preset]
    axes = {"task": Axis(values=tasks, named=TASKS), "seed": Axis(values=seeds)}
    return Sweep("circuit_networks", DEMO.with_overrides(changes), axes, metric="eval/validation/accuracy")


if __name__ == "__main__":
    main(build, {preset: size[0] for preset, size in PRESETS.items()})
