"""A pipeline of seconds: first -> (left | right) -> last, over two seeds. Run by the tests as a user would run it."""

from paced_parts import PacedLoss

from groundswell import AdamW, Budget, Checkpointing, Evaluation, Every, Experiment
from groundswell.cli import main
from groundswell.sweep import Sweep
from models.decoder import Decoder
from tasks.modular_arithmetic import ModularArithmetic
from tests.groundswell.staged import pipeline

PRESETS = {"quick": "as fast as it goes", "paced": "two seconds a run"}


def build(preset: str) -> Sweep:
    experiment = Experiment(
        task=ModularArithmetic(modulus=13, train_fraction=0.6),
        model=Decoder(num_layers=1, num_heads=2, width=16, init_scale=3.0),
        objective=PacedLoss(pause_s=0.0 if preset == "quick" else 0.03),
        optimizer=AdamW(lr=3e-3, weight_decay=0.3, warmup_steps=5),
        budget=Budget(steps=60, batch_size=32),
        metrics_every=5,
        evaluation=Evaluation(schedule=Every(every=10)),
        checkpointing=Checkpointing(schedule=Every(every=10)),
    )
    return pipeline(experiment, seeds=(0, 1))


if __name__ == "__main__":
    main(build, PRESETS, default="quick")
