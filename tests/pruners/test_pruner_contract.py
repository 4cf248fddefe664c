"""What holds for every pruner: exact counts, nothing revived, nothing changed by scores(), helpful errors."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pruners
from ap.masks import Masks
from pruners.base import _REGISTRY, Pruner, register
from recipes import models

STRUCTURED = [name for name in pruners.names() if name.startswith("structured-")]
EXACT = [name for name in pruners.names() if name not in STRUCTURED and name != "nm"]
ROUNDS = {"synflow": 3}  # instead of 100, to be quick


class Dense(nn.Module):
    """Concatenations, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = torch.cat([x, F.relu(self.second(x))], 1)
        return self.head(F.relu(self.third(x)).mean((2, 3)))


class Depthwise(nn.Module):
    """A MobileNet block."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 4, 1)
        )
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Attention(nn.Module):
    """A transformer on patches."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.block(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


MODELS = {
    "plain": lambda: models.create("cnn", image_size=8),
    "residual": lambda: models.create("resnet20", image_size=8, width=0.25, shortcut="B"),
    "dense": Dense,
    "depthwise": Depthwise,
    "attention": Attention,
}


def data(count=2):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.rand(6, 3, 8, 8, generator=generator), torch.randint(0, 10, (6,), generator=generator))
        for _ in range(count)
    ]


def make(name):
    needs_example = name in ("lookahead", "synaptic-stripping")
    options = {"example_input": torch.zeros(1, 3, 8, 8)} if needs_example else {}
    return pruners.create(name, rounds=ROUNDS.get(name), **options)


def state(model):
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return tensors, gradients, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def same(a, b):
    tensors = all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    gradients = all(
        (x is None) == (y is None) and (x is None or torch.equal(x, y))
        for x, y in zip(a[1].values(), b[1].values(), strict=True)
    )
    return tensors and gradients and a[2:] == b[2:]


@pytest.mark.parametrize(
    ("name", "kind"),
    # synflow refuses attention, see test_pruner_scores
    [pair for pair in itertools.product([*EXACT, "nm"], MODELS) if pair != ("synflow", "attention")],
)
def test_scores_change_nothing_and_prune_is_exact(name, kind):
    torch.manual_seed(0)
    model = MODELS[kind]()
    F.cross_entropy(model(data()[0][0]), data()[0][1]).backward()  # some gradients to be left alone
    next(model.parameters()).requires_grad_(False)
    model.train()
    next(iter(model.children())).eval()
    masks = Masks(model)
    pruner = make(name)
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lookahead and nm name layers here
        scores = pruner.scores(model, masks, batches=data(), loss_fn=F.cross_entropy)
        assert same(before, state(model))
        assert list(scores) == masks.names
        assert all(scores[n].shape == masks[n].shape and scores[n].isfinite().all() for n in masks)
        again = pruner.scores(model, masks, batches=data(), loss_fn=F.cross_entropy)
        assert all(torch.equal(scores[n], again[n]) for n in masks)
        if name == "nm":
            return
        dead = {n: torch.zeros_like(masks[n]) for n in masks}
        for amount in (0.3, 0.5):
            alive = masks.alive
            removed = pruner.prune(model, masks, amount=amount, batches=data(), loss_fn=F.cross_entropy)
            assert removed == round(amount * alive) == alive - masks.alive
            for n in masks:
                assert not (dead[n] & masks[n]).any()  # nothing came back
                assert (masks.weight(n)[~masks[n]] == 0).all()
                dead[n] = ~masks[n]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(EXACT),
    sizes=st.lists(st.integers(1, 7), min_size=3, max_size=5),
    amounts=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3),
    rounds=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_counts_are_exact_for_any_shape_and_amount(name, sizes, amounts, rounds, seed):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    masks = Masks(model)
    # Loss gradients vanish behind dead units; a loss that always has some keeps this about counting.
    batches = [(torch.rand(4, sizes[0]), torch.zeros(4))]
    options = {"example_input": torch.zeros(1, sizes[0])} if name in ("lookahead", "synaptic-stripping") else {}
    pruner = pruners.create(name, rounds=rounds, **options)
    dead = {n: ~masks[n] for n in masks}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for amount in amounts:
            alive = masks.alive
            try:
                removed = pruner.prune(model, masks, amount, batches, lambda out, _: (out - 3).square().mean())
            except ValueError as error:
                if "every score is zero" not in str(error):
                    raise
                return  # all units are dead: nothing can be ranked, and that is said
            assert removed == round(amount * alive) == alive - masks.alive
            for n in masks:
                assert not (dead[n] & masks[n]).any()
                dead[n] = ~masks[n]


@pytest.mark.parametrize("name", [n for n in pruners.names() if pruners.create(n).needs_data])
def test_missing_data_is_said(name):
    model = MODELS["plain"]()
    with pytest.raises(ValueError, match="batches="):
        pruners.create(name).prune(model, Masks(model), amount=0.2)
    if pruners.create(name).needs_loss:
        with pytest.raises(ValueError, match="loss_fn="):
            pruners.create(name).prune(model, Masks(model), amount=0.2, batches=data())


@pytest.mark.parametrize("amount", [0, 1, -0.1, 1.5, True, float("nan")])
def test_amount_out_of_range(amount):
    model = MODELS["plain"]()
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        pruners.create("lamp").prune(model, Masks(model), amount=amount)


def test_a_generator_is_enough_even_for_several_rounds_and_passes():
    for name in ("grasp", "snip", "taylor"):
        model = MODELS["plain"]()
        masks = Masks(model)
        pruners.create(name, rounds=3).prune(model, masks, 0.5, (b for b in data()), F.cross_entropy)
        assert masks.alive == masks.total - round(0.5 * masks.total)


def test_grasp_says_when_a_part_cannot_be_differentiated_twice():
    model = nn.Sequential(nn.Linear(4, 4), nn.Hardsigmoid(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="grasp differentiates twice"):
        pruners.create("grasp").prune(
            model, Masks(model), 0.5, [(torch.rand(3, 4), torch.zeros(3).long())], F.cross_entropy
        )


def test_all_zero_and_non_finite_scores_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.zeros_(model[2].weight)
    with pytest.raises(ValueError, match=r"snip: every score is zero.*initialised with zeros"):
        pruners.create("snip").prune(
            model, Masks(model), 0.5, [(torch.rand(3, 4), torch.zeros(3).long())], lambda o, t: o.sum() * 0
        )
    nan = pruners.create(lambda model, masks: {n: torch.full(masks[n].shape, torch.nan) for n in masks})
    with pytest.raises(ValueError, match=r"0\.weight has scores that are not finite"):
        nan.prune(model, Masks(model), 0.5)


def test_a_function_is_a_pruner_wherever_one_is_accepted():
    from ap.cycles import Cycles

    def smallest_last(model, masks):
        return {name: -masks.weight(name).detach().abs() for name in masks}

    model = MODELS["plain"]()
    masks = Masks(model)
    pruner = pruners.create(smallest_last)
    assert (pruner.name, pruner.scope, pruner.needs_data) == ("smallest_last", "global", False)
    assert pruner.prune(model, masks, amount=0.25) == round(0.25 * masks.total)
    assert pruners.create(pruner) is pruner
    assert pruners.Gradual(smallest_last, model, masks, amount=0.5, steps=1).step(1) == round(0.5 * masks.total * 0.75)
    loop = Cycles(MODELS["plain"](), smallest_last, cycles=1, amount=0.2, ap="none")
    assert loop.run(lambda *_: {})[-1]["alive"] == masks.total - round(0.2 * masks.total)
    with pytest.raises(TypeError, match="a pruner is a name, a Pruner or a function"):
        pruners.create(3)


def test_decorator_entry_point_and_unknown_names(monkeypatch):
    class Third(Pruner):
        def scores(self, model, masks, batches=None, loss_fn=None):
            return {name: masks.weight(name).detach() for name in masks}

    class Point:
        name = "from-elsewhere"

        def load(self):
            return Third

    import pruners.base as base

    monkeypatch.setattr(base, "_REGISTRY", dict(_REGISTRY))
    register("decorated")(type("Decorated", (Third,), {}))
    assert pruners.create("decorated").name == "decorated"
    register("function")(lambda model, masks: {name: masks.weight(name).detach().abs() for name in masks})
    layer = nn.Linear(4, 5)
    assert pruners.create("function", density="uniform").prune(layer, Masks(layer), amount=0.5) == 10
    assert pruners.create("function").name == "function"
    monkeypatch.setattr(base, "entry_points", lambda group: [Point()] if group == base.ENTRY_POINTS else [])
    assert "from-elsewhere" in pruners.names()
    assert pruners.create("from-elsewhere").name == "from-elsewhere"
    with pytest.raises(ValueError, match="unknown pruner 'lmap'; close: lamp"):
        pruners.create("lmap")


def test_options_that_a_pruner_cannot_have():
    for name, option in (("nm", "rounds"), ("nm", "density"), ("wanda", "density"), ("structured-random", "density")):
        with pytest.raises(ValueError, match=f"has no {option}"):
            pruners.create(name, **{option: 2 if option == "rounds" else "erk"})
    with pytest.raises(ValueError, match="rounds must be"):
        pruners.create("lamp", rounds=0)
    with pytest.raises(ValueError, match="unknown density 'erc'; close: erk"):
        pruners.create("lamp", density="erc")


def test_contract_attributes():
    scopes = {name: pruners.create(name).scope for name in pruners.names()}
    assert scopes["lamp"] == scopes["synflow"] == scopes["snip"] == scopes["grasp"] == scopes["taylor"] == "global"
    assert scopes["layer-magnitude"] == scopes["lookahead"] == "layer"
    assert scopes["wanda"] == "row"
    assert scopes["nm"] == "group"
    data_free = {name for name in pruners.names() if not pruners.create(name).needs_data}
    assert {"random", "magnitude", "layer-magnitude", "lamp", "lookahead", "synflow", "nm"} <= data_free
    assert all(pruners.create(name).needs_data for name in ("gradient", "snip", "grasp", "taylor", "wanda"))


def test_scores_of_a_half_precision_copy_rank_alike():
    """bfloat16 weights are scored without overflow or NaN."""
    model = MODELS["plain"]()
    model = copy.deepcopy(model).bfloat16()
    masks = Masks(model)
    inputs = [(x.bfloat16(), y) for x, y in data()]
    for name in ("lamp", "snip", "taylor", "lookahead", "wanda", "magnitude"):
        scores = pruners.create(name).scores(model, masks, inputs, F.cross_entropy)
        assert all(scores[n].isfinite().all() for n in masks)
    assert pruners.create("lamp").prune(model, masks, 0.5) == round(0.5 * masks.total)


def test_nothing_alive_and_nothing_to_remove_is_no_division():
    from pruners.schedules import exponential, removed_by

    assert removed_by(exponential, 0.5, 0, 0) == 0
    assert removed_by(exponential, 0.5, 3, 0) == 0


@pytest.mark.parametrize("name", ["magnitude", "nm", "structured-magnitude"])
def test_masks_of_another_model_are_refused_and_that_one_stays(name):
    model = models.create("cnn", image_size=8)
    masks = Masks(model)
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"masks are of another model.*Masks\(model\) makes its own"):
        pruners.create(name).prune(twin, masks, amount=0.5)
    assert masks.alive == masks.total
