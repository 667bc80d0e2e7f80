"""The fast masked pass and its hand-written way back, against the plain form and against recorded cases."""

import itertools

import pytest
import torch
from edge_golden import arrays, vectors, write_network
from edge_networks import VARIANTS, inputs, network

from models import edge_fast, edge_reference
from models.edge_loading import load_edge_network

CASES = [  # (family, tag, case) with recorded logits and masks of 0 and 1
    (family, *key.split("/")[:2])
    for family in ("gpt2", "llama")
    for key in arrays(f"{family}_tiny_cases")
    if key.endswith("/logits") and key.split("/")[1].startswith(("all", "keep", "none"))
]
BOOLEANS = (True, False)


def outcome(form, parts, masks, *arguments):
    """Logits and gradients of both masks, for one fixed weighting of the logits."""
    edges, nodes = (mask.clone().requires_grad_() for mask in masks)
    logits = form.masked_logits(parts, edges, nodes, *arguments)
    factors = torch.arange(logits.numel(), dtype=logits.dtype).sin().view_as(logits)
    (logits * factors).sum().backward()
    return logits.detach(), edges.grad, nodes.grad


def random_masks(parts, num_runs):
    generator = torch.Generator().manual_seed(3)
    sizes = parts.graph.num_edges, parts.graph.num_writers
    return [torch.rand(num_runs, size, generator=generator, dtype=torch.float64) for size in sizes]


def agree(parts, num_runs, copies, zero, prefix):
    clean, corrupted, positions = inputs(copies, prefix)
    arguments = clean, None if zero else corrupted, positions
    masks = random_masks(parts, num_runs)
    found, expected = (outcome(form, parts, masks, *arguments) for form in (edge_fast, edge_reference))
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-8 * float(plain.abs().max()) + 1e-10, rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mask_embeddings", BOOLEANS)
def test_equals_the_plain_form(variant, mask_embeddings):
    parts = network(variant, mask_embeddings)
    for (num_runs, copies), zero, prefix in itertools.product([(1, 1), (3, 1), (3, 3)], BOOLEANS, (0, 3)):
        agree(parts, num_runs, copies, zero, prefix)


@pytest.mark.parametrize("mask_embeddings", BOOLEANS)
def test_grouped_heads(mask_embeddings, tmp_path):
    parts = load_edge_network(write_network("llama", tmp_path), mask_embeddings, dtype=torch.float64)
    for num_runs, zero, prefix in itertools.product((1, 2), BOOLEANS, (0, 3)):
        agree(parts, num_runs, 1, zero, prefix)


@pytest.mark.parametrize(("family", "tag", "case"), CASES)
def test_recorded_cases(family, tag, case, tmp_path):
    name, recorded = f"{family}_tiny_cases", arrays(f"{family}_tiny_cases")
    prefix = f"{tag}/{case}/"
    parts = load_edge_network(write_network(family, tmp_path), tag == "emb")
    edges, nodes = vectors(name, f"{prefix}mask/", parts.graph)
    clean, corrupted = (recorded[ids].long()[None] for ids in ("input_ids", "corr_input_ids"))
    positions = torch.arange(clean.shape[-1]).expand_as(clean)
    for other, key in ((corrupted, "logits"), (None, "logits_zero_ablation")):
        if prefix + key in recorded:
            logits = edge_fast.masked_logits(parts, edges[None], nodes[None], clean, other, positions)[0]
            torch.testing.assert_close(logits, recorded[prefix + key], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("zero", BOOLEANS)
def test_finite_differences(zero):
    parts = network("gpt2", True)
    clean, corrupted, positions = inputs(1, prefix=2)
    arguments = clean, None if zero else corrupted, positions
    masks = random_masks(parts, 1)
    ways = [torch.randn(mask.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64) for mask in masks]
    _, *gradients = outcome(edge_fast, parts, masks, *arguments)
    slope = sum((gradient * way).sum() for gradient, way in zip(gradients, ways, strict=True))
    ends = []
    for step in (1e-5, -1e-5):
        moved = [mask + step * way for mask, way in zip(masks, ways, strict=True)]
        logits = edge_fast.masked_logits(parts, *moved, *arguments)
        ends.append((logits * torch.arange(logits.numel(), dtype=logits.dtype).sin().view_as(logits)).sum())
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-6)


def test_the_way_back_can_be_walked_once():
    parts = network("gpt2", True)
    edges, nodes = random_masks(parts, 1)
    total = edge_fast.masked_logits(parts, edges.requires_grad_(), nodes, *inputs(1)).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run it again"):
        total.backward()


def test_padding_after_the_last_answer_changes_nothing():
    parts, masks = network("gpt2", True), random_masks(network("gpt2", True), 1)
    clean, corrupted, positions = inputs(1)
    expected = edge_fast.masked_logits(parts, *masks, clean, corrupted, positions)
    other = clean.clone()
    other[..., int(positions.max()) + 1 :] = 0
    assert torch.equal(edge_fast.masked_logits(parts, *masks, other, corrupted, positions), expected)


def test_equal_inputs_give_the_whole_network():
    parts = network("gpt2", True)
    clean, _, positions = inputs(1)
    logits = edge_fast.masked_logits(parts, *random_masks(parts, 1), clean, clean, positions)[0]
    torch.testing.assert_close(logits, parts.run(clean[0], positions[0]).logits)


def test_steps_that_overlap_do_not_share_buffers():
    parts = network("gpt2", True)
    masks, (clean, corrupted, positions) = random_masks(parts, 1), inputs(1)
    expected = outcome(edge_fast, parts, masks, clean, corrupted, positions)[1]
    edges = masks[0].clone().requires_grad_()
    first = edge_fast.masked_logits(parts, edges, masks[1], clean, corrupted, positions)
    second = edge_fast.masked_logits(parts, edges, masks[1], corrupted, clean, positions)
    factors = torch.arange(first.numel(), dtype=first.dtype).sin().view_as(first)
    (gradient,) = torch.autograd.grad((first * factors).sum(), edges)
    torch.testing.assert_close(gradient, expected)
    assert second.requires_grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_buffers_that_are_used_again(variant, monkeypatch):
    monkeypatch.setattr("models.edge_workspace.SMALL", 1)
    parts = network(variant, True)
    for num_runs, zero in itertools.product((1, 3), BOOLEANS):
        for _ in range(2):
            agree(parts, num_runs, 1, zero, 3)
            with torch.no_grad():
                edge_fast.masked_logits(parts, *random_masks(parts, 1), *inputs(1))


def test_nothing_is_kept_without_gradients():
    parts = network("gpt2", True)
    with torch.no_grad():
        logits = edge_fast.masked_logits(parts, *random_masks(parts, 1), *inputs(1))
    assert logits.grad_fn is None


def test_masks_in_float32_on_a_network_of_bfloat16(tmp_path):
    folder = write_network("llama", tmp_path)
    parts = load_edge_network(folder, dtype=torch.bfloat16)
    clean, corrupted, positions = inputs(1)
    edges = torch.full((1, parts.graph.num_edges), 0.9).requires_grad_()
    logits = edge_fast.masked_logits(parts, edges, None, clean, corrupted, positions)
    logits.float().square().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert edges.grad.dtype == torch.float32
    exact = load_edge_network(folder)
    expected = edge_fast.masked_logits(exact, edges, None, clean, corrupted, positions)
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.1)
