"""Against the recorded original, against Hugging Face, and against itself: pruned or whole, packed or alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from groundswell.config import ConfigError
from groundswell.protocols import IGNORE, Answer, ParameterSpec, Split
from models.decoder import Decoder
from models.layers import dropout
from models.objectives import AnswerLoss

ANSWER = Answer(slice(0, 1))
GOLDEN = Path(__file__).parents[1] / "golden" / "grokking"
TINY = Decoder(num_layers=4, num_heads=4, width=32, num_positions=16)
RECURRENT = TINY.with_overrides({"num_recurrences": 2})
VARIANTS = {
    "plain": TINY,
    "recur": RECURRENT,
    "recur_reembed": RECURRENT.with_overrides({"re_embed": True}),
}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "tiny_gpt2_arrays.npz"))


def golden_weights(name: str) -> dict[str, torch.Tensor]:
    return {key: value.unsqueeze(0) for key, value in load_file(GOLDEN / name).items()}


def random_parameters(
    specs: list[ParameterSpec], seeds: list[int], dtype: torch.dtype = torch.float64, gain: float = 5.0
) -> dict[str, torch.Tensor]:
    """Every tensor random, also those that start at 0 or 1, so that none can be left out unnoticed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return {
        s.name: torch.stack([s.init_value + 0.02 * gain * torch.randn(s.shape, generator=g) for g in generators]).to(
            dtype
        )
        for s in specs
    }


def random_batch(seeds: list[int], batch: int, length: int, vocab_size: int, ignored: bool = False) -> Split:
    """Answers at the last two tokens in even rows, one earlier in odd rows, as in mixed atomic and two-hop data."""
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    tokens = torch.stack([torch.randint(vocab_size, (batch, length), generator=g) for g in generators])
    targets = torch.stack([torch.randint(vocab_size, (batch, 2), generator=g) for g in generators])
    positions = torch.tensor([length - 2, length - 1]) - (torch.arange(batch) % 2).unsqueeze(1)
    if ignored:
        targets[:, ::3, 1] = IGNORE
    return Split(tokens, positions.expand_as(targets).contiguous(), targets)


# ---- the recorded original ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_the_recorded_forward_pass(variant: str, arrays: dict[str, np.ndarray]) -> None:
    decoder, weights = VARIANTS[variant], golden_weights("tiny_gpt2_init.safetensors")
    tokens = torch.tensor(arrays["ids"]).unsqueeze(0)
    logits, states = decoder.logits(weights, tokens)[0], decoder.hidden_states(weights, tokens)[0]
    torch.testing.assert_close(logits, torch.tensor(arrays[f"{variant}.logits"]), atol=1e-4, rtol=0)
    assert states.shape == arrays[f"{variant}.hidden"].shape
    torch.testing.assert_close(states, torch.tensor(arrays[f"{variant}.hidden"]), atol=1e-4, rtol=0)

    batch = shifted(arrays["ids"], arrays["labels"])
    loss, _ = AnswerLoss().loss(decoder, weights, batch, ANSWER, None)
    assert loss.item() == pytest.approx(float(arrays[f"{variant}.loss"]), abs=1e-5)


def shifted(ids: np.ndarray, labels: np.ndarray) -> Split:
    """Labels as the original keeps them (aligned with ids) -> a batch of one run with every position as an answer."""
    tokens, targets = torch.tensor(ids).long(), torch.tensor(labels).long()[:, 1:]
    positions = torch.arange(tokens.shape[1] - 1).expand_as(targets)
    return Split(tokens.unsqueeze(0), positions.unsqueeze(0), targets.unsqueeze(0))


def test_matches_twenty_recorded_training_steps(arrays: dict[str, np.ndarray]) -> None:
    weights = golden_weights("tiny_gpt2_init.safetensors")
    decayed = [spec.name for spec in TINY.parameters(328, 10) if spec.decayed]
    recorded = next(
        g for g in json.loads((GOLDEN / "tiny_gpt2_meta.json").read_text())["optimizer"]["groups"] if g["weight_decay"]
    )
    assert {f"lm.{name}" for name in decayed} == set(recorded["names"])
    for tensor in weights.values():
        tensor.requires_grad_(True)
    groups = [
        {"params": [weights[name] for name in decayed], "weight_decay": 0.1},
        {"params": [weights[name] for name in weights if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(20):
        loss, _ = AnswerLoss().loss(
            TINY, weights, shifted(arrays["train.ids"][step], arrays["train.labels"][step]), ANSWER, None
        )
        optimizer.zero_grad()
        loss.sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = float(arrays["train.lr"][step])
        optimizer.step()
        assert loss.item() == pytest.approx(float(arrays["train.loss"][step]), abs=1e-4)
        assert norm.item() == pytest.approx(float(arrays["train.grad_norm"][step]), abs=1e-3)
    for name, expected in load_file(GOLDEN / "tiny_gpt2_after20.safetensors").items():
        torch.testing.assert_close(weights[name][0].detach(), expected, atol=1e-4, rtol=0)


# ---- against itself ----

SHAPES = [
    pytest.param(Decoder(num_layers=2, num_heads=2, width=16), 4, id="grouped"),
    pytest.param(Decoder(num_layers=2, num_heads=2, width=16), 9, id="one-example-groups"),
    pytest.param(Decoder(num_layers=2, num_heads=2, width=16), 20, id="long"),
    pytest.param(
        Decoder(num_layers=1, num_heads=2, width=16, layer_norm=False, tied_head=False, activation="relu"),
        4,
        id="no-norm",
    ),
    pytest.param(Decoder(num_layers=2, num_heads=2, width=16, num_recurrences=2, re_embed=True), 4, id="looped"),
    pytest.param(
        Decoder(num_layers=1, num_heads=1, width=16, num_recurrences=3, num_positions=32), 5, id="one-layer-loop"
    ),
]


@pytest.mark.parametrize("num_runs", [1, 3])
@pytest.mark.parametrize(("decoder", "length"), SHAPES)
def test_answer_logits_are_the_logits_at_the_answers(decoder: Decoder, length: int, num_runs: int) -> None:
    seeds = list(range(num_runs))
    parameters = random_parameters(decoder.parameters(23, length), seeds)
    for tensor in parameters.values():
        tensor.requires_grad_(True)
    batch = random_batch(seeds, 6, length, 23)
    whole = decoder.logits(parameters, batch.tokens)
    expected = whole.gather(2, batch.positions.unsqueeze(-1).expand(-1, -1, -1, 23))
    got = decoder.answer_logits(parameters, batch.tokens, batch.positions)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)

    weights = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(0))
    names = list(parameters)
    gradients = [torch.autograd.grad((x * weights).sum(), list(parameters.values())) for x in (got, expected)]
    for name, mine, reference in zip(names, *gradients, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize("length", [4, 9, 20])
def test_short_attention_equals_the_plain_formula(length: int) -> None:
    """`logits` and `answer_logits` share the attention function, so it needs an oracle of its own."""
    decoder = Decoder(num_layers=1, num_heads=2, width=8, layer_norm=False)
    p = random_parameters(decoder.parameters(11, length), [0])
    tokens = random_batch([0], 4, length, 11).tokens
    x = p["transformer.wte.weight"][0][tokens[0]] + p["transformer.wpe.weight"][0]
    w = {name.removeprefix("transformer.h.0."): tensor[0] for name, tensor in p.items()}
    q, k, v = (
        (x @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"]).view(4, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
    ).unbind(0)
    later = torch.ones(length, length).triu(1).bool()
    attended = ((q @ k.transpose(-1, -2)) / 2.0).masked_fill(later, -torch.inf).softmax(-1) @ v
    x = x + attended.transpose(1, 2).reshape(4, length, 8) @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]
    hidden = F.gelu(x @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"], approximate="tanh")
    x = x + hidden @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]
    torch.testing.assert_close(
        decoder.logits(p, tokens)[0], x @ p["transformer.wte.weight"][0].T, atol=1e-12, rtol=1e-12
    )


def adam_losses(
    decoder: Decoder, seeds: list[int], dtype: torch.dtype, steps: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A plain Adam, element by element and so blind to packing. Returns losses [steps, K] and the weights."""
    parameters = random_parameters(decoder.parameters(17, 4), seeds, dtype, gain=1.0)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds] if decoder.dropout else None
    losses = []
    for step in range(1, steps + 1):
        leaves = {name: p.detach().requires_grad_(True) for name, p in parameters.items()}
        batch = random_batch([seed + 100 * (step % 4) for seed in seeds], 8, 4, 17, ignored=True)
        loss, _ = AnswerLoss().loss(decoder, leaves, batch, ANSWER, generators)
        loss.sum().backward()
        losses.append(loss.detach())
        with torch.no_grad():
            for name, leaf in leaves.items():
                first, second = moments[name]
                assert leaf.grad is not None
                first.lerp_(leaf.grad, 0.1)
                second.lerp_(leaf.grad**2, 0.01)
                update = (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-6)
                parameters[name] = parameters[name] - 3e-3 * update
    return torch.stack(losses), parameters


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_pack_trains_as_its_members_alone(dtype: torch.dtype, tolerance: float, rate: float) -> None:
    decoder = Decoder(num_layers=2, num_heads=2, width=16, dropout=rate)
    packed, weights = adam_losses(decoder, [3, 4, 5], dtype, 30)
    for index, seed in enumerate([3, 4, 5]):
        alone, own = adam_losses(decoder, [seed], dtype, 30)
        torch.testing.assert_close(packed[:, index], alone[:, 0], atol=tolerance, rtol=tolerance)
        if dtype == torch.float64:
            for name in own:
                torch.testing.assert_close(weights[name][index], own[name][0], atol=1e-10, rtol=0, msg=name)
    assert packed[-1].mean() < packed[0].mean() - 0.1


# ---- dropout ----


def test_dropout_masks_of_a_pack_are_those_of_its_members() -> None:
    ones = torch.ones(3, 50, 7)
    packed = dropout(ones, 0.3, [torch.Generator().manual_seed(seed) for seed in range(3)])
    for seed in range(3):
        alone = dropout(ones[:1], 0.3, [torch.Generator().manual_seed(seed)])
        assert torch.equal(packed[seed], alone[0])
    assert not torch.equal(packed[0], packed[1])
    assert packed.unique().tolist() == [0.0, pytest.approx(1 / 0.7, rel=1e-4)]
    assert 0.25 < (packed == 0).float().mean() < 0.35


@pytest.mark.parametrize("length", [4, 20])
def test_dropout_acts_on_embeddings_attention_and_branches(length: int) -> None:
    """GPT-2's four places: the embedding draws alone, a block's three masks are drawn together."""
    decoder = Decoder(num_layers=2, num_heads=2, width=8, dropout=0.5)
    parameters = random_parameters(decoder.parameters(13, length), [0])
    batch = random_batch([0], 4, length, 13)
    generator = torch.Generator().manual_seed(0)
    noisy = decoder.answer_logits(parameters, batch.tokens, batch.positions, [generator])
    assert not torch.allclose(noisy, decoder.answer_logits(parameters, batch.tokens, batch.positions))

    reference = torch.Generator().manual_seed(0)
    full, pruned = 4 * length * 8, 4 * 2 * 8
    sizes = [full, 4 * 2 * length * length + 2 * full, 4 * 2 * 2 * length + 2 * pruned]
    for size in sizes:
        torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None, generator=reference)  # 16 bits each
    assert torch.equal(generator.get_state(), reference.get_state())


def test_generators_without_dropout_change_nothing() -> None:
    decoder = Decoder(num_layers=1, num_heads=2, width=8)
    parameters, batch = random_parameters(decoder.parameters(13, 4), [0]), random_batch([0], 4, 4, 13)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    noisy = decoder.answer_logits(parameters, batch.tokens, batch.positions, [generator])
    assert torch.equal(noisy, decoder.answer_logits(parameters, batch.tokens, batch.positions))
    assert torch.equal(before, generator.get_state())


# ---- parameters and mistakes ----


def test_parameter_specs() -> None:
    specs = Decoder(num_layers=2, num_heads=2, width=8, tied_head=False, init_scale=3.0, num_recurrences=2).parameters(
        11, 5
    )
    by_name = {spec.name: spec for spec in specs}
    assert [spec.decayed for spec in specs] == sorted((spec.decayed for spec in specs), reverse=True)
    assert by_name["transformer.wpe.weight"].shape == (5, 8)
    assert by_name["transformer.h.1.mlp.c_fc.weight"].shape == (8, 32)
    assert by_name["transformer.h.1.attn.c_attn.weight"].init_std == pytest.approx(0.06)
    assert by_name["transformer.h.1.mlp.c_proj.weight"].init_std == pytest.approx(0.03)  # / sqrt(2 * 2 physical layers)
    assert by_name["transformer.ln_f.weight"].init_value == 1.0 and not by_name["transformer.ln_f.weight"].decayed
    assert {name for name, spec in by_name.items() if not spec.decayed} == {
        name for name in by_name if name.endswith(".bias") or ".ln_" in name
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 64, "num_heads": 5}, "num_heads:? 5 does not divide width 64; choose one of 1, 2, 4"),
        ({"width": 0}, "width: Input should be greater than 0"),
        ({"dropout": 1.0}, "dropout: Input should be less than 1"),
        ({"num_recurrences": 0}, "num_recurrences: Input should be greater than 0"),
        ({"activation": "swish"}, "activation"),
    ],
)
def test_wrong_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoder.from_dict(fields)


def test_too_few_positions_are_refused() -> None:
    class Long:
        max_length = 7

    Decoder(num_positions=7).check(Long())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"num_positions 5 is less than the task's 7 tokens; set model\.num_positions=7"
    ):
        Decoder(num_positions=5).check(Long())  # type: ignore[arg-type]


def test_flops_count_the_matrix_products_that_run() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for decoder in (Decoder(num_layers=3, num_heads=2, width=16), VARIANTS["recur_reembed"]):
        parameters, batch = random_parameters(decoder.parameters(23, 9), [0]), random_batch([0], 2, 9, 23)
        with FlopCounterMode(display=False) as counter:  # 9 tokens: examples are not attended in groups
            decoder.answer_logits(parameters, batch.tokens, batch.positions, None)
        assert decoder.flops_per_example(23, 9, 2) == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)
