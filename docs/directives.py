"""Directives that write from the code: the options of the command line, and what no page of the reference names."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective


class _Table(SphinxDirective):
    """A directive whose content is Markdown that it makes."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Sphinx calls it."""
        lines = self.lines(self.arguments[0])
        container = nodes.container()
        self.state.nested_parse(StringList(lines, source=self.arguments[0]), self.content_offset, container)
        return container.children

    def lines(self, name: str) -> list[str]:
        """The Markdown."""
        raise TypeError(f"{type(self).__name__} makes no table")


class Options(_Table):
    """`module:Class`: the fields of a dataclass that tyro reads, with their defaults and docstrings."""

    def lines(self, name: str) -> list[str]:
        """A table, or one for each section of the class's body."""
        return options(*name.split(":"))


class Arguments(_Table):
    """`module:function`: what the parser that the function makes takes; of its first subcommand, if it has any."""

    def lines(self, name: str) -> list[str]:
        """One table."""
        module, function = name.split(":")
        return arguments(getattr(importlib.import_module(module), function)())


class Presets(_Table):
    """`module`: the experiments of `PRESETS` there."""

    def lines(self, name: str) -> list[str]:
        """One table."""
        rows = [
            [
                f"`{key}`",
                preset.about,
                " ".join(f"`{arm}`" for arm in preset.experiment.ap),
                str(preset.experiment.cycles),
            ]
            for key, preset in importlib.import_module(name).PRESETS.items()
        ]
        return table(["preset", "", "arms", "cycles"], rows)


class Remaining(_Table):
    """`package`: automodule of its modules that no page of the reference names, so that none is left out."""

    def lines(self, name: str) -> list[str]:
        """A block of reStructuredText."""
        pages = Path(self.env.srcdir, "reference").glob("*.md")
        named = set(re.findall(r"auto(?:module|class|function):: ([\w.]+)", "".join(map(Path.read_text, pages))))
        block = [
            line for module in remaining(name, named) for line in (f".. automodule:: {module}", "   :members:", "")
        ]
        return ["```{eval-rst}", *block, "```"]


def remaining(package: str, named: set[str]) -> list[str]:
    """The modules of a package that define something public, and that neither are nor contain one of `named`."""
    named = named | {name.rpartition(".")[0] for name in named}
    found = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
    return [m.name for m in found if m.name not in named and not m.name.endswith("__main__") and _defines(m.name)]


def _defines(name: str) -> bool:
    public = {key: value for key, value in vars(importlib.import_module(name)).items() if not key.startswith("_")}
    return any(getattr(value, "__module__", None) == name for value in public.values())


def options(module: str, kind: str) -> list[str]:
    """Markdown of a dataclass's options."""
    cls = getattr(importlib.import_module(module), kind)
    docs = ModuleAnalyzer.for_module(module).find_attr_docs()
    fields = {field.name: field for field in dataclasses.fields(cls)}
    sections: list[tuple[str | None, list[list[str]]]] = [(None, [])]
    for line in inspect.getsource(cls).splitlines():
        title = re.fullmatch(r"    # --- (.*) ---", line)
        declared = re.match(r"    (\w+): ", line)
        if title:
            sections.append((title[1].capitalize(), []))
        elif declared and declared[1] in fields and (kind, declared[1]) in docs:
            field = fields[declared[1]]
            called = re.search("""metavar=['"](.+?)['"]""", str(field.type))
            positional = "tyro.conf.Positional" in str(field.type)
            place = called[1] if called else field.name.upper()
            shown = place if positional else "--" + field.name.replace("_", "-")
            sections[-1][1].append([f"`{shown}`", default(field), " ".join(docs[kind, field.name]).strip()])
    lines = []
    for heading, rows in sections:
        if rows:
            lines += [f"**{heading}**", ""] if heading else []
            lines += [*table(["option", "default", ""], rows), ""]
    return lines


def default(field: dataclasses.Field[Any]) -> str:
    """A field's default as the command line would take it."""
    value = field.default
    if value is dataclasses.MISSING or value is None or value == ():
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def arguments(parser: argparse.ArgumentParser) -> list[str]:
    """Markdown of an argparse parser's options."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parser = next(iter(action.choices.values()))
    rows = [
        [
            " ".join(f"`{flag}`" for flag in action.option_strings) or f"`{(action.metavar or action.dest).upper()}`",
            action.help,
        ]
        for action in parser._actions
        if action.help and action.dest != "help"
    ]
    return table(["option", ""], rows)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    cells = [[as_cell(text) for text in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells]]


def as_cell(text: str) -> str:
    """A text in a table; options that it names become code, so that their hyphens stay hyphens."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"(?<![\w-])--[a-z][\w-]*", r"`\g<0>`", part) for part in parts[::2]]
    return "`".join(parts).replace("|", "\\|")


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls it."""
    for name, directive in (
        ("options", Options),
        ("arguments", Arguments),
        ("presets", Presets),
        ("remaining", Remaining),
    ):
        app.add_directive(name, directive)
    return {"parallel_read_safe": True}
