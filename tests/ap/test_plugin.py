import copy
import gc
import re
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim import optimizer as optim

from ap import AP, Masks, criteria, steps
from ap.criteria import DecayTracker, Layer
from ap.plugin import split


def network(seed=0, inputs=12, hidden=24):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 3)
    )


def train(model, steps=6, seed=0, optimizer=None):
    """A plain loop whose owner knows nothing of masks."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(steps):
        x = torch.randn(16, model[0].in_features, generator=generator)
        y = torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def zero_smallest(model, share):
    """A pruner that only writes zeros: the share of what is not zero, over all layers."""
    weights = [m.weight for m in model if isinstance(m, nn.Linear)]
    values = np.concatenate([w.detach().numpy().ravel() for w in weights])
    nonzero = np.flatnonzero(values)
    gone = nonzero[np.argsort(np.abs(values[nonzero]), kind="stable")[: round(share * len(nonzero))]]
    values[gone] = 0
    at = 0
    with torch.no_grad():
        for w in weights:
            w.copy_(torch.from_numpy(values[at : at + w.numel()]).view_as(w))
            at += w.numel()


def numbers(masks):
    return np.concatenate([masks.weight(n).detach().numpy().ravel() for n in masks])


def test_ap_equals_a_numpy_reference_over_several_cycles():
    model = network()
    initial = copy.deepcopy(model.state_dict())
    plugin = AP(model, rate=0.05)
    alive = np.ones(plugin.masks.total, dtype=bool)
    for cycle in range(6):
        count = alive.sum()
        start = numbers(plugin.masks) * alive
        with plugin.cycle(amount=0.25) as share:
            assert share == (round(0.25 * count) - round(0.05 * count)) / count
            train(model, seed=cycle)
            end = numbers(plugin.masks)
            zero_smallest(model, share)
        # The reference: the pruner's zeros, then the least-moved negative ones of what is left.
        order = np.argsort(np.where(alive, np.abs(end), np.inf), kind="stable")
        alive[order[: round(0.25 * count) - round(0.05 * count)]] = False
        movement = np.where(alive & (end < 0), np.abs(end - start), np.inf)
        alive[np.argsort(movement, kind="stable")[: round(0.05 * count)]] = False
        np.testing.assert_array_equal(np.concatenate([plugin.masks[n].numpy().ravel() for n in plugin.masks]), alive)
        assert alive.sum() == count - round(0.25 * count)
        model.load_state_dict(initial)  # a rewind that knows nothing of masks
    plugin.masks.apply_()
    np.testing.assert_array_equal(numbers(plugin.masks) == 0, ~alive)
    plugin.detach()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_what_ap_removed_stays_removed_through_training_and_rewinding(optimizer):
    model = network()
    initial = copy.deepcopy(model.state_dict())
    plugin = AP(model)
    for _ in range(3):
        with plugin.cycle(amount=0.3) as share:
            own = optimizer(model.parameters())  # made anew, never bound
            train(model, optimizer=own)
            zero_smallest(model, share)
            alive = plugin.masks.alive
        model.load_state_dict(initial)
        assert plugin.masks.alive < alive
    density = plugin.masks.density
    plugin.masks.apply_()
    train(model, 10)
    assert Masks.from_zeros(model).density == density == plugin.masks.density
    plugin.detach()
    train(model, 1)
    assert Masks.from_zeros(model).density > density  # let go: an optimizer may revive again


def test_torch_prune_in_the_block_and_afterwards():
    model = network()
    plugin = AP(model, rate=0.05)
    layers = [(m, "weight") for m in model if isinstance(m, nn.Linear)]
    for _ in range(3):
        alive = plugin.masks.alive
        with plugin.cycle(amount=0.25) as share:
            train(model)
            prune.global_unstructured(layers, prune.L1Unstructured, amount=share)
        assert plugin.masks.alive == alive - round(0.25 * alive)
        assert sum(int(m.weight_mask.sum()) for m, _ in layers) == plugin.masks.alive
    reference = model(torch.ones(1, 12))
    for layer, name in layers:
        prune.remove(layer, name)
    torch.testing.assert_close(model(torch.ones(1, 12)), reference)
    assert Masks.from_zeros(model).alive == plugin.masks.alive
    plugin.detach()


def test_a_head_of_zeros_is_not_pruned_but_may_be_later():
    model = network()
    nn.init.zeros_(model[4].weight)
    plugin = AP(model, rate=0.05)
    with plugin.cycle(amount=0.2):
        pass  # nothing is trained, nothing pruned: zeros are where they were
    assert plugin.masks.layer_alive()["4.weight"] == 72
    with plugin.cycle(amount=0.2):
        train(model)
        with torch.no_grad():
            model[4].weight[0] = 0  # learned, then pruned, although it is zero as at the start
    assert not plugin.masks["4.weight"][0].any()
    assert plugin.masks["4.weight"][1:].sum() >= 48 - round(0.05 * plugin.masks.total)
    plugin.detach()


def test_frozen_start_keeps_zeros_of_a_layer_that_does_not_learn():
    model = network()
    nn.init.zeros_(model[4].weight)
    model[4].weight.requires_grad_(False)
    plugin = AP(model, rate=0.05)
    with plugin.cycle(amount=0.2) as share:
        train(model)
        zero_smallest(model, share)
    assert plugin.masks.layer_alive()["4.weight"] == 72
    plugin.detach()


def test_another_models_steps_do_not_touch_what_is_known_of_zeros():
    """They may be captured in a CUDA graph, which would go on writing, also when this plugin's memory is another's."""
    models = network(), network(seed=1)
    plugins = [AP(model) for model in models]
    for model, plugin in zip(models, plugins, strict=True):
        nn.init.zeros_(model[4].weight)
        plugin.mark_start()
    before = [plugin.followed[0]._version for plugin in plugins]
    train(models[0], steps=3)
    after = [plugin.followed[0]._version for plugin in plugins]
    for plugin in plugins:
        plugin.detach()
    assert (after[0] - before[0], after[1] - before[1]) == (3, 0)


def test_an_error_in_the_block_activates_nothing():
    plugin = AP(network())
    with pytest.raises(RuntimeError, match="user"), plugin.cycle(amount=0.2):
        raise RuntimeError("user")
    assert plugin.masks.density == 1.0
    with plugin.cycle(amount=0.2), pytest.raises(RuntimeError, match="inside a cycle already"), plugin.cycle():
        pass
    plugin.detach()


def test_preview_changes_nothing_and_tells_what_goes():
    model = network()
    plugin = AP(model)
    plugin.mark_start()
    train(model)
    before = copy.deepcopy(model.state_dict())
    preview = plugin.preview(count=20)
    assert plugin.masks.density == 1.0
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    removed = plugin.activate(count=20)
    assert removed.total == sum(removed.counts.values()) == 20
    for name in preview:
        assert torch.equal(preview[name], removed[name])
        assert bool((before[name][removed[name]] < 0).all())
        assert bool((model.state_dict()[name][removed[name]] == 0).all())
    assert preview.overlap(removed) == 1.0
    plugin.detach()


def test_too_few_negatives_are_taken_warned_about_and_recorded():
    model = network()
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.abs_()
        model[0].weight[0, :5] = -0.1
    plugin = AP(model)
    plugin.mark_start()
    with pytest.warns(UserWarning, match="AP found 5 of the 30 weights"):
        removed = plugin.activate(count=30)
    assert (removed.total, plugin.shortfall) == (5, 25)
    assert removed.counts["0.weight"] == 5
    plugin.detach()


def test_bad_input_says_what_is_right():
    model = network()
    with pytest.raises(ValueError, match="unknown criterion 'least-moved-negatives'; close: least-moved-negative"):
        AP(model, criterion="least-moved-negatives")
    with pytest.raises(ValueError, match=r"rate is a share of what is alive, in \(0, 1\), not 0"):
        AP(model, rate=0)
    with pytest.raises(ValueError, match=r"where='3' matches no layer"):
        AP(model, where="3")
    with pytest.raises(ValueError, match="allocation must be 'global' or 'as-ap'"):
        AP(model, allocation="layer")
    with pytest.raises(ValueError, match=r"most-waking.*give AP"):
        AP(model, criterion="most-waking")
    plugin = AP(model, rate=0.2)
    with pytest.raises(ValueError, match=r"rate \(0.2\) must be below amount \(0.2\)"), plugin.cycle(amount=0.2):
        pass
    with pytest.raises(ValueError, match=r"amount is a share"), plugin.cycle(amount=1.2):
        pass
    fresh = AP(model)
    with pytest.raises(RuntimeError, match="does not know where training started"):
        fresh.activate(count=3)
    fresh.mark_start()
    with pytest.raises(ValueError, match="count must be between 0 and the"):
        fresh.activate(count=10**6)
    fresh.detach()


def test_the_hook_goes_with_the_model():
    AP(network()).mark_start()
    gc.collect()
    hooks, before = len(optim._global_optimizer_post_hooks), len(steps._functions)
    for _ in range(20):
        model = network()
        plugin = AP(model)
        plugin.mark_start()
        plugin.mark_start()
    reference = weakref.ref(model)
    del model, plugin
    gc.collect()
    assert reference() is None
    assert (len(optim._global_optimizer_post_hooks), len(steps._functions)) == (hooks, before)


def test_dead_stays_dead_when_the_plugin_itself_is_gone():
    model = network()
    plugin = AP(model)
    plugin.mark_start()
    plugin.activate(count=50)
    masks = plugin.masks.state_dict()
    del plugin
    gc.collect()
    train(model, 5)
    again = Masks(copy.deepcopy(model))
    again.load_state_dict(masks)
    assert all(bool((model.get_parameter(n)[~again[n]] == 0).all()) for n in again)


def test_split_is_the_same_total_in_every_arm():
    for alive in range(1, 400):
        total, own = split(alive, 0.2, 0.02)
        assert (total, own) == (round(0.2 * alive), round(0.02 * alive))


def example_layer():
    return Layer(
        "w",
        weight=torch.tensor([[-1.0, 2.0, -3.0], [0.5, -0.25, -4.0]]),
        start=torch.tensor([[-1.5, 2.25, -3.0], [0.0, -1.0, -5.0]]),
        decay=0.5,
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("least-moved-negative", [[0.5, np.inf, 0.0], [np.inf, 0.75, 1.0]]),
        ("least-moved", [[0.5, 0.25, 0.0], [0.5, 0.75, 1.0]]),
        ("least-moved-positive", [[np.inf, 0.25, np.inf], [0.5, np.inf, np.inf]]),
        ("most-moved-negative", [[-0.5, np.inf, 0.0], [np.inf, -0.75, -1.0]]),
        ("smallest-negative", [[1.0, np.inf, 3.0], [np.inf, 0.25, 4.0]]),
        ("decay-corrected", [[0.25, np.inf, 1.5], [np.inf, 0.25, 1.5]]),
    ],
)
def test_criteria_by_hand(name, expected):
    np.testing.assert_array_equal(criteria.get(name)(example_layer()).numpy(), np.array(expected, dtype=np.float32))


def test_random_criteria_draw_once_per_seed_and_layer():
    layer = example_layer()
    draws = criteria.get("random")(layer)
    assert torch.equal(draws, criteria.get("random")(layer))
    assert torch.equal(torch.isinf(criteria.get("random-negative")(layer)), layer.weight >= 0)
    other = Layer("v", layer.weight, layer.start, seed=0)
    assert not torch.equal(draws, criteria.get("random")(other))
    assert not torch.equal(draws, criteria.get("random")(Layer("w", layer.weight, layer.start, seed=1)))


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.3},
        {},
    ],
)
def test_decay_is_followed_exactly(options):
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=0.05, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    tracker = DecayTracker()
    for _ in range(50):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        tracker.step(optimizer)
        schedule.step()
    assert tracker.factor(weight) == pytest.approx(weight.item(), rel=1e-12)
    assert weight.item() < 0.96


def test_decay_corrected_in_a_loop_and_refused_where_it_cannot_be_known():
    model = network()
    with torch.no_grad():
        model[0].weight[:, 0] = -torch.rand(24) - 0.1  # fed by an input that is always zero: only decay moves them
    plugin = AP(model, criterion="decay-corrected", where=["0"])
    plugin.mark_start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    for i in range(20):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(i))
        x[:, 0] = 0
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.randint(3, (16,))).backward()
        optimizer.step()
    chosen = plugin.preview(24)
    assert bool(chosen["0.weight"][:, 0].all())  # exactly those that learned nothing
    plain = plugin.preview(24, criterion="least-moved-negative")
    assert not bool(plain["0.weight"][:, 0].all())
    adam = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    with pytest.raises(ValueError, match="decay-corrected cannot tell weight decay from learning in Adam"):
        adam.step()
    plugin.detach()


def test_allocation_as_ap_separates_layer_from_weight():
    model = network()
    plain = AP(model)
    plain.mark_start()
    train(model)
    expected = plain.preview(60)
    for criterion in ("random-negative", "least-moved-positive", "random"):
        plugin = AP(model, criterion=criterion, allocation="as-ap")
        plugin.load_state_dict(plain.state_dict())
        chosen = plugin.preview(60)
        assert chosen.counts == expected.counts
        assert chosen.overlap(expected) < 0.7
        plugin.detach()
    plain.detach()


def test_own_criterion_and_where():
    model = network()
    plugin = AP(model, criterion=lambda layer: layer.weight.abs(), where=["0", "4.*"])
    plugin.mark_start()
    removed = plugin.activate(count=40)
    assert set(removed) == {"0.weight", "4.weight"}
    assert removed.total == 40
    plugin.detach()


def test_most_waking_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-0.5, -1.0], [-2.0, 1.0]]))
        model[2].weight.copy_(torch.tensor([[-1.0, -1.0]]))
    x = torch.tensor([[1.0, 0.0], [1.0, 4.0], [3.0, 4.0], [3.0, 8.0]])
    # E[x] = (2, 4), E[x²] = (5, 24). Unit 0 is -0.5 x0 - x1: always dead; unit 1 is -2 x0 + x1: half dead.
    # The last layer feeds no activation: no lift at all.
    plugin = AP(model, criterion="most-waking", batches=[(x[:2], None), (x[2:], None)])
    plugin.mark_start()
    scores = [[-(2 / 5 * 1) / 0.5, -(4 / 24 * 1) / 1.0], [-(2 / 5 * 0.5) / 2.0, np.inf]]
    order = np.argsort(np.array(scores).ravel())
    for count in range(1, 4):
        chosen = plugin.preview(count)
        assert sorted(chosen["0.weight"].view(-1).nonzero()[:, 0].tolist()) == sorted(order[:count].tolist())
    assert plugin.preview(5).counts == {"0.weight": 3, "2.weight": 2}
    plugin.detach()


def test_gentle_waking_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-0.5, -1.0], [-2.0, 1.0]]))
        model[2].weight.copy_(torch.tensor([[-1.0, -1.0]]))
    x = torch.tensor([[1.0, 0.0], [1.0, 4.0], [3.0, 4.0], [3.0, 8.0]])
    # √E[x²] = (√5, √24); unit 0 is always dead, unit 1 half of the time: √5 / 2, √24, 4 √5. The last layer feeds no
    # activation, so it comes last.
    plugin = AP(model, criterion="gentle-waking", batches=[(x, None)])
    plugin.mark_start()
    order = [0, 1, 2]
    assert 0.5 * 5**0.5 < 24**0.5 < 2 * 5**0.5 / 0.5
    for count in range(1, 4):
        chosen = plugin.preview(count)
        assert chosen["0.weight"].view(-1).nonzero()[:, 0].tolist() == order[:count]
    assert plugin.preview(5).counts == {"0.weight": 3, "2.weight": 2}
    plugin.detach()


def test_most_waking_with_groups_and_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1, bias=False),
    )
    x = torch.rand(8, 4, 5, 5)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([-9.0, -9, -9, 9, 9, 9]))  # the first three channels are dead, the others not
    plugin = AP(model, criterion="most-waking", batches=[(x, None)], where=["0"])
    plugin.mark_start()
    weight = model[0].weight.detach()
    mean, square = x.mean((0, 2, 3)), x.square().mean((0, 2, 3))
    lift = torch.zeros_like(weight)
    for row in range(3):
        for column in range(2):
            channel = column  # rows 0 to 2 belong to the first group: channels 0 and 1
            lift[row, column] = mean[channel] / square[channel] / weight[row, column].abs()
    lift[weight >= 0] = -1
    best = lift.view(-1).topk(5).indices
    assert set(plugin.preview(5)["0.weight"].view(-1).nonzero()[:, 0].tolist()) == set(best.tolist())
    plugin.detach()


def test_where_rectified_limits_the_step():
    plugin = AP(network(), where="rectified")
    plugin.mark_start()
    assert set(plugin.preview(10)) == {"2.weight"}  # the first layer sees raw inputs, the last feeds nothing
    with pytest.raises(ValueError, match="no layer of this model has a rectified input"):
        AP(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)), where="rectified")


def test_a_model_whose_neurons_cannot_die_is_pointed_out_once():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    plugin = AP(model)
    with pytest.warns(UserWarning, match=r"no neuron of this model can die \(Tanh cannot\)"), plugin.cycle() as share:
        zero_smallest(model, share)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with plugin.cycle() as share:
            zero_smallest(model, share)
    plugin.detach()


@pytest.mark.parametrize("where", [None, [], ()])
def test_where_must_name_a_layer(where):
    with pytest.raises(ValueError, match="names no layer: 'all', 'rectified'"):
        AP(network(), where=where)


def test_warnings_name_the_users_line_whatever_lies_between():
    model = network()
    plugin = AP(model)
    source = "with plugin.cycle(amount=0.2) as share:\n    model[2].weight.data.zero_()\n"
    with warnings.catch_warnings(record=True, action="always") as caught:
        exec(compile(source, "train.py", "exec"), {"plugin": plugin, "model": model, "__name__": "__main__"})
    assert [(w.filename, w.lineno, str(w.message)) for w in caught] == [
        ("train.py", 1, "pruning left no weight in 2.weight")
    ]
    plugin.detach()


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        (lambda model, share: None, "the pruner removed nothing in this cycle"),
        (lambda model, share: zero_smallest(model, 0.2), "give it the share that cycle.. yields, not the amount"),
        (zero_smallest, None),
    ],
)
def test_a_pruner_that_removes_nothing_or_the_whole_amount_is_pointed_out(slip, message):
    model = network()
    plugin = AP(model)
    with warnings.catch_warnings(record=True, action="always") as caught, plugin.cycle(amount=0.2) as share:
        train(model)
        slip(model, share)
    plugin.detach()
    texts = [str(one.message) for one in caught]
    assert len(texts) == bool(message)
    assert all(re.search(message, text) for text in texts)


def test_complex_weights_have_no_sign():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"sign of weights; 0\.weight is complex"):
        AP(model)
    plugin = AP(model, where="1")  # what can be is
    with plugin.cycle(amount=0.4) as share:
        plugin.masks.prune({name: plugin.masks.weight(name).detach().abs() for name in plugin.masks}, amount=share)
    assert plugin.masks.alive == 24 - round(0.4 * 24)
