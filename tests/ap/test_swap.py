import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from ap import activations
from ap.activations import HeLU, SmeLU, swap


def kinds(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


def test_resnet_by_modules_and_back():
    model = torchvision.models.resnet18().eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    swapped = swap(model, "smelu", beta=0.3)
    assert swapped == 9  # the stem's, and one in each block, used twice there
    assert (kinds(model, nn.ReLU), kinds(model, SmeLU)) == (0, 9)
    assert {m.beta for m in model.modules() if isinstance(m, SmeLU)} == {0.3}
    assert not torch.allclose(model(x), before)
    swapped.undo()
    swapped.undo()
    assert torch.equal(model(x), before)


def test_relu_and_helu_compute_the_same_forward():
    model = torchvision.models.vgg11_bn(num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    before = model(x)
    assert swap(model, "helu") == 10
    assert torch.equal(model(x), before)


def test_gates_stay():
    model = torchvision.models.mobilenet_v3_small()
    gates = kinds(model, nn.Hardsigmoid)
    swapped = swap(model, "gelu")
    assert kinds(model, nn.Hardsigmoid) == gates > 0
    assert kinds(model, nn.Hardswish) == kinds(model, nn.ReLU) == 0
    assert sum("gate" in why for why in swapped.skipped.values()) == gates
    name = next(name for name, why in swapped.skipped.items() if "gate" in why)
    assert swap(model, "sigmoid", include=name) == 1


def test_timm_squeeze_and_excitation():
    timm = pytest.importorskip("timm")
    model = timm.create_model("seresnet18" if "seresnet18" in timm.list_models() else "legacy_seresnet18")
    sigmoids = sum(type(module).__name__ == "Sigmoid" for module in model.modules())  # timm has a class of its own
    swap(model, "relu_squared")
    assert sum(type(module).__name__ == "Sigmoid" for module in model.modules()) == sigmoids > 0
    assert kinds(model, nn.ReLU) == 0


def test_vision_transformer():
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32).eval()
    attention = copy.deepcopy(model.encoder.layers[0].self_attention.state_dict())
    assert swap(model, "relu") == 2
    assert kinds(model, nn.GELU) == 0
    for name, value in model.encoder.layers[0].self_attention.state_dict().items():
        assert torch.equal(value, attention[name])
    model(torch.randn(1, 3, 32, 32))


def test_pytorchs_transformer_layers_hold_a_function():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    before = layer(x)
    swapped = swap(layer, "helu")
    assert swapped == 1
    assert isinstance(layer.activation, HeLU)
    torch.testing.assert_close(layer(x), before)
    swapped.undo()
    assert layer.activation is F.relu
    torch.testing.assert_close(layer(x), before)


def test_functional_calls_are_reported_with_the_remedy():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(2, 2), nn.ReLU()

        def forward(self, x):
            return F.relu(self.act(self.fc(x)))

    model = nn.Sequential(Block(), Block())
    swapped = swap(model, "gelu")
    assert swapped == 2
    assert set(swapped.skipped) == {"0/relu", "1/relu"}
    assert "make it a module" in swapped.skipped["0/relu"]


def test_filters_and_shared_modules():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act, nn.Tanh())
    swapped = swap(model, "prelu", exclude="4")
    assert swapped == 1
    assert model[1] is model[3]
    assert swapped.skipped["4"] == "left out by the filters"
    assert len(list(model.parameters())) == 5
    assert swap(model, "gelu", include=lambda name, module: isinstance(module, nn.Tanh)) == 1
    with pytest.raises(ValueError, match=r"include='9' matches no activation"):
        swap(model, "gelu", include="9")
    before = str(model)
    with pytest.raises(ValueError, match="no activation is named 'gelo'"):
        swap(model, "gelo")
    assert str(model) == before
    with pytest.raises(ValueError, match="the model itself is an activation"):
        swap(nn.ReLU(), "gelu")


@pytest.mark.parametrize("name", activations.names())
def test_swapped_networks_train(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    swap(model, name)
    model(torch.randn(16, 4)).square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model[0].parameters())


def test_dropout_in_place_would_overwrite_what_the_new_activation_keeps() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Hardswish(), nn.Dropout(0.5, inplace=True), nn.Linear(4, 1))
    swapped = swap(model, "smelu")
    model(torch.randn(8, 4)).sum().backward()  # would raise: modified by an inplace operation
    assert not model[2].inplace
    swapped.undo()
    assert model[2].inplace
    assert swap(nn.Sequential(nn.Linear(4, 4), untouched := nn.Dropout(inplace=True)), "smelu") == 0
    assert untouched.inplace


def test_who_swaps_nothing_is_told_why():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return F.relu(self.fc(x))

    with pytest.warns(UserWarning, match=r"replaced nothing; /relu: relu is called as a function: make it a module"):
        assert swap(Called(), "helu") == 0
    with pytest.warns(UserWarning, match="replaced nothing; this model has no activation module"):
        assert swap(nn.Linear(2, 2), "helu") == 0
