"""Each score against a slow reference written from its formula alone."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pruners
from ap.masks import Masks
from recipes import models


def randomised(model):
    """Trained-looking norms, so that formulas with BatchNorm in them are tested."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.rand(module.num_features, generator=generator) - 0.5)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.2)
            module.bias.data.copy_(torch.rand(module.num_features, generator=generator) - 0.5)
    return model


def small_cnn():
    torch.manual_seed(0)
    return randomised(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 4, 5),
            nn.Tanh(),
            nn.Linear(5, 3),
        )
    ).train()


def batches(shape=(2, 5, 5), classes=3, count=2, size=5):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, *shape, generator=generator), torch.randint(0, classes, (size,), generator=generator))
        for _ in range(count)
    ]


def half_pruned(model):
    masks = Masks(model)
    generator = torch.Generator().manual_seed(2)
    masks.prune({name: torch.rand(masks[name].shape, generator=generator) for name in masks}, amount=0.3)
    return masks


# --- LAMP ---------------------------------------------------------------------------------------------------


def lamp_reference(weight, alive):
    flat, living = weight.double().flatten(), alive.flatten()
    scores = torch.zeros_like(flat)
    for i in range(len(flat)):
        if living[i]:
            at_least = living & (flat.abs() >= flat[i].abs())
            scores[i] = flat[i] ** 2 / (flat[at_least] ** 2).sum()
    return scores.view(weight.shape)


def test_lamp_by_hand():
    layer = nn.Linear(3, 1)
    layer.weight.data = torch.tensor([[3.0, -4.0, 1.0]])
    scores = pruners.create("lamp").scores(layer, Masks(layer))["weight"]
    torch.testing.assert_close(scores, torch.tensor([[9 / 25, 1.0, 1 / 26]]))


def test_lamp_against_loops_with_ties_and_dead_weights():
    model = small_cnn()
    with torch.no_grad():
        model[3].weight.copy_((model[3].weight * 20).round() / 20)  # many equal magnitudes
    masks = half_pruned(model)
    scores = pruners.create("lamp").scores(model, masks)
    for name in masks:
        expected = lamp_reference(masks.weight(name).detach(), masks[name])
        torch.testing.assert_close(scores[name].double(), expected, rtol=1e-6, atol=0)


def test_lamp_keeps_the_largest_weights_apart_where_float32_sums_lose_them():
    layer = nn.Linear(400_000, 1, bias=False)
    torch.manual_seed(0)
    scores = pruners.create("lamp").scores(layer, Masks(layer))["weight"].flatten()
    largest = layer.weight.detach().flatten().abs().argsort(descending=True)[:5]
    torch.testing.assert_close(scores[largest[0]], torch.tensor(1.0), rtol=0, atol=0)
    square = layer.weight.detach().flatten().double()[largest].square()
    torch.testing.assert_close(scores[largest].double(), square / square.cumsum(0), rtol=1e-6, atol=0)


# --- first and second order ---------------------------------------------------------------------------------


def reference_gradients(model, data, temperature=1.0):
    twin = copy.deepcopy(model).double().eval()
    weights = {name: p for name, p in twin.named_parameters() if name.endswith("weight") and p.dim() > 1}
    for inputs, targets in data:
        F.cross_entropy(twin(inputs.double()) / temperature, targets).backward()
    return {name: p.grad.clone() for name, p in weights.items()}


def test_gradient_and_snip():
    model, data = small_cnn(), batches()
    masks = half_pruned(model)
    reference = {n: (masks.weight(n).detach() * g).abs() for n, g in reference_gradients(model, data).items()}
    gradient = pruners.create("gradient").scores(model, masks, data, F.cross_entropy)
    snip = pruners.create("snip").scores(model, masks, data, F.cross_entropy)
    total = sum(score.sum() for score in reference.values())
    for name in masks:
        torch.testing.assert_close(gradient[name].double(), reference[name], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(snip[name].double(), reference[name] / total, rtol=1e-3, atol=1e-7)
    assert sum(float(score.sum()) for score in snip.values()) == pytest.approx(1.0, abs=1e-5)


def test_taylor_squares_each_batch():
    model, data = small_cnn(), batches()
    masks = half_pruned(model)
    scores = pruners.create("taylor").scores(model, masks, data, F.cross_entropy)
    each = [reference_gradients(model, [batch]) for batch in data]
    for name in masks:
        expected = sum((masks.weight(name).detach() * g[name]) ** 2 for g in each)
        torch.testing.assert_close(scores[name].double(), expected, rtol=1e-3, atol=1e-10)


def test_grasp_against_an_explicit_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    masks, data = Masks(model), [(x.double(), y) for x, y in batches((3,), 3)]
    scores = pruners.create("grasp").scores(model, masks, data, F.cross_entropy)
    shapes = {name: masks.weight(name).shape for name in masks}

    def loss(flat):
        parts = dict(zip(shapes, flat.split([s.numel() for s in shapes.values()]), strict=True))
        weights = {name: part.view(shapes[name]) for name, part in parts.items()}
        outputs = [torch.func.functional_call(model, weights, (x,)) / 200 for x, _ in data]
        return sum(F.cross_entropy(out, y) for out, (_, y) in zip(outputs, data, strict=True))

    flat = torch.cat([masks.weight(name).detach().flatten() for name in masks])
    gradient = torch.autograd.functional.jacobian(loss, flat)
    expected = flat * (torch.autograd.functional.hessian(loss, flat) @ gradient)
    torch.testing.assert_close(torch.cat([scores[name].flatten() for name in masks]), expected, rtol=1e-8, atol=0)


# --- Wanda --------------------------------------------------------------------------------------------------


def watched_inputs(model, data):
    """The inputs of every module, in evaluation mode."""
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0].detach()))
        for name, m in model.named_modules()
    ]
    model.eval()
    with torch.no_grad():
        for inputs, _ in data:
            model(inputs)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    ],
    ids=["plain", "strided", "grouped", "depthwise", "circular"],
)
def test_wanda_on_convolutions_against_unfold(conv):
    model = nn.Sequential(conv)
    masks, data = Masks(model), batches((4, 8, 7))
    scores = pruners.create("wanda").scores(model, masks, [x for x, _ in data])["0.weight"]
    x = torch.cat([x for x, _ in data])
    padding = conv._reversed_padding_repeated_twice
    x = F.pad(x, padding, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    columns = F.unfold(x, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)  # [N, C · k · k, L]
    norms = columns.double().square().sum((0, 2)).sqrt().view(4, *conv.kernel_size)
    per_group = 4 // conv.groups
    for row in range(conv.out_channels):
        first = row // (conv.out_channels // conv.groups) * per_group
        expected = conv.weight[row].detach().abs().double() * norms[first : first + per_group]
        torch.testing.assert_close(scores[row].double(), expected, rtol=1e-5, atol=1e-6)


def test_wanda_on_linear_layers_and_attention():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    masks = Masks(model)
    data = [(x, None) for x, _ in batches((5, 8))]
    scores = pruners.create("wanda").scores(model, masks, [x for x, _ in data])
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        inputs = watched_inputs(model, data)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    x = torch.cat([x for x, _ in data])
    attention = model.self_attn
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).detach().chunk(3, dim=-1)
    heads = [t.view(len(x), 5, 2, 4).transpose(1, 2) for t in (q, k, v)]  # [N, heads, tokens, 4]
    mixed = torch.softmax(heads[0] @ heads[1].transpose(-1, -2) / 2, -1) @ heads[2]
    mixed = mixed.transpose(1, 2).reshape(len(x), 5, 8)
    for name, source in {
        "self_attn.in_proj_weight": x,
        "self_attn.out_proj.weight": mixed,
        "linear1.weight": inputs["linear1"],
        "linear2.weight": inputs["linear2"],
    }.items():
        norms = source.double().square().flatten(0, -2).sum(0).sqrt()
        expected = masks.weight(name).detach().abs().double() * norms
        torch.testing.assert_close(scores[name].double(), expected, rtol=1e-4, atol=1e-5)


def test_wanda_compares_within_a_row():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    masks = Masks(layer)
    pruners.create("wanda").prune(layer, masks, amount=0.5, batches=[torch.tensor([[9.0, 1.0, 1.0, 1.0]])])
    assert masks["weight"].tolist() == [[True, False, False, True], [True, False, False, True]]


# --- lookahead ----------------------------------------------------------------------------------------------


def test_lookahead_by_hand():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    model[2].weight.data = torch.tensor([[5.0, 6.0]])
    scores = pruners.create("lookahead").scores(model, Masks(model))
    assert scores["0.weight"].tolist() == [[1 * 25, 4 * 25], [9 * 36, 16 * 36]]
    assert scores["2.weight"].tolist() == [[25 * (1 + 4), 36 * (9 + 16)]]


def test_lookahead_with_batchnorm_and_flatten():
    model = small_cnn()
    scores = pruners.create("lookahead").scores(model, Masks(model))
    first, norm, second, third, last = model[0], model[1], model[3], model[6], model[8]
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach() ** 2
    w1, w2, w3, w4 = (layer.weight.detach() for layer in (first, second, third, last))
    expected = torch.zeros_like(w2)
    for o, c, i, j in itertools.product(*map(range, w2.shape)):
        before = scale[c] * sum(w1[c].flatten() ** 2)
        after = (w3[:, 4 * o : 4 * o + 4] ** 2).sum()  # four positions of each channel
        expected[o, c, i, j] = w2[o, c, i, j] ** 2 * before * after
    torch.testing.assert_close(scores["3.weight"], expected, rtol=1e-4, atol=0)
    for o in range(4):
        torch.testing.assert_close(
            scores["0.weight"][o], w1[o] ** 2 * scale[o] * (w2[:, o] ** 2).sum(), rtol=1e-4, atol=0
        )
    for column in range(24):
        torch.testing.assert_close(
            scores["6.weight"][:, column],
            w3[:, column] ** 2 * (w2[column // 4] ** 2).sum() * (w4**2).sum(0),
            rtol=1e-4,
            atol=0,
        )


class Residual(nn.Module):
    """Two branches that are added, one of them a shortcut convolution, the other with an identity further on."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 1, bias=False)
        self.branch = nn.Conv2d(2, 3, 1, bias=False)
        self.shortcut = nn.Conv2d(2, 3, 1, bias=False)
        self.inner = nn.Conv2d(3, 3, 1, groups=3, bias=False)
        self.head = nn.Conv2d(3, 2, 1, bias=False)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.branch(x) + self.shortcut(x))
        return self.head(x + self.inner(x))


def test_lookahead_follows_additions_shortcuts_and_depthwise_convolutions():
    torch.manual_seed(0)
    model = Residual()
    scores = pruners.create("lookahead").scores(model, Masks(model))
    square = {name: p.detach().flatten(1) ** 2 for name, p in model.named_parameters()}
    stem, branch, shortcut, inner, head = (
        square[f"{n}.weight"] for n in ("stem", "branch", "shortcut", "inner", "head")
    )
    stream = branch.sum(1) + shortcut.sum(1)  # what arrives behind the first addition
    leaves = head.sum(0) + inner[:, 0]  # who reads it: the head through the identity, and the inner layer
    expected = {
        "stem": stem * (branch.sum(0) + shortcut.sum(0))[:, None],
        "branch": branch * leaves[:, None] * stem.sum(1),
        "shortcut": shortcut * leaves[:, None] * stem.sum(1),
        "inner": inner * head.sum(0)[:, None] * stream[:, None],
        "head": head * (stream + inner[:, 0]),
    }
    for name, value in expected.items():
        torch.testing.assert_close(scores[f"{name}.weight"].flatten(1), value, rtol=1e-4, atol=0)


def test_lookahead_names_what_it_cannot_follow():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.warns(UserWarning, match=r"cannot follow the graph at self_attn\.in_proj_weight"):
        pruners.create("lookahead", example_input=torch.zeros(1, 5, 8)).scores(model, Masks(model))


# --- SynFlow ------------------------------------------------------------------------------------------------


def synflow_reference(model, shape):
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for value in twin.state_dict().values():
            value.abs_()
    twin(torch.ones(1, *shape, dtype=torch.float64)).sum().backward()
    return {name: (p * p.grad).abs().detach() for name, p in twin.named_parameters()}


@pytest.mark.parametrize(("make", "shape"), [(small_cnn, (2, 5, 5)), (lambda: models.create("resnet20"), (3, 32, 32))])
def test_synflow_against_absolute_values(make, shape):
    model = make()
    masks = half_pruned(model)
    scores = pruners.create("synflow", example_input=torch.zeros(4, *shape)).scores(model, masks)
    reference = synflow_reference(model, shape)
    for name in masks:
        assert scores[name].dtype == torch.float64
        torch.testing.assert_close(scores[name], reference[name], rtol=1e-10, atol=0)


def test_synflow_empties_no_layer_at_one_percent_of_resnet20():
    model = models.create("resnet20")
    masks = Masks(model)
    removed = pruners.create("synflow").prune(model, masks, amount=0.99, batches=[torch.zeros(2, 3, 32, 32)])
    assert removed == round(0.99 * masks.total)
    assert min(masks.layer_alive().values()) >= 1


def test_synflow_follows_the_published_rounds():
    """Density ρ^(k/n) after round k, against a loop that removes by sorting."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    twin = copy.deepcopy(model)
    masks = Masks(model)
    pruners.create("synflow", rounds=5, example_input=torch.zeros(1, 6)).prune(model, masks, amount=0.8)
    total = masks.total
    for k in range(1, 6):
        scores = synflow_reference(twin, (6,))
        weights = [twin[i].weight for i in (0, 2, 4)]
        flat = torch.cat([scores[f"{i}.weight"].flatten() for i in (0, 2, 4)])
        alive = torch.cat([(w != 0).flatten() for w in weights])
        keep = total - round(0.8 * total) if k == 5 else total - round(total * (1 - 0.2 ** (k / 5)))
        order = torch.where(alive, flat, -1.0).argsort(descending=True)
        stays = torch.zeros_like(alive).index_fill(0, order[:keep], True)
        with torch.no_grad():
            for weight, part in zip(weights, stays.split([w.numel() for w in weights]), strict=True):
                weight.mul_(part.view(weight.shape))
    for i in (0, 2, 4):
        assert torch.equal(masks[f"{i}.weight"], twin[i].weight != 0)


def test_synflow_treats_bounded_activations_as_flow_and_gates_as_constants():
    torch.manual_seed(0)
    bounded = nn.Sequential(nn.Linear(4, 50), nn.ReLU6(), nn.Linear(50, 2))
    free = nn.Sequential(bounded[0], nn.ReLU(), bounded[2])
    with torch.no_grad():
        bounded[0].weight.mul_(100)  # far above 6
    synflow = pruners.create("synflow", example_input=torch.zeros(1, 4))
    a, b = synflow.scores(bounded, Masks(bounded)), synflow.scores(free, Masks(free))
    for name in a:
        torch.testing.assert_close(a[name], b[name])

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.gate, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.body(x) * torch.sigmoid(self.gate(x)))

    gated = Gated()
    masks = Masks(gated)
    with pytest.warns(UserWarning, match=r"cannot follow gate\.weight"):
        synflow.prune(gated, masks, amount=0.4)
    assert masks["gate.weight"].all()


def test_synflow_refuses_attention_and_missing_shapes():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match="not defined through multi_head_attention_forward"):
        pruners.create("synflow", example_input=torch.zeros(1, 5, 8)).scores(model, Masks(model))
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="needs the input's shape"):
        pruners.create("synflow").prune(layer, Masks(layer), amount=0.5)
    with pytest.raises(ValueError, match="floating-point"):
        pruners.create("synflow", example_input=torch.zeros(1, 3, dtype=torch.long)).scores(layer, Masks(layer))


# --- N:M ----------------------------------------------------------------------------------------------------


def test_nm_keeps_the_largest_of_each_group_and_names_the_rest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 6))
    masks = Masks(model)
    with pytest.warns(UserWarning, match=r"0\.weight: the input axis is no multiple of 4"):
        removed = pruners.create("nm").prune(model, masks)
    assert removed == (8 * 4 * 9 + 16 * 6) // 2
    assert masks["0.weight"].all()
    weights = {name: masks.weight(name).detach() for name in ("1.weight", "3.weight")}
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 6))
    for name, weight in weights.items():
        before = dense.get_parameter(name).detach().movedim(1, -1).reshape(-1, 4)
        after = weight.movedim(1, -1).reshape(-1, 4)
        for old, new in zip(before, after, strict=True):
            assert sorted(new[new != 0].abs().tolist()) == sorted(old.abs().tolist())[2:]


def test_nm_loads_as_semi_structured_values():
    """What torch.sparse.to_sparse_semi_structured checks on a GPU: two of every four along the last axis are zero."""
    layer = nn.Linear(128, 64)
    masks = Masks(layer)
    pruners.create("nm").prune(layer, masks, amount=0.5)
    groups = layer.weight.detach().view(64, 32, 4)
    assert ((groups != 0).sum(-1) == 2).all()


def test_nm_other_patterns_and_refusals():
    layer = nn.Linear(16, 3)
    masks = Masks(layer)
    assert pruners.create("nm", n=1, m=8).prune(layer, masks) == 3 * 14
    assert pruners.create("nm", n=1, m=8).prune(layer, masks) == 0  # there already
    with pytest.raises(ValueError, match=r"removes exactly 0\.5"):
        pruners.create("nm").prune(layer, masks, amount=0.3)
    with pytest.raises(ValueError, match="0 < n < m"):
        pruners.create("nm", n=4, m=4)
    narrow = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="multiple of 4"):
        pruners.create("nm").prune(narrow, Masks(narrow))


# --- Synaptic Stripping -------------------------------------------------------------------------------------


def test_stripping_takes_the_most_negative_weights_into_dead_units_first():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[-5.0, 0.1, -7.0], [1.0, -9.0, 0.2]])
    model[0].bias.data = torch.tensor([0.0, 100.0])
    model[2].weight.data = torch.tensor([[3.0, -0.05]])
    data = [torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) + 0.1]
    masks = Masks(model)
    pruner = pruners.create("synaptic-stripping")
    assert pruner.scores(model, masks, data)["0.weight"][0, 0] == -5.0
    assert pruner.prune(model, masks, amount=1 / 8, batches=data) == 1
    assert not masks["0.weight"][0, 2]
    assert pruner.prune(model, masks, amount=1 / 7, batches=data) == 1
    assert not masks["0.weight"][0, 0]  # the unit is alive from now on
    assert pruner.prune(model, masks, amount=1 / 6, batches=data) == 1
    assert not masks["2.weight"][0, 1]  # so the smallest weight of all goes, not the -9
