"""The rooms of abflax: which may import which."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# rooms -> what they may import of abflax, besides errors and themselves
MAY_IMPORT = {
    ("losses", "taps", "data", "runtime"): set(),
    ("metrics",): {"losses"},
    ("models",): {"taps"},
    ("storage",): {"models", "runtime"},
    ("weights",): {"models", "storage"},
    ("export",): {"data", "models", "taps", "weights"},
    ("methods",): {"losses", "metrics", "models", "taps"},
    ("config",): {"data", "methods"},
    ("training",): {"config", "data", "losses", "methods", "metrics", "models", "runtime",
                    "storage", "taps", "weights"},
    ("analysis",): {"data", "losses", "methods", "metrics", "models", "runtime", "taps",
                    "training"},
    ("synthesis",): {"config", "data", "losses", "models", "runtime", "storage", "taps",
                     "training"},
    ("distillation",): {"config", "data", "metrics", "models", "runtime", "taps", "training"},
}  # fmt: skip


def _imports(path: Path) -> set[str]:
    """The modules of abflax and experiments that a file imports."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        modules.update(name for name in names if name.split(".")[0] in ("abflax", "experiments"))
    return modules


def _rooms() -> dict[str, list[Path]]:
    """Room -> its files. A room is a folder, or a file at the top."""
    rooms: dict[str, list[Path]] = {}
    for path in (ROOT / "abflax").rglob("*.py"):
        room = path.relative_to(ROOT / "abflax").parts[0].removesuffix(".py")
        rooms.setdefault(room, []).append(path)
    return rooms


def test_imports_point_one_way():
    rooms = _rooms()
    del rooms["__init__"]
    known = {room for row in MAY_IMPORT for room in row} | {"errors"}
    assert set(rooms) == known
    allowed = {
        room: rooms_ | {room, "errors"} for row, rooms_ in MAY_IMPORT.items() for room in row
    }
    allowed["errors"] = {"errors"}
    for room, paths in rooms.items():
        for path in paths:
            for name in _imports(path):
                package, *parts = name.split(".")
                assert package == "abflax", f"{path} imports {name}: abflax knows no experiments"
                assert not parts or parts[0] in allowed[room], f"{path} may not import {name}"


def test_the_table_fits_on_a_screen():
    assert len(MAY_IMPORT) <= 12


def test_only_one_file_says_pmap():
    files = [
        path.name for path in (ROOT / "abflax").rglob("*.py")
        if any(isinstance(node, ast.Attribute) and node.attr in ("pmap", "shard_map")
               for node in ast.walk(ast.parse(path.read_text())))
    ]  # fmt: skip
    assert files == ["parallel.py"]


def test_importing_abflax_is_light():
    """What only a loader, an exporter or the commands need is imported by them."""
    heavy = ("sklearn", "matplotlib", "tensorflow_datasets", "tensorboardX", "tyro", "flax.nnx")
    code = f"import sys, abflax; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert printed.stdout == "[]\n"
