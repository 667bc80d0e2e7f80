"""A sweep of seconds: modular addition over learning rate (the last one diverges) and seed.

Run by the tests as a user would run it.
"""

from paced_parts import BrokenForOneSeed, PacedLoss

from groundswell import AdamW, Budget, Checkpointing, Evaluation, Every, Experiment
from groundswell.cli import main
from groundswell.sweep import Axis, Sweep
from models.decoder import Decoder

PRESETS = {"paced": "four seconds a run", "quick": "as fast as it goes", "seen": "paced, judged by what was seen"}
DIVERGING_LR = 1e20


def build(preset: str) -> Sweep:
    experiment = Experiment(
        task=BrokenForOneSeed(modulus=13, train_fraction=0.6),
        model=Decoder(num_layers=1, num_heads=2, width=16, init_scale=3.0),
        objective=PacedLoss(pause_s=0.0 if preset == "quick" else 0.035),
        optimizer=AdamW(lr=3e-3, weight_decay=0.3, warmup_steps=5, clip_norm=0.0),
        budget=Budget(steps=120, batch_size=32),
        metrics_every=5,
        evaluation=Evaluation(schedule=Every(every=10)),
        checkpointing=Checkpointing(schedule=Every(every=10)),
    )
    axes = {
        "optimizer.lr": Axis(values=(1e-3, 1e-2, DIVERGING_LR), low=1e-4, high=1e-1, log=True),
        "seed": Axis(values=(0, 1), also=("task.seed",)),
    }
    return Sweep("small", experiment, axes, metric=f"eval/{'train' if preset == 'seen' else 'test'}/accuracy")


if __name__ == "__main__":
    main(build, PRESETS, default="paced")
