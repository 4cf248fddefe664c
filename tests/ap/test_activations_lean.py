"""The lean kernels against the plain form of the same function, block by block and under transforms; what they keep."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from ap import activations
from ap.activations import functional as f
from ap.activations import lean
from recipes import models

CASES = [
    ("smelu", {}),
    ("smelu", {"beta": 2.0}),
    ("smelu", {"learnable": True}),
    ("smelu", {"learnable": True, "num_parameters": 3}),
    ("gsmelu", {}),
    ("gsmelu", {"g_minus": 0.2, "g_plus": 1.5, "t": -0.3}),
    ("gsmelu", {"learnable": True, "g_minus": 0.2}),
    ("gsmelu", {"learnable": True, "num_parameters": 3, "g_minus": 0.2}),
    ("rescu", {}),
    ("rescu", {"g_plus": 0.0, "g_minus": -1.0}),
    ("rescu", {"learnable": True}),
    ("rescu", {"learnable": True, "num_parameters": 3}),
    ("swish", {}),
    ("swish", {"beta": -1.5}),
    ("swish", {"learnable": True}),
    ("swish", {"learnable": True, "num_parameters": 3}),
    ("gcu", {}),
    ("relu_squared", {}),
    ("star_relu", {"learnable": True}),
    ("prelu", {}),
    ("prelu", {"num_parameters": 3}),
    ("helu", {}),
]


def ident(case: tuple[str, dict[str, object]]) -> str:
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


@pytest.fixture(params=CASES, ids=ident)
def module(request: pytest.FixtureRequest) -> nn.Module:
    name, parameters = request.param
    return activations.create(name, **parameters)


def batch(*shape: int) -> Tensor:
    return torch.randn(shape or (4, 3, 5), generator=torch.Generator().manual_seed(0))


def gradients(module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum(), [x, *module.parameters()]
    )


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for category in (DeprecationWarning, FutureWarning):  # torch's own, of its own code
            warnings.simplefilter("ignore", category)
        yield


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "transposed", "one_sample"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_number_of_blocks_gives_what_the_plain_form_gives(module, layout, dtype, monkeypatch):
    x = batch(1 if layout == "one_sample" else 6, 3, 5, 7).to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "expanded":
        x = x[:, :, :1].expand(6, 3, 5, 7)
    elif layout == "transposed":
        x = x.transpose(2, 3)
    a, b = x.detach().requires_grad_(), x.detach().requires_grad_()
    monkeypatch.setattr(lean, "_BLOCK", 50)
    y = module(a)
    got = gradients(module, a, y)
    monkeypatch.setattr(lean, "is_everyday", lambda: False)
    z = module(b)
    expected = gradients(module, b, z)
    exact = dtype == torch.float64
    torch.testing.assert_close(y, z, **({"rtol": 1e-12, "atol": 1e-12} if exact else {"rtol": 2e-2, "atol": 1e-2}))
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(
            mine, theirs, **({"rtol": 1e-5, "atol": 1e-6} if exact else {"rtol": 3e-2, "atol": 3e-2})
        )


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_an_infinity_in_one_block_leaves_the_others_alone(module, value, where, monkeypatch):
    x = batch(6, 3, 5, 7)
    x[(0, 0, 0, 0) if where == "first" else (-1, -1, -1, -1)] = value
    monkeypatch.setattr(lean, "_BLOCK", 50)
    y = module(x)
    monkeypatch.setattr(lean, "is_everyday", lambda: False)
    torch.testing.assert_close(y, module(x), equal_nan=True)


def test_shapes_without_much_in_them(module):
    shared = all(p.numel() == 1 for p in module.parameters())
    for shape in [(0, 3), (1, 3)] + [(), (3,)] * shared:
        x = torch.full(shape, 0.3, requires_grad=True)
        y = module(x)
        assert y.shape == x.shape or y.numel() == x.numel() == 1  # a parameter's own axis may come to a bare number
        y.sum().backward()
        assert x.grad.shape == x.shape


# --- transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_warnings")
def test_vmap_with_autograd_outside_of_it(module):
    x = batch().requires_grad_()
    plain = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    for run in (torch.vmap(lambda s: module(s[None])[0]), torch.vmap(module, in_dims=2, out_dims=2)):
        got = torch.autograd.grad(run(x).square().sum(), [x, *module.parameters()])
        for mine, expected in zip(got, plain, strict=True):
            torch.testing.assert_close(mine, expected)


@pytest.mark.usefixtures("no_warnings")
def test_vmap_over_stacked_parameters(module):
    names = [name for name, _ in module.named_parameters()]
    stacked = [torch.stack([p.detach() + 0.1 * i for i in range(4)]).requires_grad_() for p in module.parameters()]
    x = batch()

    def run(values, sample):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (sample[None],))[0]

    y = torch.vmap(run)(stacked, x)
    expected = torch.stack([run([p[i] for p in stacked], x[i]) for i in range(4)])
    torch.testing.assert_close(y, expected)
    if stacked:
        got = torch.autograd.grad(y.square().sum(), stacked)
        for mine, theirs in zip(got, torch.autograd.grad(expected.square().sum(), stacked), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.usefixtures("no_warnings")
def test_grad_inside_of_vmap_without_a_fallback(module):
    x = batch().requires_grad_()
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    got = torch.vmap(torch.func.grad(lambda s: module(s[None]).square().sum()))(x.detach())
    torch.testing.assert_close(got, expected)


def test_forward_mode_and_hessian(module):
    x, direction = batch().double(), batch().double().flip(0)
    module.double()
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(module(leaf).sum(), leaf, create_graph=True)
    _, tangent = torch.func.jvp(module, (x,), (direction,))
    torch.testing.assert_close(tangent, slope.detach() * direction)
    second = torch.zeros_like(x)
    if slope.requires_grad:
        (second,) = torch.autograd.grad(slope.sum(), leaf)
    hessian = torch.func.hessian(lambda s: module(s).sum())(x[:1]).reshape(15, 15)
    torch.testing.assert_close(hessian, torch.diag(second[0].flatten()))


# --- joints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.25, 1.0), (0.3, 0.7)])
def test_the_joints_belong_to_the_straight_parts(alpha, beta, dtype):
    ends = torch.tensor([-alpha, beta], dtype=dtype, requires_grad=True)
    for function in (f.gsmelu, f.rescu):
        y = function(ends, alpha, beta)
        (slope,) = torch.autograd.grad(y.sum(), ends)
        tight = 0 if dtype == torch.float64 or (alpha, beta) == (0.5, 0.5) else torch.finfo(dtype).eps
        assert slope.tolist() == pytest.approx([0.0, 1.0], abs=8 * tight + 1e-15)
        assert y.tolist() == pytest.approx([0.0, (alpha + beta) / 2], rel=4 * torch.finfo(dtype).eps, abs=tight)


# --- memory ----------------------------------------------------------------------------------------------------------


def kept(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images).sum()
    return sum(storages.values())


def test_a_resnet20_keeps_with_smelu_what_it_keeps_with_relu_and_so_on():
    images = batch(2, 3, 32, 32)
    bytes_of: dict[str, int] = {}
    units = 0
    for name, parameters in (
        ("relu", {}),
        ("gelu", {}),
        ("smelu", {}),
        ("gsmelu", {}),
        ("helu", {}),
        ("swish", {}),
        ("rescu", {"learnable": True}),
        ("gcu", {}),
    ):
        torch.manual_seed(0)
        model = models.create("resnet20").train()
        activations.swap(model, name, **parameters)
        sizes: list[int] = []
        hooks = [
            part.register_forward_hook(lambda _, args, output, sizes=sizes: sizes.append(output.numel()))
            for part in model.modules()
            if activations.is_activation(part)
        ]
        bytes_of[name] = kept(model, images)
        units = sum(sizes)
        for hook in hooks:
            hook.remove()
    assert units == 2 * (7 * 16 * 32 * 32 + 6 * 32 * 16 * 16 + 6 * 64 * 8 * 8)
    assert bytes_of["smelu"] == bytes_of["gsmelu"] == bytes_of["relu"]
    # One byte more an element; and the last output, which is only averaged, is kept by ReLU itself.
    assert bytes_of["helu"] == bytes_of["relu"] + units - 4 * 2 * 64 * 8 * 8
    assert bytes_of["swish"] == bytes_of["gcu"] == bytes_of["gelu"]
    assert bytes_of["rescu"] - bytes_of["gelu"] < 19 * 5 * 64  # its parameters' values
