"""Grokking over weight decay and depth: two-hop composition after Wang et al. 2024 (arXiv 2405.15071), Figures 1 and 13.

python sweeps/grok_wd_layers.py --help
"""

from functools import partial

from analysis.grokking import grokking_report
from groundswell import AdamW, Budget, Checkpointing, DenseThenSparse, Evaluation, Every, Experiment, LogSpaced, Reached
from groundswell.cli import main
from groundswell.sweep import Axis, Sweep
from models.decoder import Decoder
from models.objectives import AnswerLoss
from tasks.composition import Composition

HELD_OUT = "eval/test_inferred_iid/accuracy"
PRESETS = {
    "smoke": "under a minute: does everything work",
    "demo": "delayed generalisation in under 20 minutes on 2 CPU cores",
    "small": "500 entities on one GPU",
    "paper": "2,000 entities, 8 layers, width 768, 1.5 M steps",
}
TINY_WORLD = Composition(
    num_entities=32, num_relations=12, out_degree=12, phi=8.0, iid_fraction=0.10, ood_fraction=0.15, predict_stop=False
)


def build(preset: str) -> Sweep:
    experiment = Experiment(
        task=TINY_WORLD,
        model=Decoder(num_layers=2, num_heads=4, width=64, init_scale=3.0),
        objective=AnswerLoss(),
        optimizer=AdamW(lr=1e-3, weight_decay=0.3, beta2=0.98, warmup_steps=10, clip_norm=1.0),
        budget=Budget(steps=5_000, batch_size=512),
        evaluation=Evaluation(schedule=LogSpaced(per_decade=20, first=50), stop=(Reached(metric=HELD_OUT, value=0.99),)),
        checkpointing=Checkpointing(schedule=Every(every=500)),
    )
    layers, weight_decays, seeds = (1, 2, 3), (0.03, 0.3, 1.0), (0, 1)
    if preset == "smoke":
        experiment = experiment.with_overrides({"budget.steps": 150, "metrics_every": 50, "checkpointing.schedule.every": 50})
        layers, weight_decays, seeds = (1, 2), (0.1, 1.0), (0,)
    elif preset == "small":
        experiment = experiment.with_overrides(
            {
                "task": Composition(num_entities=500, num_relations=50, phi=9.0, iid_fraction=0.01, ood_fraction=0.05),
                "model": Decoder(num_layers=4, num_heads=8, width=256),
                "optimizer": AdamW(lr=5e-4, weight_decay=0.3, warmup_steps=500),
                "budget": Budget(steps=100_000, batch_size=2_048),
                "checkpointing.schedule.every": 5_000,
                "scaling.precision": "bf16",
                "scaling.device": "cuda",
            }
        )
        layers, weight_decays, seeds = (2, 4, 8), (0.03, 0.1, 0.3, 1.0), (0, 1, 2)
    elif preset == "paper":
        experiment = experiment.with_overrides(
            {
                "task": Composition(phi=7.2),
                "model": Decoder(num_layers=8, num_heads=12, width=768, dropout=0.1),
                "optimizer": AdamW(lr=1e-4, weight_decay=0.1, warmup_steps=2_000),
                "budget": Budget(steps=1_500_000, batch_size=512),
                "checkpointing": Checkpointing(schedule=DenseThenSparse()),
                "evaluation.max_examples": 3_000,
            }
        )
        layers, weight_decays, seeds = (4, 8), (0.03, 0.1, 0.3), (0, 1, 2)
    axes = {
        "model.num_layers": Axis(values=layers),
        "optimizer.weight_decay": Axis(values=weight_decays, low=0.01, high=3.0, log=True),
        "seed": Axis(values=seeds, also=("task.seed",)),
    }
    report = partial(grokking_report, panel_axis="model.num_layers", colour_axis="optimizer.weight_decay")
    return Sweep("grok_wd_layers", experiment, axes, metric=HELD_OUT, report=report)


if __name__ == "__main__":
    main(build, PRESETS)
