"""The documentation does what it says: its code runs, its commands and options exist, nothing public is left out."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from recipes import cli

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = [*sorted((DOCS / "guides").glob("*.md")), DOCS / "faq.md"]
# An HTML comment before a fence says more of it: <!-- runs -->, <!-- file: NAME -->.
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
