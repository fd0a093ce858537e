"""The rooms of the house: who may know whom, and how large a file may be."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# room -> what it may import of abflax, besides errors and itself
MAY_KNOW = {
    "files": set(),
    "losses": set(),
    "metrics": {"losses"},  # the indicator
    "taps": set(),
    "norm": set(),
    "models": {"norm", "taps"},
    "connectors": {"losses", "norm", "taps"},
    "optim": set(),
    "data": {"settings"},
    "interrupt": set(),
    "progress": set(),
    "processes": set(),
    "checkpoint": {"networks", "processes"},  # the digest
    "lock": {"processes"},
    "terms": {"losses", "metrics", "taps"},
    "settings": set(),
    "transfer": {"terms"},
    "phase": {"optim", "terms"},
    "methods": {"optim", "phase", "settings", "terms", "transfer"},
    "networks": {"models", "taps"},
    "trained": {"step"},
    "step": {"losses", "metrics", "taps", "connectors", "phase", "terms"},
    "compatibility": {"config", "data", "models", "networks", "step", "taps"},
    "weights": {"compatibility", "files", "models", "networks", "step"},
    "config": {"methods", "settings"},
    "record": {"config", "files"},
    "journal": {"config", "optim", "phase"},
    "diagnosis": {"step", "taps"},
    "parallel": {"data", "diagnosis", "optim", "phase", "step", "taps", "trained"},
    "feed": {"data", "parallel"},
    "evaluation": {
        "compatibility",
        "data",
        "feed",
        "methods",
        "networks",
        "optim",
        "parallel",
        "processes",
    },
    "kept": {"networks", "parallel", "phase", "processes"},
    "events": set(),
    "abreast": {"interrupt", "parallel", "processes", "step"},
    "classroom": {
        "abreast",
        "config",
        "data",
        "evaluation",
        "feed",
        "networks",
        "parallel",
        "record",
        "step",
        "taps",
    },
    "run": {
        "abreast",
        "checkpoint",
        "classroom",
        "compatibility",
        "config",
        "diagnosis",
        "events",
        "interrupt",
        "journal",
        "kept",
        "networks",
        "optim",
        "parallel",
        "phase",
        "processes",
        "progress",
        "record",
        "step",
        "taps",
    },
    "analysis": {"compatibility", "data", "losses", "metrics", "networks", "taps"},
    "loop": {
        "abreast",
        "checkpoint",
        "classroom",
        "compatibility",
        "config",
        "data",
        "interrupt",
        "lock",
        "models",
        "networks",
        "processes",
        "progress",
        "record",
        "run",
        "settings",
        "taps",
        "weights",
    },
}


def _imports(path: Path) -> set[str]:
    """Top-level rooms of abflax and experiments that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found.update(name for name in names if name.split(".")[0] in ("abflax", "experiments"))
    return found


def _room(path: Path) -> str:
    return path.relative_to(ROOT / "abflax").parts[0].removesuffix(".py")


def test_imports_point_one_way():
    rooms = set()
    for path in (ROOT / "abflax").rglob("*.py"):
        room = _room(path)
        rooms.add(room)
        if room in ("__init__", "errors"):
            continue
        allowed = MAY_KNOW[room] | {"errors", room}
        for name in _imports(path):
            parts = name.split(".")
            assert parts[0] == "abflax", f"{path} imports {name}: abflax knows no experiments"
            if len(parts) > 1:
                is_room = (ROOT / "abflax" / parts[1]).is_dir() or (
                    ROOT / "abflax" / f"{parts[1]}.py"
                ).is_file()
                assert not is_room or parts[1] in allowed, f"{path} may not import {name}"
    assert set(MAY_KNOW) == rooms - {"__init__", "errors"}


def test_pmap_is_said_in_one_file():
    saying = [
        path.name for path in (ROOT / "abflax").rglob("*.py")
        if any(isinstance(node, ast.Attribute) and node.attr in ("pmap", "shard_map")
               for node in ast.walk(ast.parse(path.read_text())))
    ]  # fmt: skip
    assert saying == ["parallel.py"]


def test_no_file_is_long():
    for folder in ("abflax", "experiments", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path
