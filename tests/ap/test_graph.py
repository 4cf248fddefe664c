"""The traced graph, symbolic and watched, on models of every kind; contexts worked out by hand."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from ap.graph import layer_contexts, trace


class Functional(nn.Module):
    """A pre-activation residual block with functional activations, a concatenation and a split."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.a(x).relu_()
        y = x + self.b(y)
        z = torch.cat([F.dropout(y, 0.1, self.training), self.c(torch.relu(self.norm(y)))], 1)
        z = F.adaptive_avg_pool2d(F.leaky_relu(z), 1)
        return self.head(z.view(z.size(0), -1))


class DataDependent(Functional):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


@pytest.fixture(params=["symbolic", "watched"])
def find(request):
    """layer_contexts, either way."""
    return (lambda model, x: layer_contexts(model)) if request.param == "symbolic" else layer_contexts


def short(contexts):
    return {
        c.name: (c.input_rectified, c.between, c.activation, c.followed_by, c.feeds_rectifier)
        for c in contexts.values()
    }


def test_functional_model_by_hand(find):
    assert short(find(Functional(), torch.randn(2, 3, 8, 8))) == {
        "stem": (False, (), "/relu", "rectifier", True),
        "a": (True, (), "/relu:2", "rectifier", True),
        # the sum is read by dropout → cat → leaky_relu and by norm → relu: the shorter way counts
        "b": (True, ("add", "norm"), "/relu:3", "add", True),
        "c": (True, ("concat",), "/leaky_relu", "concat", False),
        "head": (False, (), None, "nothing", False),
    }


def test_names_are_those_of_the_report():
    from ap.dnr import measure_dnr

    for model, size in ((Functional(), 8), (torchvision.models.resnet18(), 32), (torchvision.models.vgg11_bn(), 32)):
        x = torch.randn(2, 3, size, size)
        activations = [node.name for node in trace(model).activations()]
        assert activations == [node.name for node in trace(model, x).activations()]
        assert activations == list(measure_dnr(model, [x]).layers)


NAMES = [
    "resnet18",
    "vgg11_bn",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "squeezenet1_0",
    "shufflenet_v2_x0_5",
]


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_agree_on_torchvision(name):
    model = getattr(torchvision.models, name)().eval()
    assert short(layer_contexts(model)) == short(layer_contexts(model, torch.randn(1, 3, 64, 64)))


def test_resnet_by_hand():
    contexts = short(layer_contexts(torchvision.models.resnet18()))
    assert contexts["conv1"] == (False, ("norm",), "relu", "norm", True)
    assert contexts["layer1.0.conv1"] == (True, ("norm",), "layer1.0.relu", "norm", True)
    assert contexts["layer1.0.conv2"] == (True, ("norm", "add"), "layer1.0.relu:2", "norm", True)
    assert contexts["layer2.0.downsample.0"] == (True, ("norm", "add"), "layer2.0.relu:2", "norm", True)
    assert contexts["fc"] == (True, (), None, "nothing", False)
    assert len(contexts) == 21


def test_vision_transformer(find):
    model = torchvision.models.VisionTransformer(16, 4, 1, 2, 8, 16, num_classes=3)
    contexts = find(model, torch.randn(1, 3, 16, 16))
    mlp = contexts["encoder.layers.encoder_layer_0.mlp.0"]
    assert (mlp.input_rectified, mlp.activation, mlp.feeds_rectifier) == (
        False,
        "encoder.layers.encoder_layer_0.mlp.1",
        False,
    )
    assert not contexts["encoder.layers.encoder_layer_0.self_attention.out_proj"].input_rectified
    assert contexts["heads.head"].followed_by == "nothing"


@pytest.mark.parametrize(
    ("activation", "rectified", "rectifier"),
    [
        (nn.ReLU(), True, True),
        (nn.ReLU6(), True, True),
        (nn.Threshold(0.5, 0.0), True, True),
        (nn.Sigmoid(), True, False),
        (nn.Softplus(), True, False),
        (nn.LeakyReLU(), False, False),
        (nn.LeakyReLU(0.0), True, True),
        (nn.PReLU(4), False, False),
        (nn.PReLU(4, init=0.0), True, True),
        (nn.GELU(), False, False),
        (nn.Tanh(), False, False),
        (nn.RReLU(), False, False),
        (nn.Softmax(1), True, None),
    ],
)
def test_what_each_activation_does_to_signs(find, activation, rectified, rectifier):
    model = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4))
    contexts = find(model, torch.randn(2, 4))
    assert contexts["2"].input_rectified is rectified
    if rectifier is not None:
        assert contexts["0"].feeds_rectifier is rectifier


class Signs(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.last = body, nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.body(x.relu()))


@pytest.mark.parametrize(
    ("body", "rectified"),
    [
        (lambda x: x + x * 2, True),
        (lambda x: x + 1, True),
        (lambda x: x - 1, False),
        (lambda x: x + -1.0, False),
        (lambda x: -x, False),
        (lambda x: x * -1, False),
        (lambda x: x.abs() / 2, True),
        (lambda x: F.dropout(x), True),
        (lambda x: F.alpha_dropout(x, training=True), False),
        (lambda x: torch.cat([x[:, :2], x[:, 2:].detach()], 1), True),
        (lambda x: F.layer_norm(x, (4,)), False),
        (lambda x: F.pad(x[:, :3], (0, 1)), True),
        (lambda x: F.pad(x[:, :3], (0, 1), value=-1.0), False),
        (lambda x: x.softmax(1), True),
        (lambda x: x.mean(0, keepdim=True), True),
        (lambda x: x.view(x.shape[0], -1).t().t().contiguous(), True),
        (lambda x: x.cos(), False),
    ],
)
def test_what_each_operation_does_to_signs(find, body, rectified):
    assert find(Signs(body), torch.randn(2, 4))["last"].input_rectified is rectified


def test_a_layer_called_twice_is_rectified_only_if_it_is_so_every_time(find):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(F.relu(self.linear(x)))

    model = Twice()
    assert not find(model, torch.randn(2, 4))["linear"].input_rectified
    graph = trace(model)
    assert [node.name for node in graph.calls("linear")] == ["linear", "linear:2"]


def test_code_that_depends_on_values_needs_an_example():
    model = DataDependent()
    with pytest.raises(ValueError, match=r"DataDependent cannot be traced symbolically .*pass example_input="):
        layer_contexts(model)
    x = torch.randn(2, 3, 8, 8)
    assert short(layer_contexts(model, x)) == short(layer_contexts(Functional()))


def test_watching_changes_nothing():
    from ap.dnr import DNRMonitor

    model = Functional().train()
    model.norm.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    x = torch.randn(2, 3, 8, 8)
    random = torch.get_rng_state()
    layer_contexts(nn.Sequential(model, nn.RReLU(), nn.Dropout()), x)
    assert torch.equal(torch.get_rng_state(), random)
    with DNRMonitor(model, every=1) as monitor:
        trace(model, x)
        with pytest.raises(ValueError, match="no pass was observed"):
            monitor.report()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_producers_and_consumers(find):
    graph = trace(Functional(), None)
    add = graph["/add"]
    assert [node.name for node in add.inputs] == ["/relu", "b"]
    assert [node.name for node in add.users] == ["/dropout", "norm"]
    assert [node.name for node in graph["/cat"].inputs] == ["/dropout", "c"]
    assert graph["/output"].inputs == [graph["head"]]
    assert "a" in graph
    assert len(graph) == len(list(graph))
    for node in graph:
        assert all(node in source.users for source in node.inputs)


def test_shapes_come_with_an_example():
    graph = trace(Functional(), torch.randn(2, 3, 8, 8))
    assert graph["stem"].shape == (2, 4, 8, 8)
    assert graph["/cat"].shape == (2, 8, 8, 8)


def test_transformer_encoder_is_looked_into():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)).eval()
    with torch.no_grad():
        contexts = layer_contexts(model, torch.randn(2, 5, 4))
    assert contexts["1.layers.0.linear1"].activation == "1.layers.0/relu"
    assert contexts["1.layers.0.linear2"].input_rectified
    assert contexts["1.layers.0.self_attn"].kind == "MultiheadAttention"


def test_wrappers_do_not_show(find):
    model = torch.compile(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), backend="eager")
    assert list(find(model, torch.randn(2, 4))) == ["0"]
    assert list(find(nn.Linear(4, 8), torch.randn(2, 4))) == [""]


def test_several_and_named_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, y, scale=1.0):
            return self.linear(x.relu() + y.relu() * scale)

    assert layer_contexts(Two(), (torch.randn(2, 4), torch.randn(2, 4)))["linear"].input_rectified
