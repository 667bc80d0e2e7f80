"""Epochs of the reversal demo's tasks: eight packed seeds against the published way, on one thread.

Published way: Hugging Face GPT-2 with dropout 0.1 and an untied head, a DataLoader, the loss at the last entity,
AdamW, a validation pass each epoch, and log-probabilities taken sample by sample with .item(). Ours is the whole loop
of a run as the demo has it: training with readings each epoch, evaluation of training and validation data every 5
epochs (`each_epoch_vs_original`: every epoch), journal, checkpoints. Interleaved in one process.

    python tests/benchmarks/reversal_epochs.py [--task reverse] [--seeds 8] [--rounds 5] [--seconds 2] [--profile]
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import finish, interleaved, print_table, ratio
from torch.utils.data import DataLoader

from groundswell import Experiment
from groundswell.rundir import SweepFolder
from groundswell.sweep import PlannedRun
from groundswell.training.pack import Member, Pack
from groundswell.training.trainer import PackTrainer
from sweeps.reversal_curse import DEMO, SMALL
from tasks.entities import FactTask

FOREVER = 10**6  # epochs
EVALUATION_EPOCHS = DEMO.evaluation.schedule.every  # type: ignore[attr-defined]


class PublishedLoop:
    """One seed; a call is one epoch."""

    def __init__(self, experiment: Experiment) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(experiment.seed)
        task, model = experiment.task, experiment.model.to_dict()
        assert isinstance(task, FactTask)
        config = GPT2Config(
            vocab_size=task.vocab_size, n_positions=1024, n_embd=model["width"], n_layer=model["num_layers"],
            n_head=model["num_heads"], use_cache=False, tie_word_embeddings=False, attn_implementation="eager",
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config)
        facts = task.draw()
        self.length = task.entity_length
        batch = experiment.budget.batch_size
        self.train = DataLoader(torch.from_numpy(facts.train), batch_size=batch, shuffle=True)
        self.validation = DataLoader(torch.from_numpy(facts.validation), batch_size=batch, shuffle=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=experiment.optimizer.lr)

    def __call__(self) -> None:
        self.model.train()
        for tokens in self.train:
            loss, _ = self.forward(tokens)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.model.eval()
        for tokens in self.validation:
            self.forward(tokens)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
        logits = self.model(tokens).logits
        predicted, labels = logits[:, -self.length - 1 : -1], tokens[:, -self.length :]
        loss = torch.nn.functional.cross_entropy(predicted.flatten(0, 1), labels.flatten())
        words, firsts = [], []
        for probabilities, answer in zip(predicted.softmax(-1), labels, strict=True):
            word = 1.0
            for place, token in enumerate(answer):
                word *= probabilities[place, token].item()
            words.append(math.log(word + 1e-50))
            firsts.append(math.log(probabilities[0, answer[0]].item() + 1e-50))
        return loss, (sum(words) / len(words), sum(firsts) / len(firsts))


def trainer_of(base: Experiment, seeds: int, folder: Path) -> PackTrainer:
    sweep = SweepFolder(folder / "epochs")
    experiments = [base.with_overrides({"seed": n, "task.seed": n}) for n in range(seeds)]
    runs = [sweep.create_run(PlannedRun(e, {"seed": n}, f"seed={n}"), "pack", n) for n, e in enumerate(experiments)]
    return PackTrainer(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(SMALL), default="reverse", help="of the demo")
    parser.add_argument("--seeds", type=int, default=8, help="runs of our pack")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each variant in each round")
    parser.add_argument("--profile", action="store_true", help="where our CPU time goes, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = DEMO.with_overrides({**SMALL[options.task], "budget.epochs": FOREVER})
    seeds = [base.with_overrides({"seed": n, "task.seed": n}) for n in range(options.seeds)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(base, options.seeds, Path(folder))
        alone = trainer_of(base, 1, Path(folder) / "alone")
        often = trainer_of(base.with_overrides({"evaluation.schedule.every": 1}), options.seeds, Path(folder) / "often")
        bare = Pack([Member.create(experiment, torch.device("cpu")) for experiment in seeds])
        if options.profile:
            profile(trainer)
            return
        variants = {
            "published": PublishedLoop(base),
            "alone": lambda: to_evaluation(alone),
            "packed": lambda: to_evaluation(trainer),
            "often": lambda: to_evaluation(often),
            "bare": lambda: bare.train(1),
        }
        times = interleaved(variants, options.rounds, options.seconds)
    for name in ("alone", "packed"):
        times[name] = [seconds / EVALUATION_EPOCHS for seconds in times[name]]
    count = options.seeds
    middle = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        ("published way, one seed", f"{1e3 * middle['published']:.2f}", f"{1 / middle['published']:.0f}"),
        ("ours, one seed", f"{1e3 * middle['alone']:.2f}", f"{1 / middle['alone']:.0f}"),
        (f"ours, {count} seeds packed", f"{1e3 * middle['packed']:.2f}", f"{count / middle['packed']:.0f}"),
        ("  with evaluations each epoch", f"{1e3 * middle['often']:.2f}", f"{count / middle['often']:.0f}"),
        ("  its training steps alone", f"{1e3 * middle['bare']:.2f}", f"{count / middle['bare']:.0f}"),
    ]
    print_table(f"{options.task}, 80 tokens, 2 layers, width 64", ("", "CPU ms an epoch", "run-epochs/s"), rows)
    finish(
        {
            "vs_original": count * ratio(times, "published", "packed"),
            "each_epoch_vs_original": count * ratio(times, "published", "often"),
            "alone_vs_original": ratio(times, "published", "alone"),
            "run_epochs_per_s": count / middle["packed"],
        }
    )


def to_evaluation(trainer: PackTrainer) -> None:
    """The epochs up to the next evaluation."""
    trainer.advance(min_seconds=math.inf, every_evaluation=True)


def profile(trainer: PackTrainer, evaluations: int = 40) -> None:
    to_evaluation(trainer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(evaluations):
            to_evaluation(trainer)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=50))


if __name__ == "__main__":
    main()
