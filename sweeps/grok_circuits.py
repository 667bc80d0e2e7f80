"""How circuits form while a transformer groks (arXiv 2405.15071, Figures 4, 5, 9-12, 14): every checkpoint of two-hop
composition and of comparison, with weights of their own in each layer and shared ones, is read and traced.

python sweeps/grok_circuits.py [--preset smoke|demo|small|paper] [--axis task=composition]
"""

from typing import Any

from analysis.causal_tracing import CausalTracing
from analysis.circuit_report import circuits_report
from analysis.logit_lens import LogitLens
from groundswell import AdamW, Budget, Checkpointing, Evaluation, Experiment, Scaling
from groundswell.cli import main
from groundswell.schedule import DenseThenSparse, LogSpaced
from groundswell.sweep import Axis, Sweep
from models.decoder import Decoder
from models.objectives import AnswerLoss
from tasks.comparison import Comparison
from tasks.composition import Composition

DEMO = Experiment(
    task=Composition(
        num_entities=32, num_relations=12, out_degree=12, phi=8, iid_fraction=0.1, ood_fraction=0.15, predict_stop=False
    ),
    model=Decoder(num_layers=4, num_heads=4, width=64, init_scale=3.0),
    objective=AnswerLoss(),
    optimizer=AdamW(lr=1e-3, weight_decay=1.0, beta2=0.98, warmup_steps=10, clip_norm=1.0),
    budget=Budget(steps=3_000, batch_size=512),
    evaluation=Evaluation(schedule=LogSpaced(per_decade=20, first=50)),
    checkpointing=Checkpointing(schedule=LogSpaced(per_decade=10, first=50)),
)
COMPARISON = Comparison(num_entities=200, num_attributes=3, num_values=10, phi=10, predict_stop=False)
TINY = {"composition": {"task": DEMO.task}, "comparison": {"task": COMPARISON, "budget.batch_size": 256}}
SMALL = {
    "composition": {"task": Composition(num_entities=500, num_relations=50, phi=9, iid_fraction=0.01)},
    "comparison": {"task": Comparison(num_entities=200, num_attributes=10, phi=7.2)},
}
PAPER = {"composition": {"task": Composition(phi=9)}, "comparison": {"task": Comparison(phi=7.2)}}
SIZES: dict[str, Any] = {  # what it is for, tasks, layers, seeds, and what else differs from the demo
    "smoke": ("does everything work", TINY, 2, (0,), {"budget.steps": 120, "model.width": 32}),
    "demo": ("four settings, 4 layers, width 64, on 2 CPU cores", TINY, 4, (0,), {}),
    "small": ("500 entities, 3 seeds, on one GPU", SMALL, 4, (0, 1, 2), {
        "model": Decoder(num_layers=4, num_heads=8, width=256), "optimizer": AdamW(lr=5e-4, weight_decay=0.3),
        "budget": Budget(steps=100_000, batch_size=2_048), "checkpointing.schedule": DenseThenSparse(),
        "scaling": Scaling(device="cuda", precision="tf32", cuda_graph=True),
    }),
    "paper": ("the paper's size: 2,000 entities, 8 layers, width 768", PAPER, 8, (0, 1, 2), {
        "model": Decoder(num_layers=8, num_heads=12, width=768, dropout=0.1),
        "optimizer": AdamW(lr=1e-4, weight_decay=0.1, warmup_steps=2_000), "budget": Budget(steps=1_500_000),
        "checkpointing.schedule": DenseThenSparse(),
    }),
}  # fmt: skip


def build(preset: str) -> Sweep:
    _, tasks, layers, seeds, changes = SIZES[preset]
    weights = {"own": {"model.num_layers": layers, "model.num_recurrences": 1},
               "shared": {"model.num_layers": layers // 2, "model.num_recurrences": 2}}  # fmt: skip
    seed = Axis(values=seeds, also=("task.seed",))
    return Sweep(
        "grok_circuits", DEMO.with_overrides(changes),
        {"task": Axis.of_names(tasks), "weights": Axis.of_names(weights), "seed": seed},
        metric="eval/test_inferred_iid/accuracy", report=circuits_report,
        probes=(LogitLens(), CausalTracing()), probe_steps="all",
    )  # fmt: skip


if __name__ == "__main__":
    main(build, {preset: size[0] for preset, size in SIZES.items()})
