"""Activations under double backward, torch.func, torch.compile, AMP, export; what they keep for the backward pass."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from ap import activations
from ap.activations import functional as f

SMOOTH_CASES = [
    ("smelu", {}),
    ("smelu", {"beta": 2.0}),
    ("smelu", {"learnable": True}),
    ("smelu", {"learnable": True, "num_parameters": 3}),
    ("gsmelu", {"learnable": True}),
    ("gsmelu", {"learnable": True, "num_parameters": 3, "g_minus": 0.2}),
    ("rescu", {}),
    ("rescu", {"learnable": True}),
    ("swish", {}),
    ("swish", {"beta": -1.5}),
    ("swish", {"learnable": True}),
    ("swish", {"learnable": True, "num_parameters": 3}),
    ("gcu", {}),
    ("relu_squared", {}),
    ("star_relu", {"learnable": True}),
    ("prelu", {"num_parameters": 3}),
]
ALL_CASES = [*SMOOTH_CASES, ("helu", {})]


def ident(case: tuple[str, dict[str, object]]) -> str:
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


@pytest.fixture(params=ALL_CASES, ids=ident)
def module(request) -> nn.Module:
    name, parameters = request.param
    return activations.create(name, **parameters)


def batch(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", SMOOTH_CASES, ids=ident)
def test_gradcheck_and_gradgradcheck_of_inputs_and_parameters(case):
    module = activations.create(case[0], **case[1]).double()
    names = [name for name, _ in module.named_parameters()]
    x = torch.linspace(-1.9, 1.9, 6, dtype=torch.float64).view(2, 3).clone().requires_grad_()
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


def test_gradients_of_learnable_parameters_as_published():
    """Closed forms of the parameters' gradients, on both sides and inside of the transition."""
    x = torch.tensor([-3.0, -0.4, 0.1, 0.7, 3.0], dtype=torch.float64)
    alpha, beta, low, high, t = (
        torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.5, 1.0, 0.2, 1.5, 0.3)
    )
    f.gsmelu(x, alpha, beta, low, high, t).sum().backward()
    tau = ((x + 0.5) / 1.5).clamp(0, 1)
    h = 1.5 * tau**2 / 2 + torch.relu(x - 1.0)
    delta = 1.3
    expected = {
        "alpha": (0.2 + delta * (tau - tau**2 / 2)).sum(),
        "beta": (-delta * tau**2 / 2).sum(),
        "low": (x + 0.5 - h).sum(),
        "high": h.sum(),
        "t": torch.tensor(5.0),
    }
    got = {"alpha": alpha.grad, "beta": beta.grad, "low": low.grad, "high": high.grad, "t": t.grad}
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(value.item(), abs=1e-12), name

    width = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    f.smelu(x, width).sum().backward()
    share = ((x + 0.8) / 1.6).clamp(0, 1)
    assert width.grad.item() == pytest.approx((share * (1 - share)).sum().item(), abs=1e-12)

    slope = torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
    f.swish(x, slope).sum().backward()
    s = torch.sigmoid(1.7 * x)
    assert slope.grad.item() == pytest.approx((x**2 * s * (1 - s)).sum().item(), abs=1e-12)


def test_learnable_widths_stay_positive_whatever_the_steps():
    module = activations.create("gsmelu", learnable=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=50.0)
    for step in range(20):
        optimizer.zero_grad()
        (module(batch(step)) * (-1) ** step).sum().backward()
        optimizer.step()
        assert float(module.alpha().detach()) >= 0
        assert float(module.beta().detach()) >= 0
        assert module(batch(step)).isfinite().all()


def test_channels_must_match():
    module = activations.create("swish", learnable=True, num_parameters=4)
    with pytest.raises(ValueError, match="needs that many channels on axis 1"):
        module(torch.zeros(2, 3))


# --- transforms ------------------------------------------------------------------------------------------------------


def test_vmap_grad_and_jacrev_agree_with_plain_autograd(module):
    x = batch()
    plain = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(plain).square().sum(), plain)
    grad = torch.func.grad(lambda x: module(x).square().sum())
    torch.testing.assert_close(grad(x), expected)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: module(x[None]).square().sum()))(x)
    torch.testing.assert_close(per_sample, expected)
    jacobian = torch.func.jacrev(module)(x[:1])
    diagonal = jacobian.reshape(15, 15).diagonal().view(1, 3, 5)
    torch.testing.assert_close(diagonal * 2 * module(x[:1]), expected[:1])
    assert torch.count_nonzero(jacobian.reshape(15, 15) - torch.diag(diagonal.flatten())) == 0


def test_per_sample_parameter_gradients_sum_to_the_batch_gradient():
    module = activations.create("swish", learnable=True, num_parameters=3)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch())["beta"]
    (expected,) = torch.autograd.grad(module(batch()).square().sum(), module.beta)
    torch.testing.assert_close(each.sum(0), expected)


def test_traced_as_one_graph_with_the_same_values_and_gradients(module):
    """fullgraph=True: a graph break would raise. The backend runs the traced graphs as they are."""
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    a, b = batch().requires_grad_(), batch().requires_grad_()
    y, z = module(a), compiled(b)
    torch.testing.assert_close(z, y)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.parametrize("beta", [1.0, 2.5, -0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_swish_traced_has_its_limits_and_their_slopes(beta, dtype):
    """A compiler is given a backward pass of its own, which autograd's NaN at an infinity is not in."""
    torch._dynamo.reset()
    values = [-math.inf, math.inf, -1e30, -200.0, -2.0, 0.0, 0.3, 30.0]
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    y = torch.compile(activations.create("swish", beta=beta), fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    limits = [0.0, math.inf] if beta > 0 else [-math.inf, 0.0]
    assert y[:2].tolist() == limits
    assert x.grad[:2].tolist() == [float(limit != 0) for limit in limits]
    z = torch.tensor(values[3:], dtype=torch.float64, requires_grad=True)
    (z * torch.sigmoid(beta * z)).sum().backward()
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(x.grad[3:].double(), z.grad, **tolerance)


def test_swish_in_a_transform_that_is_traced():
    x = batch()
    grad = torch.func.vmap(torch.func.grad(lambda t: activations.functional.swish(t).sum()))
    each = torch.compile(grad, backend="aot_eager")
    y = x.clone().requires_grad_()
    torch.nn.functional.silu(y).sum().backward()
    torch._dynamo.reset()
    torch.testing.assert_close(each(x), y.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_low_precision(module, dtype):
    channels = 3
    layer = nn.Linear(5, channels)
    with torch.autocast("cpu", dtype=dtype):
        y = module(layer(torch.randn(4, 5)))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_export(module):
    program = torch.export.export(module.eval(), (batch(),))
    torch.testing.assert_close(program.module()(batch(1)), module(batch(1)))


def test_copies_and_state_dicts(module):
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        parameter.data += 0.1
    module.load_state_dict(twin.state_dict())
    torch.testing.assert_close(module(batch()), twin(batch()))


# --- memory ----------------------------------------------------------------------------------------------------------


def kept_bytes(module: nn.Module, x: Tensor) -> tuple[int, bool, bool]:
    """Bytes an element kept for the backward pass; whether the input, and whether the output, is among what is kept."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = module(x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.numel() == x.numel()}
    return (
        sum(storages.values()) // x.numel(),
        x.untyped_storage().data_ptr() in storages,
        y.untyped_storage().data_ptr() in storages,
    )


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("relu", {}, (4, False, True)),
        ("smelu", {}, (4, False, True)),  # only its output
        ("helu", {}, (1, False, False)),  # one byte an element
        ("silu", {}, (4, True, False)),
        ("swish", {}, (4, True, False)),
        ("swish", {"beta": 1.7}, (4, True, False)),
        ("swish", {"learnable": True}, (4, True, False)),
        ("gcu", {}, (4, True, False)),
    ],
)
def test_what_is_kept_for_the_backward_pass(name, parameters, expected):
    x = torch.randn(8, 16, requires_grad=True) * 1  # not a leaf, as in a network
    assert kept_bytes(activations.create(name, **parameters), x) == expected


# --- parameter groups ------------------------------------------------------------------------------------------------


def test_activations_parameters_are_exempt_from_weight_decay():
    model = nn.Sequential(
        nn.Linear(3, 3), activations.create("smelu", learnable=True), nn.Linear(3, 2), nn.PReLU(), nn.BatchNorm1d(2)
    )
    decayed, exempt = activations.param_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert exempt["weight_decay"] == 0.0
    assert [id(p) for p in exempt["params"]] == [id(model[1].beta.raw), id(model[3].weight)]
    assert len(decayed["params"]) == 6
    torch.optim.SGD([decayed, exempt], lr=0.1)
    assert len(activations.param_groups(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), 0.1)) == 1
