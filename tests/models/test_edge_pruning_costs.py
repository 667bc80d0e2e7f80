"""Against counts made by hand in the published code, and sizes of real edge graphs."""

import pytest
import torch
from safetensors.torch import load_file

from groundswell import AdamW, Budget, Experiment
from groundswell.experiment import ParameterGroup
from groundswell.planning.footprint import LiveBytes, Meter
from groundswell.planning.hardware import find_gpu
from groundswell.planning.plan import Machine, Planner
from models import edge_workspace
from models.decoder import Decoder
from models.edge_fast import masked_logits
from models.edge_gpt2 import from_tensors
from models.edge_masked import EdgeMasked
from models.edge_objective import EdgePruning
from models.edge_pruning_costs import Graph, buffer_bytes, extra, mask_flops, moved_bytes, read_bytes, saved_bytes
from models.transformers_model import TransformersModel
from models.weight_files import WEIGHTS
from sweeps.plans._pruning import pruning
from tests.models.edge_golden import write_network
from tests.models.edge_pairs import RandomPairs

GPT2_SMALL = Graph(12, 12, 12, ("tok_embeds", "pos_embeds"), 768)
LLAMA_13B = Graph(40, 40, 40, (), 5120)


@pytest.mark.parametrize(
    ("graph", "form", "reference", "forward", "backward", "total"),
    [
        (GPT2_SMALL, "published", 0.29, 0.25, 0.36, 0.91),
        (GPT2_SMALL, "fast", 0.0, 0.050, 0.10, 0.15),
        (LLAMA_13B, "published", 218, 190, 271, 679),
        (LLAMA_13B, "fast", 0.0, 40, 79, 119),
    ],
)
def test_gflops_of_reads_and_writes(graph, form, reference, forward, backward, total):
    flops = mask_flops(graph, form)
    found = [value / 1e9 for value in (flops.reference, flops.forward, flops.backward, flops.total)]
    digits = 2 if graph is GPT2_SMALL else 0
    assert [round(value, digits) for value in found] == [
        round(value, digits) for value in (reference, forward, backward, total)
    ]


def test_the_networks_own_forward_pass_for_comparison():
    """2 FLOPs a weight of the blocks: .17 and 25 GFLOP a token."""
    assert pytest.approx(0.17, abs=0.005) == 2 * 12 * 12 * 768**2 / 1e9
    assert pytest.approx(25, abs=0.5) == 2 * 40 * (4 * 5120**2 + 3 * 5120 * 13824) / 1e9


def test_buffers():
    assert buffer_bytes(GPT2_SMALL, 32, 64, 4) / 1e9 == pytest.approx(0.99, abs=0.005)
    assert buffer_bytes(LLAMA_13B, 1, 72, 2) / 1e9 == pytest.approx(1.21, abs=0.005)
    assert saved_bytes(GPT2_SMALL, "published", 32, 64, 4) / 1e9 == pytest.approx(24, abs=0.5)
    assert saved_bytes(LLAMA_13B, "published", 1, 72, 2) / 1e9 == pytest.approx(97, abs=0.5)
    assert saved_bytes(LLAMA_13B, "published", 1, 72, 2, checkpointing=True) / 1e9 == pytest.approx(48, abs=0.5)
    # two buffers of 1,640 rows, 121 readers of 40 layers, and what is kept of the corrupted run
    assert saved_bytes(LLAMA_13B, "fast", 1, 72, 2) == (2 * 1_640 + 40 * (121 + 4)) * 72 * 5120 * 2


def test_what_the_planner_is_told():
    one, two = (extra(LLAMA_13B, "fast", batch, 72, 2) for batch in (1, 2))
    assert two.bytes_per_gpu == 2 * one.bytes_per_gpu
    assert one.bytes_per_gpu == saved_bytes(LLAMA_13B, "fast", 1, 72, 2) + read_bytes(LLAMA_13B, "fast", 1, 72, 2)
    assert two.flops_per_example == one.flops_per_example == 72 * mask_flops(LLAMA_13B, "fast").total
    assert one.moved_bytes_per_example < moved_bytes(LLAMA_13B, "published", 1, 72, 2) / 5
    assert one.trained_parameters == 3_872_820 + 1_640
    assert one.gradients_pass_network and one.forwards == 2


@pytest.mark.parametrize(("layers", "heads", "width", "batch", "length"), [(8, 8, 64, 4, 16), (6, 12, 96, 4, 24)])
def test_predicted_memory_is_that_of_the_fast_form(layers, heads, width, batch, length, monkeypatch):
    monkeypatch.setattr(edge_workspace, "SMALL", 10**12)  # every buffer is allocated when it is needed, as on a GPU
    decoder = Decoder(num_layers=layers, num_heads=heads, width=width, num_positions=length)
    source = torch.Generator().manual_seed(0)
    tensors = {s.name: s.init_value + 0.1 * torch.randn(s.shape, generator=source) for s in decoder.parameters(50, 1)}
    network = from_tensors(decoder, tensors, mask_embeddings=True)
    edges = torch.full((1, network.graph.num_edges), 0.9).requires_grad_()
    clean, corrupted = torch.randint(50, (2, 1, batch, length), generator=source)
    corrupted[..., 0] = (clean[..., 0] + 1) % 50  # no shared prefix
    places = torch.full((1, batch, 1), length - 1)
    assert network.folded  # made before what is measured
    with LiveBytes() as live:
        masked_logits(network, edges, None, clean, corrupted, places).square().sum().backward()
    model = TransformersModel(
        architecture="gpt2", num_layers=layers, num_heads=heads, width=width, num_positions=length
    )
    own = Meter(pruning(model, 50, batch, length, 1, 1, "float32"), True).footprint(batch, "float32", True, False)
    graph = Graph(layers, heads, heads, network.graph.embeddings, width)
    predicted = own.saved_bytes + own.workspace_bytes + extra(graph, "fast", batch, length, 4).bytes_per_gpu
    assert live.peak == pytest.approx(predicted, rel=0.15)


@pytest.mark.slow
def test_an_experiment_with_edge_masks_is_planned(tmp_path):
    folder = write_network("llama", tmp_path / "network")
    experiment = Experiment(
        task=RandomPairs(size=53),
        model=EdgeMasked(path=str(folder), mask_embeddings=False),
        objective=EdgePruning(),
        optimizer=AdamW(groups=(ParameterGroup(match="multipliers", ascent=True),)),
        budget=Budget(steps=10, batch_size=8),
    )
    planner = Planner("pruning", experiment)
    assert planner.sizes.total == sum(x.numel() for x in load_file(folder / WEIGHTS).values())
    plan = planner.plan(Machine(find_gpu("a100-80"), 2))
    assert plan.extra.trained_parameters == 162 + 3 * 5
    assert {row.scaling.strategy for row in plan.rows if row.fits} == {"single", "ddp", "fsdp", "deepspeed"}
