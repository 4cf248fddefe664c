"""The monitor's counts, against hand-worked tensors and against brute force over every stored activation."""

import copy
import io
import math
import pickle
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from ap.dnr import DNRMonitor, measure_dnr


def brute_force(pre_activations, is_dead=lambda z: z <= 0):
    """(total, static) per layer from all pre-activations of all inputs, kept: {name: [[N, ...], ...]}."""
    rates = {}
    for name, batches in pre_activations.items():
        dead = is_dead(torch.cat(batches).double()).flatten(1)  # [inputs, units]
        rates[name] = (dead.double().mean().item(), dead.all(0).double().mean().item())
    return rates


def record_modules(model, kinds=(nn.ReLU,)):
    """Stores every activation module's input in passes to come, under the report's names."""
    stored, calls, handles = defaultdict(list), {}, []

    def start(module, args):
        calls.clear()

    handles.append(model.register_forward_pre_hook(start))
    for name, module in model.named_modules():
        if isinstance(module, kinds):

            def store(module, args, name=name):
                calls[name] = calls.get(name, 0) + 1
                stored[name if calls[name] == 1 else f"{name}:{calls[name]}"].append(args[0].detach().clone())

            handles.append(module.register_forward_pre_hook(store))
    return stored, handles


def assert_rates(report, expected):
    assert list(report.layers) == list(expected)
    for name, (total, static) in expected.items():
        layer = report.layers[name]
        assert layer.total == pytest.approx(total, abs=1e-12), name
        assert layer.static == pytest.approx(static, abs=1e-12), name
        assert layer.dynamic == pytest.approx(total - static, abs=1e-12), name


class Functional(nn.Module):
    """Activations of every spelling, as functions."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.block = Block()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = F.relu(self.inner(x))
        x = self.block(x)
        x = self.relu(self.inner(x[:, :6]))
        return F.gelu(torch.relu(x - 0.3) - 5 * x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(F.relu(self.linear(x), inplace=True)).relu_() - F.relu(input=x - 0.1)


class FunctionalRecorded(Functional):
    """The same, with every pre-activation stored by hand."""

    def forward(self, x):
        self.stored = stored = {}
        z = stored["/relu"] = self.inner(x)
        x = z.relu()
        z = stored["block/relu"] = self.block.linear(x)
        z2 = stored["block/relu:2"] = self.block.linear(z.relu())
        z3 = stored["block/relu:3"] = x - 0.1
        x = z2.relu() - z3.relu()
        z = stored["relu"] = self.inner(x[:, :6])
        x = z.relu()
        z = stored["/relu:2"] = x - 0.3
        z = stored["/gelu"] = z.relu() - 5 * x
        return F.gelu(z)


def test_hand_worked():
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    with DNRMonitor(model, every=1) as monitor:
        model(torch.tensor([[1.0, 0.0, -1.0], [2.0, 3.0, -2.0]]))
        model(torch.tensor([[-1.0, -0.0, -3.0]]))
    layer = monitor.report().layers["1"]
    # unit 0 is alive twice, unit 1 once, unit 2 never: 3 of 9 pairs alive, 1 of 3 units static
    assert (layer.units, layer.samples) == (3, 3)
    assert layer.total == pytest.approx(6 / 9)
    assert layer.static == pytest.approx(1 / 3)
    assert layer.dynamic == pytest.approx(6 / 9 - 1 / 3)
    alive, inputs = layer.alive_counts()
    assert alive.tolist() == [2, 1, 0]
    assert inputs == 3


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_equal_to_brute_force_on_torchvision(name):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10)
    if name == "vgg11_bn":  # its classifier for 224 × 224 images holds 100 M weights
        model.avgpool, model.classifier[0] = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 4096)
    batches = [torch.randn(n, 3, 32, 32) for n in (4, 4, 3)]
    twin = copy.deepcopy(model)
    with DNRMonitor(model, every=1):
        torch.manual_seed(1)  # of the dropout
        outputs = [model(x) for x in batches]
    torch.manual_seed(1)
    plain = [twin(x) for x in batches]
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))

    stored, _ = record_modules(twin.eval())
    for x in batches:
        twin(x)
    expected = brute_force(stored)
    report = measure_dnr(model, batches)
    assert_rates(report, expected)
    units = {key: value[0][0].numel() for key, value in stored.items()}
    assert {key: layer.units for key, layer in report.layers.items()} == units
    weights = torch.tensor([units[key] for key in expected], dtype=torch.double)
    totals = torch.tensor([expected[key][0] for key in expected], dtype=torch.double)
    assert report.total == pytest.approx(((weights * totals).sum() / weights.sum()).item(), abs=1e-12)
    assert report.mean_over_layers.total == pytest.approx(totals.mean().item(), abs=1e-12)
    assert report.dynamic == pytest.approx(report.total - report.static)


def test_functional_calls_of_every_spelling():
    torch.manual_seed(1)
    model, recorded = Functional(), FunctionalRecorded()
    recorded.load_state_dict(model.state_dict())
    batches = [torch.randn(n, 6) for n in (16, 16, 5)]
    stored = defaultdict(list)
    for x in batches:
        recorded(x)
        for name, z in recorded.stored.items():
            stored[name].append(z.detach())
    with DNRMonitor(model, every=1) as monitor:
        outputs = [model(x) for x in batches]
    assert all(torch.equal(a, model(x)) for a, x in zip(outputs, batches, strict=True))
    gelu = stored.pop("/gelu")
    report = monitor.report()
    assert list(report.layers) == [*stored, "/gelu"]
    for name, (total, static) in brute_force(stored).items():
        assert report.layers[name].total == pytest.approx(total, abs=1e-12), name
        assert report.layers[name].static == pytest.approx(static, abs=1e-12), name
    z = torch.cat(gelu).double().requires_grad_()
    y = F.gelu(z)
    (slope,) = torch.autograd.grad(y.sum(), z)
    tail = (y.abs() <= 0.01) & (slope.abs() <= 0.01) & (z < 0)
    assert report.layers["/gelu"].total == pytest.approx(tail.double().mean().item(), abs=1e-12)
    assert 0 < report.layers["/gelu"].total < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (7, 5), (300, 8), (513, 3), (3, 4, 5, 6), (2, 3, 8), (260, 2, 2, 2)])
def test_layouts_batches_and_types_are_counted_alike(shape, dtype):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    z.view(-1)[::3] = 0
    z.view(-1)[::7] = -0.0
    variants = [z, z.flip(0).flip(0)[...], torch.stack([z, z], -1)[..., 0]]  # the last is not dense
    if z.dim() == 4:
        variants.append(z.to(memory_format=torch.channels_last))
    for activation, alive in ((nn.ReLU(), z > 0), (nn.Hardswish(), z > -3), (nn.Softshrink(0.5), z.abs() > 0.5)):
        for variant in variants:
            model = nn.Sequential(nn.Identity(), activation)
            with DNRMonitor(model, every=1) as monitor:
                model(variant)
            counts, inputs = monitor.report().layers["1"].alive_counts()
            assert inputs == shape[0]
            assert torch.equal(counts.long(), alive.sum(0)), type(activation)


def test_layout_may_change_between_batches():
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    z = torch.randn(4, 3, 5, 8)
    with DNRMonitor(model, every=1) as monitor:
        model(z)
        model(z.to(memory_format=torch.channels_last))
    assert torch.equal(monitor.report().layers["1"].alive_counts()[0], 2 * (z > 0).sum(0))


def test_sizes_that_change_make_units_of_channels():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    model[1].bias.data[:] = torch.tensor([0.0, -9.0, -1.5, 1.0])
    batches = [torch.randn(5, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(3, 3, 12, 9)]
    report = measure_dnr(model, batches)
    dead = torch.cat([(model[:2](x) <= 0).transpose(0, 1).flatten(1) for x in batches], 1)  # [C, inputs × positions]
    layer = report.layers["2"]
    assert layer.unit == "channel"
    assert (layer.units, layer.samples) == (4, 10)
    assert layer.total == pytest.approx(dead.double().mean().item(), abs=1e-12)
    assert layer.static == 0.25  # the channel that is shifted down by 9 deviations
    assert "channels, because the number of positions changed" in str(report)
    assert layer.dead_rate_per_channel().tolist() == pytest.approx(dead.double().mean(1).tolist())


def test_sequences_of_changing_length_keep_their_features():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    batches = [torch.randn(2, 7, 4), torch.randn(2, 9, 4)]
    layer = measure_dnr(model, batches).layers["1"]
    dead = torch.cat([(model[0](x) <= 0).flatten(0, 1) for x in batches])
    assert (layer.units, layer.unit, layer.samples) == (6, "channel", 4)
    assert layer.dead_rate_per_channel().tolist() == pytest.approx(dead.double().mean(0).tolist())


def test_dead_rate_per_channel_of_a_convolution():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    x = torch.randn(4, 3, 8, 8)
    layer = measure_dnr(model, [x]).layers["1"]
    expected = (model[0](x) <= 0).double().mean((0, 2, 3))
    assert layer.dead_rate_per_channel().tolist() == pytest.approx(expected.tolist())


def test_first_pass_then_every_nth_training_and_evaluation_apart():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with DNRMonitor(model, every=3) as monitor:
        for n in (1, 2, 4, 8, 16):
            model(torch.randn(n, 2))
        model.eval()
        model(torch.randn(32, 2))
        with torch.no_grad():
            model(torch.randn(64, 2))
    assert monitor.report("train").layers["1"].samples == 1 + 8
    assert monitor.report("eval").layers["1"].samples == 32
    both = monitor.report()
    assert both.layers["1"].samples == 41
    assert (both.passes, both.mode, monitor.report("train").mode) == (3, None, "train")
    monitor.reset()
    with pytest.raises(ValueError, match="no pass was observed"):
        monitor.report()


def test_both_kinds_of_pass_together_are_static_only_if_dead_in_both():
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    with DNRMonitor(model, every=1) as monitor:
        model(torch.tensor([[1.0, -1.0, -1.0]]))
        model.eval()(torch.tensor([[-1.0, 1.0, -1.0]]))
    assert monitor.report("train").static == pytest.approx(2 / 3)
    assert monitor.report().static == pytest.approx(1 / 3)
    assert monitor.report().total == pytest.approx(4 / 6)


def test_activations_that_cannot_die_are_told_apart_from_a_rate_of_zero():
    model = nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(), nn.Tanh(), nn.Flatten(), nn.ReLU())
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(1)
    report = measure_dnr(model, [torch.randn(4, 2)])
    assert [layer.can_die for layer in report.layers.values()] == [False, False, True]
    assert report.layers["1"].total is None
    assert (report.layers["4"].total, report.total) == (0.0, 0.0)
    assert (report.layers["1"].units, report.layers["1"].samples) == (3, 4)
    assert "cannot die" in str(report)


def test_slope_that_learns_its_way_out_of_zero():
    model = nn.Sequential(nn.Flatten(), nn.PReLU(init=0.0))
    x = torch.tensor([[-1.0, 2.0], [-3.0, -4.0]])
    with DNRMonitor(model, every=1) as monitor:
        model(x)
        assert monitor.report().total == 0.75
        model[1].weight.data.fill_(0.3)
        model(x)
    assert monitor.report().total == pytest.approx(3 / 8)


def test_parameters_per_channel():
    model = nn.Sequential(nn.Identity(), nn.PReLU(3))
    model[1].weight.data[:] = torch.tensor([0.0, 0.25, 0.0])
    z = torch.randn(5, 3, 4, 4)
    alive, _ = measure_dnr(model, [z]).layers["1"].alive_counts()
    expected = (z > 0).sum(0)
    expected[1] = 5
    assert torch.equal(alive.long(), expected)


def test_nan_is_not_dead():
    model = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Hardswish())
    report = measure_dnr(model, [torch.tensor([[math.nan, -math.inf, math.inf]])])
    assert report.layers["1"].alive_counts()[0].tolist() == [1, 0, 1]
    assert report.layers["2"].alive_counts()[0].tolist() == [1, 1, 1]


def test_no_grad_inference_mode_and_autocast():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU6())
    x = torch.randn(6, 4)
    with DNRMonitor(model, every=1) as monitor:
        model(x)
        with torch.no_grad():
            model(x)
        with torch.inference_mode():
            model(x)
        model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
    assert monitor.report().layers["1"].samples == 30


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)
        self.reentrant = reentrant

    def part(self, x):
        return F.relu(self.second(self.relu(self.first(x))))

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_count_once(reentrant):
    model = Checkpointed(reentrant)
    x = torch.randn(5, 4, requires_grad=True)
    with DNRMonitor(model, every=1) as monitor:
        for _ in range(2):
            model(x).sum().backward()
    report = monitor.report()
    assert {name: layer.samples for name, layer in report.layers.items()} == {"relu": 10, "/relu": 10}
    assert report.layers["relu"].total == pytest.approx((model.first(x) <= 0).double().mean().item())


def test_copies_are_not_counted_and_carry_nothing():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    x = torch.randn(5, 4)
    with DNRMonitor(model, every=1) as monitor:
        model(x)
        twin = copy.deepcopy(model)
        average = torch.optim.swa_utils.AveragedModel(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        for other in (twin, average, loaded, pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), model[0](x).relu())
        with DNRMonitor(twin, every=1) as second:
            twin(x)
    assert monitor.report().layers["1"].samples == 5
    assert second.report().layers["1"].samples == 5


def test_several_monitors_at_once():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), Block())
    x = torch.randn(5, 4)
    with (
        DNRMonitor(model, every=1) as outer,
        DNRMonitor(model[0], every=2) as inner,
        DNRMonitor(model, every=2) as third,
    ):
        for _ in range(3):
            model(x)
    assert list(outer.report().layers) == ["0.1", "1/relu", "1/relu:2", "1/relu:3"]
    assert {layer.samples for layer in outer.report().layers.values()} == {15}
    assert {name: layer.samples for name, layer in inner.report().layers.items()} == {"1": 10}
    assert {layer.samples for layer in third.report().layers.values()} == {10}
    assert outer.report().layers["0.1"].total == inner.report().total


def hooks_of(model):
    return {
        name: {key: dict(value) for key, value in vars(module).items() if "hooks" in key and value is not None}
        for name, module in model.named_modules()
    }


def test_detaching_leaves_the_model_as_it_was():
    model = nn.Sequential(Functional(), nn.Unflatten(1, (1, 8)), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    model[2].linear1.register_forward_hook(lambda *args: None)
    before, keys = hooks_of(model), {name: set(vars(module)) for name, module in model.named_modules()}
    monitor = DNRMonitor(model, every=1).attach()
    assert monitor.attach() is monitor
    assert hooks_of(model) != before
    model(torch.randn(3, 6))
    model.eval()(torch.randn(3, 6))
    model.train()
    monitor.detach()
    monitor.detach()
    assert hooks_of(model) == before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu, self.error = nn.ReLU(), None

    def forward(self, x):
        x = F.relu(self.relu(x))
        if self.error is not None:
            raise self.error
        return F.relu(x)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_pass_that_fails_leaves_nothing_behind(error):
    model = Failing()
    x = torch.randn(4, 3)
    with DNRMonitor(model, every=1) as monitor:
        model.error = error
        with pytest.raises(type(error)):
            model(x)
        model.error = None
        model(x)
    assert not torch.overrides._get_current_function_mode_stack()
    assert list(monitor.report().layers) == ["relu", "/relu", "/relu:2"]
    assert monitor.report().layers["/relu:2"].samples == 4


class CallsItself(nn.Module):
    def forward(self, x, again=True):
        return self(F.relu(x), again=False) if again else F.relu(x - 1)


def test_a_model_that_calls_itself_is_one_pass():
    model = CallsItself()
    with DNRMonitor(model, every=1) as monitor:
        model(torch.tensor([[2.0, 0.5, -1.0]]))
        model(torch.tensor([[2.0, 0.5, -1.0]]))
    report = monitor.report()
    assert report.passes == 2
    assert {name: layer.total for name, layer in report.layers.items()} == {
        "/relu": pytest.approx(1 / 3),
        "/relu:2": pytest.approx(2 / 3),
    }


def test_gradient_dead_rate_where_it_differs():
    from ap import activations

    model = nn.Sequential(nn.Flatten(), activations.create("helu", alpha=0.5))
    report = measure_dnr(model, [torch.tensor([[-1.0, -0.2, 0.3, -0.5]])])
    layer = report.layers["1"]
    assert (layer.total, layer.gradient_total) == (0.75, 0.5)  # -0.2 is not passed on but learns
    assert "no gradient" in str(report)
    assert measure_dnr(nn.Sequential(nn.Flatten(), nn.ReLU()), [torch.randn(2, 2)]).layers["1"].gradient_total is None


def test_eps_widens_the_dead_range():
    model = nn.Sequential(nn.Flatten(), nn.GELU())
    z = torch.linspace(-6, 6, 1201)[:, None]
    rates = [measure_dnr(model, [z], eps=eps).total for eps in (1e-4, 0.01, 0.1)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ends_of_the_range_are_not_rounded_outwards(dtype):
    from ap.activations.ranges import dead_range

    high = dead_range(nn.SiLU()).high
    z = torch.tensor([high], dtype=dtype)
    steps = [z]
    for _ in range(3):
        steps.append(torch.nextafter(steps[-1], torch.tensor([0.0], dtype=dtype)))
        steps.insert(0, torch.nextafter(steps[0], torch.tensor([-20.0], dtype=dtype)))
    z = torch.stack(steps)  # the numbers of this type around the end
    counts = measure_dnr(nn.Sequential(nn.Identity(), nn.SiLU()), [z]).layers["1"].alive_counts()[0]
    assert counts.item() == (z.double() > high).sum().item()


def test_report_reads_well():
    import json

    import pandas

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Tanh())
    report = measure_dnr(model, [torch.randn(5, 4)])
    table = pandas.DataFrame(report.rows())
    assert list(table["name"]) == ["1", "3"]
    assert {"units", "samples", "total", "static", "dynamic", "can_die"} <= set(table.columns)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"]["1"]["total"] == report.layers["1"].total
    assert data["total"] == report.total
    text = str(report)
    assert all(word in text for word in ("1", "ReLU", "total", "static", "dynamic", "mean over layers"))
    assert f"{100 * report.total:.2f} %" in text


def test_measure_restores_the_mode_of_every_module():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU())
    model[1].eval()
    before = [module.training for module in model.modules()]
    first = measure_dnr(model, [(torch.randn(5, 4), torch.zeros(5)), [torch.randn(3, 4), None]])
    assert [module.training for module in model.modules()] == before
    assert first.mode == "eval"
    assert first.layers["3"].samples == 8
    with pytest.raises(RuntimeError):
        measure_dnr(model, [torch.randn(5, 3)])
    assert [module.training for module in model.modules()] == before


def test_bad_input_gets_one_clear_line():
    dies = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    for every in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="every must be a positive number of passes"):
            DNRMonitor(dies, every=every)
    with pytest.raises(ValueError, match="eps must be in"):
        DNRMonitor(dies, eps=2)
    with pytest.raises(TypeError, match=r"DataParallel.*\.module.*DistributedDataParallel"):
        DNRMonitor(nn.DataParallel(dies))
    with pytest.raises(ValueError, match=r"nothing in this model can die.*Tanh"):
        DNRMonitor(nn.Sequential(nn.Linear(2, 2), nn.Tanh())).attach()
    with pytest.raises(ValueError, match="nothing in this model can die: it has no activation"):
        measure_dnr(nn.Linear(2, 2), [torch.randn(1, 2)])
    with pytest.raises(ValueError, match="there are no batches"):
        measure_dnr(dies, [])
    with pytest.raises(ValueError, match="unknown mode 'test'"):
        DNRMonitor(dies).report("test")

    class Custom(nn.Module):
        def forward(self, x):
            return torch.tanh(x)

    with pytest.raises(ValueError, match=r"nothing in this model can die.*tanh"):
        measure_dnr(Custom(), [torch.randn(1, 2)])


def test_counts_do_not_overflow():
    from ap.dnr_count import Counts

    counts = Counts(torch.Size([2]), torch.device("cpu"))
    counts.alive[0] = counts.inputs = 2**31 - 3
    counts.add_batch(torch.Size([2]), torch.tensor([5, 0]), 5)
    assert counts.alive.tolist() == [2**31 + 2, 0]
    assert counts.inputs == 2**31 + 2


def test_transforms_of_torch_func():
    from torch.func import functional_call, grad, jvp, vmap

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(5, 4)
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).sum()

    stacked = {name: value.expand(3, *value.shape) for name, value in parameters.items()}
    calls = {
        "functional_call": (5, lambda: loss(parameters, x)),
        "grad": (5, lambda: grad(loss)(parameters, x)),
        "jvp": (5, lambda: jvp(lambda x: loss(parameters, x), (x,), (x,))),
        "gradients per sample": (5, lambda: vmap(grad(loss), (None, 0))(parameters, x[:, None])),
        "ensemble": (15, lambda: vmap(loss, (0, None))(stacked, x)),
    }
    expected = (model[0](x) <= 0).double().mean().item()
    for name, (samples, call) in calls.items():
        with DNRMonitor(model, every=1) as monitor:
            call()
        layer = monitor.report().layers["1"]
        assert (layer.samples, layer.units) == (samples, 8), name
        assert layer.total == pytest.approx(expected), name


def test_passes_that_compute_nothing_are_not_counted():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    x = torch.randn(5, 4)
    with DNRMonitor(model, every=1) as monitor:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(x)
        exported = torch.export.export(model, (x,), strict=False)  # as newer versions of torch do anyway
        assert "bool" not in exported.graph_module.code
        model(x)
    assert monitor.report().layers["1"].samples == 5


def test_a_model_that_moves_keeps_its_counts():
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    with DNRMonitor(model, every=1) as monitor:
        model(torch.tensor([[1.0, -1.0]]))
        model.double()(torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    assert monitor.report().layers["1"].alive_counts()[0].tolist() == [2, 0]


def test_bad_input_is_answered_with_what_would_be_right():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for batch in ({"x": torch.randn(3, 4)}, [[1.0, 2.0]], []):
        with pytest.raises(TypeError, match=r"batches of tensors.*within DNRMonitor"):
            measure_dnr(model, [batch])
    with pytest.raises(ValueError, match="meta device"):
        measure_dnr(copy.deepcopy(model).to("meta"), [torch.randn(3, 4)])
    assert model.training
    with DNRMonitor(model, every=1) as monitor:
        model(torch.randn(3, 4))
        for writer in ("runs", None, print):
            with pytest.raises(TypeError, match=r"add_scalar.*log_metrics"):
                monitor.log(writer, 1)
    assert monitor.report().layers["1"].samples == 3


def test_a_layer_that_is_called_on_nothing_has_no_rate():
    class Detector(nn.Module):
        """A head that sees as many proposals as there are."""

        def __init__(self):
            super().__init__()
            self.body, self.head = nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.head(self.body(x)[x[:, 0] > 0])

    nothing, something = torch.tensor([[-1.0, 1.0]]), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    report = measure_dnr(Detector(), [nothing])
    assert {name: layer.total for name, layer in report.layers.items()} == {"body": 0.5}
    report = measure_dnr(Detector(), [nothing, something, something[:0]])
    assert report.layers["body"].samples == 3
    assert (report.layers["head"].samples, report.layers["head"].total) == (1, 0.5)
    with pytest.raises(ValueError, match="no activation was called with any input"):
        measure_dnr(Detector(), [something[:0]])
