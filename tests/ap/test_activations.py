"""Values, slopes and limits of the activations against slow double-precision references and closed identities."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ap import activations
from ap.activations import functional as f
from ap.activations import ranges

X = torch.linspace(-4, 4, 161, dtype=torch.float64)
INF = math.inf
OURS = ["smelu", "gsmelu", "rescu", "helu", "swish", "gcu", "relu_squared", "star_relu", "prelu"]
# Not names(): other packages may have registered more by now.
BUILT_IN = sorted(set(OURS) | {spec.name for spec in ranges.MODULES.values()})
# torch's own kernels give NaN here, where x * 0 appears at -inf or inf / inf at the ends.
NAN_AT_INF = {"gelu", "silu", "mish", "hardswish", "softsign", "gcu"}
SURROGATE = {"helu"}


def numeric_slope(function, x: Tensor, step: float = 1e-5) -> Tensor:
    return (function(x + step) - function(x - step)) / (2 * step)


def gradient(function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(x).sum(), x)
    return grad


def box_average_of_relu(x: float, beta: float, points: int = 20_001) -> float:
    """ReLU convolved with a box of half-width beta, by the midpoint rule: an independent definition of SmeLU."""
    offsets = [(2 * i + 1 - points) / points * beta for i in range(points)]
    return sum(max(0.0, x + offset) for offset in offsets) / points


def test_every_name_is_created_without_arguments_and_keeps_shape_and_dtype():
    assert set(BUILT_IN) <= set(activations.names())
    for name in BUILT_IN:
        y = activations.create(name).eval()(torch.randn(2, 3, 4))
        assert y.shape == (2, 3, 4), name
        assert y.dtype == torch.float32, name


def test_every_registered_name_has_a_functional_form():
    for name in BUILT_IN:
        assert callable(getattr(f, name)), name


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"rrelu", "threshold"}))
def test_module_and_functional_form_agree(name):
    function = getattr(f, name)
    x = torch.randn(50)
    expected = function(x, torch.tensor([0.25])) if name == "prelu" else function(x)
    torch.testing.assert_close(activations.create(name)(x), expected)


def test_unknown_name_lists_close_ones_and_bad_parameters_say_what_is_taken():
    with pytest.raises(ValueError, match="smelu"):
        activations.create("smellu")
    with pytest.raises(ValueError, match="it takes: beta"):
        activations.create("swish", gamma=1)
    with pytest.raises(ValueError, match="alpha must be 0 or more"):
        activations.create("helu", alpha=-1.0)
    with pytest.raises(ValueError, match="alpha must be 0 or more"):
        f.helu(torch.zeros(1), float("nan"))
    with pytest.raises(ValueError, match="beta must be 0 or more"):
        activations.create("smelu", beta=-0.5)
    with pytest.raises(ValueError, match="start above 0"):
        activations.create("smelu", beta=0.0, learnable=True)
    with pytest.raises(ValueError, match="together"):
        f.rescu(torch.zeros(1), cdf=lambda tau: tau)


# --- values worked out by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "x", "value", "slope"),
    [
        (lambda x: f.smelu(x, 0.5), -0.5, 0.0, 0.0),
        (lambda x: f.smelu(x, 0.5), 0.0, 0.125, 0.5),
        (lambda x: f.smelu(x, 0.5), 0.25, 0.28125, 0.75),
        (lambda x: f.smelu(x, 0.5), 0.5, 0.5, 1.0),
        (lambda x: f.smelu(x, 2.0), 1.0, 1.125, 0.75),
        # alpha 1, beta 3, slopes 0.5 and 2, t = 7: at x = 1, tau = 1/2: 7 + .5*2 + 1.5*4/8
        (lambda x: f.gsmelu(x, 1.0, 3.0, 0.5, 2.0, 7.0), 1.0, 8.75, 1.25),
        (lambda x: f.gsmelu(x, 1.0, 3.0, 0.5, 2.0, 7.0), -1.0, 7.0, 0.5),
        (lambda x: f.gsmelu(x, 1.0, 3.0, 0.5, 2.0, 7.0), -3.0, 6.0, 0.5),
        (lambda x: f.gsmelu(x, 1.0, 3.0, 0.5, 2.0, 7.0), 4.0, 14.0, 2.0),
        # smoothstep, tau = 1/4: F = 3/16 - 1/32, integral = 1/64 - 1/512
        (lambda x: f.rescu(x), -0.25, 1 / 64 - 1 / 512, 3 / 16 - 1 / 32),
        (lambda x: f.swish(x, 2.0), 0.0, 0.0, 0.5),
        (lambda x: f.gcu(x), math.pi, -math.pi, -1.0),
        (lambda x: f.relu_squared(x), 3.0, 9.0, 6.0),
        (lambda x: f.star_relu(x), 1.0, 0.5 / math.sqrt(1.25), 2 / math.sqrt(1.25)),
        (lambda x: f.star_relu(x), -1.0, -0.5 / math.sqrt(1.25), 0.0),
    ],
)
def test_hand_worked(function, x, value, slope):
    point = torch.tensor([x], dtype=torch.float64)
    assert function(point).item() == pytest.approx(value, abs=1e-14)
    assert gradient(function, point).item() == pytest.approx(slope, abs=1e-14)


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - SURROGATE - {"rrelu"}))
def test_slope_is_the_derivative(name):
    module = activations.create(name).double()
    x = X + 0.0137  # off the kinks
    torch.testing.assert_close(gradient(module, x), numeric_slope(module, x).detach(), atol=2e-6, rtol=1e-6)


# --- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("x", [-2.5, -0.31, -0.1, 0.0, 0.2, 1.0, 3.0])
def test_smelu_is_relu_convolved_with_a_box(x, beta):
    got = f.smelu(torch.tensor(x, dtype=torch.float64), beta).item()
    assert got == pytest.approx(box_average_of_relu(x, beta), abs=1e-8)


def test_smelu_with_vanishing_beta_is_relu():
    for beta in (0.0, 1e-9, torch.tensor(0.0, dtype=torch.float64)):
        torch.testing.assert_close(f.smelu(X, beta), F.relu(X), atol=1e-6, rtol=0)
        assert gradient(lambda x, b=beta: f.smelu(x, b), X).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.floats(-5, 5), st.floats(0.01, 4), st.floats(0.01, 4), st.floats(-2, 2), st.floats(-2, 2), st.floats(-3, 3))
def test_gsmelu_is_continuous_with_the_slopes_it_says(x, alpha, beta, g_minus, g_plus, t):
    point = torch.tensor([x], dtype=torch.float64)
    value = f.gsmelu(point, alpha, beta, g_minus, g_plus, t).item()
    # Independent: integrate the piecewise linear slope from -alpha.
    width = alpha + beta
    if x <= -alpha:
        expected = t + g_minus * (x + alpha)
    elif x < beta:
        into = x + alpha
        expected = t + g_minus * into + (g_plus - g_minus) * into * into / (2 * width)
    else:
        expected = t + (g_minus + g_plus) / 2 * width + g_plus * (x - beta)
    assert value == pytest.approx(expected, abs=1e-10)


def test_gsmelu_special_cases():
    torch.testing.assert_close(f.gsmelu(X, 0.7, 0.7, 0.0, 1.0, 0.0), f.smelu(X, 0.7))
    torch.testing.assert_close(f.gsmelu(X, 0.0, 0.0, 0.1, 1.0, 0.0), F.leaky_relu(X, 0.1), atol=1e-6, rtol=0)
    torch.testing.assert_close(f.gsmelu(X, 0.3, 0.9, 0.4, 0.4, 0.2), 0.2 + 0.4 * (X + 0.3))
    torch.testing.assert_close(
        f.rescu(X, 0.3, 0.9, 0.1, 1.2, 0.2, lambda tau: tau, lambda tau: tau**2 / 2),
        f.gsmelu(X, 0.3, 0.9, 0.1, 1.2, 0.2),
    )


def test_smoothstep_rescu_has_a_continuous_second_derivative_and_gsmelu_has_not():
    def jump(function, at):
        ends = torch.tensor([at - 1e-6, at + 1e-6], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(function(ends).sum(), ends, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), ends)
        return (second[1] - second[0]).abs().item()

    for at in (-0.5, 0.5):
        assert jump(f.rescu, at) < 1e-4
        assert jump(f.gsmelu, at) == pytest.approx(1.0)


def test_logistic_transition_on_a_wide_interval_is_softplus():
    wide = 40.0  # tau in [0, 1] stands for x in [-wide, wide]
    function = f.rescu(
        X,
        wide,
        wide,
        cdf=lambda tau: torch.sigmoid(wide * (2 * tau - 1)),
        integral=lambda tau: F.softplus(wide * (2 * tau - 1)) / (2 * wide),
    )
    torch.testing.assert_close(function, F.softplus(X), atol=1e-12, rtol=0)


def test_prelu_and_swish_special_cases():
    for slope, expected in ((0.0, F.relu(X)), (1.0, X), (-1.0, X.abs())):
        torch.testing.assert_close(f.prelu(X, slope), expected)
        torch.testing.assert_close(f.prelu(X, torch.tensor([slope])), expected)
    for beta, expected in ((0.0, X / 2), (1.0, F.silu(X)), (1e4, F.relu(X))):
        torch.testing.assert_close(f.swish(X, beta), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(f.swish(X, torch.tensor([beta])), expected, atol=1e-6, rtol=0)


def test_gelu_and_silu_extremes_as_published():
    x = torch.linspace(-6, 6, 1_200_001, dtype=torch.float64)
    gelu, silu = F.gelu(x), F.silu(x)
    assert gelu.min().item() == pytest.approx(-0.169971, abs=1e-6)
    assert x[gelu.argmin()].item() == pytest.approx(-0.751792, abs=1e-5)
    slope = gradient(F.gelu, x)
    assert (slope.min().item(), slope.max().item()) == pytest.approx((-0.128904, 1.128904), abs=1e-6)
    assert (silu.min().item(), x[silu.argmin()].item()) == pytest.approx((-0.27846, -1.27846), abs=1e-5)
    assert (F.gelu(x) - f.gelu(x, approximate="tanh")).abs().max().item() == pytest.approx(4.73e-4, abs=1e-6)


# --- HeLU's backward pass, which is not the derivative of its forward pass -------------------------------------------


def test_helu_backward_is_exact_at_its_threshold():
    x = torch.tensor([-1.0, -0.5, math.nextafter(-0.5, 0), -0.25, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 60.0], dtype=torch.float64)
    y = f.helu(x, 0.5)
    torch.testing.assert_close(y, torch.relu(x))
    (y * weight).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 30.0, 40.0, 50.0, 60.0]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_helu_compares_alike_in_every_type_with_any_number_of_threads(dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # chooses how to compare, the result is the same
    x = torch.tensor([-INF, -1.0, -0.5, -0.25, -0.0, 0.0, 2.0, INF, float("nan")], dtype=dtype, requires_grad=True)
    f.helu(x, 0.5).backward(torch.arange(1, 10, dtype=dtype))
    assert x.grad.tolist() == [0, 0, 0, 4, 5, 6, 7, 8, 0]
    point = torch.tensor(-0.25, dtype=dtype, requires_grad=True)
    f.helu(point, 0.5).backward()
    assert point.grad.item() == 1


def test_helu_takes_an_alpha_beyond_its_inputs_type():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.tensor([-INF, torch.finfo(torch.float32).min, 1.0])
        assert gradient(lambda x: f.helu(x, 1e300), x).tolist() == [0, 1, 1]


def test_helu_limits_and_that_it_fails_gradcheck_only_inside_its_band():
    assert gradient(lambda x: f.helu(x, 0.0), X).tolist() == gradient(torch.relu, X).tolist()
    assert gradient(lambda x: f.helu(x, INF), X).tolist() == [1.0] * len(X)
    inside = torch.tensor([-0.03], dtype=torch.float64, requires_grad=True)
    outside = torch.tensor([-0.3, 0.4], dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.gradcheck(f.helu, inside, raise_exception=False)
    assert torch.autograd.gradcheck(f.helu, outside)


# --- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", BUILT_IN)
def test_dtype_nan_limits_and_finite_gradients(name, dtype):
    module = activations.create(name)  # parameters stay in float32
    if name == "rrelu" and dtype == torch.float16:
        module.eval()  # torch has no such kernel on a CPU in training
    x = torch.tensor([-INF, -1e4, -1, -1e-3, 0, 1e-3, 1, 1e4, INF, math.nan], dtype=dtype, requires_grad=True)
    squares = name in {"relu_squared", "star_relu"} and dtype == torch.float16  # 1e4 squared is inf there
    y = module(x)
    assert y.dtype == dtype
    assert y[-1].isnan()
    assert y[1:-2].isnan().sum() == 0
    if name not in NAN_AT_INF:
        assert not y[0].isnan()
        assert not y[-2].isnan()
    finite = slice(1, -3) if squares else slice(1, -2)
    y[finite].float().sum().backward()
    assert x.grad[finite].isfinite().all()


@pytest.mark.parametrize(
    ("name", "parameters", "left", "right"),
    [
        ("smelu", {}, 0.0, INF),
        ("smelu", {"learnable": True}, 0.0, INF),
        ("gsmelu", {"g_minus": 0.5}, -INF, INF),
        ("gsmelu", {"learnable": True}, 0.0, INF),
        ("gsmelu", {"learnable": True, "g_minus": -0.5}, INF, INF),
        ("gsmelu", {"t": 2.0}, 2.0, INF),
        ("rescu", {}, 0.0, INF),
        ("helu", {}, 0.0, INF),
        ("swish", {}, 0.0, INF),
        ("swish", {"beta": 3.0}, 0.0, INF),
        ("swish", {"beta": 0.0}, -INF, INF),
        ("relu_squared", {}, 0.0, INF),
    ],
)
def test_limits(name, parameters, left, right):
    y = activations.create(name, **parameters)(torch.tensor([-INF, INF]))
    assert y.tolist() == [left, right]


@pytest.mark.parametrize("name", ["smelu", "gsmelu", "rescu", "helu", "swish"])
def test_gradients_at_infinity_are_the_limits_of_the_slope(name):
    assert gradient(activations.create(name), torch.tensor([-INF, INF])).tolist() == [0.0, 1.0]
