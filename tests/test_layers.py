"""The house has floors: imports go down only, and strangers on the same floor do not meet."""

from __future__ import annotations

import ast
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
