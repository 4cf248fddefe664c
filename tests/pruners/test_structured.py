"""Channels removed physically: exact counts, masks, optimizers and AP follow, the model still runs and learns."""

import builtins
import copy
import itertools
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import models as tv

import pruners
from ap.compaction import fit_
from ap.cycles import Cycles
from ap.masks import Masks
from ap.plugin import AP
from recipes import models

NAMES = [name for name in pruners.names() if name.startswith("structured-")]


def data(shape=(3, 32, 32), size=4):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, *shape, generator=generator), torch.randint(0, 10, (size,), generator=generator))]


class PerChannel(nn.Module):
    """An activation of one's own with a parameter a channel, in front of a flattening."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 8, 3, stride=4), Scaled(8), nn.Linear(8 * 64, 10)

    def forward(self, x):
        return self.head(self.act(self.conv(x)).flatten(1))


class Scaled(nn.Module):
    dead_range = (-float("inf"), 0.0)

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x):
        return x.relu() * self.scale.view(1, -1, 1, 1)


def channels(model):
    return {n: m.weight.shape[0] for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


@pytest.mark.parametrize("name", NAMES)
def test_every_importance_removes_its_share_of_channels(name):
    torch.manual_seed(0)
    # 16, 32 and 64 channels, and the classes, which stay
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(4)),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()),
        nn.Sequential(nn.Linear(32 * 4, 64), nn.BatchNorm1d(64), nn.ReLU()),
        nn.Linear(64, 10),
    )
    masks, batches = Masks(model), data()
    model.train()
    before = copy.deepcopy(model.state_dict())
    pruner = pruners.create(name)
    scores = pruner.scores(model, masks, batches, F.cross_entropy)
    assert {n: s.shape for n, s in scores.items()} == {n: masks[n].shape for n in masks}
    assert torch.isinf(scores["3.weight"]).all()
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    alive = masks.alive
    removed = pruner.prune(model, masks, amount=0.25, batches=batches, loss_fn=F.cross_entropy)
    assert removed == alive - masks.alive
    if name == "structured-demp":
        assert sum(channels(model).values()) >= 10 + 112 - 28
        return
    assert channels(model) == {"0.0": 12, "1.0": 24, "2.0": 48, "3": 10}
    assert model(batches[0][0]).shape == (4, 10)
    assert masks.total == alive
    assert masks.alive == sum(masks.weight(n).numel() for n in masks)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: models.create("resnet20"), (3, 32, 32)),
        (lambda: models.create("resnet20", shortcut="B"), (3, 32, 32)),
        (lambda: models.create("cnn", activation="prelu"), (3, 32, 32)),
        (PerChannel, (3, 32, 32)),
        (lambda: tv.densenet121(num_classes=10), (3, 32, 32)),
        (lambda: tv.mobilenet_v2(num_classes=10), (3, 32, 32)),
        (lambda: tv.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10), (3, 32, 32)),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2), (3, 32, 32)),
    ],
    ids=["resnet20", "resnet20-B", "prelu", "per-channel", "densenet", "mobilenet", "vit", "timm-vit"],
)
def test_architectures_keep_running_and_dead_weights_stay_dead(build, shape):
    torch.manual_seed(0)
    model = build()
    masks, batches = Masks(model), data(shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    masks.bind(optimizer)
    pruners.create("magnitude", density="uniform").prune(model, masks, amount=0.5)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
        optimizer.step()

    step()
    size = sum(p.numel() for p in model.parameters())
    alive = masks.alive
    removed = pruners.create("structured-magnitude").prune(model, masks, amount=0.25, batches=batches)
    assert 0 < removed == alive - masks.alive
    assert sum(p.numel() for p in model.parameters()) < size
    step()
    for name in masks:
        assert (masks.weight(name)[~masks[name]] == 0).all()
        assert masks[name].shape == masks.weight(name).shape


def test_scores_are_the_channels_norms_and_the_lowest_go():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([[3.0], [0.01], [2.0], [0.02]]))
        model[2].weight.mul_(torch.tensor([[3.0, 0.01, 2.0, 0.02]]))
    kept = [model[0].weight[[0, 2]].detach().clone(), model[2].weight[:, [0, 2]].detach().clone()]
    masks = Masks(model)
    pruner = pruners.create("structured-magnitude", example_input=torch.zeros(1, 3))
    rows = pruner.scores(model, masks)["0.weight"][:, 0]
    assert rows.argsort().tolist() == [1, 3, 2, 0]
    assert pruner.prune(model, masks, amount=0.5) == 2 * 3 + 2 * 2
    assert torch.equal(model[0].weight, kept[0])
    assert torch.equal(model[2].weight, kept[1])
    assert (masks.alive, masks.total, masks.density) == (10, 20, 0.5)
    assert masks.layer_density() == {"0.weight": 0.5, "2.weight": 0.5}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor])
def test_optimizer_state_follows(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    masks = Masks(model)
    optimizer = kind(model.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    masks.bind(optimizer)
    x = torch.rand(16, 3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    key = {"SGD": "momentum_buffer", "AdamW": "exp_avg"}.get(kind.__name__)
    parameters = dict(model.named_parameters())
    before = {n: (p.detach().clone(), optimizer.state[p][key].clone() if key else None) for n, p in parameters.items()}
    gradients = {n: p.grad.clone() for n, p in parameters.items()}
    pruners.create("structured-magnitude", example_input=x).prune(model, masks, amount=0.25)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameters[n] is p for n, p in model.named_parameters())  # the same objects
    rows = [i for i, row in enumerate(before["0.weight"][0]) if any(torch.equal(row, r) for r in model[0].weight)]
    assert len(rows) == 6
    for name, index in {
        "0.weight": (rows,),
        "0.bias": (rows,),
        "1.weight": (rows,),
        "3.weight": (slice(None), rows),
    }.items():
        assert torch.equal(parameters[name], before[name][0][index])
        assert torch.equal(parameters[name].grad, gradients[name][index])
        if key:
            assert torch.equal(optimizer.state[parameters[name]][key], before[name][1][index])
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def test_ap_goes_on_with_what_remains():
    torch.manual_seed(0)
    model = models.create("cnn", image_size=8)
    plugin = AP(model, rate=0.05)
    batches = data((3, 8, 8))
    pruner = pruners.create("structured-magnitude")
    with plugin.cycle(amount=0.25) as share:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
        optimizer.step()
        own = round(0.05 * plugin.masks.alive)
        pruner.prune(model, plugin.masks, amount=share, batches=batches)
        before = {name: plugin.masks.weight(name).detach().clone() for name in plugin.masks}
        start = {name: plugin._start[name].clone() for name in plugin.masks}
        alive = plugin.masks.alive
    assert plugin.masks.alive == alive - own
    negatives = torch.cat([before[n][before[n] < 0].flatten() for n in before])
    moved = {n: (before[n] - start[n]).abs() for n in before}
    limit = torch.cat([moved[n][(before[n] < 0)] for n in before]).sort().values[own - 1]
    assert len(negatives) > own
    for name in plugin.masks:
        gone = ~plugin.masks[name]
        assert (before[name][gone] < 0).all()
        assert (moved[name][gone] <= limit).all()
    plugin.detach()


@settings(max_examples=30, deadline=None)
@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    amount=st.floats(0.01, 0.99),
    ranking=st.sampled_from(["local", "global"]),
)
def test_the_number_of_channels_is_exact(widths, amount, ranking):
    torch.manual_seed(0)
    layers = []
    for before, after in itertools.pairwise([3, *widths]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 2))
    pruner = pruners.create("structured-magnitude", example_input=torch.zeros(1, 3), ranking=ranking)
    pruner.prune(model, Masks(model), amount)
    left = [layer.out_features for layer in model if isinstance(layer, nn.Linear)][:-1]
    assert sum(left) == sum(widths) - min(round(amount * sum(widths)), sum(widths) - len(widths))
    assert min(left) >= 1


def test_apoz_removes_the_most_dead_and_demp_only_the_dead():
    def network():
        model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        model[0].weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        model[0].bias.data = torch.tensor([5.0, -10.0, 0.0, 0.5])  # alive, dead, half, mostly alive
        return model

    batches = [torch.stack([torch.linspace(-1, 1, 20), torch.zeros(20)], 1)]
    model = network()
    pruners.create("structured-apoz").prune(model, Masks(model), amount=0.5, batches=batches)
    assert model[0].bias.tolist() == [5.0, 0.5]
    model = network()
    masks = Masks(model)
    demp = pruners.create("structured-demp")
    assert demp.prune(model, masks, amount=0.75, batches=batches) == 2 + 2
    assert model[0].bias.tolist() == [5.0, 0.0, 0.5]
    assert demp.prune(model, masks, amount=0.75, batches=batches) == 0


def test_hessian_sums_every_sample():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x, y = torch.randn(7, 3), torch.randint(0, 2, (7,))
    masks = Masks(model)
    scores = pruners.create("structured-hessian").scores(
        model, masks, [(x[:4], y[:4]), (x[4:], y[4:])], F.cross_entropy
    )
    squares = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(7):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        for square, grad in zip(squares.values(), grads, strict=True):
            square += grad**2 / 7
    rows = (model[0].weight ** 2 * squares["0.weight"]).sum(1)
    columns = (model[2].weight ** 2 * squares["2.weight"]).sum(0)
    expected = (rows + columns) / 2
    torch.testing.assert_close(scores["0.weight"][:, 0], (expected / expected.mean()).detach(), rtol=1e-4, atol=0)


def test_global_ranking_ignored_layers_and_rounds():
    torch.manual_seed(0)
    model = models.create("cnn")
    masks = Masks(model)
    example = torch.zeros(1, 3, 32, 32)
    pruner = pruners.create("structured-random", example_input=example, ranking="global", ignored="conv1", rounds=2)
    pruner.prune(model, masks, amount=0.5)
    after = channels(model)
    assert after["conv1"] == 16
    assert after["conv2"] + after["fc1"] == 48
    with pytest.raises(ValueError, match="no layer conv7"):
        pruners.create("structured-random", example_input=example, ignored="conv7").prune(model, masks, amount=0.1)
    with pytest.raises(ValueError, match="'local' or 'global'"):
        pruners.create("structured-random", ranking="both")


def test_a_loop_of_structured_pruning_resumes():
    """Saved after the first pruning, the second run starts from the full architecture and ends as the first."""
    batches = data((3, 8, 8))

    def build():
        torch.manual_seed(0)
        model = models.create("cnn", image_size=8)
        pruner = pruners.create("structured-magnitude")
        return Cycles(model, pruner, cycles=3, amount=0.3, rate=0.05, rewind="none", batches=batches)

    def train(model, masks, run):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batches[0][0]), batches[0][1])
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()}

    saved = []

    def save(loop):
        if loop.cycle == 2 and not saved:
            saved.append(copy.deepcopy((loop.model.state_dict(), loop.state_dict())))

    whole = build()
    expected = whole.run(train, on_phase=save)
    again = build()
    fit_(again.model, saved[0][0])
    again.load_state_dict(saved[0][1])
    assert again.run(train) == expected
    assert again.masks.total == whole.masks.total
    assert sum(p.numel() for p in again.model.parameters()) == sum(p.numel() for p in whole.model.parameters())


def test_masks_of_a_smaller_model_save_and_load():
    torch.manual_seed(0)
    model = models.create("cnn", image_size=8)
    masks = Masks(model)
    pruners.create("structured-random", example_input=torch.zeros(1, 3, 8, 8)).prune(model, masks, amount=0.5)
    pruners.create("magnitude").prune(model, masks, amount=0.5)
    twin = copy.deepcopy(model)
    loaded = Masks(twin)
    loaded.load_state_dict(masks.state_dict())
    assert (loaded.alive, loaded.total, loaded.layer_density()) == (masks.alive, masks.total, masks.layer_density())


def test_without_torch_pruning_the_remedy_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("torch_pruning"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'activate-while-pruning\[structured\]'"):
        pruners.create("structured-magnitude")


def test_no_shape_is_guessed():
    model = models.create("cnn", image_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="example_input="):
            pruners.create("structured-magnitude").prune(model, Masks(model), amount=0.5)
