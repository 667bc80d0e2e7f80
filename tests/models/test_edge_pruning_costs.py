"""Against counts made by hand in the published code, and sizes of real edge graphs."""

import pytest

from models.edge_pruning_costs import Graph, buffer_bytes, extra, mask_flops, moved_bytes, read_bytes, saved_bytes

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
    assert saved_bytes(LLAMA_13B, "fast", 1, 72, 2) == 3 * buffer_bytes(LLAMA_13B, 1, 72, 2)


def test_what_the_planner_is_told():
    one, two = (extra(LLAMA_13B, "fast", batch, 72, 2) for batch in (1, 2))
    assert two.bytes_per_gpu == 2 * one.bytes_per_gpu
    assert one.bytes_per_gpu == saved_bytes(LLAMA_13B, "fast", 1, 72, 2) + read_bytes(LLAMA_13B, 1, 72, 2)
    assert two.flops_per_example == one.flops_per_example == 72 * mask_flops(LLAMA_13B, "fast").total
    assert one.moved_bytes_per_example < moved_bytes(LLAMA_13B, "published", 1, 72, 2) / 5
    assert one.trained_parameters == 3_872_820 + 1_640
    assert one.gradients_pass_network and one.forwards == 2
