"""The house has floors: imports go down only, and strangers on the same floor do not meet."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Set
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hybridkv
from tests.with_lab import needs_lab

ROOT = Path(hybridkv.__file__).parent
LAB = Path(__file__).parent.parent / "lab/src/hybridkv_lab"
"""What measures: a distribution of its own, above all of the package but for its command line."""
FLOORS = (
    ("lab/cli",),
    ("cli",),
    ("server", "lab"),
    ("engine",),
    ("native",),
    ("hf", "gguf"),
    ("runtime",),
    ("policy", "planner", "placement", "held", "memory", "model", "text"),
    ("cache",),
    ("kernels",),
    ("rotation", "formats"),
    ("errors", "options"),
)
LEVEL = {room: len(FLOORS) - i for i, floor in enumerate(FLOORS) for room in floor}
ONLY_IN = {
    "transformers": ("hf", "gguf", "cli", "lab/cli"),
    "triton": ("kernels/cuda",),
    "gguf": ("gguf", "kernels/grids"),
    "rich": ("cli", "lab/cli"),
    "prompt_toolkit": ("cli",),
    "huggingface_hub": ("engine", "gguf", "hf"),
    "fastapi": ("server",),
    "starlette": ("server",),
    "uvicorn": ("server",),
    "prometheus_client": ("server",),
    "ray": ("server", "lab", "cli"),
}
FILES = sorted([*ROOT.rglob("*.py"), *LAB.rglob("*.py")])


def place(path: Path) -> str:
    """A file's path inside the package, and behind `lab/` inside what measures."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else f"lab/{path.relative_to(LAB).as_posix()}"


def module(path: Path) -> str:
    """A file's module name."""
    root = ROOT if path.is_relative_to(ROOT) else LAB
    return ".".join((root.name, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


def room(name: str) -> str | None:
    """The room of a module by its name; None for the package itself and for those of others."""
    first, *parts = name.split(".")
    if first == "hybridkv_lab":
        return "lab/cli" if parts[:1] == ["cli"] else "lab"
    return parts[0] if first == "hybridkv" and parts and parts[0] in LEVEL else None


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports anywhere: late and TYPE_CHECKING imports count."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


@pytest.mark.parametrize("path", FILES, ids=place)
def test_imports_go_down(path: Path) -> None:
    if path == ROOT / "__init__.py":
        return
    here = room(module(path))
    assert here is not None, f"{place(path)} has no floor"
    for name in imports(path):
        there = room(name)
        if there not in (here, None):
            assert LEVEL[there] < LEVEL[here], f"{place(path)} may not import {name}"
        for library, rooms in ONLY_IN.items():
            if name.split(".")[0] == library:
                allowed = place(path).startswith(tuple(f"{r}/" for r in rooms)) or place(path)[:-3] in rooms
                assert allowed, f"{library} may be imported in {rooms} only"


def test_the_package_does_not_know_what_measures_it() -> None:
    """`hybridkv-lab` is found through its entry points alone."""
    found = [place(path) for path in ROOT.rglob("*.py") if any(n.startswith("hybridkv_lab") for n in imports(path))]
    assert found == []


@needs_lab
def test_every_floor_is_met() -> None:
    """The test above checks something: the package imports across floors."""
    crossings = {(room(module(path)), room(name)) for path in FILES for name in imports(path)}
    assert {
        ("lab/cli", "cli"),
        ("lab/cli", "lab"),
        ("cli", "server"),
        ("server", "engine"),
        ("lab", "engine"),
        ("engine", "hf"),
        ("engine", "native"),
        ("native", "gguf"),
        ("native", "model"),
        ("hf", "runtime"),
        ("native", "runtime"),
        ("runtime", "policy"),
        ("runtime", "model"),
        ("policy", "cache"),
        ("cache", "kernels"),
    } <= crossings


def imports_at_run_time(path: Path) -> set[str]:
    """Modules of the package that a file imports, late ones too, but for those that only a type checker reads."""
    tree = ast.parse(path.read_text())
    guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    unread = {id(node) for block in guarded for statement in block.body for node in ast.walk(statement)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in whole}
    return found & set(MODULES)


MODULES = {module(path): path for path in FILES}


def circle(graph: Mapping[str, Set[str]]) -> list[str]:
    """The modules of one circle, none if there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_file_leads_back_to_itself() -> None:
    """A circle of imports hides in an import within a function, until a file is moved."""
    graph = {name: imports_at_run_time(path) - {name} for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 900
    assert circle(graph) == []
    graph["hybridkv.errors"] = {"hybridkv.cli.main"}
    assert {"hybridkv.errors", "hybridkv.cli.main"} < set(circle(graph))
