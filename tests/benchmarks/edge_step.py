"""A whole train step of Edge Pruning: the fast form against the published formulation, interleaved on one thread.

A step: the reference run on clean tokens, the run on corrupted ones, noise, the masked run, KL at the answer and the
sparsity terms, backward, AdamW. Rows are of full length, tokens random (so no prefix is shared), one answer a row.

Memory is the growth of the resident set's peak in one step, each form in a process of its own, at 12 layers.

    python tests/benchmarks/edge_step.py [--rounds 5] [--seconds 2] [--only L3H4d32]
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import statistics
import subprocess
import sys

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

# layers, heads, width, batch, tokens, vocabulary
SIZES = {
    "L3H4d32": (3, 4, 32, 16, 16, 200),
    "L4H4d128": (4, 4, 128, 16, 32, 1000),
    "L6H4d128": (6, 4, 128, 16, 32, 1000),
    "L8H8d128": (8, 8, 128, 8, 32, 1000),
    "L4H12d96": (4, 12, 96, 8, 32, 1000),
}
TWELVE_LAYERS = (12, 8, 128, 8, 64, 1000)


def make_network(num_layers: int, num_heads: int, width: int, length: int, vocabulary: int) -> EdgeTransformer:
    decoder = Decoder(num_layers=num_layers, num_heads=num_heads, width=width, num_positions=length)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        spec.name: spec.init_value + 0.1 * torch.randn(spec.shape, generator=generator)
        for spec in decoder.parameters(vocabulary, length)
    }
    return from_tensors(decoder, tensors, mask_embeddings=True)


class FastStep:
    """The same step as PublishedStep's on the fast form, log alphas of edges in one vector."""

    def __init__(self, network: EdgeTransformer) -> None:
        self.network, graph = network, network.graph
        self.edges = torch.full((1, graph.num_edges), 10.0).requires_grad_()
        self.nodes = torch.full((1, graph.num_writers), 10.0).requires_grad_()
        self.multipliers = torch.zeros(4, requires_grad=True)
        self.optimizer = torch.optim.AdamW(
            [{"params": [self.edges, self.nodes]}, {"params": [self.multipliers], "maximize": True}],
            lr=LEARNING_RATE,
            fused=True,
        )

    def __call__(self, clean: Tensor, corrupted: Tensor, positions: Tensor) -> float:
        with torch.no_grad():
            reference = self.network.run(clean, positions).logits
        edges, nodes = (
            hard_concrete.sample(x, torch.empty_like(x).uniform_(hard_concrete.EPS, 1 - hard_concrete.EPS))
            for x in (self.edges, self.nodes)
        )
        logits = masked_logits(self.network, edges, nodes, clean[None], corrupted[None], positions[None])[0]
        picked = [F.log_softmax(x, -1) for x in (logits, reference)]
        loss = F.kl_div(picked[0], picked[1], log_target=True, reduction="none").sum(-1).mean()
        edge_gap, node_gap = 1 - edges.mean() - TARGET, 1 - nodes.mean() - TARGET
        first, second, third, fourth = self.multipliers
        loss = loss + first * edge_gap + second * edge_gap**2 + third * node_gap + fourth * node_gap**2
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


FORMS = {"published": PublishedStep, "fast": FastStep}


def make_batch(size: tuple[int, ...]) -> tuple[EdgeTransformer, tuple[Tensor, Tensor, Tensor]]:
    """Network, and clean tokens, corrupted tokens, positions of one step."""
    num_layers, num_heads, width, batch, length, vocabulary = size
    network = make_network(num_layers, num_heads, width, length, vocabulary)
    clean, corrupted = torch.randint(
        vocabulary, (2, batch, length), generator=torch.Generator().manual_seed(1)
    ).unbind()
    return network, (clean, corrupted, torch.full((batch, 1), length - 1))


def print_peak(form: str) -> None:
    """MB by which the first step raises this process's peak; what torch itself takes is touched before."""
    warm_network, warm_batch = make_batch((1, 1, 8, 1, 4, 10))
    FORMS[form](warm_network)(*warm_batch)
    network, batch = make_batch(TWELVE_LAYERS)
    if form == "fast":
        assert network.folded  # copies of weights are no activations
    step = FORMS[form](network)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(*batch)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def measure_peak(form: str) -> float:
    command = [sys.executable, __file__, "--peak", form]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU seconds a variant and round")
    parser.add_argument("--only", choices=tuple(SIZES), help="one size")
    parser.add_argument("--peak", choices=tuple(FORMS), help="only print MB that a step of one form takes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        return print_peak(options.peak)
    figures, rows = {}, []
    for name, size in SIZES.items():
        if options.only not in (None, name):
            continue
        network, batch = make_batch(size)
        variants = {form: functools.partial(make(network), *batch) for form, make in FORMS.items()}
        times = interleaved(variants, options.rounds, options.seconds)
        figures[name] = ratio(times, "published", "fast")
        slow, quick = (1e3 * statistics.median(times[variant]) for variant in variants)
        rows.append((name, str(size[3]), str(size[4]), f"{slow:.1f}", f"{quick:.1f}", f"{figures[name]:.2f}"))
    title = f"sgemm peak {sgemm_peak() / 1e9:.0f} GFLOP/s"
    print_table(title, ("size", "batch", "tokens", "published ms", "fast ms", "ratio"), rows)
    peaks = {form: measure_peak(form) for form in FORMS}
    print(", ".join(f"{form}: {megabytes:.0f} MB in a step at 12 layers" for form, megabytes in peaks.items()))
    figures["memory_vs_reference_12_layers"] = peaks["fast"] / peaks["published"]
    finish(figures)


if __name__ == "__main__":
    main()
