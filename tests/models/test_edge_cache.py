"""What the whole network does on an example: the same alone or in any batch, kept or not."""

import itertools

import pytest
import torch
from edge_golden import write_network
from edge_networks import VARIANTS, VOCAB_SIZE, inputs, network

from models.edge_cache import ReferenceCache
from models.edge_fast import masked_logits
from models.edge_loading import load_edge_network
from models.edge_masked import EdgeMasked

PLENTY = 10**9


def outcome(parts, num_runs, tokens, source=None):
    generator = torch.Generator().manual_seed(3)
    edges = torch.rand(num_runs, parts.graph.num_edges, generator=generator, dtype=torch.float64).requires_grad_()
    logits = masked_logits(parts, edges, None, *tokens, source=source)
    (logits * torch.arange(logits.numel(), dtype=logits.dtype).sin().view_as(logits)).sum().backward()
    return logits.detach(), edges.grad


def agrees(parts, num_runs, copies, prefix):
    tokens = inputs(copies, prefix)
    expected = outcome(parts, num_runs, tokens)
    cache = ReferenceCache(parts.folded)
    for _ in range(2):  # computed, then kept
        found = outcome(parts, num_runs, tokens, cache.given(num_runs, *tokens, PLENTY))
        torch.testing.assert_close(found, expected)
        logits = cache.logits(*tokens, PLENTY)
        for own, plain in zip(logits, map(parts.run, tokens[0], tokens[2]), strict=True):
            torch.testing.assert_close(own, plain.logits)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mask_embeddings", [True, False])
def test_equals_what_is_computed_at_every_visit(variant, mask_embeddings):
    parts = network(variant, mask_embeddings)
    for (num_runs, copies), prefix in itertools.product([(1, 1), (3, 1), (3, 3)], (0, 3)):
        agrees(parts, num_runs, copies, prefix)


def test_grouped_heads(tmp_path):
    parts = load_edge_network(write_network("llama", tmp_path), dtype=torch.float64)
    agrees(parts, 2, 1, 3)


def test_zero_ablation_keeps_logits():
    parts = network("gpt2", True)
    clean, corrupted, positions = inputs(1)
    cache = ReferenceCache(parts.folded)
    expected = parts.run(clean[0], positions[0]).logits[None]
    torch.testing.assert_close(cache.logits(clean, None, positions, PLENTY), expected)
    assert cache.num_bytes == expected.nbytes
    torch.testing.assert_close(cache.logits(clean, corrupted, positions, PLENTY), expected)  # others than those kept


def test_examples_are_the_same_to_the_bit_in_any_batch():
    parts = load_float32()
    clean, corrupted, positions = inputs(1, prefix=2, batch=5)
    whole = ReferenceCache(parts.folded).logits(clean, corrupted, positions, PLENTY)
    for order in ([4, 0], [2], [3, 2, 1, 4]):
        rows = [x[:, order] for x in (clean, corrupted, positions)]
        assert torch.equal(ReferenceCache(parts.folded).logits(*rows, PLENTY), whole[:, order])
        one, other = (ReferenceCache(parts.folded) for _ in range(2))
        one.given(1, clean, corrupted, positions, PLENTY)
        found, again = (cache.given(1, *rows, PLENTY).corrupted for cache in (one, other))
        for name in ("residual", "attention", "mlp", "mixed"):
            for x, y in zip(getattr(found, name), getattr(again, name), strict=True):
                assert torch.equal(x, y)


def load_float32():
    from edge_networks import decoder, weights

    from models import edge_gpt2

    model = decoder("gpt2")
    return edge_gpt2.from_tensors(model, weights(model, torch.float32), mask_embeddings=True)


def test_budget(monkeypatch):
    parts = network("gpt2", True)
    tokens = inputs(1, batch=6)
    full = ReferenceCache(parts.folded)
    full.given(1, *tokens, PLENTY)
    cache, budget = ReferenceCache(parts.folded), full.num_bytes // 2
    computed = []
    compute = ReferenceCache._compute
    monkeypatch.setattr(ReferenceCache, "_compute", lambda *own: computed.append(1) or compute(*own))
    for _ in range(2):
        cache.logits(*tokens, budget)
        cache.given(1, *tokens, budget)  # what has no room is not computed twice in a step
    assert full.num_bytes // 4 < cache.num_bytes <= budget
    assert len(computed) == 6
    cache.logits(*(x[:, :1] for x in tokens), budget)
    cache.logits(*tokens, budget)
    assert 6 < len(computed) < 12


def test_only_training_fills_the_cache(tmp_path):
    model = EdgeMasked(path=str(write_network("gpt2", tmp_path)))
    plain = EdgeMasked(path=model.path, cache_megabytes=0)
    parts = model.frozen("cpu")
    tokens = torch.randint(VOCAB_SIZE, (1, 4, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([5, 3, 4, 5]).view(1, 4, 1)
    masks = torch.rand(1, parts.graph.num_edges), torch.rand(1, parts.graph.num_writers)
    with torch.no_grad():
        expected = model.whole_logits(tokens, positions), model.masked_logits(*masks, tokens, positions)
    plain.whole_logits(tokens, positions)
    plain.masked_logits(*masks, tokens, positions)
    assert not parts.references.num_bytes
    for _ in range(2):
        found = model.whole_logits(tokens, positions), model.masked_logits(*masks, tokens, positions)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert parts.references.num_bytes
