"""At initialisation and 1 % of the weights of a VGG, with real CIFAR-10."""

import importlib.util
from pathlib import Path

import pytest
import torch

import pruners
from ap.masks import Masks
from recipes import models

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_synflow_ranking.py"


@pytest.mark.slow
def test_synflow_before_magnitude_before_random():
    spec = importlib.util.spec_from_file_location("check_synflow_ranking", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    accuracy = {
        method: script.train_and_test(method, seed=0, images=8_000, epochs=6, density=0.01, width=0.25)
        for method in script.METHODS
    }
    assert accuracy["synflow"] > accuracy["magnitude"] > accuracy["random"]


@pytest.mark.slow
def test_synflow_empties_no_layer_at_one_percent_of_vgg16():
    model = models.create("vgg16-bn")
    masks = Masks(model)
    removed = pruners.create("synflow", example_input=torch.zeros(1, 3, 32, 32)).prune(model, masks, amount=0.99)
    assert removed == round(0.99 * masks.total)
    assert min(masks.layer_alive().values()) >= 1
    assert masks.layer_alive()["fc.weight"] > 50
    with torch.no_grad():  # and paths lead through: the outputs depend on the inputs
        model.train()
        assert model(torch.randn(8, 3, 32, 32)).std(0).min() > 0
