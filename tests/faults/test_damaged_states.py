"""Damaged mask, loop and monitor states: refused with one message, and nothing is changed then."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ap import AP, Masks
from ap.cycles import Cycles


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))


def magnitude(model, masks):
    return {name: masks.weight(name).detach().abs() for name in masks}


def pruned():
    masks = Masks(net())
    masks.prune(magnitude(masks.model, masks), amount=0.5)
    return masks


def snapshot(masks):
    weights = [masks.weight(name).detach().clone() for name in masks]
    return [masks[name].clone() for name in masks], weights


def same(first, second):
    return all(torch.equal(a, b) for parts in zip(first, second, strict=True) for a, b in zip(*parts, strict=True))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_flipped_bit_of_a_mask_is_noticed(data):
    state = pruned().state_dict()
    name = data.draw(st.sampled_from(list(state["bits"])))
    bits = state["bits"][name]
    for at in data.draw(st.sets(st.integers(0, 8 * len(bits) - 1), min_size=1, max_size=3)):
        bits[at // 8] ^= 1 << at % 8
    target = Masks(net())
    before = snapshot(target)
    with pytest.raises(ValueError, match=f"{name}: damaged mask state, its checksum is wrong"):
        target.load_state_dict(state)
    assert same(before, snapshot(target))


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=3),
    st.just([]),
    st.just({}),
    st.just(torch.zeros(0)),
    st.just(torch.zeros(3, dtype=torch.uint8)),
    st.just(torch.full((8,), 255, dtype=torch.uint8).to_sparse()),
    st.just(torch.empty(8, dtype=torch.uint8, device="meta")),
)


def places(state, prefix=()):
    """The paths to everything in nested dictionaries and lists."""
    found = [prefix] if prefix else []
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return found + [place for key, value in items for place in places(value, (*prefix, key))]


def change(data, state):
    """One thing of a state replaced, or taken away; None when that is what it was."""
    *path, key = data.draw(st.sampled_from(places(state)), label="place")
    inner = state
    for step in path:
        inner = inner[step]
    before = inner[key]
    if isinstance(inner, dict) and data.draw(st.booleans(), label="removed"):
        del inner[key]
        return key
    value = data.draw(odd, label="value")
    inner[key] = value
    return key if type(value) is not type(before) or repr(value) != repr(before) else None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_mask_state_is_refused_or_means_the_same(data):
    state = pruned().state_dict()
    change(data, state)
    target = Masks(net())
    before = snapshot(target)
    try:
        target.load_state_dict(state)
    except ValueError as error:
        assert "mask state" in str(error)  # noqa: PT017
        assert same(before, snapshot(target))
    else:
        assert same(snapshot(pruned()), snapshot(target))


def loop():
    return Cycles(net(), magnitude, cycles=3, amount=0.3, rate=0.1)


def train(model, masks, run):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.ones(4, 9)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return {"loss": float(model(x).square().mean().detach())}


def state_in_the_middle():
    states = []

    def note(loop):
        states.append((copy.deepcopy(loop.state_dict()), copy.deepcopy(loop.model.state_dict())))

    done = loop()
    done.run(train, on_phase=note)
    return *states[2], done.history


MIDDLE, WEIGHTS, HISTORY = state_in_the_middle()


def test_the_undamaged_state_goes_on_to_the_same_history():
    again = loop()
    again.model.load_state_dict(WEIGHTS)
    again.load_state_dict(copy.deepcopy(MIDDLE))
    assert again.run(train) == HISTORY


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_state_of_the_loop_is_refused_whole(data):
    state = copy.deepcopy(MIDDLE)
    change(data, state)
    target = loop()
    target.model.load_state_dict(WEIGHTS)
    before = snapshot(target.masks)
    try:
        target.load_state_dict(state)
    except ValueError as error:
        assert str(error)  # noqa: PT017
        assert same(before, snapshot(target.masks))
        assert (target.cycle, target.phase, target.history) == (0, "train", [])
        assert not target.plugin._handles
    target.plugin.detach()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_state_of_the_plugin_is_refused(data):
    plugin = AP(net(), rate=0.1)
    plugin.mark_start()
    state = copy.deepcopy(plugin.state_dict())
    plugin.detach()
    change(data, state)
    target = AP(net(), rate=0.1)
    try:
        target.load_state_dict(state)
    except ValueError as error:
        assert str(error)  # noqa: PT017
    target.detach()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 7), st.booleans())
def test_a_damaged_file_of_masks_is_an_error_or_the_same_masks(place, bit, cut):
    """torch.load looks at no checksum, so this is what stands between a flipped bit and another network."""
    masks = pruned()
    buffer = io.BytesIO()
    torch.save(masks.state_dict(), buffer)
    content = bytearray(buffer.getvalue())
    place %= len(content)
    if cut:
        del content[place:]
    else:
        content[place] ^= 1 << bit
    target = Masks(net())
    try:
        state = torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # torch's own message; what it raises depends on the byte
        return
    try:
        target.load_state_dict(state)
    except ValueError as error:
        assert "mask state" in str(error)  # noqa: PT017
    else:
        assert same(snapshot(masks), snapshot(target))
