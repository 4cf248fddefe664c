import copy
import gc
import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from ap import Masks
from ap.ranking import apportion


def mlp(*sizes, bias=True):
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def magnitudes(masks):
    return {name: masks.weight(name).detach().abs() for name in masks}


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.norm = nn.BatchNorm2d(4)
        self.embedding = nn.Embedding(5, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        self.head = nn.Linear(8, 5)


def test_selects_convolutions_linear_layers_and_projections_in_module_order():
    assert Masks(Everything()).names == [
        "conv.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
        "head.weight",
    ]


def test_filters():
    model = Everything()
    assert Masks(model, include=["conv", "head.weight"]).names == ["conv.weight", "head.weight"]
    assert Masks(model, include="cross.*", exclude="*out_proj*").names == [
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
    ]
    assert Masks(model, include=lambda name, module: isinstance(module, nn.Conv2d)).names == ["conv.weight"]
    assert Masks(model, include=["head", "embedding.weight"]).names == ["embedding.weight", "head.weight"]
    with pytest.raises(ValueError, match=r"include='heed.weight' matches no weight; close: head.weight"):
        Masks(model, include="heed.weight")


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    masks = Masks(model)
    assert (masks.names, masks.total) == (["0.weight"], 9)


def test_nothing_to_prune_and_wrappers():
    with pytest.raises(ValueError, match="BatchNorm2d has nothing to prune"):
        Masks(nn.BatchNorm2d(3))
    with pytest.raises(TypeError, match=r"wrapped in nn.DataParallel: pass its \.module"):
        Masks(nn.DataParallel(mlp(2, 2)))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got dict"):
        Masks({})
    with pytest.raises(ValueError, match=r"1\.weight is not initialised yet"):
        Masks(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))


def test_names_without_the_prefixes_of_wrappers():
    inner = mlp(3, 4, 2)
    expected = Masks(inner).names
    assert Masks(torch.compile(inner)).names == expected
    assert Masks(torch.optim.swa_utils.AveragedModel(inner)).names == expected
    odd = nn.Module()
    odd.module = inner
    odd.other = nn.Linear(1, 1)
    assert Masks(odd).names == ["module.0.weight", "module.2.weight", "other.weight"]


def test_prune_by_hand():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.1, -0.5, 0.3], [-0.2, 0.9, 0.05]]))
        model[1].weight.copy_(torch.tensor([[0.15, -0.4]]))
    masks = Masks(model)
    assert masks.prune(magnitudes(masks), amount=0.5) == 4  # of 8: 0.05, 0.1, 0.15, 0.2
    assert model[0].weight.tolist() == [
        [0.0, pytest.approx(-0.5), pytest.approx(0.3)],
        [0.0, pytest.approx(0.9), 0.0],
    ]
    assert masks["1.weight"].tolist() == [[False, True]]
    assert masks.density == 0.5
    assert masks.layer_density() == {"0.weight": 0.5, "1.weight": 0.5}


@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=5),
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5),
    st.sampled_from(["global", "layer", "row"]),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_counts_are_exact_and_nothing_comes_back(sizes, amounts, scope, seed):
    torch.manual_seed(seed)
    masks = Masks(mlp(*sizes, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # layers do run empty here
        for amount in amounts:
            alive = masks.alive
            before = {name: masks[name].clone() for name in masks}
            layer_alive = masks.layer_alive()
            gone = masks.prune({n: torch.rand_like(masks.weight(n)) for n in masks}, amount=amount, scope=scope)
            assert gone == round(amount * alive) == alive - masks.alive
            for name in masks:
                assert not bool((masks[name] & ~before[name]).any())
                assert bool((masks.weight(name)[~masks[name]] == 0).all())
            if scope == "layer":
                shares = apportion(gone, list(layer_alive.values()))
                for name, share in zip(masks, shares, strict=True):
                    assert layer_alive[name] - int(masks[name].sum()) == share


def test_groups_keep_n_of_m_along_the_input_axis():
    conv = nn.Conv2d(8, 3, 2, bias=False)
    masks = Masks(conv)
    assert masks.prune(magnitudes(masks), amount=0.5, scope="group", group=4) == 8 * 3 * 4 // 2
    grouped = masks["weight"].permute(0, 2, 3, 1).reshape(-1, 4)
    assert grouped.sum(1).unique().tolist() == [2]
    kept = torch.where(masks["weight"], conv.weight, 0).permute(0, 2, 3, 1).reshape(-1, 4)
    assert torch.equal(kept, conv.weight.permute(0, 2, 3, 1).reshape(-1, 4))
    with pytest.raises(ValueError, match=r"weight: its input axis of shape .* is not a multiple of the group of 3"):
        masks.prune(magnitudes(masks), amount=0.2, scope="group", group=3)


def test_bad_arguments_say_what_is_right():
    masks = Masks(mlp(3, 3, 2))
    scores = magnitudes(masks)
    for amount in (0, 1, -0.1, 1.5, float("nan"), True, "0.2"):
        with pytest.raises(ValueError, match=r"amount is a share of what is alive, in \(0, 1\)"):
            masks.prune(scores, amount=amount)
    with pytest.raises(ValueError, match="either amount or count"):
        masks.prune(scores)
    with pytest.raises(ValueError, match=r"2\.weight: no score given"):
        masks.prune({"0.weight": scores["0.weight"]}, amount=0.2)
    with pytest.raises(ValueError, match=r"'2\.weigth', which has no mask; close: 2\.weight"):
        masks.prune({**scores, "2.weigth": scores["2.weight"]}, amount=0.2)
    with pytest.raises(ValueError, match=r"2\.weight: scores of shape \[3, 2\]"):
        masks.prune({**scores, "2.weight": scores["2.weight"].t()}, amount=0.2)
    with pytest.raises(ValueError, match="scope must be one of global, layer, row, group, not 'layers'; close: layer"):
        masks.prune(scores, amount=0.2, scope="layers")
    with pytest.raises(KeyError, match="no mask named '0'"):
        masks["0"]
    assert masks.density == 1.0


def test_empty_layer_is_reported_and_a_floor_prevents_it():
    model = mlp(4, 4, 2, bias=False)
    with torch.no_grad():
        model[2].weight.fill_(1e-6)
    masks = Masks(model)
    with pytest.warns(UserWarning, match=r"left no weight in 2\.weight"):
        masks.prune(magnitudes(masks), amount=0.5)
    with torch.no_grad():
        model[2].weight.fill_(1e-6)
    masks = Masks(model, floor=3)
    assert masks.prune(magnitudes(masks), amount=0.5) == 12
    assert masks.layer_alive() == {"0.weight": 9, "2.weight": 3}
    with pytest.raises(ValueError, match="cannot remove 10: with at least 3 kept in every layer 6 may go"):
        masks.prune(magnitudes(masks), count=10)


def test_channels_last_and_strided_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    twin[0].weight = nn.Parameter(twin[0].weight.detach().permute(2, 3, 0, 1).clone().permute(2, 3, 0, 1))
    counts = []
    for candidate in (model, twin):
        masks = Masks(candidate)
        optimizer = torch.optim.SGD(candidate.parameters(), lr=0.1, momentum=0.9)
        masks.bind(optimizer)
        counts.append(masks.prune(magnitudes(masks), amount=0.4))
        for _ in range(2):
            candidate(torch.ones(1, 3, 8, 8)).sum().backward()
            optimizer.step()
        assert all(bool((masks.weight(n)[~masks[n]] == 0).all()) for n in masks)
    first, second = Masks.from_zeros(model), Masks.from_zeros(twin)
    assert counts[0] == counts[1] == round(0.4 * (8 * 3 * 9 + 4 * 8 * 9))
    for name in first:
        assert torch.equal(first[name], second[name])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "momentum, one by one": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_optimizer_revives_a_weight_or_its_momentum(kind):
    torch.manual_seed(0)
    model = mlp(6, 16, 3)
    masks = Masks(model)
    optimizer = OPTIMIZERS[kind](model.parameters())

    def steps(n):
        for _ in range(n):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(8, 6)), torch.randint(3, (8,))).backward()
            optimizer.step()

    def check():
        for name in masks:
            weight = masks.weight(name)
            dead = ~masks[name]
            assert bool((weight[dead] == 0).all())
            for value in optimizer.state[weight].values():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    assert bool((value[dead] == 0).all())

    steps(3)  # so that there is momentum to come back from
    handle = masks.bind(optimizer)
    masks.prune(magnitudes(masks), amount=0.5)
    steps(3)
    check()
    masks.prune(magnitudes(masks), amount=0.3)  # a later pruning is kept as well
    steps(3)
    check()
    handle.remove()
    steps(1)
    assert any(bool((masks.weight(n)[~masks[n]] != 0).any()) for n in masks)


def test_bind_refuses_an_optimizer_of_another_model():
    model = mlp(2, 2)
    other = copy.deepcopy(model)
    with pytest.raises(ValueError, match="this SGD holds none of the 1 masked weights"):
        Masks(model).bind(torch.optim.SGD(other.parameters(), lr=0.1))


def test_masked_gradients_keep_dead_weights_out_of_clipping():
    torch.manual_seed(0)
    model = mlp(6, 16, 3, bias=False)
    masks = Masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks.prune(magnitudes(masks), amount=0.5)
    model(torch.ones(2, 6)).square().sum().backward()
    everything = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    living = torch.stack([p.grad[masks[n]].square().sum() for n, p in model.named_parameters()]).sum().sqrt()
    assert living < everything
    optimizer.zero_grad()
    handle = masks.bind(optimizer, mask_gradients=True)
    model(torch.ones(2, 6)).square().sum().backward()
    torch.testing.assert_close(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]), living)
    handle.remove()


def test_state_is_packed_and_comes_back(tmp_path):
    torch.manual_seed(0)
    model = mlp(5, 7, 3)
    masks = Masks(model)
    masks.prune(magnitudes(masks), amount=0.37)
    state = masks.state_dict()
    assert sum(bits.numel() for bits in state["bits"].values()) == (35 + 7) // 8 + (21 + 7) // 8
    torch.save(state, tmp_path / "masks.pt")
    twin = mlp(5, 7, 3)
    fresh = Masks(twin)
    fresh.load_state_dict(torch.load(tmp_path / "masks.pt", weights_only=True))
    for name in masks:
        assert torch.equal(fresh[name], masks[name])
        assert bool((fresh.weight(name)[~masks[name]] == 0).all())


def test_damaged_or_foreign_states_change_nothing():
    masks = Masks(mlp(5, 7, 3))
    good = masks.state_dict()
    bad = [
        {},
        [],
        {**good, "schema": 99},
        {**good, "bits": {}},
        {**good, "bits": {**good["bits"], "0.weight": torch.zeros(1, dtype=torch.uint8)}},
        {**good, "bits": {**good["bits"], "0.weight": torch.zeros(5)}},
        {**good, "shapes": {**good["shapes"], "0.weight": [35]}},
        Masks(mlp(5, 7)).state_dict(),
    ]
    for state in bad:
        with pytest.raises(ValueError, match="mask state"):
            masks.load_state_dict(state)
    assert masks.density == 1.0


def test_from_zeros_and_apply():
    model = mlp(4, 4, 2)
    with torch.no_grad():
        model[0].weight[0] = 0
    masks = Masks.from_zeros(model)
    assert masks.alive == masks.total - 4
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    masks.apply_()
    assert model[0].weight[0].tolist() == [0, 0, 0, 0]
    assert model[0].weight[1:].eq(3).all()


def test_torch_prune_masks_are_understood_and_kept_in_step():
    model = mlp(6, 6, 2)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    masks = Masks(model)
    assert masks.names == ["0.weight", "2.weight"]
    assert masks.layer_alive() == {"0.weight": 18, "2.weight": 12}
    alive = masks["0.weight"].nonzero()[0]
    dead = torch.zeros(6, 6, dtype=torch.bool)
    dead[tuple(alive)] = True
    masks.remove({"0.weight": dead})
    assert int(model[0].weight_mask.sum()) == 17
    assert model[0].weight[tuple(alive)] == 0
    prune.remove(model[0], "weight")
    assert Masks.from_zeros(model).layer_alive()["0.weight"] == 17


def test_changed_shapes_are_refused_by_name():
    model = mlp(4, 4, 2)
    masks = Masks(model)
    model[0].weight = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"0\.weight has shape \[3, 4\] now, its mask \[4, 4\]"):
        masks["0.weight"]


def test_lazy_scores_of_several_dtypes():
    masks = Masks(mlp(3, 3, 3, bias=False))
    scores = {"0.weight": torch.arange(9.0).view(3, 3).half(), "2.weight": torch.arange(9.0).view(3, 3).double() + 0.5}
    masks.prune(scores, count=5)
    assert [int((~masks[n]).sum()) for n in masks] == [3, 2]  # 0, 0.5, 1, 1.5, 2


def test_packed_bits_match_numpy_order():
    masks = Masks(nn.Linear(3, 3, bias=False))
    masks.remove({"weight": torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)})
    bits = np.unpackbits(masks.state_dict()["bits"]["weight"].numpy(), count=9)
    assert bits.tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.slow  # the compiler takes its time
def test_a_compiled_optimizer_step_keeps_dead_weights_dead():
    torch.manual_seed(0)
    model = mlp(8, 16, 2)
    masks = Masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.9)
    handle = masks.hold()
    step = torch.compile(lambda: optimizer.step())
    for amount in (0.5, 0.2, 0.1):
        masks.prune(magnitudes(masks), amount=amount)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().sum().backward()
            step()
        assert all(bool((masks.weight(n)[~masks[n]] == 0).all()) for n in masks)
    handle.remove()


def test_included_weights_of_other_kinds_stand_in_module_order():
    model = nn.Sequential()
    model.add_module("emb", nn.Embedding(5, 4))
    model.add_module("norm", nn.LayerNorm(4))
    model.add_module("fc", nn.Linear(4, 2))
    assert Masks(model, include=["fc.weight", "norm.weight", "emb.weight"]).names == [
        "emb.weight",
        "norm.weight",
        "fc.weight",
    ]
    tied = nn.ModuleDict({"emb": nn.Embedding(3, 4), "first": nn.Linear(4, 4), "head": nn.Linear(4, 3)})
    tied["head"].weight = tied["emb"].weight
    assert Masks(tied).names == ["first.weight", "head.weight"]


def test_a_layer_that_was_replaced_is_named_with_the_remedy():
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
    masks = Masks(model)
    model[2] = nn.Linear(2, 3)
    gc.collect()
    with pytest.raises(ReferenceError, match=r"2.weight: the layer .* was replaced.*Masks\(model\)"):
        masks.apply_()
