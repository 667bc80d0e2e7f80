"""One training step on reversed addition: ours against the plain formulation of the original, interleaved in one
process on one thread, alone and as a pack of three seeds.

The plain formulation (McLeish et al. 2024, code): modules called one after the other, the head and the loss over the
vocabulary at every position of the padded rows, torch.optim.AdamW. Both get the same batches.

    python tests/benchmarks/arithmetic_step.py [--rounds 5] [--seconds 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from common import finish, interleaved, print_table, ratio, sgemm_peak
from torch import Tensor, nn

from groundswell import AdamW
from groundswell.protocols import IGNORE, Answer, Split
from groundswell.training.flat import FlatParameters, PackedAdamW, initial_row, layout
from models.recurrent import RecurrentDecoder
from models.recurrent_objective import ProgressiveLoss

PLUS, EQUALS, EOS, VOCABULARY = 14, 17, 3, 19
LONGEST, BATCH, SEEDS, NUM_BATCHES = 5, 128, 3, 8
SETTINGS = AdamW(lr=3e-3, beta2=0.98, eps=1e-12, weight_decay=0.01, clip_norm=1.0)
SHAPES = {  # layers, recurrences; every layer injects in the standard model
    "standard": {"num_layers": 2, "num_recurrences": 1, "inject_every_layer": True},
    "looped": {"num_layers": 1, "num_recurrences": 4},
}
TOKENS_IN_ROW = 2 * LONGEST + 2 + LONGEST + 2  # operands, + and =, sum, EOS


def addition(generator: torch.Generator) -> Tensor:
    """A batch of reversed problems [B, L], right-padded, operands of 1 to 5 digits."""
    rows = torch.zeros(BATCH, TOKENS_IN_ROW, dtype=torch.long)
    for row in rows:
        lengths = torch.randint(1, LONGEST + 1, (2,), generator=generator).tolist()
        numbers = [int(torch.randint(10 ** (n - 1), 10**n, (1,), generator=generator)) for n in lengths]
        texts = [str(number)[::-1] for number in (*numbers, sum(numbers))]
        digits = [[int(digit) + 4 for digit in text] for text in texts]
        whole = [*digits[0], PLUS, *digits[1], EQUALS, *digits[2], EOS]
        row[: len(whole)] = torch.tensor(whole)
    return rows


def answers(rows: Tensor) -> Split:
    """The same rows as the engine has them: positions of the answers only."""
    targets = torch.full((len(rows), LONGEST + 2), IGNORE)
    positions = torch.zeros_like(targets)
    for index, row in enumerate(rows.tolist()):
        first, last = row.index(EQUALS), row.index(EOS)
        targets[index, : last - first] = rows[index, first + 1 : last + 1]
        positions[index] = torch.arange(first, first + LONGEST + 2).clamp(max=last - 1)
    return Split(rows[:, :-1], positions, targets)


# ---- the plain formulation ----


class Gated(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden // 2, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, -1)
        return self.down(value * F.gelu(gate))


class Layer(nn.Module):
    """Post-norm, as torch's own attention module computes it in training."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
        self.mlp = Gated(width, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, later: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, x, x, attn_mask=later, need_weights=False)[0])
        return self.norm2(x + self.mlp(x))


class Plain(nn.Module):
    def __init__(self, num_layers: int, num_recurrences: int, inject_every_layer: bool = False) -> None:
        super().__init__()
        width, rows = 64, 128
        self.recurrences, self.every = num_recurrences, inject_every_layer
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(rows, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(Layer(width, 4, 2 * width) for _ in range(num_layers))
        self.head, self.final_norm = Gated(width, 2 * width), nn.LayerNorm(width, eps=1e-12)
        self.adapter, self.decoder = nn.Linear(width, width, bias=False), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, offset: int, before: int, after: int) -> Tensor:
        injected = self.norm(self.tokens(tokens) + self.places(abacus(tokens, offset)))
        later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        state = torch.randn_like(injected) * 0.02
        with torch.no_grad():
            for _ in range(before):
                state = self.block(state, injected, later)
        for _ in range(after):
            state = self.block(state, injected, later)
        return self.decoder(self.adapter(self.final_norm(self.head(state))))

    def block(self, state: Tensor, injected: Tensor, later: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            state = layer(state + injected if index == 0 or self.every else state, later)
        return state


def abacus(tokens: Tensor, offset: int) -> Tensor:
    """Places in numbers by segment sums, as the published module finds them."""
    mask = torch.isin(tokens, torch.arange(4, 14))
    before = F.pad(mask[:, :-1], (1, 0))
    starts = (before != mask) & mask
    segments = starts.cumsum(1)
    index = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    resets = torch.zeros_like(index).scatter_add(1, segments, index * starts)
    places = (index - resets.gather(1, segments) + 1) * mask
    places[places > 0] += offset
    return places


class PlainStep:
    def __init__(self, batches: list[Tensor], **shape: Any) -> None:
        self.model, self.batches, self.count = Plain(**shape), batches, 0
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for name, p in named if "norm" not in name], "weight_decay": 0.01},
            {"params": [p for name, p in named if "norm" in name], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.98), eps=1e-12)

    def __call__(self) -> None:
        rows = self.batches[self.count % NUM_BATCHES]
        self.count += 1
        total = self.model.recurrences
        most = max(total // 2, 1)
        before = int(torch.randint(0, total, (1,)))
        after = int(torch.randint(1, 1 + min(total - before, most), (1,)))
        logits = self.model(rows, int(torch.randint(0, 101, (1,))), before, after)
        labels = rows * (torch.arange(rows.shape[1]) > (rows == EQUALS).int().argmax(1, keepdim=True))
        labels[labels == 0] = IGNORE
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), ignore_index=IGNORE)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()


# ---- ours ----


class OurStep:
    """What the engine does for a pack of `num_runs` seeds: loss, backward pass, clipping, AdamW."""

    def __init__(self, batches: list[Split], num_runs: int, **shape: Any) -> None:
        self.model, self.batches, self.count = RecurrentDecoder(num_positions=128, **shape), batches, 0
        specs = self.model.parameters(VOCABULARY, TOKENS_IN_ROW - 1)
        self.generators = [torch.Generator().manual_seed(seed) for seed in range(num_runs)]
        rows = [initial_row(specs, generator) for generator in self.generators]
        assert rows[0].numel() == layout(specs).row_size
        self.parameters = FlatParameters(specs, torch.stack(rows))
        self.optimizer = PackedAdamW(self.parameters, [SETTINGS] * num_runs)
        self.objective, self.num_runs = ProgressiveLoss(), num_runs

    def __call__(self) -> None:
        parts = [self.batches[(self.count + run) % NUM_BATCHES] for run in range(self.num_runs)]
        self.count += 1
        batch = Split(*(torch.stack([getattr(p, name) for p in parts]) for name in ("tokens", "positions", "targets")))
        self.parameters.grad.zero_()
        views = self.parameters.views
        loss, _ = self.objective.loss(self.model, views, batch, Answer(slice(None)), self.generators)
        loss.sum().backward()
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU seconds a variant and round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    peak = sgemm_peak()
    generator = torch.Generator().manual_seed(0)
    batches = [addition(generator) for _ in range(NUM_BATCHES)]
    splits = [answers(rows) for rows in batches]
    figures: dict[str, float] = {}
    for name, shape in SHAPES.items():
        variants: dict[str, Callable[[], None]] = {
            "plain": PlainStep(batches, **shape),
            "ours": OurStep(splits, 1, **shape),
            f"ours, {SEEDS} seeds": OurStep(splits, SEEDS, **shape),
        }
        times = interleaved(variants, options.rounds, options.seconds)
        runs = dict(zip(variants, (1, 1, SEEDS), strict=True))
        rows = []
        for label in variants:
            median = statistics.median(times[label]) / runs[label]
            gain = runs[label] * ratio(times, "plain", label)
            rows.append((label, f"{1e3 * median:.2f}", f"{1 / median:.1f}", f"{gain:.2f}"))
        flops = 3 * RecurrentDecoder(**shape).flops_per_example(VOCABULARY, TOKENS_IN_ROW - 1, LONGEST + 2) * BATCH
        title = f"{name}: {shape}, batch {BATCH}; {flops / 1e9:.2f} GFLOP a step, sgemm peak {peak / 1e9:.0f} GFLOP/s"
        print_table(title, ("step of a run", "CPU ms", "steps/s", "x plain"), rows)
        figures[f"{name}_vs_plain"] = ratio(times, "plain", "ours")
        figures[f"{name}_pack{SEEDS}_vs_plain"] = SEEDS * ratio(times, "plain", f"ours, {SEEDS} seeds")
    finish(figures | {"sgemm_peak_gflops": peak / 1e9})


if __name__ == "__main__":
    main()
