"""A whole train step of Edge Pruning: the fast form against the published formulation, interleaved on one thread.

A step: the reference run on clean tokens, the run on corrupted ones, noise, the masked run, KL at the answer and the
sparsity terms, backward, AdamW. Rows are of full length, tokens random (so no prefix is shared), one answer a row.

Steps visit a training set of 64 examples again and again, as published runs do (200 examples, 96,000 visits). The fast
form keeps what both reference runs give at the first visit, which is not in the times; `<size>_uncached` is the ratio
without that, each run done at every visit. The published form has nothing of the kind.

Memory is the growth of the resident set's peak in one step, each form in a process of its own, at 12 layers, the larger
of the fast form's two. Growth is the exponent of time from the first to the last size.

    python tests/benchmarks/edge_step.py [--rounds 5] [--seconds 1] [--only L3H4d32]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from common import finish, interleaved, print_table, ratio, sgemm_peak
from edge_step_published import LEARNING_RATE, TARGET, PublishedStep
from torch import Tensor

from models import hard_concrete
from models.decoder import Decoder
from models.edge_fast import masked_logits
from models.edge_gpt2 import from_tensors
from models.edge_transformer import EdgeTransformer
from tasks.boolean_expressions import BooleanExpressions

# layers, heads, width, batch, tokens, vocabulary
SIZES = {
    "L3H4d32": (3, 4, 32, 16, 16, 200),
    "L4H4d128": (4, 4, 128, 16, 32, 1000),
    "L6H4d128": (6, 4, 128, 16, 32, 1000),
    "L8H8d128": (8, 8, 128, 8, 32, 1000),
    "L4H12d96": (4, 12, 96, 8, 32, 1000),
}
TWELVE_LAYERS = (12, 8, 128, 8, 64, 1000)
GROWTH_SIZE = {"layers": 4, "heads": 4, "width": 64, "batch": 8, "tokens": 16, "vocabulary": 200}
GROWTH = {"layers": (2, 4, 8), "heads": (2, 4, 8), "tokens": (8, 16, 32)}
PREFIX_NETWORK = (4, 4, 64)  # layers, heads, width
EXAMPLES = 64  # of a training set
BUDGET = 2**29
Batch = tuple[Tensor, Tensor, Tensor]


def make_network(num_layers: int, num_heads: int, width: int, length: int, vocabulary: int) -> EdgeTransformer:
    decoder = Decoder(num_layers=num_layers, num_heads=num_heads, width=width, num_positions=length)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        spec.name: spec.init_value + 0.1 * torch.randn(spec.shape, generator=generator)
        for spec in decoder.parameters(vocabulary, length)
    }
    return from_tensors(decoder, tensors, mask_embeddings=True)


class FastStep:
    """The same step as PublishedStep's on the fast form, log alphas of edges in one vector. `budget`: bytes for what is
    kept of the reference runs; 0: both are run at every visit."""

    def __init__(self, network: EdgeTransformer, budget: int) -> None:
        self.network, self.budget, graph = network, budget, network.graph
        self.edges = torch.full((1, graph.num_edges), 10.0).requires_grad_()
        self.nodes = torch.full((1, graph.num_writers), 10.0).requires_grad_()
        self.multipliers = torch.zeros(4, requires_grad=True)
        self.optimizer = torch.optim.AdamW(
            [{"params": [self.edges, self.nodes]}, {"params": [self.multipliers], "maximize": True}],
            lr=LEARNING_RATE,
            fused=True,
        )

    def __call__(self, clean: Tensor, corrupted: Tensor, positions: Tensor) -> float:
        clean, corrupted, positions = clean[None], corrupted[None], positions[None]
        source = None
        if self.budget:
            references = self.network.references
            reference = references.logits(clean, corrupted, positions, self.budget)[0]
            source = references.given(1, clean, corrupted, positions, self.budget)
        else:
            with torch.no_grad():
                reference = self.network.run(clean[0], positions[0]).logits
        edges, nodes = (
            hard_concrete.sample(x, torch.empty_like(x).uniform_(hard_concrete.EPS, 1 - hard_concrete.EPS))
            for x in (self.edges, self.nodes)
        )
        logits = masked_logits(self.network, edges, nodes, clean, corrupted, positions, source=source)[0]
        picked = [F.log_softmax(x, -1) for x in (logits, reference)]
        loss = F.kl_div(picked[0], picked[1], log_target=True, reduction="none").sum(-1).mean()
        edge_gap, node_gap = 1 - edges.mean() - TARGET, 1 - nodes.mean() - TARGET
        first, second, third, fourth = self.multipliers
        loss = loss + first * edge_gap + second * edge_gap**2 + third * node_gap + fourth * node_gap**2
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


FORMS: dict[str, Callable[[EdgeTransformer], Callable[[Tensor, Tensor, Tensor], float]]] = {
    "published": PublishedStep,
    "uncached": functools.partial(FastStep, budget=0),
    "fast": functools.partial(FastStep, budget=BUDGET),
}


def make_batches(size: tuple[int, ...]) -> tuple[EdgeTransformer, list[Batch]]:
    """A network, and the batches of an epoch of EXAMPLES examples: clean tokens, corrupted tokens, positions."""
    num_layers, num_heads, width, batch, length, vocabulary = size
    network = make_network(num_layers, num_heads, width, length, vocabulary)
    source = torch.Generator().manual_seed(1)
    batches: list[Batch] = []
    for _ in range(EXAMPLES // batch):
        clean, corrupted = torch.randint(vocabulary, (2, batch, length), generator=source).unbind()
        batches.append((clean, corrupted, torch.full((batch, 1), length - 1)))
    return network, batches


def steps(network: EdgeTransformer, batches: Sequence[Batch], forms: Sequence[str]) -> dict[str, Callable[[], None]]:
    """Steps of each form, which visits the batches in turn; first visits are over."""

    def in_turn(form: str) -> Callable[[], None]:
        step, turn = FORMS[form](network), itertools.cycle(batches)

        def call() -> None:
            step(*next(turn))

        return call

    if "fast" in forms:
        for clean, corrupted, positions in batches:
            network.references.logits(clean[None], corrupted[None], positions[None], BUDGET)
    return {form: in_turn(form) for form in forms}


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Milliseconds."""
    return {name: 1e3 * statistics.median(own) for name, own in times.items()}


def measure_sizes(names: Sequence[str], rounds: int, seconds: float) -> dict[str, float]:
    figures, rows = {}, []
    for name in names:
        times = interleaved(steps(*make_batches(SIZES[name]), tuple(FORMS)), rounds, seconds)
        figures[f"{name}_vs_reference"] = ratio(times, "published", "fast")
        figures[f"{name}_uncached"] = ratio(times, "published", "uncached")
        ratios = (figures[f"{name}_{end}"] for end in ("uncached", "vs_reference"))
        sizes = (str(x) for x in SIZES[name][3:5])
        rows.append((name, *sizes, *(f"{x:.1f}" for x in medians(times).values()), *(f"{x:.2f}" for x in ratios)))
    columns = ("size", "batch", "tokens", "published ms", "uncached ms", "fast ms", "ratio uncached", "ratio")
    print_table(f"a step; sgemm peak {sgemm_peak() / 1e9:.0f} GFLOP/s", columns, rows)
    return figures


def measure_growth(rounds: int, seconds: float) -> dict[str, float]:
    """How the time of a step grows from the first to the last size: the exponent n of size^n."""
    figures, rows = {}, []
    for name, sizes in GROWTH.items():
        found = []
        for value in sizes:
            size = GROWTH_SIZE | {name: value}
            times = interleaved(steps(*make_batches(tuple(size.values())), ("published", "fast")), rounds, seconds)
            found.append(medians(times))
            figure = ratio(times, "published", "fast")
            rows.append((f"{name} {value}", *(f"{x:.1f}" for x in found[-1].values()), f"{figure:.2f}"))
        for form in ("published", "fast"):
            exponent = math.log(found[-1][form] / found[0][form]) / math.log(sizes[-1] / sizes[0])
            figures[f"growth_{name}_{form}"] = exponent
    print_table("growth, else " + str(GROWTH_SIZE), ("", "published ms", "fast ms", "ratio"), rows)
    return figures


def measure_prefix(rounds: int, seconds: float) -> float:
    """A fast step on few-shot Boolean prompts, whose example lines are the same in clean and corrupted inputs, against
    one on the same prompts where the first token differs, so that all tokens are computed."""
    task = BooleanExpressions(train_size=EXAMPLES, validation_size=8, test_size=8)
    data = task.build()
    train = data.train
    clean, corrupted = (x[:EXAMPLES] for x in train.tokens.chunk(2, 1))
    positions = train.positions[:EXAMPLES, data.answer.columns]
    network = make_network(*PREFIX_NETWORK, clean.shape[1], task.vocab_size)
    other = corrupted.clone()
    other[:, 0] = (clean[:, 0] + 1) % task.vocab_size
    variants = {}
    for name, rows in (("prefix", corrupted), ("none", other)):
        batches = list(zip(clean.split(8), rows.split(8), positions.split(8), strict=True))
        variants[name] = steps(network, batches, ("fast",))["fast"]
    times = interleaved(variants, rounds, seconds)
    shared = (clean == corrupted).cumprod(1).sum(1).min()
    print(f"few-shot prompts of {int(positions.max()) + 1} tokens, {shared} shared: {medians(times)} ms")
    return ratio(times, "none", "prefix")


def print_peak(form: str) -> None:
    """MB by which the first step raises this process's resident set at its peak; what torch itself takes is touched
    before. Linux only."""
    warm_network, warm_batches = make_batches((1, 1, 8, 1, 4, 10))
    FORMS[form](warm_network)(*warm_batches[0])
    network, batches = make_batches(TWELVE_LAYERS)
    if form != "published":
        assert network.folded  # copies of weights are no activations
    step = FORMS[form](network)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = _resident()
    step(*batches[0])
    print((_resident() - before) / 1024)


def _resident() -> int:
    """The peak in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure_peak(form: str) -> float:
    command = [sys.executable, __file__, "--peak", form]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU seconds a variant and round")
    parser.add_argument("--only", choices=tuple(SIZES), help="one size and nothing else")
    parser.add_argument("--peak", choices=tuple(FORMS), help="only print MB that a step of one form takes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        return print_peak(options.peak)
    figures = measure_sizes([options.only] if options.only else list(SIZES), options.rounds, options.seconds)
    if not options.only:
        figures |= measure_growth(min(options.rounds, 3), options.seconds / 4)
        figures["few_shot_prefix_gain"] = measure_prefix(min(options.rounds, 3), options.seconds / 2)
        peaks = {form: measure_peak(form) for form in FORMS}
        print("MB in a step at 12 layers: " + ", ".join(f"{form} {size:.0f}" for form, size in peaks.items()))
        figures["memory_vs_reference_12_layers"] = max(peaks["fast"], peaks["uncached"]) / peaks["published"]
    finish(figures)


if __name__ == "__main__":
    main()
