"""The house has floors: imports go down only, and strangers on the same floor do not meet."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hybridkv

ROOT = Path(hybridkv.__file__).parent
FLOORS = (
    ("cli",),
    ("server",),
    ("lab",),
    ("engine",),
    ("native",),
    ("hf", "gguf"),
    ("runtime",),
    ("policy", "planner", "held", "memory", "model", "text"),
    ("cache",),
    ("kernels",),
    ("rotation", "formats"),
    ("errors",),
)
LEVEL = {room: len(FLOORS) - i for i, floor in enumerate(FLOORS) for room in floor}
ONLY_IN = {
    "transformers": ("hf", "gguf", "cli"),
    "triton": ("kernels/cuda",),
    "gguf": ("gguf", "kernels/grids"),
    "rich": ("cli",),
    "prompt_toolkit": ("cli",),
    "huggingface_hub": ("engine", "gguf", "hf"),
    "fastapi": ("server",),
    "starlette": ("server",),
    "uvicorn": ("server",),
    "prometheus_client": ("server",),
    "ray": ("server", "lab", "cli"),
}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere: late and TYPE_CHECKING imports count."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module_parts: tuple[str, ...]) -> str | None:
    """The top-level room of a module inside the package, None for the package itself."""
    return module_parts[0] if module_parts else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    here = room(path.relative_to(ROOT).with_suffix("").parts)
    if here in ("__init__", None):
        return
    assert here in LEVEL, f"{here} has no floor"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "hybridkv" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != here:
            assert LEVEL[parts[1]] < LEVEL[here], f"{here} may not import {name}"
        for library, rooms in ONLY_IN.items():
            if parts[0] == library:
                place = path.relative_to(ROOT).as_posix()
                assert place.startswith(tuple(f"{r}/" for r in rooms)) or place[:-3] in rooms, (
                    f"{library} may be imported in {rooms} only"
                )


def test_every_floor_is_met() -> None:
    """The test above checks something: the package imports across floors."""
    crossings = {
        (room(p.relative_to(ROOT).with_suffix("").parts), n.split(".")[1])
        for p in FILES
        for n in imports(p)
        if n.startswith("hybridkv.")
    }
    assert {
        ("cli", "lab"),
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


def module(path: Path) -> str:
    return ".".join(("hybridkv", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


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
