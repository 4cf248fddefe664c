"""Masks, AP, criteria, the loop, activations and dead-neuron counts on a pretended GPU: the CPU's answers."""

import copy

import numpy as np
import pytest
import torch
from pretend import MixedDevices, OnGPU, Waited, never_waiting, pretended  # noqa: F401
from torch import nn

import ap.activations
from ap import AP, DNRMonitor, Masks, compact, criteria, measure_dnr
from ap.cycles import Cycles
from ap.init import gain, initialize_

pytestmark = pytest.mark.usefixtures("pretended")


def here(x):
    return x.elem if isinstance(x, OnGPU) else x.detach()


def same(on_gpu, on_cpu):
    assert isinstance(on_gpu, OnGPU)
    torch.testing.assert_close(here(on_gpu), here(on_cpu), rtol=1e-5, atol=1e-6)


def network(activation="relu", **parameters):
    torch.manual_seed(0)

    def act():
        return ap.activations.create(activation, **parameters)

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        act(),
        nn.Conv2d(8, 8, 1),
        act(),
        nn.Flatten(),
        nn.Linear(512, 4),
    )


def twins(*args, **kwargs):
    model = network(*args, **kwargs)
    return model, copy.deepcopy(model).to("cuda").to(memory_format=torch.channels_last)


def magnitudes(masks):
    return {name: masks.weight(name).detach().abs() for name in masks}


def batches(device="cpu"):
    draws = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, 8, 8, generator=draws).to(device), torch.arange(6).to(device) % 4) for _ in range(2)]


def train(model, optimizer, steps=2):
    for x, y in batches(next(model.parameters()).device) * (steps // 2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_what_cuda_refuses_is_refused():
    x, cpu = torch.ones(3, device="cuda"), torch.ones(3)
    assert x.device.type == "cuda"
    assert isinstance(x + torch.tensor(1.0), OnGPU)  # a number may come from the CPU
    for mixed in (
        lambda: x + cpu,
        lambda: cpu.add_(x),
        lambda: torch.cat([cpu, x]),
        lambda: x.index_select(0, torch.tensor([1])),
        lambda: torch.where(cpu > 0, x, x),
        lambda: cpu[torch.ones(2, dtype=torch.long, device="cuda")],
        lambda: nn.Linear(3, 2)(x),
        lambda: torch._foreach_mul_([x], [cpu]),
    ):
        with pytest.raises(MixedDevices):
            mixed()
    for array in (x.numpy, lambda: np.asarray(x)):
        with pytest.raises(TypeError, match="cuda"):
            array()
    for draw in (
        lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
        lambda: x.normal_(generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="generator"):
            draw()
    reads = [
        x.sum().item,
        lambda: bool(x.any()),
        x.nonzero,
        lambda: x[x > 0],
        x.tolist,
        x.cpu,
        lambda: cpu.to("cuda"),
        lambda: x.copy_(cpu),
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: x[torch.tensor([0, 1])],
    ]
    for read in reads:
        read()
        with never_waiting(), pytest.raises(Waited):
            read()


@pytest.mark.parametrize("scope", ["global", "layer", "row", "group"])
def test_masks(scope):
    found = []
    for model in twins():
        masks = Masks(model, exclude="0.weight" if scope == "group" else None)
        for optimizer in (
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
            torch.optim.Adam(model.parameters(), lr=0.01),
        ):
            masks.bind(optimizer, mask_gradients=True)
            train(model, optimizer)
            masks.prune(magnitudes(masks), amount=0.3, scope=scope)
            train(model, optimizer)
            assert all(bool((masks.weight(name)[~masks[name]] == 0).all()) for name in masks)
        state = masks.state_dict()
        again = Masks(model, exclude="0.weight" if scope == "group" else None)
        again.load_state_dict(state)
        assert again.alive == masks.alive < masks.total
        found.append(masks)
    for name in found[0]:
        same(found[1][name], found[0][name])
    assert found[0].layer_alive() == found[1].layer_alive()


def test_masks_keep_dead_weights_dead_without_waiting():
    _, model = twins()
    masks = Masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    masks.bind(optimizer, mask_gradients=True)
    plugin = AP(masks)
    plugin.mark_start()
    masks.prune(magnitudes(masks), amount=0.3)
    given = batches("cuda")
    for wait in (True, False):
        for x, y in given:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if wait:
                optimizer.step()
            else:
                with never_waiting():
                    optimizer.step()
    plugin.detach()
    assert all(bool((masks.weight(name)[~masks[name]] == 0).all()) for name in masks)


@pytest.mark.parametrize("criterion", [name for name in criteria.names() if name != "pruner"])
@pytest.mark.parametrize("allocation", ["global", "as-ap"])
def test_every_criterion_chooses_the_same_weights(criterion, allocation):
    chosen = []
    for model in twins():
        plugin = AP(model, rate=0.1, criterion=criterion, allocation=allocation, batches=batches())
        plugin.mark_start()
        train(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1))
        state = copy.deepcopy(plugin.state_dict())
        plugin.load_state_dict(state)
        plugin.masks.prune(magnitudes(plugin.masks), amount=0.2)
        chosen.append(plugin.activate())
        plugin.detach()
    assert chosen[0].total > 0
    for name in chosen[0]:
        same(chosen[1][name], chosen[0][name])


@pytest.mark.parametrize("variant", ["none", "lite", "pro", "solo"])
def test_the_loop_makes_the_same_rows(variant):
    def training(model, masks, run):
        train(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
        run.reached(2)
        return {}

    histories = []
    for model in twins():
        loop = Cycles(
            model,
            None if variant == "solo" else lambda model, masks: magnitudes(masks),
            cycles=2,
            ap=variant,
            rewind="2it" if variant == "lite" else "init",
        )
        histories.append(loop.run(training))
        loop.load_state_dict(copy.deepcopy(loop.state_dict()))
    assert histories[0] == histories[1]


ACTIVATIONS = {
    **{name: (name, {}) for name in ap.activations.names()},
    **{
        f"{name}, learned{', by channel' if count > 1 else ''}": (name, {"learnable": True, "num_parameters": count})
        for name in ("swish", "smelu", "gsmelu", "rescu")
        for count in (1, 8)
    },
    "prelu, by channel": ("prelu", {"num_parameters": 8}),
    "star_relu, learned": ("star_relu", {"learnable": True}),
}


@pytest.mark.parametrize("which", ACTIVATIONS)
def test_every_activation_with_its_gradients_and_counts(which):
    name, parameters = ACTIVATIONS[which]
    module = ap.activations.create(name, **parameters).eval()  # RReLU draws in training
    twin = copy.deepcopy(module).to("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        x = (3 * torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
        there = x.detach().to("cuda").requires_grad_()
        weights = torch.linspace(-1, 1, x.numel()).view(x.shape).to(dtype)
        weights_there = weights.to("cuda")
        module.zero_grad(), twin.zero_grad()
        y = module(x)
        y.backward(weights)
        with never_waiting():
            y_there = twin(there)
            y_there.backward(weights_there)
        rtol = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(here(y_there), y.detach(), rtol=rtol, atol=rtol)
        torch.testing.assert_close(here(there.grad), x.grad, rtol=rtol, atol=rtol)
        for a, b in zip(twin.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(here(a.grad), b.grad, rtol=10 * rtol, atol=10 * rtol)


def rows(report):
    return [(d.name, d.kind, d.samples, d.total, d.static, d.can_die, d.gradient_total) for d in report.layers.values()]


SLOW = ["gsmelu, learned", "rescu, learned", "gsmelu, learned, by channel", "rescu, learned, by channel"]  # with an eps


@pytest.mark.parametrize(
    ("which", "eps"), [(n, None) for n in ACTIVATIONS] + [(n, 0.05) for n in ACTIVATIONS if n not in SLOW]
)
def test_dead_neurons_of_every_activation(which, eps):
    name, parameters = ACTIVATIONS[which]
    cannot_die = ap.activations.dead_range(ap.activations.create(name, **parameters), eps) is None
    parameters = {key: 8 if key == "num_parameters" else value for key, value in parameters.items()}
    reports = []
    for model in twins(name, **parameters):
        model.append(nn.ReLU())  # so that something can die
        monitor = DNRMonitor(model.eval(), every=1, eps=eps)
        with monitor:
            for x, _ in batches(next(model.parameters()).device):
                model(x)
            reports.append(monitor.sync())
    assert rows(reports[0]) == rows(reports[1])
    assert reports[1].layers["2"].can_die is not cannot_die


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.slope = nn.Linear(6, 8), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return torch.relu(nn.functional.prelu(self.linear(x), self.slope) - 0.1)


LEARNED = ["prelu, by channel", "prelu", "smelu, learned", "smelu, learned, by channel", "star_relu, learned"]


@pytest.mark.parametrize("which", ["relu", "gelu", "helu", *LEARNED, "functional"])
def test_observed_passes_never_wait_and_can_be_recorded(which):
    if which == "functional":
        torch.manual_seed(0)
        model = Functional()
        given = [torch.randn(5, 6) for _ in range(4)]
    else:
        name, parameters = ACTIVATIONS[which]
        model = network(name, **parameters).append(nn.ReLU())
        given = [x for x, _ in batches()] * 2
    twin = copy.deepcopy(model).to("cuda")
    given_there = [x.to("cuda") for x in given]
    with DNRMonitor(model, every=1) as monitor, DNRMonitor(twin, every=1) as there:
        recording = there.record()
        with there.into(recording):
            twin(given_there[0])
            recording.clear()
        with never_waiting(), there.into(recording):
            for x in given_there[:2]:
                assert there.due()
                with never_waiting(capturing=True):
                    twin(x)
                recording.passes += 1
        with never_waiting():
            for x in given_there[2:]:
                twin(x)
        twin_report = there.report()
        model(given[0])
        monitor.reset()
        for x in given:
            model(x)
        assert rows(twin_report) == rows(monitor.report())


def test_a_recording_follows_parameters_that_are_learned():
    """Between replays the ends are written where a captured graph reads them; what cannot die yet may do so later."""
    model = nn.Sequential(nn.Linear(4, 8), nn.PReLU(8), nn.Linear(8, 2), nn.ReLU())
    twin, x = copy.deepcopy(model).to("cuda"), torch.randn(16, 4)
    x_there = x.to("cuda")
    with DNRMonitor(model, every=1) as monitor, DNRMonitor(twin, every=1) as there:
        recording = there.record()
        with there.into(recording):
            twin(x_there)
            recording.clear()
        held = there._watch._sites[0].interval
        for slope in (0.25, 0.0):
            for net in (model, twin):
                with torch.no_grad():
                    net[1].weight[:3] = slope
            model(x)
            with never_waiting():
                assert there.due()
            with never_waiting(capturing=True), there.into(recording):  # what a replay does
                twin(x_there)
                recording.passes += 1
        assert all(a is b for a, b in zip(held, there._watch._sites[0].interval, strict=True))
        mine, theirs = monitor.report("train").layers["1"], there.report("train").layers["1"]
    assert mine.can_die
    assert theirs.can_die
    alive, inputs = theirs.alive_counts()
    assert inputs == 32
    dead = here(model[0](x) <= 0).sum(0)
    assert (inputs - here(alive)).tolist() == [*dead[:3].tolist(), *[0] * 5]


def test_swapped_activations_are_where_the_model_is():
    _, model = twins()
    ap.activations.swap(model, "prelu", num_parameters=8)
    assert all(parameter.is_cuda for parameter in model.parameters())
    model(batches("cuda")[0][0]).sum().backward()


def test_initialisation_of_a_model_on_the_device():
    found = []
    model = network("prelu", num_parameters=8)
    for model in (model, copy.deepcopy(model).to("cuda")):  # noqa: B020
        stds = initialize_(model, generator=torch.Generator().manual_seed(3))
        found.append(
            (stds, model[0].weight, gain(ap.activations.create("swish", learnable=True).to(model[0].weight.device)))
        )
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-6)
    same(found[1][1], found[0][1])


def test_compaction_on_the_device():
    _, model = twins()
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[3].weight[:2] = 0
    x = batches("cuda")[0][0]
    small = compact(model, x)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    same(small(x), model.eval()(x) if not small.training else small(x))
    assert measure_dnr(small, [x]).total < 1
