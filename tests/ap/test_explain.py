"""explain() on models whose answers are known."""

import json

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from ap.explain import explain


def verdicts(model, example=None):
    return {row.name: (row.verdict, row.why) for row in explain(model, example).rows}


def test_resnet():
    rows = {row.name: row for row in explain(torchvision.models.resnet18()).rows}
    assert (rows["conv1"].verdict, rows["conv1"].why) == ("fails", "inputs can be negative")
    assert (rows["layer1.0.conv1"].verdict, rows["layer1.0.conv1"].why) == ("weakened", "BatchNorm2d re-centres")
    assert rows["layer1.0.conv2"].why == "BatchNorm2d re-centres; a residual is added"
    assert (rows["fc"].verdict, rows["fc"].followed_by, rows["fc"].can_die) == ("fails", "nothing", None)
    assert rows["layer2.0.conv1"].followed_by == "BatchNorm2d"
    assert rows["layer2.0.conv1"].weights == 64 * 128 * 9


def test_plain_vgg_is_where_the_argument_holds():
    result = verdicts(torchvision.models.vgg11())
    assert [verdict for verdict, _ in result.values()] == ["fails", *["holds"] * 9, "fails"]


def test_many_layers_without_normalisation_are_a_danger_and_few_or_normalised_ones_are_not():
    deep = explain(torchvision.models.vgg11())
    assert len(deep.warnings) == 1
    assert "9 of these layers follow one another" in deep.warnings[0]
    assert str(deep).endswith(deep.warnings[0])
    assert deep.to_dict()["warnings"] == deep.warnings
    assert explain(torchvision.models.vgg11_bn()).warnings == []
    assert explain(torchvision.models.alexnet()).warnings != []
    shallow = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert explain(shallow).warnings == []


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.ReLU(), ("holds", "")),
        (nn.GELU(), ("fails", "GELU is no rectifier")),
        (nn.Tanh(), ("fails", "Tanh cannot die")),
        (nn.LeakyReLU(), ("fails", "LeakyReLU cannot die")),
    ],
)
def test_what_the_next_activation_decides(activation, expected):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), activation, nn.Linear(8, 2))
    assert verdicts(model)["2"] == expected


def test_functional_activations_and_models_that_need_an_example():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.b(F.relu(self.a(x)))
            x = F.threshold(x, 0.0, 0.0) if x.sum() > -1e9 else x
            return F.softsign(self.c(x))

    with pytest.raises(ValueError, match="example_input"):
        explain(Model())
    assert verdicts(Model(), torch.randn(2, 4)) == {
        "a": ("fails", "inputs can be negative"),
        "b": ("holds", ""),
        "c": ("fails", "softsign cannot die"),
    }


def test_it_agrees_with_where_rectified():
    from ap.plugin import AP

    model = torchvision.models.vgg11_bn()
    rows = explain(model).rows
    chosen = {row.name + ".weight" for row in rows if row.verdict != "fails"}
    plugin = AP(model, where="rectified")
    assert set(plugin._resolve("rectified")) == chosen


def test_table_and_dictionary():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    explanation = explain(model)
    text = str(explanation)
    assert all(
        word in text for word in ("layer", "AP's argument", "rectified", "any sign", "1 (ReLU)", explanation.summary)
    )
    assert json.loads(json.dumps(explanation.to_dict()))["rows"][0]["name"] == "0"


def test_bad_input():
    with pytest.raises(ValueError, match="no layer with weights"):
        explain(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match="DataParallel"):
        explain(nn.DataParallel(nn.Linear(2, 2)))
