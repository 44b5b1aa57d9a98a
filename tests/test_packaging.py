"""What is imported is declared, where it is declared, and what is said of the releases it was tried with."""

from __future__ import annotations

import contextlib
import re
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hybridkv
from hybridkv.cli.added import GROUP
from hybridkv.cli.added import LAB as LAB_COMMANDS
from tests.test_layers import LAB, imports
from tests.with_lab import needs_lab

SOURCES = Path(hybridkv.__file__).parent
TESTS = Path(__file__).parent
PROJECT = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
LAB_PROJECT = LAB.parents[1] / "pyproject.toml"
OURS = ("hybridkv", "hybridkv_lab", "tests")
DISTRIBUTIONS: Mapping[str, str] = {"llama_cpp": "llama-cpp-python", "jsonschema_rs": "schemathesis"}
"""Where they come from, of those that are not installed wherever tests run, or come with another."""

OPTIONAL = {
    "serve": ("server/",),
    "structured": ("server/grammar.py", "server/vet_grammar.py"),
    "ray": ("server/", "cli/ray_options.py", "cli/serve_ray.py"),
}
"""The files that may import what an extra brings."""
WITH_TORCH = ("triton",)
"""Torch's builds for CUDA bring it; without it, `kernels/cuda` is never imported."""
SELECTED = ("llama_cpp", "langchain_openai", "litellm", "llm")
"""What tests are skipped without, in no extra of theirs."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def brought(*extras: str) -> set[str]:
    """The distributions that the package or some of its extras declare, those of extras within extras too."""
    found: set[str] = set()
    lines = list(PROJECT["dependencies"]) if not extras else []
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    for line in map(Requirement, lines):
        found |= brought(*line.extras) if line.name == "hybridkv" else {canonical(line.name)}
    return found


@cache
def installed() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def distribution(module: str) -> str:
    return DISTRIBUTIONS.get(module) or canonical(installed().get(module, [module])[0])


@cache
def foreign(path: Path) -> set[str]:
    """The top-level modules of others that a file imports."""
    tops = {name.partition(".")[0] for name in imports(path)}
    return {top for top in tops if top not in sys.stdlib_module_names and top not in OURS}


def test_imports_are_declared() -> None:
    for path in sorted(SOURCES.rglob("*.py")):
        place = path.relative_to(SOURCES).as_posix()
        allowed = brought().union(*(brought(extra) for extra, places in OPTIONAL.items() if place.startswith(places)))
        undeclared = {top for top in foreign(path) if distribution(top) not in allowed and top not in WITH_TORCH}
        assert not undeclared, place


def test_what_tests_import_is_declared() -> None:
    allowed = brought() | brought("test-all") | {"matplotlib"}  # of hybridkv-lab
    found = {top for path in TESTS.rglob("*.py") for top in foreign(path) if top not in SELECTED}
    ours = {path.stem for path in (TESTS.parent / "docs").glob("*.py")}
    assert {top for top in found - ours if distribution(top) not in allowed} <= {"packaging"}  # pytest's


def test_no_dependency_is_declared_in_vain() -> None:
    used = {distribution(top) for path in SOURCES.rglob("*.py") for top in foreign(path)}
    assert brought() - used == set()


@needs_lab
def test_what_measures_is_released_with_the_package() -> None:
    """Both have one version and name each other's exactly; what measures declares what it imports."""
    lab = tomllib.loads(LAB_PROJECT.read_text())["project"]
    version = hybridkv.__version__
    assert PROJECT["version"] == lab["version"] == metadata.version("hybridkv-lab") == version
    assert PROJECT["optional-dependencies"]["lab"] == [f"hybridkv-lab=={version}"]
    assert f"hybridkv=={version}" in lab["dependencies"]
    declared = {canonical(line.name) for line in map(Requirement, lab["dependencies"])} - {"hybridkv"}
    used = {distribution(top) for path in LAB.rglob("*.py") for top in foreign(path)}
    assert declared == used - {"ray"}  # which `--ray` asks for
    points = {point.name: point.value for point in metadata.entry_points(group=GROUP)}
    assert points == lab["entry-points"][GROUP] == {name: f"hybridkv_lab.cli.{name}" for name in LAB_COMMANDS}


def test_the_quick_tests_need_neither_ray_nor_a_browser() -> None:
    quick, all_of_them = brought("test"), brought("test-all")
    assert quick < all_of_them
    assert all_of_them - quick == {"ray", "accelerate", "schemathesis", "playwright"}


def test_transformers_is_one_of_the_releases_that_were_tried() -> None:
    """Private names of it are used, so that a new release is tried before it is let in."""
    (declared,) = (line for line in map(Requirement, PROJECT["dependencies"]) if line.name == "transformers")
    assert any(part.operator == "<" for part in declared.specifier)
    assert metadata.version("transformers") in declared.specifier


def test_system_headers_are_in_one_file() -> None:
    """Another operating system is a matter of `system.cpp`."""
    of_the_system = re.compile(r"#include <(sys/|unistd|pthread|signal|sched|linux/|windows|mach/)")
    files = [p for p in (TESTS.parent / "src/hybridkv/kernels/csrc").rglob("*") if p.suffix in (".cpp", ".h")]
    assert [p.name for p in files if of_the_system.search(p.read_text())] == ["system.cpp"]


def test_the_source_distribution_holds_what_builds_and_runs() -> None:
    """Its builder's own choice of files, asked as it asks."""
    chooses = pytest.importorskip("scikit_build_core.build._file_processor").each_unignored_file
    root = TESTS.parent
    with contextlib.chdir(root):
        options = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["scikit-build"]["sdist"]
        files = sorted(chooses(Path(), exclude=options["exclude"], mode="default"))
    held = {path.as_posix() for path in files}
    assert {"CMakeLists.txt", "LICENSE", "NOTICE", "README.md", "pyproject.toml"} <= held
    assert {path.parts[0] for path in files if len(path.parts) > 1} == {"src"}
    kinds = (".py", ".cpp", ".h", ".html", ".typed")
    sources = {path.relative_to(root).as_posix() for path in SOURCES.rglob("*") if path.suffix in kinds}
    assert sources <= held
    data = {path.name: path.stat().st_size for path in (SOURCES / "data").iterdir()}
    assert {f"src/hybridkv/data/{name}" for name in data} <= held
    assert sum((root / path).stat().st_size for path in files) < sum(data.values()) + 5e6
