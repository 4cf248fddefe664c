"""The same answers on a CUDA device as on the CPU. Run with `scripts/test -m gpu`."""

import copy

import pytest
import torch
from torch import nn

from ap import AP, Masks
from ap.ranking import lowest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10))


def magnitudes(masks):
    return {name: masks.weight(name).detach().abs() for name in masks}


def test_ranking_equals_the_cpu():
    generator = torch.Generator().manual_seed(0)
    scores = {str(i): torch.randn(700, 1100, generator=generator).round(decimals=2) for i in range(4)}
    eligible = {n: torch.rand(700, 1100, generator=generator) < 0.8 for n in scores}
    expected = lowest(scores, eligible, 500_000)
    found = lowest({n: s.cuda() for n, s in scores.items()}, {n: e.cuda() for n, e in eligible.items()}, 500_000)
    for name in scores:
        assert torch.equal(found[name].cpu(), expected[name])


def test_masks_follow_the_model_to_the_device():
    model = network()
    masks = Masks(model)
    model.cuda().to(memory_format=torch.channels_last)
    assert masks.prune(magnitudes(masks), amount=0.3) == round(0.3 * masks.total)
    assert masks["0.weight"].device.type == "cuda"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    masks.bind(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 8, 8, device="cuda")).square().mean().backward()
        optimizer.step()
    for name in masks:
        assert bool((masks.weight(name)[~masks[name]] == 0).all())


def test_a_captured_step_sees_later_prunings():
    model = network().cuda()
    masks = Masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.bind(optimizer)
    x = torch.randn(8, 3, 8, 8, device="cuda")

    def step():
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    masks.prune(magnitudes(masks), amount=0.5)
    for _ in range(3):
        graph.replay()
    for name in masks:
        assert bool((masks.weight(name)[~masks[name]] == 0).all())
        assert bool((masks.weight(name)[masks[name]] != 0).all())


def test_the_plugin_removes_the_same_weights_as_on_the_cpu():
    model = network()
    twin = copy.deepcopy(model).cuda()
    chosen = []
    for candidate in (model, twin):
        plugin = AP(candidate)
        plugin.mark_start()
        with torch.no_grad():
            for i, parameter in enumerate(candidate.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
                parameter.add_(noise.to(parameter.device), alpha=0.01)
        chosen.append(plugin.activate(count=100))
        plugin.detach()
    for name in chosen[0]:
        assert torch.equal(chosen[0][name], chosen[1][name].cpu())
