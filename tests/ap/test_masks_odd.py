"""Models and uses out of the ordinary: what happens is right, or is said."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from ap import AP, Masks
from ap.cycles import Cycles


def magnitude(model, masks):
    return {name: masks.weight(name).detach().abs() for name in masks}


def zeros(parameter):
    return int((parameter == 0).sum())


def test_an_embedding_that_is_tied_to_the_head_is_the_heads_weight():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.hidden, self.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

    model = Language()
    masks = Masks(model)
    assert (masks.names, masks.total) == (["hidden.weight", "head.weight"], 56)
    masks.prune(magnitude(model, masks), count=20, scope="layer")
    assert zeros(model.embedding.weight) == int((~masks["head.weight"]).sum()) > 0


@pytest.mark.parametrize(
    "computed",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_weights_that_are_computed_are_named_and_left_out(computed):
    model = nn.Sequential(computed(nn.Linear(3, 3)), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="0: its weight is computed, .* and is left out"):
        assert Masks(model).names == ["1.weight"]


def test_a_deep_copy_has_the_copied_models_masks():
    masks = Masks(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    masks.prune(magnitude(masks.model, masks), count=1)
    copied = copy.deepcopy(masks)
    copied.prune(magnitude(copied.model, copied), count=3)
    assert (masks.alive, copied.alive) == (5, 2)
    assert (zeros(masks.model[0].weight), zeros(copied.model[0].weight)) == (1, 4)
    optimizer = torch.optim.SGD(copied.model.parameters(), lr=0.1)
    copied.bind(optimizer)
    copied.model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert zeros(copied.model[0].weight) == 4


def test_masks_inside_the_model_are_copied_with_it():
    class Own(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.masks = Masks(self)

    model = Own()
    model.masks.prune(magnitude(model, model.masks), count=2)
    copied = copy.deepcopy(model)
    assert copied.masks.model is copied
    copied.masks.prune(magnitude(copied, copied.masks), count=2)
    assert (zeros(model.weight), zeros(copied.weight)) == (2, 4)


def test_what_cannot_be_pickled_or_copied_says_what_to_do():
    masks = Masks(nn.Linear(3, 2))
    with pytest.raises(TypeError, match=r"save masks.state_dict\(\)"):
        pickle.dumps(masks)
    plugin = AP(masks)
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"AP belongs to a living model"):
            attempt(plugin)


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"0.weight is on the meta device, without any values"):
        Masks(model)


def test_a_layers_own_buffer_called_weight_mask_is_its_own():
    class Triangular(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("weight_mask", torch.tril(torch.ones(3, 3)))

        def forward(self, x):
            return nn.functional.linear(x, self.weight * self.weight_mask, self.bias)

    model = nn.Sequential(Triangular())
    masks = Masks(model)
    masks.prune({"0.weight": torch.arange(9.0).view(3, 3)}, count=2)
    assert (masks.alive, zeros(model[0].weight)) == (7, 2)
    assert torch.equal(model[0].weight_mask, torch.tril(torch.ones(3, 3)))


def test_scores_are_not_taken_for_bools():
    with pytest.raises(TypeError, match=r"weight: expected bools, True = remove, got torch.float32"):
        Masks(nn.Linear(3, 2)).remove({"weight": torch.rand(2, 3)})


def test_an_optimizer_that_lost_its_weights_is_told_of():
    model = nn.Sequential(nn.Linear(3, 2))
    masks, optimizer = Masks(model), torch.optim.SGD(model.parameters(), lr=0.1)
    masks.bind(optimizer)
    model.load_state_dict({key: torch.ones_like(value) for key, value in model.state_dict().items()}, assign=True)
    with pytest.warns(UserWarning, match="this SGD no longer holds any of the masked weights"):
        optimizer.step()
    with warnings.catch_warnings(action="error"):
        optimizer.step()  # once is enough


def test_masks_made_in_inference_mode_work_outside_of_it():
    model = nn.Linear(3, 2)
    with torch.inference_mode():
        masks = Masks(model)
        masks.prune(magnitude(model, masks), count=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.bind(optimizer)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert zeros(model.weight) == 6 - masks.alive
        masks.prune(magnitude(model, masks), count=1)


def test_lbfgs_with_masked_gradients_finds_the_best_of_the_living_weights():
    """A line search that moved dead weights would judge steps by a network that the masks do not allow."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=generator), torch.randn(40, 1, generator=generator)
    model = nn.Linear(3, 1, bias=False)
    masks, optimizer = Masks(model), torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    masks.bind(optimizer, mask_gradients=True)
    masks.remove({"weight": torch.tensor([[False, True, False]])})

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss.detach()

    for _ in range(5):
        optimizer.step(closure)
    best = torch.linalg.lstsq(x[:, [0, 2]], y).solution.T
    assert model.weight[0, 1] == 0
    torch.testing.assert_close(model.weight.detach()[:, [0, 2]], best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_row_of_a_transposed_convolution_is_an_output_channel(groups):
    """Output channel c of group g adds up the inputs of its group: weight[inputs of g, c % (out / groups)]."""
    model = nn.ConvTranspose2d(4, 6, 2, groups=groups)
    masks = Masks(model)
    scores = torch.rand(model.weight.shape, generator=torch.Generator().manual_seed(groups))
    masks.prune({"weight": scores}, amount=0.5, scope="row")
    each, inputs = 6 // groups, 4 // groups
    for channel in range(6):
        rows = slice(channel // each * inputs, (channel // each + 1) * inputs)
        alive, score = masks["weight"][rows, channel % each], scores[rows, channel % each]
        assert int(alive.sum()) == alive.numel() // 2
        assert score[alive].min() > score[~alive].max()


def test_a_group_of_a_transposed_convolution_lies_along_its_inputs():
    model = nn.ConvTranspose1d(4, 3, 1)
    masks = Masks(model)
    scores = torch.rand(4, 3, 1, generator=torch.Generator().manual_seed(0))
    masks.prune({"weight": scores}, amount=0.5, scope="group", group=4)
    assert masks["weight"].sum(0).flatten().tolist() == [2, 2, 2]
    masks = Masks(nn.ConvTranspose1d(3, 4, 1))
    with pytest.raises(ValueError, match="not a multiple of the group of 4"):
        masks.prune(magnitude(None, masks), amount=0.5, scope="group", group=4)


@pytest.mark.parametrize("scope", ["global", "layer", "row", "group"])
def test_odd_scores_are_refused_in_every_scope(scope):
    masks = Masks(nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"weight: scores of shape \[4, 2\] for weights of shape \[2, 4\]"):
        masks.prune({"weight": torch.rand(4, 2)}, count=2, scope=scope)
    with pytest.raises(TypeError, match=r"weight: scores must be floating point, not torch.int64"):
        masks.prune({"weight": torch.arange(8).view(2, 4)}, count=2, scope=scope)
    assert masks.alive == 8


@pytest.mark.filterwarnings("ignore:.*(zero-element|no weight that is alive)")
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_weights_of_no_size(scope):
    masks = Masks(nn.Sequential(nn.Linear(0, 5), nn.Linear(5, 2)))
    assert masks.prune(magnitude(None, masks), count=4, scope=scope) == 4
    assert masks.layer_alive() == {"0.weight": 0, "1.weight": 6}


def test_shrinking_layers_and_going_back_to_earlier_weights_exclude_each_other():
    class Shrinking:
        name, changes_shapes = "shrinking", True

        def prune(self, model, masks, amount, batches=None, loss_fn=None): ...

    model = nn.Sequential(nn.Linear(3, 2))
    for rewind in ("init", "5it"):
        with pytest.raises(ValueError, match=r"shrinking makes layers smaller.*rewind='lr' or 'none', not '"):
            Cycles(model, Shrinking(), rewind=rewind)
    Cycles(model, Shrinking(), rewind="lr")


def test_weights_in_pieces_are_refused(tmp_path):
    """Tensor parallelism: each parameter is a DTensor. With one rank of gloo."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
        for use in (Masks, AP):
            with pytest.raises(TypeError, match=r"0 is distributed \(DTensor\), its weights are in pieces"):
                use(model)
    finally:
        dist.destroy_process_group()


def test_masked_gradients_beside_a_frozen_layer():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    masks, optimizer = Masks(model), torch.optim.SGD(model.parameters(), lr=0.1)
    masks.bind(optimizer, mask_gradients=True)
    masks.prune(magnitude(model, masks), count=4, scope="layer")
    model(torch.ones(4, 3)).sum().backward()
    assert model[0].weight.grad is None
    assert torch.equal(model[1].weight.grad != 0, masks["1.weight"])


@pytest.mark.parametrize("count", [True, 3.5, 2.0, "2", -1, 7])
def test_counts_are_whole_numbers(count):
    masks = Masks(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"count must be (a whole number|between 0 and the 6 weights)"):
        masks.prune(magnitude(None, masks), count=count)
    plugin = AP(masks)
    plugin.mark_start()
    with pytest.raises(ValueError, match="count must be"):
        plugin.activate(count=count)
    plugin.detach()


def test_decay_is_followed_in_every_optimizer_of_the_model():
    """The head has an optimizer of its own, and the first layer is frozen."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    plugin = AP(model, criterion="decay-corrected")
    plugin.mark_start()
    for layer in model[1:]:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5)
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    moved = [plugin._decay.factor(plugin.masks.weight(name)) for name in plugin.masks]
    plugin.detach()
    assert moved == pytest.approx([1, 0.95, 0.95])


def test_strides_that_say_nothing_need_no_second_copy_of_a_mask():
    """In channels_last a 1 × 1 convolution's weight and its momentum may differ in the strides of their last axes."""
    layer = nn.Conv2d(4, 8, 1)
    masks = Masks(layer)
    slot, mask = masks._slots["weight"], masks["weight"]
    momentum = torch.empty_strided(layer.weight.shape, (4, 1, 4, 4))
    assert layer.weight.stride() == (4, 1, 1, 1)
    assert slot.multiplier(layer.weight, mask) is slot.multiplier(momentum, mask)
    turned = torch.empty_strided(layer.weight.shape, (1, 8, 1, 1))
    other = slot.multiplier(turned, mask)
    assert other.stride()[:2] == (1, 8)
    masks.remove({"weight": torch.arange(32).view(8, 4, 1, 1) % 3 == 0})
    assert torch.equal(slot.multiplier(turned, mask) != 0, mask)
