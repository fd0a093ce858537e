"""Builds the pages: `python -m sphinx -W docs workdir/site`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

project, author = "abflax", "the abflax developers"
copyright = author
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = "abflax"
html_static_path, html_css_files = ["_static"], ["narrow.css"]
pygments_dark_style = "github-dark"
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"
default_role = "literal"  # what docstrings have in single backquotes is code
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_use_rtype = False

COMMANDS = ("quickstart", "run", "table", "results", "search", "transfer", "analyse", "export",
            "probe", "emoji", "dream", "relatives", "figure1", "pictures", "bench")  # fmt: skip


def write_commands(app: object) -> None:
    """Writes the command reference from what the commands print."""
    parts = ["# Command reference\n", "What `--help` prints, made with these pages.\n"]
    for name in COMMANDS:
        command = [sys.executable, "-m", f"experiments.{name}", "--help"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        parts.append(f"## experiments.{name}\n\n```text\n{shown.stdout.strip()}\n```\n")
    (ROOT / "docs" / "commands.md").write_text("\n".join(parts))


def escape_bars(*event: object) -> None:
    """Escapes the bars of |x| in a docstring, which reStructuredText reads as a substitution."""
    lines: list[str] = event[-1]  # type: ignore[assignment]
    lines[:] = [line.replace("|", r"\|") for line in lines]


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", write_commands)  # type: ignore[attr-defined]
    app.connect("autodoc-process-docstring", escape_bars)  # type: ignore[attr-defined]
