"""docs/architecture.md: the rooms of the package from top to bottom, and one line for each source file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, LAB = ROOT / "src/hybridkv", ROOT / "lab/src/hybridkv_lab"
START = """# Architecture

Written by `docs/generate.py` from the first line of every source file.

Attention follows one path: a **format** record says how a row is stored; an attention **case** says what a call computes;
the **registry** picks the first kernel that does not reject the case, and knows every refusal's reason; the **cache** stores
rows for that kernel; the **guard** compares what the kernel computed with float attention. A model is data: a **family** is a
function from a config to a graph of records, and a backend lowers each record to operations.

Imports go down only (`tests/test_layers.py`), and rooms on one floor do not import each other. `lab` is `hybridkv-lab`, which
measures: a distribution of its own in `lab/`, whose commands the command line finds through entry points.

"""


def architecture_page() -> str:
    """Build the page: the floors, then every room."""
    floors = _floors()
    lines = [START + "```text", *(" | ".join(floor) for floor in floors), "```", ""]
    for name in [room for floor in floors for room in floor]:
        room = _room(name)
        lines += [f"## {name}", ""]
        if room.is_dir():
            lines += [f"{_docstring(room / '__init__.py')}", ""]
            lines += [f"- `{path.relative_to(room)}`: {line}" for path, line in _files(room)]
        else:
            lines.append(_docstring(room.with_suffix(".py")))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _room(name: str) -> Path:
    """Find a room's folder, or the room without its suffix where it is one file; `lab` is what measures."""
    first, _, rest = name.partition("/")
    return LAB / rest if first == "lab" else PACKAGE / name


def _floors() -> tuple[tuple[str, ...], ...]:
    """Read the floors that the layer test enforces."""
    for node in ast.parse((ROOT / "tests/test_layers.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            found: tuple[tuple[str, ...], ...] = ast.literal_eval(node.value)
            return found
    raise AssertionError("tests/test_layers.py has no FLOORS")


def _files(room: Path) -> list[tuple[Path, str]]:
    """List a room's files, C++ included, with their first lines."""
    python = [(p, _docstring(p)) for p in sorted(room.rglob("*.py")) if p.parent != room or p.name != "__init__.py"]
    if room == LAB:
        python = [(path, line) for path, line in python if path.parent != LAB / "cli"]
    native = sorted([*room.rglob("*.h"), *room.rglob("*.cpp")])
    return python + [(path, _comment(path)) for path in native]


def _docstring(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, path
    return " ".join(text.split("\n\n")[0].split())


def _comment(path: Path) -> str:
    """Join a C++ file's first comment; files without one compile a header of their name, or the body of a folder."""
    found = re.match(r"(?:// ?.*\n)+", path.read_text())
    if found:
        text = "\n".join(line.removeprefix("//").strip() for line in found[0].splitlines())
        return " ".join(text.split("\n\n")[0].split())
    if path.with_suffix(".h").exists():
        return f"Defines what `{path.stem}.h` declares."
    body = "isa.h" if path.stem.startswith("isa_") else f"{path.parent.name}.h"
    assert (path.parent / body).exists(), path
    return f"Compiles `{body}` for {path.stem.removeprefix('isa_')}."
