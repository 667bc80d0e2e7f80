"""One training step: ours against the original's way of doing it, interleaved in one process on one thread.

The original (Wang et al. 2024, code): Hugging Face GPT-2, rows padded to 10, dropout 0.1, logits at every position over
the vocabulary, AdamW with two groups, clipping, a DataLoader over dictionaries.

    python tests/benchmarks/step_time.py [--rounds 5] [--seconds 2]
"""

from __future__ import annotations

import argparse
import os
import statistics

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import finish, interleaved, print_table, ratio, sgemm_peak
from torch.utils.data import DataLoader

from groundswell import AdamW, Budget, Experiment
from groundswell.training.pack import Member, Pack
from models.decoder import Decoder
from models.objectives import AnswerLoss
from tasks.composition import Composition

PADDED_LENGTH = 10  # the original's max_length
VOCABULARY = 2_208  # 2,206 tokens of the default world, padded to a multiple of 8 as the original does


class HuggingFaceStep:
    """forward, loss, backward, clip, AdamW on batches from a DataLoader of dictionaries."""

    def __init__(self, pack: Pack, num_layers: int, width: int, padded: bool, dropout: float) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=1024 if padded else 8, n_embd=width, n_layer=num_layers, n_head=4,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False, attn_implementation="eager",
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config).train()
        rows = full_rows(pack, PADDED_LENGTH if padded else 5)
        self.loader = DataLoader(rows, batch_size=pack.batch_size, shuffle=True)
        self.batches = iter(self.loader)
        no_decay = [p for name, p in self.model.named_parameters() if "bias" in name or "ln" in name]
        ids = {id(p) for p in no_decay}
        decay = [p for p in self.model.parameters() if id(p) not in ids]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3)

    def __call__(self) -> None:
        batch = next(self.batches, None)
        if batch is None or len(batch["input_ids"]) < 512:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()


def full_rows(pack: Pack, length: int) -> list[dict[str, torch.Tensor]]:
    """Our training rows as the original holds them: prompt, answer, stop, padding; labels only at the answer."""
    data = pack.data
    rows = []
    for tokens, positions, targets in zip(data.tokens[:20_000], data.positions, data.targets, strict=False):
        ids = torch.zeros(length, dtype=torch.long)
        labels = torch.full((length,), -100)
        last = int(positions[-1])
        ids[: last + 1] = tokens[: last + 1]
        ids[positions + 1] = targets
        labels[positions + 1] = targets
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def make_pack(world: Composition, num_layers: int, width: int, batch_size: int, members: int) -> Pack:
    base = Experiment(
        task=world,
        model=Decoder(num_layers=num_layers, num_heads=4, width=width),
        objective=AnswerLoss(),
        optimizer=AdamW(lr=1e-3, weight_decay=0.1),
        budget=Budget(steps=1_000_000, batch_size=batch_size),
    )
    device = torch.device("cpu")
    return Pack([Member.create(base.with_overrides({"seed": seed}), device) for seed in range(members)])


def step_flops(pack: Pack) -> float:
    e = pack.members[0].experiment
    return 3 * e.model.flops_per_example(e.task.vocab_size, e.task.max_length, e.task.num_answers) * pack.batch_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU seconds a variant and round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peak = sgemm_peak()

    paper_world = Composition(num_entities=2_000, num_relations=200, phi=3.6)
    large = make_pack(paper_world, 2, 128, 512, 1)
    variants = {
        "original (Hugging Face, padded to 10, dropout .1)": HuggingFaceStep(large, 2, 128, padded=True, dropout=0.1),
        "Hugging Face, unpadded, no dropout": HuggingFaceStep(large, 2, 128, padded=False, dropout=0.0),
        "ours": lambda: large.train(1),
    }
    times = interleaved(variants, options.rounds, options.seconds)
    original, unpadded, ours = variants
    rows = []
    for name in variants:
        median = statistics.median(times[name])
        rate = f"{step_flops(large) / median / 1e9:.1f}" if name == ours else "-"
        rows.append((name, f"{1e3 * median:.1f}", f"{ratio(times, original, name):.2f}", rate))
    title = f"2 layers, width 128, batch 512, vocabulary {VOCABULARY}; sgemm peak {peak / 1e9:.0f} GFLOP/s"
    print_table(title, ("step", "CPU ms", "x original", "GFLOP/s"), rows)

    small_world = Composition(num_entities=100, num_relations=22, out_degree=20, phi=9.0)
    alone, eight = make_pack(small_world, 2, 64, 32, 1), make_pack(small_world, 2, 64, 32, 8)
    packed = interleaved(
        {"alone": lambda: alone.train(1), "pack of 8": lambda: eight.train(1)}, options.rounds, options.seconds
    )
    pack8_vs_alone = 8 * ratio(packed, "alone", "pack of 8")
    rows = []
    for name, pack, members in (("alone", alone, 1), ("pack of 8", eight, 8)):
        median = statistics.median(packed[name]) / members
        speed = f"{step_flops(pack) / median / 1e9:.1f}"
        rows.append((name, f"{1e3 * median:.2f}", f"{8 * ratio(packed, 'alone', name) / (8 / members):.2f}", speed))
    print_table("2 layers, width 64, batch 32", ("step", "CPU ms a run", "x alone", "GFLOP/s"), rows)
    finish(
        {
            "vs_original": ratio(times, original, ours),
            "vs_hf": ratio(times, unpadded, ours),
            "pack8_vs_alone": pack8_vs_alone,
            "sgemm_peak_gflops": peak / 1e9,
        }
    )


if __name__ == "__main__":
    main()
