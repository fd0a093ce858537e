"""What the documentation says is so: its code runs, its names are there, its links lead on.

The API page is built by `pip install -e '.[docs]'` and `python -m pytest -m slow
tests/test_docs.py`, with the README's own command.
"""

import ast
import dataclasses
import doctest
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

import abflax
from abflax import Dataset, load

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "abflax").rglob("*.py"))
    if ">>> " in path.read_text()
]

ROOMS = ["abflax"] + [
    f"abflax.{path.stem}"
    for path in sorted((ROOT / "abflax").iterdir())
    if re.fullmatch(r"[a-z]\w*(\.py)?", path.name)
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_of_docstrings(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


PYTHON = _blocks(ROOT / "README.md", "python")


@pytest.mark.parametrize("block", PYTHON[:2], ids=["shipped", "own"])  # then `test_nnx`
def test_the_readmes_python_fits_what_it_calls(block):
    """All it imports is there, and every call's arguments are those of what it calls."""
    tree, names = ast.parse(block), {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            exec(ast.unparse(node), names)
    called = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "print") != "print":
            options = {keyword.arg: None for keyword in node.keywords}
            inspect.signature(names[node.func.id]).bind(*node.args, **options)
            called.add(node.func.id)
    assert "distill" in called


@pytest.mark.slow
def test_the_readmes_python_runs(monkeypatch):
    """On a batch of noise in place of CIFAR-10."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 32, 32, 3), dtype=np.uint8)
    data = Dataset(noise, np.arange(128) % 10)
    monkeypatch.setattr(abflax, "load", lambda name, split: data)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(PYTHON[0], names)
    assert 0 <= names["result"].record["result"]["test_error"] <= 1


class Block(nn.Module):
    stride: int

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.LayerNorm(name="norm")(nn.Conv(4, (3, 3), self.stride)(x)))


class Own(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(4, (3, 3))(images))
        for stride in (1, 1, 1, 2):
            x = Block(stride)(x)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


@pytest.mark.slow
def test_the_readmes_own_models_run():
    """With a model that has the modules named there; its teacher's taps are the suggested ones."""
    data = load("digits", "train").take(range(16))
    images = data.images.astype(np.float32)
    variables = Own().init(jax.random.key(0), images)
    given = {"images": images, "labels": data.labels, "variables": variables}
    names = {**given, "student": Own(), "teacher": Own()}
    exec(PYTHON[1], names)
    steps = {phase["name"]: phase["steps"] for phase in names["result"].record["phases"]}
    assert steps == {"initialise": 2, "classify": 13}  # ⌊20·16/128⌋, and ⌊120·16/128⌋ in all
    assert "Block_2/norm" in names["result"].record["config"]["teacher"]


def test_the_pages_links_lead_to_files_and_their_commands_to_modules():
    for page in PAGES:
        text = page.read_text()
        prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
        links = re.findall(r"\]\((?!https?:)([^)#\s]+)", prose)
        targets = {page.parent / link.replace("\\", "") for link in links}
        added = re.findall(r"^```python (\S+)$", text, re.MULTILINE)  # by who follows the page
        named = re.findall(r"`((?:tests|abflax|experiments)/[\w./-]+)`", text)
        targets |= {ROOT / name for name in set(named) - set(added)}
        for target in targets:
            assert target.exists(), f"{page.name}: {target}"
        for name in re.findall(r"python -m (experiments[.\w]*\w)", text):
            assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), f"{page.name}: {name}"


@pytest.mark.slow
def test_the_contributions_of_the_page_work(tmp_path):
    """A method, a model and a data set are added to a copy as told there; their tests pass."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    for name in ("abflax", "docs", "experiments", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    files = re.findall(r"^```python (\S+)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for name, code in files:
        assert not (tmp_path / name).exists(), name
        (tmp_path / name).write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment["GIT_CEILING_DIRECTORIES"] = str(tmp_path.parent)  # it is no part of a repository

    def run(*command, **options):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, **options
        )
        assert done.returncode == 0, done.stdout + done.stderr

    diffs = _blocks(ROOT / "CONTRIBUTING.md", "diff")
    for diff in diffs:
        run("git", "apply", "-C1", "-", input=diff)
    commands = re.findall(r"^python (-m pytest -n 0 .*)$", page, re.MULTILINE)
    assert (len(files), len(diffs), len(commands)) == (5, 3, 3)
    checks = ("pytest -n 0 tests/test_architecture.py", "ruff check .", "ruff format --check .")
    for command in (*commands, *(f"-m {check}" for check in checks), "-m mypy abflax"):
        run(sys.executable, *command.split())


class _Html(HTMLParser):
    """A page's anchors, where its links lead, and the code in its text that is no link."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.unlinked = set(), [], []
        self._code = None
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.add(attributes.get("id"))
        if tag == "code":
            self._code = ""
        if tag == "a":
            self._code = None
            self.links.append(attributes.get("href", ""))

    def handle_data(self, data):
        if self._code is not None:
            self._code += data

    def handle_endtag(self, tag):
        if tag == "code" and self._code is not None:
            self.unlinked.append(self._code)
            self._code = None


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """name -> page of the API, built by the README's command."""
    pytest.importorskip("pdoc", reason="pip install -e '.[docs]'")
    (command,) = re.findall(
        r"^python (-m pdoc .*)$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    folder = tmp_path_factory.mktemp("api")
    assert "workdir/api" in command
    command = f"'{sys.executable}' {command.replace('workdir/api', str(folder))}"
    built = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    return folder, {path.resolve(): _Html(path) for path in folder.rglob("*.html")}


@pytest.mark.slow
def test_every_public_module_has_a_page(api):
    folder, pages = api
    for room in ROOMS:
        path = folder / f"{room.replace('.', '/')}.html"
        assert path.resolve() in pages, room


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_documented(room):
    """By a docstring, and a dataclass's fields by their names in it."""
    pages = pytest.importorskip("pdoc.doc", reason="pip install -e '.[docs]'")

    def undocumented(namespace):
        for member in namespace.members.values():
            if member.name.startswith("_") or not member.taken_from[0].startswith("abflax"):
                continue
            if isinstance(member, pages.Class):
                yield from undocumented(member)
                yield from fields(member.obj)
            elif isinstance(namespace, pages.Class) and isinstance(member, pages.Variable):
                continue  # see `fields`; other attributes are shown as they are
            if not member.docstring and f"`{member.name}`" not in namespace.docstring:
                yield member.fullname

    def fields(kind):
        text = " ".join(inspect.getdoc(each) or "" for each in kind.__mro__)
        for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
            if field.name not in ("parent", "name") and not re.search(rf"\b{field.name}\b", text):
                yield f"{kind.__qualname__}.{field.name}"

    page = pages.Module(importlib.import_module(room))
    assert page.docstring and not list(undocumented(page))


@pytest.mark.slow
def test_every_link_of_the_api_leads_on(api):
    _, pages = api
    followed = 0
    for path, page in pages.items():
        for link in page.links:
            if link.startswith("https://"):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target in pages and (not anchor or anchor in pages[target].anchors), (path, link)
            followed += 1
        dead = [code for code in page.unlinked if re.fullmatch(r"abflax(\.\w+)+", code)]
        assert not dead, (path, dead)
    assert followed > 1000
