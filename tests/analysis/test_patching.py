"""Batched patching against one patch at a time with the whole network, and identities that hold for any network."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from analysis.causal_tracing import Effect, find_target, summarise, trace
from analysis.logit_lens import lens_ranks
from analysis.patching import read_tokens
from models import cached
from models.decoder import Decoder
from tasks.tracing import Reading, Role, TracingExamples

VOCAB = 19
MODELS = {
    "plain": Decoder(num_layers=3, num_heads=2, width=8),
    "shared": Decoder(num_layers=2, num_heads=2, width=8, num_recurrences=2),
    "re_embed": Decoder(num_layers=2, num_heads=4, width=8, num_recurrences=2, re_embed=True),
    "rotary": Decoder(num_layers=2, num_heads=1, width=8, position_encoding="rotary", rotary_dim=4, tied_head=False),
    "no norm": Decoder(num_layers=2, num_heads=2, width=8, layer_norm=False, position_encoding="null"),
    "one layer": Decoder(num_layers=1, num_heads=2, width=8),
}


def parameters_of(model: Decoder, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    specs = model.parameters(VOCAB, length)
    return {s.name: torch.randn(1, *s.shape, generator=generator, dtype=torch.float64) * 0.5 for s in specs}


def examples_of(length: int, count: int, spans: list[tuple[int, int]], seed: int) -> TracingExamples:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(VOCAB, (count, length), generator=generator)
    roles = {}
    for start, stop in spans:
        other = prompts[:, :stop].clone()
        other[:, start] = torch.randint(VOCAB, (count,), generator=generator)
        roles[f"{start}-{stop}"] = Role(start, stop, other, [np.arange(3)] * count)
    readings = {
        f"r{place}": Reading(place, torch.randint(VOCAB, (count,), generator=generator)) for place in range(length)
    }
    answers = torch.randint(VOCAB, (count,), generator=generator)
    names = tuple(f"p{place}" for place in range(length))
    return TracingExamples(prompts, answers, torch.arange(count), names, readings, roles)


def block_with(model: Decoder, parameters, layer: int, x: Tensor, role: Role, part: str, other: Tensor, head: int):
    """One plain block on one example, with a head's or the MLP's output replaced by that on `other`."""
    name = f"transformer.h.{layer % model.num_layers}."

    def pieces(x: Tensor) -> tuple[Tensor, Tensor]:
        _, _, mixed = cached.extend(model, parameters, layer, x, None)
        middle = x + model.attention_branch(parameters, layer, mixed.flatten(0, 2)).view_as(x)
        return mixed, model.mlp_branch(parameters, layer, middle.flatten(0, 2)).view_as(x)

    assert name + "attn.c_proj.weight" in parameters
    mixed, mlp = pieces(x)
    mixed_other, mlp_other = pieces(other)
    span = slice(role.start, role.stop)
    if part == "heads":
        size = model.width // model.num_heads
        mixed[:, :, span, head * size : (head + 1) * size] = mixed_other[:, :, span, head * size : (head + 1) * size]
    middle = x + model.attention_branch(parameters, layer, mixed.flatten(0, 2)).view_as(x)
    if part == "heads":
        return middle + model.mlp_branch(parameters, layer, middle.flatten(0, 2)).view_as(x)
    mlp[:, :, span] = mlp_other[:, :, span]
    return middle + mlp


def one_patch(
    model: Decoder, parameters, prompt: Tensor, role: Role, row: int, part: str, layer: int, head: int, until: int
) -> Tensor:
    """State `until` [T, d] of one example with one patch, by the plain blocks over all positions."""
    whole = prompt.clone()
    whole[: role.stop] = role.prompts[row]  # later tokens cannot matter: they come after the replaced positions
    other = model.embed(parameters, whole.view(1, 1, -1))
    x = model.embed(parameters, prompt.view(1, 1, -1))
    for block in range(until):
        x, other = model.before_block(parameters, block, x), model.before_block(parameters, block, other)
        if part == "states" and block == layer:
            x = x.clone()
            x[:, :, role.start : role.stop] = other[:, :, role.start : role.stop]
        if part != "states" and block == layer - 1:
            x = block_with(model, parameters, block, x, role, part, other, head)
        else:
            x = model.block(parameters, block, x)
        other = model.block(parameters, block, other)
    if until < model.num_effective_layers:
        x = model.before_block(parameters, until, x)
    return x[0, 0]


def assert_as_one_by_one(name: str, part: str, length: int, spans: list[tuple[int, int]], targets: list[str]) -> None:
    model = MODELS[name]
    parameters, examples = parameters_of(model, length, 0), examples_of(length, 4, spans, 1)
    normal = cached.forward(model, parameters, examples.prompts[None])
    by_name = {t: find_target(t, model, parameters, examples, normal) for t in targets}
    seen = set()
    for effect in trace(model, parameters, examples, targets, [part]):
        aim, role = by_name[effect.target], examples.roles[effect.role]
        assert effect.ranks.shape == (aim.layer - (part == "states"), model.num_heads if part == "heads" else 1, 4)
        for index in np.ndindex(effect.ranks.shape):
            layer, head, row = int(index[0]) + 1, int(index[1]), int(index[2])
            states = one_patch(model, parameters, examples.prompts[row], role, row, part, layer, head, aim.layer)
            rank, best = read_tokens(model, parameters, states[aim.position].view(1, 1, -1), aim.tokens[row : row + 1])
            assert effect.ranks[index] == int(rank), (effect.target, effect.role, index)
            assert effect.changed[index] == (int(best) != int(aim.best[row]))
            seen.add(int(rank))
    assert len(seen) > 3  # not all alike


SPANS = [(0, 1), (1, 2), (1, 3), (3, 4), (0, 4)]


@pytest.mark.parametrize("part", ["states", "heads", "mlps"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "one layer"])
def test_batched_patches_equal_one_at_a_time(name: str, part: str) -> None:
    assert_as_one_by_one(name, part, 4, SPANS, ["answer", "r1@2", "r3@2", "S[2,p2]"])


def test_long_prompts_take_the_other_attention_kernel() -> None:
    assert_as_one_by_one("plain", "states", 20, [(2, 3), (17, 19)], ["answer", "S[2,p18]"])


def test_one_layer_has_heads_but_no_state_between() -> None:
    model = MODELS["one layer"]
    parameters, examples = parameters_of(model, 3, 0), examples_of(3, 4, [(2, 3)], 1)
    states, heads = trace(model, parameters, examples, parts=["states", "heads"])
    assert states.ranks.shape == (0, 1, 4) and heads.ranks.shape == (1, 2, 4)


# ---- identities ----

shapes = st.tuples(st.sampled_from(sorted(MODELS)), st.integers(2, 6), st.integers(0, 1000))


@settings(max_examples=40)
@given(shapes, st.sampled_from(["states", "heads", "mlps"]), st.data())
def test_patching_with_itself_changes_nothing(shape, part, data) -> None:
    name, length, seed = shape
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    model, examples = MODELS[name], examples_of(length, 3, [(start, stop)], seed)
    ((label, role),) = examples.roles.items()
    examples = replace(examples, roles={label: replace(role, prompts=examples.prompts[:, :stop])})
    for effect in trace(model, parameters_of(model, length, seed), examples, ["answer", f"S[1,p{start}]"], [part]):
        assert (effect.ranks == effect.before).all()
        assert not effect.changed.any()


@settings(max_examples=40)
@given(shapes)
def test_patching_everything_is_the_counterfactual_run(shape) -> None:
    name, length, seed = shape
    model, examples = MODELS[name], examples_of(length, 3, [(0, length)], seed)
    parameters = parameters_of(model, length, seed)
    (role,) = examples.roles.values()
    logits = model.logits(parameters, role.prompts[None])[0, :, -1]
    expected = (logits > logits.gather(1, examples.answers[:, None])).sum(1)
    (effect,) = trace(model, parameters, examples)
    assert effect.ranks.shape == (model.num_effective_layers - 1, 1, 3)
    assert (effect.ranks == expected.numpy()).all()


@settings(max_examples=40)
@given(shapes)
def test_lens_after_the_last_layer_is_the_own_ranking(shape) -> None:
    name, length, seed = shape
    model, examples = MODELS[name], examples_of(length, 5, [], seed)
    parameters = parameters_of(model, length, seed)
    ranks = lens_ranks(model, parameters, examples)
    assert ranks.shape == (length + 1, model.num_effective_layers + 1, length, 5)
    order = model.logits(parameters, examples.prompts[None])[0].sort(dim=-1, descending=True, stable=True).indices
    for index, tokens in enumerate([*(r.tokens for r in examples.readings.values()), examples.answers]):
        own = (order == tokens[:, None, None]).int().argmax(-1)
        assert (ranks[index, -1] == own.T.numpy()).all()


def test_ties_go_to_the_lower_id() -> None:
    model = MODELS["no norm"]
    parameters = {name: torch.zeros_like(x) for name, x in parameters_of(model, 3, 0).items()}
    ranks, best = read_tokens(model, parameters, torch.ones(2, 3, 8, dtype=torch.float64), torch.tensor([0, 4, 18]))
    assert ranks.tolist() == [[0, 4, 18]] * 2 and best.tolist() == [[0, 0, 0]] * 2


# ---- what is reported ----


def test_strength_counts_only_what_was_right_before() -> None:
    examples = examples_of(3, 4, [(0, 1)], 0)
    ((label, role),) = examples.roles.items()
    candidates = [np.arange(2), np.arange(2), np.arange(2), np.arange(0)]
    examples = replace(examples, roles={label: replace(role, candidates=candidates)})
    before, after = np.array([0, 0, 5, 0]), np.array([[[0, 2, 7, 9]]])
    row = summarise([Effect("answer", "states", label, before, after, after > 2)], examples).iloc[0]
    assert (row["n"], row["n_correct"], row["skipped"]) == (3, 2, 1)
    assert row["altered"] == pytest.approx(2 / 3) and row["strength"] == 0.5 and row["changed"] == pytest.approx(1 / 3)
    assert row["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 8) / 3)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nobody", r"'nobody' is no state to look at; there are r0, r1, r2, answer, S\[<layer>,p0\]"),
        ("r1@9", "needs a layer from 1 to 3"),
        ("S[2,p7]", "no state to look at"),
    ],
)
def test_unknown_targets_are_named(target: str, message: str) -> None:
    model, examples = MODELS["plain"], examples_of(3, 2, [(0, 1)], 0)
    with pytest.raises(ValueError, match=message):
        trace(model, parameters_of(model, 3, 0), examples, [target])
