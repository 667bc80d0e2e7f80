"""The reversal curse and its relatives (arXiv 2405.04669): facts in two directions, chains of facts, and the positive
controls where the answer is in the context or shares a token with the question.

python sweeps/reversal_curse.py [--preset demo|positions|vocabulary|layers|frozen|words|paper] [--axis task=reverse]
"""

from typing import Any

from analysis.reversal_curse import EmbeddingSimilarity, LogitHeatMaps, reversal_report
from groundswell import AdamW, Budget, Checkpointing, Evaluation, Every, Experiment
from groundswell.cli import main
from groundswell.sweep import Axis, Sweep
from models.decoder import Decoder
from models.objectives import WordLoss
from tasks.chain import Chain
from tasks.chain_related import ChainRelated
from tasks.reverse import Reverse
from tasks.reverse_icl import ReverseICL

DEMO = Experiment(
    task=Reverse(entity_vocab_size=80),
    model=Decoder(num_layers=2, num_heads=2, width=64, tied_head=False, dropout=0.1),
    objective=WordLoss(),
    optimizer=AdamW(lr=3e-3, weight_decay=0.01, decay_all=True, clip_norm=0),  # torch's AdamW as it is, no clipping
    budget=Budget(epochs=150, batch_size=64),
    metrics_every=1,
    evaluation=Evaluation(schedule=Every(every=5)),
    checkpointing=Checkpointing(schedule=Every(every=75)),
)
SMALL = {
    "reverse": {"task": Reverse(entity_vocab_size=80)},
    "reverse_icl": {"task": ReverseICL(entity_vocab_size=80, num_x_tokens=20, num_y_tokens=10), "budget.epochs": 60},
    "chain": {"task": Chain(entity_vocab_size=80)},
    "chain_related": {
        "task": ChainRelated(entity_vocab_size=80, alphabet_size=60, num_train_triples=20, num_validation_triples=10)
    },
}
FULL = {"reverse": {"task": Reverse()}, "reverse_icl": {"task": ReverseICL()}, "chain": {"task": Chain()},
        "chain_related": {"task": ChainRelated()}}  # fmt: skip
PAIR = {name: SMALL[name] for name in ("reverse", "chain")}
PAPER = {"model.num_layers": 24, "model.num_heads": 12, "model.width": 768, "optimizer.lr": 0.01,
         "budget.epochs": 3_000, "evaluation.schedule.every": 10, "checkpointing.schedule.every": 500}  # fmt: skip
STUDIES: dict[str, Any] = {  # what it is for, tasks, seeds, a further axis, and what else differs from the demo
    "smoke": ("does everything work", SMALL, (0,), {}, {"budget.epochs": 5}),
    "demo": ("all four tasks in under 3 minutes on 2 CPU cores", SMALL, (0, 1, 2), {}, {}),
    "positions": ("three position encodings", PAIR, (0, 1, 2),
                  {"model.position_encoding": ("absolute", "null", "rotary")}, {}),
    "vocabulary": ("from 20 to 800 tokens", PAIR, (0, 1, 2), {"task.entity_vocab_size": (20, 50, 200, 800)}, {}),
    "layers": ("depth", PAIR, (0, 1, 2), {"model.num_layers": (1, 2, 4, 12)}, {"optimizer.lr": 1e-3}),
    "frozen": ("trained and frozen embeddings", PAIR, (0, 1, 2), {"model.freeze_embeddings": (False, True)}, {}),
    "words": ("entities of 1, 2 and 3 tokens", PAIR, (0, 1, 2), {"task.word_size": (1, 2, 3)}, {"budget.epochs": 400}),
    "paper": ("24 layers, width 768, 3,000 epochs, 10 seeds", FULL, tuple(range(10)), {}, PAPER),
}  # fmt: skip


def build(preset: str) -> Sweep:
    _, tasks, seeds, more, changes = STUDIES[preset]
    axes = {"task": Axis.of_names(tasks)} | {path: Axis(values=values) for path, values in more.items()}
    axes["seed"] = Axis(values=seeds, also=("task.seed",))
    return Sweep(
        "reversal_curse", DEMO.with_overrides(changes), axes, metric="eval/validation/word_nll", mode="min",
        report=reversal_report, probes=(LogitHeatMaps(), EmbeddingSimilarity()),
    )  # fmt: skip


if __name__ == "__main__":
    main(build, {preset: study[0] for preset, study in STUDIES.items()})
