"""Compaction: outputs equal, what can go goes, what cannot stays."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune
from torchvision import models as tv

import ap.activations
from ap.compaction import compact, compare
from ap.masks import Masks
from recipes import models


@torch.no_grad()
def damaged(model, share=0.3, seed=0):
    """Rows, columns and norms zeroed at random; norms and heads look trained."""
    generator = torch.Generator().manual_seed(seed)

    def some(count):
        return torch.rand(count, generator=generator) < share

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 10)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.weight.copy_(torch.rand(module.num_features, generator=generator) + 0.3)
            module.bias.copy_(torch.randn(module.num_features, generator=generator) / 3)
            gone = some(module.num_features)
            module.weight[gone] = 0
            module.bias[gone] = -module.bias[gone].abs()
        elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            if not module.weight.any():
                nn.init.normal_(module.weight, std=0.1)
            module.weight[some(len(module.weight))] = 0
            if module.weight.shape[1] > 3:
                module.weight[:, some(module.weight.shape[1])] = 0
    return model


def assert_same(model, small, shape, tolerance=1e-4):
    model.eval()
    small.eval()
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before, after = model(x), small(x)
    assert before.abs().max() > 0
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance * float(before.abs().max()))


IDS = (
    "resnet20 resnet20-B-prelu cnn-hardswish resnet18 resnet50 vgg densenet mobilenet2 mobilenet3 shufflenet vit "
    "timm-vit convnext"
)


@pytest.mark.parametrize(
    ("build", "shape", "most"),
    [
        (lambda: models.create("resnet20"), (3, 32, 32), 0.6),
        (lambda: models.create("resnet20", shortcut="B", activation="prelu"), (3, 32, 32), 0.8),
        (lambda: models.create("cnn", activation="hardswish"), (3, 32, 32), 0.6),
        (lambda: tv.resnet18(num_classes=10), (3, 64, 64), 0.6),
        (lambda: tv.resnet50(num_classes=10), (3, 64, 64), 0.6),
        (lambda: nn.Sequential(tv.vgg11_bn().features, nn.Flatten(), nn.Linear(512, 10)), (3, 32, 32), 0.6),
        (lambda: tv.densenet121(num_classes=10), (3, 32, 32), 0.6),
        (lambda: tv.mobilenet_v2(num_classes=10), (3, 32, 32), 0.6),
        (lambda: tv.mobilenet_v3_small(num_classes=10), (3, 32, 32), 0.7),
        (lambda: tv.shufflenet_v2_x0_5(num_classes=10), (3, 32, 32), 0.9),
        (lambda: tv.VisionTransformer(32, 8, 2, 4, 32, 128, num_classes=10), (3, 32, 32), 0.8),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2), (3, 32, 32), 0.9),
        (lambda: timm.create_model("convnext_atto", num_classes=10), (3, 32, 32), 0.9),
    ],
    ids=IDS.split(),
)
def test_outputs_are_equal_and_the_model_smaller(build, shape, most):
    torch.manual_seed(0)
    model = damaged(build()).eval()
    before = copy.deepcopy(model.state_dict())
    example = torch.zeros(2, *shape)
    small = compact(model, example)
    assert_same(model, small, shape)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert sizes[1] < most * sizes[0]
    again = compact(small, example)
    assert sum(p.numel() for p in again.parameters()) <= sizes[1]


def test_hidden_units_by_hand():
    """Unit 0 acts, unit 1 is dead, unit 2 is a constant 2, and nobody reads unit 3."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    model[0].weight.data = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    model[0].bias.data = torch.tensor([0.5, -1.0, 2.0, 0.0])
    model[2].weight.data = torch.tensor([[3.0, 5.0, 7.0, 0.0]])
    model[2].bias.data = torch.tensor([1.0])
    small = compact(model, torch.zeros(1, 2))
    assert small[0].weight.tolist() == [[1.0, 1.0]]
    assert small[0].bias.tolist() == [0.5]
    assert small[2].weight.tolist() == [[3.0]]
    assert small[2].bias.tolist() == [15.0]
    assert (small[0].out_features, small[2].in_features) == (1, 1)


def test_a_constant_behind_zero_padding_stays():
    """At the border a padded convolution reads zeros, so a constant other than 0 does not fold into a bias."""

    def pair(padding, bias):
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=padding, bias=False))
        with torch.no_grad():
            model[0].weight[1:] = 0
            model[0].bias[1] = bias
            model[0].bias[2] = -1.0
        return model

    padded = pair(1, 0.7)
    assert compact(padded, torch.randn(1, 1, 8, 8))[0].out_channels == 2  # only the dead one went
    plain = pair(0, 0.7)
    small = compact(plain, torch.randn(1, 1, 8, 8))
    assert small[0].out_channels == 1
    assert small[2].bias is not None  # the constant moved there
    assert_same(plain, small, (1, 8, 8))


def test_residual_channels_go_only_when_every_member_lets_go():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch, self.head = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.head(F.relu(x + self.branch(x)))

    torch.manual_seed(0)
    model = Block()
    with torch.no_grad():
        for layer in (model.stem, model.branch):
            layer.weight[0], layer.bias[0] = 0, 0  # dead on both sides
        model.stem.weight[1], model.stem.bias[1] = 0, 0  # dead on one side
    small = compact(model, torch.zeros(1, 1, 4, 4))
    assert small.stem.out_channels == small.branch.out_channels == small.branch.in_channels == 3
    assert_same(model, small, (1, 4, 4))


def test_every_layer_keeps_a_channel_and_a_dead_network_its_constant():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.zero_()
    small = compact(model, torch.zeros(1, 4))
    assert [layer.weight.shape for layer in small if isinstance(layer, nn.Linear)] == [(1, 4), (1, 1), (3, 1)]
    assert_same(model, small, (4,))


def test_what_the_graph_does_not_let_follow_stays():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.c(self.norm(F.relu(self.b(x)).view(-1, 6)))

    torch.manual_seed(0)
    model = Odd()
    with torch.no_grad():
        model.a.weight[:2] = 0
        model.b.weight[:2] = 0
    small = compact(model, torch.zeros(2, 4))
    assert (small.a.out_features, small.b.out_features, small.c.in_features) == (4, 6, 6)
    assert_same(model, small, (4,))


def test_shared_layers_and_parameters_stay():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(F.relu(self.a(self.twice(F.relu(self.twice(x))))))

    torch.manual_seed(0)
    model = Shared()
    with torch.no_grad():
        model.twice.weight[0], model.a.weight[1] = 0, 0
    small = compact(model, torch.zeros(1, 4))
    assert small.twice.weight.shape == small.a.weight.shape == (4, 4)
    assert_same(model, small, (4,))


def test_masked_by_torch_prune_and_in_training_mode():
    torch.manual_seed(0)
    model = models.create("lenet-300-100", in_channels=1, image_size=8).train()
    torch_prune.ln_structured(model.fc1, "weight", amount=0.5, n=2, dim=0)
    with torch.no_grad():
        model.fc1.bias.zero_()
    model(torch.zeros(2, 1, 8, 8))
    small = compact(model, torch.zeros(2, 1, 8, 8))
    assert small.fc1.out_features == 150
    assert "weight_mask" not in dict(small.fc1.named_buffers())
    assert hasattr(model.fc1, "weight_mask")
    assert small.training
    assert model.training
    assert_same(model, small, (1, 8, 8))


def test_a_size_in_the_code_is_reported():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = F.relu(self.a(x))
            assert x.shape[1] == 4, "four channels are expected"
            return self.b(x)

    model = Fixed()
    with torch.no_grad():
        model.a.weight[0], model.a.bias[0] = 0, -1
    with pytest.raises(RuntimeError, match=r"(?s)does not run: four channels.*depends on a size that was changed"):
        compact(model, torch.zeros(1, 1, 4, 4))


# threshold has no values of its own
@pytest.mark.parametrize("name", [name for name in ap.activations.names() if name != "threshold"])
def test_every_activation(name):
    torch.manual_seed(0)
    model = damaged(nn.Sequential(nn.Linear(6, 12), ap.activations.create(name), nn.Linear(12, 4)), share=0.5)
    small = compact(model, torch.zeros(1, 6))
    assert small[0].out_features < 12
    assert_same(model, small, (6,))


def test_parameters_per_channel_follow():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.PReLU(6), nn.Conv2d(6, 2, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.rand(6))
        model[0].weight[[1, 4]] = 0
    small = compact(model, torch.zeros(1, 1, 8, 8))
    assert small[1].num_parameters == len(small[1].weight) == small[0].out_channels == 4
    assert_same(model, small, (1, 8, 8))


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    density=st.floats(0.02, 0.6),
    kernel=st.sampled_from([1, 3]),
    norm=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_any_sparse_network_keeps_its_outputs(widths, density, kernel, norm, seed):
    torch.manual_seed(seed)
    layers = []
    for before, after in zip([2, *widths[:-1]], widths, strict=True):
        layers += [nn.Conv2d(before, after, kernel, padding=kernel // 2)]
        layers += [nn.BatchNorm2d(after)] if norm else []
        layers += [nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 25, 3))
    masks = Masks(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of layers left empty, which is wanted here
        masks.remove({name: torch.rand(masks[name].shape) > density for name in masks})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter).round())
    small = compact(model, torch.zeros(2, 2, 5, 5))
    x = torch.randn(3, 2, 5, 5)
    model.eval()
    small.eval()
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)


def test_comparison_counts_and_prints():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10))
    small = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 10))
    model.train()
    result = compare(model, small, torch.zeros(5, 1, 8, 8), rounds=3)
    assert result.parameters == (40 + 1450, 20 + 730)
    assert result.macs == (4 * 9 * 36 + 1440, 2 * 9 * 36 + 720)
    assert min(result.latency_s) > 0
    assert model.training
    assert result.to_dict()["macs"] == {"before": 2736, "after": 1368}
    assert "MACs per sample            2,736           1,368           0.500" in str(result)


def test_models_without_values_and_what_is_no_model_are_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="meta device"):
        compact(copy.deepcopy(model).to("meta"), torch.zeros(2, 4))
    with pytest.raises(TypeError, match="got Tensor"):
        compare(model, torch.zeros(2, 4), model)
