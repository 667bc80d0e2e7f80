"""Hand-written gradients against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from models.layers import gelu_tanh


def test_gelu_and_its_gradient():
    x = torch.randn(200, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gelu_tanh, (x,))
    torch.testing.assert_close(gelu_tanh(x), F.gelu(x, approximate="tanh"), rtol=0, atol=1e-14)


@pytest.mark.parametrize("value", [0.0, -40.0, 40.0, -1e4, 1e4])
def test_gelu_far_out(value):
    x = torch.tensor([value], requires_grad=True)
    y = gelu_tanh(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.item() == F.gelu(torch.tensor(value), approximate="tanh").item()
    assert grad.item() == {0.0: 0.5}.get(value, float(value > 0))
