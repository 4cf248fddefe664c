"""The documentation does what it says: its code runs, its commands and options exist, nothing public is left out."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import ap
import pruners
import recipes
from ap.__main__ import _parser as watch_parser
from ap.compat.loggers import CSVWriter
from ap.rewind import Snapshot
from recipes import cli, sweep_command

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = [*sorted((DOCS / "guides").glob("*.md")), DOCS / "faq.md"]
# An HTML comment before a fence says more of it: <!-- runs -->, <!-- file: NAME -->.
sys.path.append(str(DOCS))
directives = importlib.import_module("directives")
FENCE = re.compile(r"^(?:<!-- (.*?) -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page."""

    note: str
    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """All of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [Block(m[1] or "", m[2], m[3], text[: m.start(3)].count("\n")) for m in FENCE.finditer(text)]


def shell(text: str) -> list[list[str]]:
    """The commands of a shell block, split into words, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str]) -> None:
    """Runs a command of a guide: `python -m recipes` in this process, others outside."""
    if words[:3] == ["python", "-m", "recipes"]:
        assert cli.main(words[3:]) == 0
        return
    assert words[0] == "python"
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guides_code_runs_in_order_and_prints_what_it_shows(page, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for note, language, text, line in blocks(page):
        if note.startswith("file: "):
            Path(note.removeprefix("file: ")).write_text(text, encoding="utf-8")
        elif language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * line + text, str(page), "exec"), namespace)
            printed = out.getvalue()
        elif language == "text":
            assert text.strip() in printed, f"{page.name}:{line} shows what its code does not print:\n{printed}"
        elif note == "runs":
            for words in shell(text):
                run(words)


def pages() -> list[Path]:
    """What people read: the README and the site, without the generated pages of studies."""
    return [
        DOCS.parent / "README.md",
        *(p for p in sorted(DOCS.rglob("*.md")) if p.parent.name not in ("studies", "_build")),
    ]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every command of this project in a shell block or in `inline code`."""
    found = []
    for page in pages():
        texts = [text for _, language, text, _ in blocks(page) if language in ("bash", "sh", "console")]
        texts += re.findall(
            r"`((?:python -m |torchrun |scripts/|activate-while-pruning )[^`]*)`", page.read_text("utf-8")
        )
        found += [(page.name, words) for text in texts for words in shell(text)]
    return found


def option_names(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


@pytest.mark.parametrize("command", ["run", "sweep", "resume", "compare", "dnr", "export"])
def test_options_in_the_documentation_exist(command: str, capsys) -> None:
    used = {}
    for page, words in commands():
        words = ["python", "-m", "recipes", "run", *words[1:]] if words[0] == "scripts/run" else words
        if words[:4] == ["python", "-m", "recipes", command]:
            used |= dict.fromkeys(option_names(words), page)
    with contextlib.suppress(SystemExit):
        cli.main([command, *(["DIR/RUN"] if command == "export" else []), "--help"])
    shown = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    assert {option: page for option, page in used.items() if option not in shown} == {}


def test_experiments_in_the_documentation_are_valid(monkeypatch) -> None:
    """Every `recipes run` is accepted up to where data is loaded, its names included."""
    taken = []
    monkeypatch.setattr(cli, "execute", lambda config, *_: taken.append(config) or 0)
    monkeypatch.setattr(sweep_command, "execute", lambda config, *_: taken.append(config) or 130)
    monkeypatch.setattr(cli, "_cost", taken.append)
    wanted = 0
    for page, words in commands():
        preset = words[4:5]
        if (
            words[:3] == ["python", "-m", "recipes"]
            and words[3:4] in (["run"], ["sweep"])
            and preset
            and preset[0].islower()
        ):
            given = [word for word in words[3:] if word != "…"]
            wanted += "--list" not in given
            assert cli.main(given) in (0, 130), f"{page}: {shlex.join(words)}"
    assert len(taken) == wanted > 5


@pytest.mark.parametrize(
    ("kind", "place"), [("cli:Resume", "DIR"), ("cli:Compare", "DIR…"), ("dnr_command:DNR", "MODEL")]
)
def test_what_is_told_by_its_place_is_no_option_in_the_tables(kind, place):
    module, name = kind.split(":")
    assert directives.options(f"recipes.{module}", name)[2].startswith(f"| `{place}` | – |")


def test_watch_options_in_the_documentation_exist() -> None:
    shown = set(re.findall(r"(?<!\w)--?[a-z][\w-]*", " ".join(directives.arguments(watch_parser()))))
    for page, words in commands():
        if "watch" in words and "ap" in words:
            rest = words[words.index("watch") + 1 :]
            own = rest[: next((i for i, word in enumerate(rest) if word.endswith(".py")), len(rest))]
            own = own[: own.index("-m") + 1] if "-m" in own else own
            assert {word for word in own if word.startswith("-")} <= shown, f"{page}: {shlex.join(words)}"


def test_every_recipes_command_is_documented() -> None:
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    assert [name for name in cli.COMMANDS if f"## `python -m recipes {name}" not in text] == []


@pytest.mark.parametrize("package", [ap, pruners, recipes], ids=lambda package: package.__name__)
def test_the_reference_leaves_no_module_out(package) -> None:
    page = (DOCS / "reference" / f"{package.__name__}.md").read_text(encoding="utf-8")
    assert f"```{{remaining}} {package.__name__}\n" in page
    assert directives.remaining(package.__name__, set())
    named = directives.remaining(package.__name__, {f"{package.__name__}.base", "ap.masks.Masks"})
    assert "ap.masks" not in named
    assert "pruners.base" not in named


def test_public_names_have_a_place_in_the_reference() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    for name in ap.__all__:
        assert re.search(rf":: ap\.{name}\b", text) or hasattr(getattr(ap, name), "__path__"), name


def test_the_page_on_installing_has_every_extra() -> None:
    extras = tomllib.loads((DOCS.parent / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    listed = set(re.findall(r"^\| `(\w+)` \|", (DOCS / "install.md").read_text("utf-8"), re.MULTILINE))
    assert listed == set(extras)


def test_the_readmes_python_runs(tmp_path, monkeypatch) -> None:
    """What its blocks take for granted is given here: a model, data, a training loop, a pruner, a rewind."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(6, 500), torch.nn.ReLU(), torch.nn.Linear(500, 10))
    start = Snapshot(model)
    plugin = None

    def train(model: torch.nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.rand(8, 6)).square().sum().backward()
        optimizer.step()

    def my_pruner(model: torch.nn.Module, share: float) -> None:
        masks = namespace["plugin"].masks
        masks.prune({name: masks.weight(name).detach().abs() for name in masks}, amount=share)

    batches, example_input, step = [torch.rand(8, 6)], torch.rand(2, 6), 1
    writer = CSVWriter("dnr.csv")
    namespace: dict[str, Any] = {**locals(), "ap": ap, "rewind": start.restore, "SummaryWriter": lambda: writer}
    for _, language, text, line in blocks(DOCS.parent / "README.md"):
        if language == "python":
            exec(compile("\n" * line + text, "README.md", "exec"), namespace)
    writer.close()
    assert "dnr/train/1/total" in Path("dnr.csv").read_text(encoding="utf-8")
    plugin = namespace["plugin"]
    expected = 8000
    for _ in range(20):
        expected -= round(0.2 * expected)
    assert expected <= plugin.masks.alive < 1.1 * expected  # above where AP ran out of negative weights
    plugin.detach()


@pytest.mark.parametrize("page", ["pruners.md", "activations.md"])
def test_the_python_of_other_pages_runs(page: str) -> None:
    """Its model, data and optimizer are given here."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks, step, example_input = ap.Masks(model), 500, torch.rand(2, 8)
    batches, loss_fn = [(torch.rand(16, 8), torch.randint(4, (16,)))], torch.nn.functional.cross_entropy
    start = {name: masks.weight(name).detach() + 0.1 * torch.rand_like(masks.weight(name)) for name in masks}
    x = torch.rand(4, 64)
    namespace: dict[str, Any] = {**locals(), "ap": ap, "torch": torch}
    found = [(text, line) for _, language, text, line in blocks(DOCS / page) if language == "python"]
    assert found
    for text, line in found:
        exec(compile("\n" * line + text, page, "exec"), namespace)
