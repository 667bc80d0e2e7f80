import pytest
import torch

from models.hard_concrete import deterministic, probability_of_zero, sample, uniform_noise
from tests.models.edge_golden import arrays

VARIANTS = {"l0": 1e-6, "l0_fllama": 1e-8}
NUMBERS = sorted({key.split("/")[1] for key in arrays("l0")})


@pytest.fixture(params=[(variant, number) for variant in VARIANTS for number in NUMBERS], ids="/".join)
def recorded(request):
    variant, number = request.param
    prefix = f"{variant}/{number}/"
    return {k[len(prefix) :]: v for k, v in arrays("l0").items() if k.startswith(prefix)}, VARIANTS[variant]


def close(found, expected, atol=2e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


def test_a_sample_and_its_gradient_are_the_published_ones(recorded):
    values, _ = recorded
    log_alpha = values["log_alpha"].clone().requires_grad_()
    masks = sample(log_alpha, values["u"])
    masks.sum().backward()
    close(masks, values["sample_z"])
    close(log_alpha.grad, values["sample_grad"], atol=1e-6)


def test_the_probability_of_zero_is_the_published_one(recorded):
    values, eps = recorded
    close(probability_of_zero(values["log_alpha"], eps), values["cdf0"], atol=1e-7)


def test_deterministic_masks_are_the_published_ones(recorded):
    values, eps = recorded
    shape = values["log_alpha"].shape
    for key, apply_one in (("det_z", False), ("det_z_apply_one", True)):
        found = deterministic(values["log_alpha"].flatten(), eps, apply_one).view(shape)  # zeros of the whole tensor
        close(found, values[key])
        assert torch.equal(found == 0, values[key] == 0)


def test_log_alphas_far_from_zero_give_whole_masks():
    noise = uniform_noise(1000, torch.Generator().manual_seed(0))
    assert (sample(torch.full((1000,), 20.0), noise) == 1).all()
    assert (sample(torch.full((1000,), -20.0), noise) == 0).all()
    assert (deterministic(torch.full((1000,), -10.0)) == 0).all()


def test_as_many_samples_are_zero_as_the_probability_says():
    log_alpha = torch.full((20_000,), 0.0)
    noise = uniform_noise(20_000, torch.Generator().manual_seed(0))
    share = (sample(log_alpha, noise) == 0).float().mean()
    assert abs(share - probability_of_zero(log_alpha).mean()) < 0.01


def test_each_row_has_zeros_of_its_own():
    log_alpha = torch.stack([torch.full((100,), 10.0), torch.linspace(-6, 0, 100)])
    masks = deterministic(log_alpha)
    assert (masks[0] > 0).all()
    assert torch.equal(masks[1], deterministic(log_alpha[1]))
    assert 0 < (masks[1] == 0).sum() < 100


def test_noise_depends_on_its_generator_alone():
    first, again = (uniform_noise(50, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.min() >= 1e-6
    assert first.max() <= 1 - 1e-6
