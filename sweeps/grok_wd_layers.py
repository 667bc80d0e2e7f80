"""Grokking over weight decay and depth: two-hop composition (Wang et al. 2024, arXiv 2405.15071, Figures 1 and 13).

python sweeps/grok_wd_layers.py [--preset smoke|demo|small|paper] [--help]
"""

from functools import partial
from typing import Any

from analysis.grokking import grokking_report
from groundswell import AdamW, Budget, Checkpointing, Evaluation, Experiment, Reached, Scaling
from groundswell.cli import main
from groundswell.schedule import DenseThenSparse, Every, LogSpaced
from groundswell.sweep import Axis, Sweep
from models.decoder import Decoder
from models.objectives import AnswerLoss
from tasks.composition import Composition

HELD_OUT = "eval/test_inferred_iid/accuracy"
DEMO = Experiment(
    task=Composition(
        num_entities=32, num_relations=12, out_degree=12, phi=8, iid_fraction=0.1, ood_fraction=0.15, predict_stop=False
    ),
    model=Decoder(num_layers=2, num_heads=4, width=64, init_scale=3.0),
    objective=AnswerLoss(),
    optimizer=AdamW(lr=1e-3, weight_decay=0.3, beta2=0.98, warmup_steps=10, clip_norm=1.0),
    budget=Budget(steps=5_000, batch_size=512),
    evaluation=Evaluation(schedule=LogSpaced(per_decade=20, first=50), stop=(Reached(metric=HELD_OUT, value=0.99),)),
    checkpointing=Checkpointing(schedule=Every(every=500)),
)
GRIDS: dict[str, Any] = {  # what it is for, layers, weight decays, seeds, and what else differs from the demo
    "smoke": ("under a minute: does everything work", (1, 2), (0.1, 1.0), (0,), {
        "budget.steps": 150, "metrics_every": 50, "checkpointing.schedule.every": 50,
    }),
    "demo": ("delayed generalisation in under 20 minutes on 2 CPU cores", (1, 2, 3), (0.03, 0.3, 1.0), (0, 1), {}),
    "small": ("500 entities on one GPU", (2, 4, 8), (0.03, 0.1, 0.3, 1.0), (0, 1, 2), {
        "task": Composition(num_entities=500, num_relations=50, phi=9, iid_fraction=0.01),
        "model": Decoder(num_layers=4, num_heads=8, width=256),
        "optimizer": AdamW(lr=5e-4, weight_decay=0.3, warmup_steps=500),
        "budget": Budget(steps=100_000, batch_size=2_048),
        "scaling": Scaling(device="cuda", precision="tf32", cuda_graph=True),
    }),
    "paper": ("2,000 entities, 8 layers, width 768, 1.5 M steps", (4, 8), (0.03, 0.1, 0.3), (0, 1, 2), {
        "task": Composition(phi=7.2), "model": Decoder(num_layers=8, num_heads=12, width=768, dropout=0.1),
        "optimizer": AdamW(lr=1e-4, weight_decay=0.1, warmup_steps=2_000), "budget": Budget(steps=1_500_000),
        "checkpointing": Checkpointing(schedule=DenseThenSparse()),
    }),
}  # fmt: skip


def build(preset: str) -> Sweep:
    _, layers, weight_decays, seeds, changes = GRIDS[preset]
    decay = Axis(values=weight_decays, low=0.01, high=3.0, log=True)
    seed = Axis(values=seeds, also=("task.seed",))
    axes = {"model.num_layers": Axis(values=layers), "optimizer.weight_decay": decay, "seed": seed}
    report = partial(grokking_report, panel_axis="model.num_layers", colour_axis="optimizer.weight_decay")
    return Sweep("grok_wd_layers", DEMO.with_overrides(changes), axes, metric=HELD_OUT, report=report)


if __name__ == "__main__":
    main(build, {preset: grid[0] for preset, grid in GRIDS.items()})
