"""Models of one's own, and starting from given weights."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from recipes.models import create, load_factory

MODULE = """
from torch import nn

class Nets:
    @staticmethod
    def tiny(num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, num_classes))

def with_activation(num_classes, activation="relu", depth=1):
    net = Nets.tiny(num_classes)
    net.seen = (activation, depth)
    return net

def anything(**kwargs):
    net = Nets.tiny(10)
    net.seen = kwargs
    return net

def nothing():
    return nn.Linear(2, 2)

def not_a_model():
    return 3

CONSTANT = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_nets_for_tests.py").write_text(MODULE)
    (tmp_path / "needs_absent_module.py").write_text("import absent_module_for_tests\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_nets_for_tests", None)
    return "own_nets_for_tests"


def test_a_factory_gets_what_it_names(module: str) -> None:
    assert create(f"{module}:Nets.tiny", num_classes=3)[3].out_features == 3
    assert create(f"{module}:with_activation", activation="gelu", depth=4).seen == ("gelu", 4)
    assert create(f"{module}:with_activation").seen == ("relu", 1)  # its own default, not ours
    assert create(f"{module}:anything", dropout=0.1).seen == {"num_classes": 10, "dropout": 0.1}
    assert isinstance(create(f"{module}:nothing"), nn.Linear)


def test_an_activation_that_a_factory_does_not_take_is_swapped_in(module: str) -> None:
    assert isinstance(create(f"{module}:Nets.tiny", activation="leaky_relu")[2], nn.LeakyReLU)
    with pytest.raises(ValueError, match="no activation module to replace by 'leaky_relu'"):
        create(f"{module}:nothing", activation="leaky_relu")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("{}:tyni", "has no 'tyni'"),
        ("{}:not_a_modle", "did you mean not_a_model"),
        ("{}:Nets.tin", "did you mean tiny"),
        ("{}:CONSTANT", "is a int, not a function or class"),
        ("{}:not_a_model", "returned a int, not a torch.nn.Module"),
        ("no_such_package_here.nets:f", "no module 'no_such_package_here'; is its folder on PYTHONPATH"),
        ("{}.sub:f", "no module|not a package"),
        ("{}:", "not of the form package.module:factory"),
        (":f", "not of the form package.module:factory"),
        ("../evil:f", "not of the form package.module:factory"),
        ("{}:f()", "not of the form package.module:factory"),
    ],
)
def test_wrong_factories(module: str, path: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        create(path.format(module))


def test_unknown_options_of_a_factory(module: str) -> None:
    with pytest.raises(ValueError, match=r"has no option dropout; it takes num_classes"):
        create(f"{module}:Nets.tiny", dropout=0.5)
    with pytest.raises(ValueError, match=r"has no option width"):
        create(f"{module}:Nets.tiny", width=0.5)
    with pytest.raises(ValueError, match=r"has no option activation_params"):
        create(f"{module}:Nets.tiny", activation_params={"negative_slope": 0.1})


def test_torchvisions_factories_work_as_they_are() -> None:
    assert create("torchvision.models:shufflenet_v2_x0_5", num_classes=4).fc.out_features == 4


def test_what_a_module_lacks_is_said_by_python(module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="absent_module_for_tests"):
        load_factory("needs_absent_module:f")


def drawn(name: str = "cnn", seed: int = 1, **arguments: object) -> nn.Module:
    torch.manual_seed(seed)
    return create(name, image_size=8, in_channels=1, **arguments)  # type: ignore[arg-type]


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_from_files(tmp_path: Path) -> None:
    trained = drawn(seed=7)
    assert not same(trained, drawn())
    state = trained.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, tmp_path / "c.pt"
    )
    torch.save({"model": {f"_orig_mod.{name}": value for name, value in state.items()}}, tmp_path / "d.pth")
    for name in ("a.safetensors", "b.pt", "c.pt", "d.pth"):
        assert same(trained, drawn(weights=tmp_path / name))


def test_weights_for_other_classes_keep_a_new_head(tmp_path: Path) -> None:
    trained = drawn(seed=7, num_classes=100)
    save_file(trained.state_dict(), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=r"another number of classes: fc2.bias and fc2.weight keep their new weights"):
        model = drawn(weights=tmp_path / "a.safetensors")
    assert torch.equal(model.conv1.weight, trained.conv1.weight)
    assert torch.equal(model.fc1.weight, trained.fc1.weight)
    assert torch.equal(model.fc2.weight, drawn().fc2.weight)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = drawn().state_dict()
    torch.save({name: value for name, value in state.items() if name != "conv2.bias"}, tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"short.pt does not fit the model: conv2.bias is missing$"):
        drawn(weights=tmp_path / "short.pt")
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "long.pt")
    with pytest.raises(ValueError, match=r"extra is not in the model"):
        drawn(weights=tmp_path / "long.pt")
    torch.save({**state, "conv1.weight": torch.zeros(16, 3, 3, 3)}, tmp_path / "shape.pt")
    with pytest.raises(ValueError, match=r"conv1.weight is \[16, 3, 3, 3\], the model's is \[16, 1, 3, 3\]"):
        drawn(weights=tmp_path / "shape.pt")
    torch.save(drawn("lenet-300-100").state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"and \d+ more"):
        drawn(weights=tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dictionary"):
        drawn(weights=tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match="no file of weights at"):
        drawn(weights=tmp_path / "none.pt")
    for name in ("noise.pt", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"these are no weights, whatever the name says")
        with pytest.raises(ValueError, match=name):
            drawn(weights=tmp_path / name)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch hostile-was-here",)


def test_weights_that_would_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Hostile()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt cannot be read as weights alone: it holds a .*, which is code"):
        drawn(weights=tmp_path / "evil.pt")
    assert not (tmp_path / "hostile-was-here").exists()
