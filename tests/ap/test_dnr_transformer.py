"""torch.nn's transformer layers: counted, with the outputs of their fused evaluation path untouched."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ap.dnr import DNRMonitor, measure_dnr


def encoder(activation="relu", batch_first=True, norm_first=False, layers=2, width=8):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        width, 2, 16, dropout=0.1, activation=activation, batch_first=batch_first, norm_first=norm_first
    )
    return nn.Sequential(nn.Linear(4, width), nn.TransformerEncoder(layer, layers, enable_nested_tensor=not norm_first))


def pre_activations(model, x, batch_first=True):
    """What goes into each feed-forward activation, [N, T, F], by the layers' own parts on the slow path."""
    stored = []
    handles = [
        layer.linear1.register_forward_hook(lambda module, args, output: stored.append(output.detach()))
        for layer in model[1].layers
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return stored if batch_first else [z.transpose(0, 1) for z in stored]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", nn.ReLU(), F.relu])
def test_evaluation_counts_and_keeps_the_outputs(activation, norm_first, batch_first):
    model = encoder(activation, batch_first, norm_first).eval()
    x = torch.randn(5, 7, 4) if batch_first else torch.randn(7, 5, 4)
    with torch.no_grad():
        plain = model(x)
        with DNRMonitor(model, every=2) as monitor:
            observed = [model(x), model(x)]
    assert all(torch.equal(output, plain) for output in observed)
    name = "activation" if isinstance(activation, nn.Module) else "/relu"
    expected = [f"1.layers.{i}{name if name[0] == '/' else '.' + name}" for i in (0, 1)]
    report = monitor.report()
    assert list(report.layers) == expected
    for layer, z in zip(report.layers.values(), pre_activations(model, x, batch_first), strict=True):
        assert (layer.units, layer.samples) == (7 * 16, 5)  # token × feature
        assert layer.total == pytest.approx((z <= 0).double().mean().item(), abs=1e-12)
        assert layer.static == pytest.approx((z <= 0).all(0).double().mean().item(), abs=1e-12)


def test_unobserved_passes_keep_the_fused_path(monkeypatch):
    model = encoder().eval()
    fused = []
    original = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: fused.append(1) or original(*args))
    with torch.no_grad(), DNRMonitor(model, every=2) as monitor:
        model(torch.randn(2, 3, 4))
        assert len(fused) == 2  # the output of an observed pass is the fused path's too
        model(torch.randn(2, 3, 4))
        assert len(fused) == 4
    assert monitor.report().layers["1.layers.0/relu"].samples == 2


class Padded(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)


def test_padding_that_becomes_nested_tensors():
    model = Padded(encoder()[1]).eval()
    x, padding = torch.randn(3, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    with torch.no_grad():
        plain = model(x, padding)
        with DNRMonitor(model, every=1) as monitor:
            observed = model(x, padding)
    assert torch.equal(plain, observed)
    assert {layer.samples for layer in monitor.report().layers.values()} == {3}


def test_a_model_that_is_itself_a_fused_layer_is_told():
    model = encoder()[1].eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        plain = model(x)
        with pytest.warns(UserWarning, match=r"is itself an nn\.TransformerEncoder.*monitor a module that contains it"):
            monitor = DNRMonitor(model, every=1).attach()
        torch.testing.assert_close(model(x), plain)
        monitor.detach()
    assert list(monitor.report().layers) == ["layers.0/relu", "layers.1/relu"]


def test_training_passes_are_the_same_to_the_bit_and_counted_once():
    model = encoder()
    x = torch.randn(5, 7, 4)
    torch.manual_seed(1)
    plain = model(x)
    with DNRMonitor(model, every=1) as monitor:
        torch.manual_seed(1)
        observed = model(x)
    assert torch.equal(plain, observed)
    assert [layer.samples for layer in monitor.report("train").layers.values()] == [5, 5]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return F.relu(self.linear(self.attention(x, x, x, need_weights=False)[0]))


def test_attention_keeps_its_fused_path():
    model = Attention().eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        plain = model(x)
        with DNRMonitor(model, every=1) as monitor:
            assert torch.equal(model(x), plain)
    assert monitor.report().total == pytest.approx((plain == 0).double().mean().item())


def test_decoder_layers_and_the_whole_transformer():
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)  # which is not fused as a whole
    source, target = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            torch.manual_seed(1)
            plain = model(source, target)
            with DNRMonitor(model, every=1) as monitor:
                torch.manual_seed(1)
                assert torch.equal(model(source, target), plain)
        layers = monitor.report().layers
        assert {name: (layer.units, layer.samples) for name, layer in layers.items()} == {
            "encoder.layers.0/relu": (5 * 16, 3),
            "decoder.layers.0/relu": (4 * 16, 3),
        }


def test_vision_transformer():
    import torchvision

    model = torchvision.models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=3)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        plain = model.eval()(x)
        with DNRMonitor(model, every=1) as monitor:
            assert torch.equal(model(x), plain)
    assert [layer.kind for layer in monitor.report().layers.values()] == ["GELU", "GELU"]
    assert measure_dnr(model, [x]).total == monitor.report().total
