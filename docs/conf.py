"""The documentation's build: python -m sphinx -W docs docs/_build/html. Nothing is fetched."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import ap  # noqa: E402

project = "Activate-while-Pruning"
author = "the Activate-while-Pruning authors"
copyright = "MIT licence"
version = release = ap.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "directives"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3  # so that pages can link to each other's headings, as they do where Markdown is read as it is

# Types that are imported for type checkers only are known by their short names, which may be ambiguous: no link then.
suppress_warnings = ["ref.python"]

default_role = "code"  # docstrings write `names` as Markdown does
autodoc_default_options = {"ignore-module-all": True}  # names are documented where they are defined
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False  # torch's own, of what is overridden, link to torch's pages
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
add_module_names = False

html_theme = "furo"
html_title = f"Activate-while-Pruning {version}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]


def _escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """In docstrings |w| is a magnitude and * a product, not the markup that reStructuredText looks for; *this* is."""
    doctest = False
    for i, line in enumerate(lines):
        doctest = bool(line.strip()) and (doctest or line.lstrip().startswith(">>>"))
        if not doctest:
            lines[i] = re.sub(r"(``.*?``|`[^`]*`|\*\w[^*]*\w\*)|([*|])", _kept_or_escaped, line)


def _kept_or_escaped(match: re.Match[str]) -> str:
    return match[1] or f"\\{match[2]}"


def setup(app: Any) -> None:
    """Sphinx calls it."""
    app.connect("autodoc-process-docstring", _escape, priority=400)  # before napoleon
