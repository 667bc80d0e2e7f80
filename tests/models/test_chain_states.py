"""Where the states of a chain of thought are read, and how rows lose their chain."""

import chain_golden as golden
import pytest
import torch

from groundswell.config import ConfigError
from models.chain_states import extract_states, find_separators, overwrite, state_positions, without_chain
from models.decoder import Decoder

SMALL = Decoder(num_layers=4, num_heads=2, width=8, init_std=0.3)


def places(first, second, *arguments, **options):
    return state_positions(torch.tensor([first]), torch.tensor([second]), *arguments, **options)[0].tolist()


def test_all_recorded_positions():
    seen = 0
    for case in golden.positions_cases():
        given = case["first_sep"], case["second_sep"], case["num_layers"], case["delta"], case["subset"]
        if case["subset"] in ("diagonal", "first_column"):
            assert places(*given, per_row=False) == case["seed_batched"], case
            seen += 1
        if case["seed_one_by_one"] is not None:
            assert places(*given) == case["seed_one_by_one"], case
    assert (seen, len(golden.positions_cases())) == (337, 340)


def test_the_first_rows_step_differs_from_that_of_each_row():
    assert places([5, 9], [12, 40], 4) == [[5, 7, 10, 12], [9, 19, 30, 40]]
    assert places([5, 9], [12, 40], 4, per_row=False) == [[5, 7, 10, 12], [9, 11, 14, 16]]


def test_columns_and_rows():
    assert places([5], [12], 4, "dynamic", "first_column") == [[5] * 4]
    assert places([5], [12], 4, "dynamic", "last_column") == [[12] * 4]
    for subset in ("top_row", "bottom_row"):
        assert places([5], [12], 4, 3, subset) == [[5, 8, 11, 12]]


def test_a_delta_beyond_the_chain_stops_at_its_end():
    assert places([5], [12], 4, 100) == [[5, 12, 12, 12]]


def test_one_layer():
    assert places([5], [12], 1, 3) == [[5]]
    assert places([5], [12], 1, "dynamic", "last_column") == [[12]]


@pytest.mark.parametrize(
    ("layers", "delta", "message"), [(4, -1, "delta -1 is negative"), (1, "dynamic", "delta dynam")]
)
def test_no_such_positions(layers, delta, message):
    with pytest.raises(ConfigError, match=rf"model\.{message}"):
        places([5], [12], layers, delta)


@pytest.mark.parametrize("subset", ["diagonal", "first_column", "last_column", "top_row", "bottom_row"])
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_states_are_those_of_the_whole_pass(subset, num_layers):
    decoder = SMALL.with_overrides({"num_layers": num_layers})
    generator = torch.Generator().manual_seed(0)
    parameters = {
        spec.name: spec.init_value + 0.3 * torch.randn(2, *spec.shape, generator=generator)
        for spec in decoder.parameters(11, 20)
    }
    tokens = torch.randint(11, (2, 3, 20), generator=generator)
    first, second = torch.tensor([[3, 4, 5]] * 2), torch.tensor([[12, 17, 6]] * 2)
    where = state_positions(first, second, num_layers, 4, subset)
    found = extract_states(decoder, parameters, tokens, where, subset)
    whole = decoder.hidden_states(parameters, tokens)[:, :-1]  # [K, L, B, T, d]
    for layer in range(num_layers):
        depth = {"top_row": num_layers - 1, "bottom_row": 0}.get(subset, layer)
        for run in range(2):
            for row in range(3):
                state = whole[run, depth, row, where[run, row, layer]]
                expected = (state - state.mean()) / (state.var(correction=0) + 1e-5).sqrt()
                torch.testing.assert_close(found[run, row, layer], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", golden.CASES)
def test_rows_without_the_chain_are_those_recorded(case):
    hidden, none = golden.hidden_batch(case), golden.none_batch(case)
    separators = find_separators(hidden.tokens, hidden.positions)
    assert torch.equal(separators.first, none.positions[..., 0])
    tokens, positions = without_chain(hidden.tokens, hidden.positions, separators)
    assert tokens.shape[-1] == int(none.positions.max()) + 1
    assert torch.equal(tokens, none.tokens[..., : tokens.shape[-1]])
    counted = none.targets != golden.IGNORE
    assert torch.equal(positions[counted], none.positions[counted])
    assert torch.equal(hidden.targets, none.targets)


def test_a_row_without_a_second_separator():
    tokens = torch.tensor([[[5, 1, 6, 1, 7, 1], [5, 5, 5, 1, 7, 1]]])
    with pytest.raises(ConfigError, match="row 1 of a batch has no second separator"):
        find_separators(tokens, torch.tensor([[[3, 4], [3, 4]]]))


def test_overwrite_changes_one_place_and_no_argument():
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    values, where = torch.randn(2, 3, 4, requires_grad=True), torch.tensor([[0, 2, 4], [1, 1, 3]])
    before = x.detach().clone()
    found = overwrite(x, where, values)
    expected = before.clone()
    for run in range(2):
        for row in range(3):
            expected[run, row, where[run, row]] = values[run, row]
    assert torch.equal(found, expected) and torch.equal(x, before)
    found.sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))
    assert torch.equal(x.grad.sum(2), torch.full((2, 3, 4), 4.0))
