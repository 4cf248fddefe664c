"""Several models, plugins and monitors at a time, also in threads: none disturbs another."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from ap import AP, DNRMonitor, Masks, measure_dnr, prune_iteratively


class Net(nn.Module):
    """Modules and functions, so that every way of observing is in use."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.relu, self.last = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3

    def forward(self, x):
        return self.last(torch.relu(self.relu(self.first(x)) - 0.1))


def magnitude(model, masks):
    return {name: masks.weight(name).detach().abs() for name in masks}


def work(seed):
    """A whole small pruning run; all that comes of it."""
    model = Net(seed)
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
    reports = []

    def train(model, masks, run):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        with DNRMonitor(model, every=2) as monitor:
            for _ in range(12):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
                assert all(bool((masks.weight(name)[~masks[name]] == 0).all()) for name in masks)
            reports.append(monitor.report("train").to_dict())
        reports.append(measure_dnr(model, [x]).to_dict())
        return {}

    history = prune_iteratively(model, train, magnitude, cycles=3, amount=0.3, rate=0.05)
    return history, reports, [parameter.detach().clone() for parameter in model.parameters()]


def same(first, second):
    return first[:2] == second[:2] and all(map(torch.equal, first[2], second[2]))


def test_threads_do_not_see_each_other():
    torch.set_num_threads(1)
    expected = [work(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for got, want in zip(pool.map(work, range(6)), expected, strict=True):
                assert same(got, want)


def test_hooks_that_come_and_go_while_others_step():
    """PyTorch goes through one list of global hooks, in every thread, while plugins are made and dropped."""
    stop, errors = threading.Event(), []

    def step():
        model = Net(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model(torch.ones(2, 8)).sum().backward()
        try:
            while not stop.is_set():
                optimizer.step()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=step) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        plugin = AP(Net(1))
        plugin.mark_start()
        plugin.detach()
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


def test_several_plugins_on_one_model_and_several_models():
    """Two plugins with masks of their own on different layers of one model, a third on another model."""
    torch.manual_seed(0)
    first, other = Net(0), Net(1)
    a, b, c = AP(Masks(first, include="first"), 0.1), AP(Masks(first, include="last"), 0.2), AP(other, 0.1)
    optimizer = torch.optim.Adam([*first.parameters(), *other.parameters()], lr=0.05)
    with a.cycle(0.3) as share_a, b.cycle(0.4) as share_b, c.cycle(0.3) as share_c:
        for plugin, share in ((a, share_a), (b, share_b), (c, share_c)):
            plugin.masks.prune(magnitude(None, plugin.masks), amount=share)
        for _ in range(5):
            optimizer.zero_grad()
            (first(torch.ones(2, 8)).sum() + other(torch.ones(2, 8)).sum()).backward()
            optimizer.step()
    assert (a.masks.alive, b.masks.alive, c.masks.alive) == (128 - 38, 48 - 19, 176 - 53)
    for plugin in (a, b, c):
        for name in plugin.masks:
            assert bool((plugin.masks.weight(name)[~plugin.masks[name]] == 0).all())
    b.detach()  # the others go on
    optimizer.step()
    assert all(bool((a.masks.weight(name)[~a.masks[name]] == 0).all()) for name in a.masks)
    assert bool((b.masks.weight("last.weight")[~b.masks["last.weight"]] != 0).any())


@pytest.mark.parametrize("wrapped", ["model", "inside"])
def test_data_parallel_is_refused_by_everything(wrapped):
    from ap import compact

    inner = nn.DataParallel(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    model = inner if wrapped == "model" else nn.Sequential(inner)
    uses = [Masks, AP, DNRMonitor, lambda m: measure_dnr(m, [torch.ones(1, 4)]), lambda m: compact(m, torch.ones(1, 4))]
    for use in uses:
        with pytest.raises(TypeError, match=r"nn.DataParallel: pass its .module, or use DistributedDataParallel"):
            use(model)


def test_fsdp_is_refused_by_everything(tmp_path):
    """Both generations, with one rank of gloo."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    from ap import compact

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = []
        try:
            from torch.distributed.fsdp import fully_shard

            wrapped.append(fully_shard(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))))
        except ImportError:  # torch 2.6 has it elsewhere
            from torch.distributed._composable.fsdp import fully_shard

            wrapped.append(fully_shard(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))))
        if torch.cuda.is_available():  # the first generation needs an accelerator
            wrapped.append(FullyShardedDataParallel(nn.Linear(4, 4).cuda()))
        for model in wrapped:
            for use in (Masks, AP, DNRMonitor, lambda m: compact(m, torch.ones(1, 4))):
                with pytest.raises(TypeError, match=r"FSDP, whose weights are in pieces: prune before wrapping"):
                    use(model)
    finally:
        dist.destroy_process_group()


class Waiting(nn.Sequential):
    """A model in whose middle a thread can be held."""

    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
        self.hold: dict[int, tuple[threading.Event, threading.Event]] = {}

    def forward(self, x):
        x = self[1](self[0](x))
        if threading.get_ident() in self.hold:
            arrived, go_on = self.hold.pop(threading.get_ident())
            arrived.set()
            assert go_on.wait(20)
        return torch.relu(self[3](self[2](x)))


def test_passes_of_one_model_that_overlap_are_told_of_and_not_counted():
    """Neither the pass that was disturbed nor the one that disturbed it: each would hold parts of the other."""
    model = Waiting()
    arrived, go_on = threading.Event(), threading.Event()

    def held():
        model.hold[threading.get_ident()] = arrived, go_on
        model(torch.ones(3, 4))

    with DNRMonitor(model, every=1) as monitor:
        model(torch.ones(2, 4))
        thread = threading.Thread(target=held)
        thread.start()
        assert arrived.wait(20)
        with pytest.warns(UserWarning, match="several threads pass this model forward at once"):
            model(torch.ones(5, 4))
        go_on.set()
        thread.join()
        model(torch.ones(7, 4))  # alone again
        report = monitor.report()
        assert report.passes == 2
        assert {name: layer.samples for name, layer in report.layers.items()} == {"1": 9, "3": 9, "/relu": 9}
    assert not torch.overrides._get_current_function_mode_stack()


def test_threads_that_take_turns_are_counted():
    model, turn, x = Net(0), threading.Lock(), torch.randn(8, 8)
    with DNRMonitor(model, every=1) as monitor:

        def work():
            for _ in range(20):
                with turn:
                    model(x)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    report = monitor.report()
    assert (report.passes, report.layers["relu"].samples) == (80, 640)
    assert report.total == pytest.approx(measure_dnr(model, [x]).total)


def test_threads_that_race_count_whole_passes_only():
    torch.set_num_threads(1)
    model, x = Net(0), torch.randn(64, 8)
    rate = measure_dnr(model, [x]).total
    with DNRMonitor(model, every=1) as monitor:
        model(x)
        with ThreadPoolExecutor(4) as pool, pytest.warns(UserWarning, match="several threads"):
            list(pool.map(lambda _: [model(x) for _ in range(100)], range(4)))
        model(x)
    report = monitor.report()
    assert 2 <= report.passes < 402
    assert report.layers["relu"].samples == report.layers["/relu"].samples == 64 * report.passes
    assert report.total == pytest.approx(rate)


def test_a_thread_that_ended_in_the_middle_of_a_pass_is_forgotten():
    class Ends(Net):
        def forward(self, x):
            if threading.current_thread() is not threading.main_thread():
                raise SystemExit
            return super().forward(x)

    model = Ends(0)
    with DNRMonitor(model, every=1) as monitor:
        with ThreadPoolExecutor(1) as pool, pytest.raises(SystemExit):
            pool.submit(model, torch.ones(2, 8)).result()
        model(torch.ones(3, 8))
    assert monitor.report().layers["relu"].samples == 3
