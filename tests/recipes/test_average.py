"""The running mean of the weights."""

import pytest
import torch
from torch import nn

from ap import Masks
from recipes.average import Average


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_against_the_formula_in_double_precision(decay):
    model = network()
    average = Average(model, decay)
    expected = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 41):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        average.update()
        d = min(decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            expected[name] = d * expected[name] + (1 - d) * tensor.double()
    last = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average.adopt()
    for name, tensor in model.state_dict().items():
        if name == "1.num_batches_tracked":
            assert tensor == 40
            continue
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
        if tensor.dim() > 1:  # a bias before BatchNorm may get no gradient at all
            assert not torch.equal(tensor, last[name])


def test_dead_weights_are_exactly_0_in_the_mean():
    model = network()
    masks = Masks(model)
    masks.prune({name: masks.weight(name).detach().abs() for name in masks}, amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.bind(optimizer)
    average = Average(model, 0.9)
    for _ in range(5):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        average.update()
    average.adopt()
    for name in masks:
        assert torch.equal(masks.weight(name) != 0, masks[name])


def test_adopting_twice_changes_nothing_and_a_state_goes_on_to_the_same_bits():
    model, other = network(), network()
    average, copy = Average(model, 0.9), Average(other, 0.9)
    for _ in range(3):
        nn.init.normal_(model[0].weight)
        average.update()
    copy.load_state_dict(average.state_dict())
    for one, its in ((model, average), (other, copy)):
        nn.init.ones_(one[0].weight)
        its.update()
        its.adopt()
        its.adopt()
    assert torch.equal(model[0].weight, other[0].weight)
    assert torch.equal(model[0].weight, average.state_dict()["means"]["0.weight"])
