"""What the documentation says is so: its code runs, its names are there, its links lead on.

`pip install -e '.[test,docs]'` and `python -m pytest -n 0 -m slow tests/test_docs.py
tests/experiments/test_notebooks.py` build the site by CONTRIBUTING's own command, follow its links
and run examples and notebooks.
"""

import ast
import contextlib
import dataclasses
import doctest
import functools
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import flax
import jax
import numpy as np
import pytest
import safetensors.flax
from flax import linen as nn
from flax import nnx

import abflax
from abflax import Dataset, Network, load
from abflax.methods import METHODS
from abflax.training.run_directory import Result
from tests.conftest import Small

ROOT = Path(__file__).parent.parent
_CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
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


(README,) = _blocks(ROOT / "README.md", "python")
SHIPPED, LOGGED = [b for b in _blocks(ROOT / "docs/get_started.md", "python") if "distill" in b]
NNX, LINEN, *_ = _blocks(ROOT / "docs/own_models.md", "python")
BOUND, LOOP = _blocks(ROOT / "docs/own_loop.md", "python")


@pytest.mark.parametrize("block", [README, SHIPPED, LINEN], ids=["readme", "shipped", "linen"])
def test_the_pages_python_fits_what_it_calls(block):
    """All it imports is there, and every call's arguments are those of what it calls."""
    tree, names = ast.parse(block), {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            exec(ast.unparse(node), names)
    called = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "print") in names:
            options = {keyword.arg: None for keyword in node.keywords}
            inspect.signature(names[node.func.id]).bind(*node.args, **options)
            called.add(node.func.id)
    assert "distill" in called


@pytest.mark.slow
def test_get_starteds_python_runs(monkeypatch, tmp_path):
    """On a batch of noise in place of CIFAR-10."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 32, 32, 3), dtype=np.uint8)
    data = Dataset(noise, np.arange(128) % 10)
    monkeypatch.setattr(abflax, "load", lambda name, split: data)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(SHIPPED.replace('"workdir"', repr(str(tmp_path))), names)
    assert 0 <= names["result"].record["result"]["test_error"] <= 1


NAMES = {
    "dataclasses": dataclasses,
    "distill": abflax.distill,
    "Small": Small,
    **{name: getattr(abflax.methods, name) for name in ("Phase", "Ramp")},
    **{name: getattr(abflax.methods.terms, name) for name in ("Term", "CrossEntropy")},
}


class Block(nn.Module):
    stride: int

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.LayerNorm(name="norm")(nn.Conv(4, (3, 3), self.stride)(x)))


class Own(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(4, (3, 3))(images))
        for stride in (1, 1, 1):
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
    exec(LINEN, names)
    steps = {phase["name"]: phase["steps"] for phase in names["result"].record["phases"]}
    assert steps == {"initialise": 2, "classify": 13}  # ⌊20·16/128⌋, and ⌊120·16/128⌋ in all
    assert "Block_2/norm" in names["result"].record["config"]["teacher"]


def test_the_readme_names_every_method():
    (row,) = re.findall(
        r"^\| methods \| (.*); sums", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert set(re.findall(r"`([^`]+)`", row)) == set(METHODS)


def test_the_bound_loop_is_short():
    assert len(BOUND.rstrip().splitlines()) <= 25


@pytest.mark.slow
def test_the_nnx_pages_python_runs():
    """The README's on the model of the page, then the loop of one's own on it."""
    data = load("digits", "train").take(range(128))
    names = {"images": data.images.astype(np.float32), "labels": data.labels}
    exec(NNX, names)
    assert isinstance(names["trained"], names["Net"]) and names["trained"] is not names["student"]
    test = load("digits", "test").take(range(64))
    names |= {"test_images": test.images.astype(np.float32), "test_labels": test.labels}
    exec(README.replace("(20, 100)", "(2, 3)"), names)
    assert names["tapped"](names["student"]).tap_paths == (("layer1", "norm"),)
    assert 0 <= names["result"].record["result"]["test_error"] <= 1
    assert isinstance(names["trained"], names["Net"])
    # The loop has no connectors, so both networks must have the same neurons.
    network = dict.fromkeys(("student", "teacher"), Network(names["teacher"]))
    names |= {role: each.model for role, each in network.items()}
    names["teacher_variables"] = network["teacher"].variables
    exec(LOOP, names)
    params, state = (dict(network["student"].variables) for _ in range(2))
    params = state.pop("params")
    opt_state, values = names["optimizer"].init(params), []
    for _ in range(5):
        params, state, opt_state, value = names["step"](params, state, opt_state, names["images"])
        values.append(float(value))
    assert np.isfinite(values).all()


def test_saved_weights_are_read_in_plain_nnx(tmp_path, monkeypatch):
    """Into a module with a list, with other weights before."""

    class Listed(nnx.Module):
        def __init__(self, seed):
            rngs = nnx.Rngs(seed)
            self.blocks = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])

        def __call__(self, x):
            return self.blocks[1](self.blocks[0](x))

    monkeypatch.chdir(tmp_path)
    saved, model, x = Listed(0), Listed(1), np.eye(3, dtype=np.float32)
    saved(x)  # moves the running statistics
    Result({}, Network(saved).variables, None).save("student.safetensors")
    (block,) = [b for b in _blocks(ROOT / "docs/own_models.md", "python") if "nnx.update" in b]
    exec(block, {"model": model, "nnx": nnx, "flax": flax, "safetensors": safetensors})
    for each in (saved, model):
        each.eval()
    np.testing.assert_array_equal(model(x), saved(x))
    assert not np.allclose(model(x), Listed(1)(x))


def test_the_pages_links_lead_to_files_and_their_commands_to_modules():
    for page in PAGES:
        text = page.read_text()
        prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
        assert "[](" not in prose, page.name  # GitHub shows nothing there
        links = re.findall(r"\]\((?!https?:)([^)#\s]+)", prose)
        targets = {page.parent / link.replace("\\", "") for link in links}
        added = re.findall(r"^```python (\S+)$", text, re.MULTILINE)  # by who follows the page
        named = re.findall(r"`((?:tests|abflax|experiments)/[\w./-]+)`", text)
        targets |= {ROOT / name for name in set(named) - set(added)}
        for target in targets:
            assert target.exists(), f"{page.name}: {target}"
        for name in re.findall(r"python -m (experiments[.\w]*\w)", text):
            assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), f"{page.name}: {name}"


def test_the_own_method_of_the_page_trains():
    """Three steps: an epoch is one batch."""
    (block,) = _blocks(ROOT / "docs/extend.md", "python")
    student = NAMES["Small"]()
    data = load("digits", "train").take(np.arange(128))
    variables = student.init(jax.random.key(1), data.images, train=False)
    teacher = Network(student, {"params": variables["params"]}, "teacher")
    names = NAMES | {"student": student, "teacher": teacher, "data": data, "__name__": "notebook"}
    exec(block, names)
    losses = [entry["loss"] for entry in names["result"].record["history"]]
    assert len(losses) == 3 and np.isfinite(losses).all()


def test_an_augmentation_metrics_and_a_logger_of_the_pages(monkeypatch):
    """One step on a batch of noise; `wandb` is a list."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    data = Dataset(noise, np.arange(16) % 10)
    student, logged = Small(), []
    variables = student.init(jax.random.key(1), data.images[:1], train=False)
    wandb = types.SimpleNamespace(
        init=lambda **_: contextlib.nullcontext(), log=lambda *entry, step: logged.append(entry)
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    distill = functools.partial(
        abflax.distill, method="kd", epochs=(0, 1), batch_size=16,
        resources=abflax.Resources(devices=1),
    )  # fmt: skip
    names = {
        "abflax": types.SimpleNamespace(distill=distill, Reporter=abflax.Reporter),
        "student": student, "teacher": Network(student, variables, "teacher"),
        "data": data, "test": data, "jax": jax, "jnp": jax.numpy,
    }  # fmt: skip
    found = []
    blocks = _blocks(ROOT / "docs/data.md", "python")
    for block in (*(b for b in blocks if "augment=" in b or "metrics=" in b), LOGGED):
        exec(block, names)
        found.append(names["result"].record)
    assert found[0]["config"]["augment"].startswith("custom:")
    assert 0 <= found[1]["result"]["metrics"]["top5"] <= 1
    assert [entry["test_error"] for (entry,) in logged] == [found[1]["result"]["test_error"]]


@pytest.mark.slow
def test_the_contributions_of_the_page_work(tmp_path):
    """A method, a model and a data set are added to a copy as told there; their tests pass."""
    page = (ROOT / "docs" / "extend.md").read_text()
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

    diffs = _blocks(ROOT / "docs" / "extend.md", "diff")
    for diff in diffs:
        run("git", "apply", "-C1", "-", input=diff)
    commands = re.findall(r"^python (-m pytest -n 0 .*)$", page, re.MULTILINE)
    assert (len(files), len(diffs), len(commands)) == (5, 3, 3)
    checks = ("pytest -n 0 tests/test_architecture.py", "ruff check .", "ruff format --check .")
    for command in (*commands, *(f"-m {check}" for check in checks), "-m mypy abflax"):
        run(sys.executable, *command.split())


class _Html(HTMLParser):
    """A page's anchors, and where its links lead."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors, self.links = {""}, []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.add(attributes.get("id"))
        if tag == "a":
            self.links.append(attributes.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages, built by CONTRIBUTING's command without a warning: path -> page."""
    pytest.importorskip("sphinx", reason="pip install -e '.[docs]'")
    command = re.findall(r"python (-m sphinx -W docs) workdir/site", _CONTRIBUTING)[0].split()
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, *command, "-q", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert (built.returncode, built.stderr) == (0, "")
    return folder, {path.resolve(): _Html(path) for path in folder.rglob("*.html")}


@pytest.mark.slow
def test_no_page_has_a_box_of_errors(site):
    """The theme draws one where a page has its own table of contents."""
    for path in site[1]:
        assert "ERROR: Adding a table of contents" not in path.read_text(), path


@pytest.mark.slow
def test_every_link_of_the_pages_leads_on(site):
    folder, pages = site
    followed = 0
    for path, page in pages.items():
        # A listing's links back name objects where they are defined, the API where they are used.
        listing = "_modules" in path.relative_to(folder.resolve()).parts
        for link in page.links:
            if listing or re.match("https?://", link):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), (path, link)
            assert not anchor or anchor in pages[target].anchors, (path, link)
            followed += 1
    assert followed > 1000


@pytest.mark.slow
def test_every_public_name_is_on_the_api_page(site):
    folder, pages = site
    anchors = pages[(folder / "api.html").resolve()].anchors
    for room in ("abflax.losses", "abflax.metrics", "abflax.taps", "abflax.methods"):
        for name, member in vars(importlib.import_module(room)).items():
            is_public = inspect.isclass(member) or inspect.isfunction(member)
            if (
                is_public
                and member.__module__.startswith(room)
                and not name.startswith(("_", "Tapped"))
            ):
                ends = [anchor for anchor in anchors if anchor and anchor.endswith(f".{name}")]
                assert ends, f"{room}.{name}"


@pytest.mark.parametrize("room", ROOMS)
def test_every_field_is_documented(room):
    """By its name in the docstring of its class, or of a class that it inherits from."""
    for kind in vars(importlib.import_module(room)).values():
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            continue
        if not kind.__module__.startswith("abflax") or kind.__name__.startswith("_"):
            continue
        text = " ".join(inspect.getdoc(each) or "" for each in kind.__mro__)
        for field in dataclasses.fields(kind):
            is_internal = field.name in ("parent", "name") or field.name.startswith("_")
            assert is_internal or re.search(rf"\b{field.name}\b", text), f"{kind}.{field.name}"


def test_attributes_have_a_line_each():
    """Sphinx takes the first of two names, such as "a, b: the ends", for the type of the other."""
    several = re.compile(r"^ {6}(?!self)\w+(?:, \w+)+: .*", re.MULTILINE)
    for path in (ROOT / "abflax").rglob("*.py"):
        assert not several.findall(path.read_text()), path


def test_tables_say_nothing_twice():
    """Except in heads."""
    for page in PAGES:
        rows = re.findall(r"^\|(?! :?-).*\|$(?!\n\| :?-)", page.read_text(), re.MULTILINE)
        assert len(rows) == len(set(rows)), page.name


def _sentences(page: Path) -> list[str]:
    """The prose of a page, without code, tables of results, lists of links and pictures."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!-- results: begin -->.*<!-- results: end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[.*?\]\(.*?\)|^(\[.*\]\(.*\) ·.*)+$", "", text, flags=re.MULTILINE)
    blocks = re.split(r"\n\s*\n|\n(?=[-|])", re.sub(r"\]\([^)]*\)", "]", text))
    return [part for block in blocks for part in re.split(r"(?<=[.!?])\s", block.strip("| "))]


@pytest.mark.parametrize("page", ["README.md", "docs/get_started.md", "docs/index.md"])
def test_sentences_have_at_most_thirty_words(page):
    """A name in backquotes is no word where several are listed."""
    for sentence in _sentences(ROOT / page):
        words = re.sub(r"(`[^`]+`, ?)+", "", sentence).split()
        assert len(words) <= 30, sentence


def test_pages_are_short():
    assert len((ROOT / "README.md").read_bytes()) <= 7_000
    assert len((ROOT / "CONTRIBUTING.md").read_bytes()) <= 3_000


def test_badges_are_true():
    badges = dict(re.findall(r"badge/(\w+)-(\S+)-blue", (ROOT / "README.md").read_text()))
    setup = (ROOT / "setup.py").read_text()
    assert f'python_requires=">={badges["python"].removesuffix("+")}"' in setup
    assert f'license="{badges["licence"].replace("--", "-")}"' in setup


def test_one_version_everywhere():
    (version,) = re.findall(r'version="([\d.]+)"', (ROOT / "setup.py").read_text())
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
