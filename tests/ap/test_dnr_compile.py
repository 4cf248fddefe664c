"""The monitor and torch.compile: the same counts, two graphs (one that counts, one that does not), no third."""

import copy

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

from ap.dnr import DNRMonitor


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.linear = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 8)

    def forward(self, x):
        return F.gelu(self.linear(F.relu(self.linear(self.block(x)))))


def modules():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.PReLU(8, init=0.0), nn.Linear(8, 8), nn.SiLU())


def compile_first(model, **options):
    compiled = torch.compile(model, **options)
    return compiled, DNRMonitor(compiled, every=3)


def used_before(model, **options):
    compiled, monitor = compile_first(model, **options)
    compiled(torch.randn(16, 6))
    return compiled, monitor


def attach_first(model, **options):
    monitor = DNRMonitor(model, every=3).attach()
    return torch.compile(model, **options), monitor


def in_place(model, **options):
    model.compile(**options)
    return model, DNRMonitor(model, every=3)


def in_a_function(model, **options):
    monitor = DNRMonitor(model, every=3).attach()
    return torch.compile(lambda x: model(x) * 1, **options), monitor


BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("build", [modules, Functional])
@pytest.mark.parametrize("arrange", [compile_first, used_before, attach_first, in_place, in_a_function])
def test_counts_are_those_of_the_model_as_it_is(arrange, build, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build()
    plain = copy.deepcopy(model)
    batches = [torch.randn(16, 6) for _ in range(7)]
    compiled, monitor = arrange(model, backend=backend)
    with monitor, DNRMonitor(plain, every=3) as reference:
        for x in batches:
            torch.testing.assert_close(compiled(x), plain(x))
    report, expected = monitor.report(), reference.report()
    assert report.passes == expected.passes == 3
    assert list(report.layers) == list(expected.layers)
    for name, layer in expected.layers.items():
        assert (report.layers[name].samples, report.layers[name].units) == (layer.samples, layer.units)
        # at most a rounding apart: a compiler may compute a pre-activation in another order
        difference = report.layers[name].alive_counts()[0] - layer.alive_counts()[0]
        assert int(difference.abs().sum()) == 0


def graphs(run, batches):
    torch._dynamo.utils.counters.clear()
    for x in batches:
        run(x)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_two_graphs_however_many_passes_and_none_while_detached():
    torch._dynamo.reset()
    model = Functional()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batches = [torch.randn(16, 6) for _ in range(9)]
    with DNRMonitor(compiled, every=4):
        assert graphs(compiled, batches) == 2
    assert graphs(compiled, batches) <= 1
    assert torch.equal(compiled(batches[0]), model(batches[0]))


def test_learnable_dead_ranges_make_no_new_graphs():
    from ap import activations

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 8), activations.create("smelu", learnable=True))
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with DNRMonitor(compiled, every=1) as monitor:
        torch._dynamo.utils.counters.clear()
        for _ in range(5):
            compiled(torch.randn(16, 6)).sum().backward()
            optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert monitor.report().layers["1"].samples == 80


def test_a_whole_graph_around_the_hooks_is_refused_with_the_remedy():
    torch._dynamo.reset()
    model = modules()
    monitor = DNRMonitor(model, every=3).attach()
    compiled = torch.compile(lambda x: model(x), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"attach it to the compiled model|DNRMonitor\._enter"):
        compiled(torch.randn(4, 6))
    monitor.detach()


def test_names_are_without_the_wrappers():
    torch._dynamo.reset()
    model = torch.compile(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), backend="eager")
    with DNRMonitor(model, every=1) as monitor:
        model(torch.randn(4, 6))
    assert list(monitor.report().layers) == ["1"]


def test_the_count_takes_outputs_in_whatever_layout_the_compiler_chose():
    operator = torch.ops.ap.count_nonzero_over_batch.default
    assert torch.Tag.flexible_layout in operator.tags  # or inductor copies each into the layout that was traced
    x = torch.randn(300, 3, 4, 6).relu()
    expected = (x != 0).sum(0, dtype=torch.int32)
    for layout in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        count = operator(layout)
        assert torch.equal(count, expected)
        assert count.is_contiguous()
    torch.library.opcheck(operator, (x,), test_utils=("test_schema", "test_faketensor"))
