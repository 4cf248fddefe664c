"""Half precision where it is tight: large loss scales, sums over a batch, products beyond float16."""

import pytest
import torch

from ap import activations

INPUTS = [-6e4, -30.0, -20.0, -0.5, -0.1, 0.0, 0.1, 0.5, 20.0, 30.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["swish", "smelu", "gsmelu", "rescu"])
def test_learnable_parameters_get_the_gradients_of_double_precision(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor(INPUTS, dtype=dtype)
    scale = 1e4  # as a gradient scaler would: ten of them, or one times 30, do not fit float16
    module, exact = (activations.create(name, learnable=True) for _ in range(2))
    exact.double()
    z, z_exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, y_exact = module(z), exact(z_exact)
    y.backward(torch.full_like(y, scale))
    y_exact.backward(torch.full_like(y_exact, float(torch.tensor(scale, dtype=dtype))))
    assert y.dtype == z.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), y_exact, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(z.grad.double(), z_exact.grad, rtol=4 * eps, atol=scale * eps)
    for (key, got), (_, want) in zip(module.named_parameters(), exact.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-2, msg=key)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_swish_whose_product_with_beta_is_beyond_float16(requires_grad: bool) -> None:
    x = torch.tensor([6e4, -6e4, 1e-2], dtype=torch.float16, requires_grad=requires_grad)
    for beta in (2.0, 1e-3):
        want = x.detach().double() * torch.sigmoid(beta * x.detach().double())
        torch.testing.assert_close(activations.functional.swish(x, beta).detach().double(), want, rtol=1e-3, atol=1e-6)
