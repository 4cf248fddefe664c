"""What is declared is what is imported and shipped; the wheel and the sdist build, and the wheel works elsewhere."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ap

ROOT = Path(__file__).parents[2]
PACKAGES = ("ap", "pruners", "recipes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _files() -> set[str]:
    """Everything in the packages that is not made by running them."""
    found = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}


def _declared(*extras: str) -> set[str]:
    project = PROJECT["project"]
    lines = project["dependencies"] + [line for e in extras for line in project["optional-dependencies"][e]]
    return {Requirement(line).name.lower() for line in lines}


def _imported(package: str, everywhere: bool) -> set[str]:
    """Distributions that a package's files import, anywhere or only when they are imported themselves."""
    names = set()
    for path in (ROOT / package).rglob("*.py"):
        tree = ast.parse(path.read_text())
        nodes = ast.walk(tree) if everywhere else tree.body
        for node in nodes:
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(str(node.module).partition(".")[0])
    foreign = names - set(sys.stdlib_module_names) - set(PACKAGES)
    owners = packages_distributions()
    return {owners[name][0].lower() for name in foreign}


def test_the_plugin_imports_torch_and_numpy_only() -> None:
    code = "import sys, ap; print(*{name.partition('.')[0] for name in sys.modules if '.' not in name})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    for foreign in ("lightning", "tensorboard", "torchvision", "torch_pruning", "pruners", "recipes", "scipy"):
        assert foreign not in loaded
    assert _imported("ap", everywhere=False) <= _declared() | {"lightning"}  # in a file of its own


def test_every_import_is_declared() -> None:
    assert _imported("ap", everywhere=True) <= _declared("tensorboard", "lightning")
    assert _imported("pruners", everywhere=True) <= _declared("structured")
    assert _imported("recipes", everywhere=True) <= _declared("recipes", "structured", "export")


def test_every_file_of_the_packages_is_shipped() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    matched = {
        str(p.relative_to(ROOT)) for package, globs in data.items() for g in globs for p in (ROOT / package).glob(g)
    }
    assert _files() == matched | {name for name in _files() if name.endswith(".py")}
    assert {f"{package}/py.typed" for package in PACKAGES} <= matched
    for name in _files():
        assert (ROOT / name).parent.joinpath("__init__.py").exists(), f"{name} lies in no package"


def test_the_console_command_and_the_version() -> None:
    assert PROJECT["project"]["version"] == ap.__version__
    (command,) = entry_points(group="console_scripts", name="activate-while-pruning")
    assert command.load()(["--help"]) == 0


def test_where_only_the_plugin_is_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['tyro'] = None\nfrom recipes.__main__ import main\nsys.exit(main(['list']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: python -m recipes needs tyro, which the plugin alone does not")
    assert done.stderr.endswith("pip install 'activate-while-pruning[recipes]'\n")


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("recipes.data", "tqdm", "recipes"),
        ("recipes.models", "safetensors", "recipes"),
        ("ap.compat.lightning", "lightning", "lightning"),
    ],
)
def test_where_only_the_plugin_is_an_import_says_what_to_install(module: str, missing: str, extra: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\nimport {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    (line,) = done.stderr.splitlines()[-1:]
    assert f"{module} needs {missing}" in line
    assert line.endswith(f"pip install 'activate-while-pruning[{extra}]'")


@pytest.mark.slow
def test_wheel_and_sdist_build_and_the_wheel_runs_elsewhere(tmp_path: Path) -> None:
    dist, site, elsewhere = tmp_path / "dist", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(ROOT), cwd=elsewhere)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")

    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in in_wheel if ".dist-info/" not in name} == _files()
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert _files() <= in_sdist
    wanted = {
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "tests/packaging/test_wheel.py",
        "examples/tour.ipynb",
        "scripts/test",
    }
    assert wanted <= in_sdist
    assert not [
        name for name in in_sdist if re.match(r"(data|runs|docs/_build|\.venv)(/|$)", name) or "__pycache__" in name
    ]

    _run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
        cwd=elsewhere,
    )
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = _run(
        sys.executable, "-c", "import ap, recipes.data as d; print(ap.__file__, d.__file__)", cwd=elsewhere, env=env
    )
    assert all(path.startswith(str(site)) for path in where.split())
    command = [str(site / "bin/activate-while-pruning"), "run", "quickstart", "--seeds", "1", "--cycles", "1"]
    printed = _run(*command, "--epochs", "1", "--out", "out", cwd=elsewhere, env=env)
    assert "summary.json" in printed
    assert (elsewhere / "out/summary.json").exists()


def _run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
