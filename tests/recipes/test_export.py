"""Exported files give the pruned model's outputs."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from ap.compaction import fit_
from ap.masks import Masks
from recipes import models
from recipes.export import ExportConfig, export, load


def pruned(name="cnn"):
    torch.manual_seed(0)
    model = models.create(name, image_size=32)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight[::3] = 0
            elif isinstance(module, nn.BatchNorm2d):
                module.bias.fill_(-0.1)
                module.weight[::3] = 0
    return model.train()


@pytest.mark.parametrize("name", ["cnn", "resnet20", "mobilenetv2"])
def test_safetensors_onnx_and_card(tmp_path, name):
    model = pruned(name)
    x = torch.randn(3, 3, 32, 32)
    config = ExportConfig(tmp_path / "out", name="small", rounds=1)
    result = export(model, x, config, {"Configuration": {"pruner": "lamp", "seed": 3}, "Metrics": {"accuracy": 0.91}})
    assert model.training
    assert set(result.files) == {"safetensors", "onnx", "card"}
    assert result.comparison.parameters[1] < result.comparison.parameters[0]
    model.eval()
    with torch.no_grad():
        expected = model(x)
        loaded = load(models.create(name, image_size=32).eval(), result.files["safetensors"])
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in loaded.parameters()) == result.comparison.parameters[1]
    if name == "cnn":  # ONNX's own reference is slow
        graph = onnx.load(result.files["onnx"])
        onnx.checker.check_model(graph)
        (outputs,) = ReferenceEvaluator(graph).run(None, {"input": x.numpy()})  # 3 samples, not the 2 of the export
        np.testing.assert_allclose(outputs, expected.numpy(), rtol=1e-3, atol=1e-5)
    card = result.files["card"].read_text()
    masks = Masks(model)
    nonzero = sum(int((masks.weight(n) != 0).sum()) for n in masks) / masks.total
    assert f"{nonzero:.2%} of its prunable weights" in card
    assert "float32 ['N', 3, 32, 32]" in card
    block = card.split("### Configuration\n\n```json\n")[1].split("\n```")[0]
    assert json.loads(block) == {"pruner": "lamp", "seed": 3}
    assert "MACs per sample" in card


def test_without_compaction_everything_keeps_its_size(tmp_path):
    config = ExportConfig(tmp_path, compacted=False, formats=("safetensors",), rounds=1)
    result = export(pruned(), torch.zeros(1, 3, 32, 32), config, {})
    assert result.comparison.parameters[0] == result.comparison.parameters[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "model.safetensors"]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [({"rounds": 0}, "--rounds must be 1"), ({"name": "../x"}, "--name must be"), ({"formats": ()}, "--formats: give")],
)
def test_settings_that_cannot_be_are_refused(tmp_path, wrong, why):
    with pytest.raises(ValueError, match=why):
        export(nn.Linear(2, 2), torch.ones(1, 2), ExportConfig(tmp_path / "out", **wrong), {})
    assert not list(tmp_path.rglob("*"))


def test_an_unknown_format_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="safetensors or onnx, not 'pickle'"):
        export(pruned(), torch.zeros(1, 3, 32, 32), ExportConfig(tmp_path / "x", formats=("pickle",)), {})
    assert not (tmp_path / "x").exists()


def test_a_state_of_another_architecture_is_refused():
    with pytest.raises(ValueError, match="of another architecture than SmallCNN: fc1"):
        fit_(models.create("cnn"), {k: v for k, v in models.create("cnn").state_dict().items() if "fc1" not in k})
