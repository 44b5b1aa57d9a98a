"""The documentation is executed or generated: what it shows is what happens."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hybridkv.cli.main import main
from hybridkv.engine.load import bundled_model, describe, load
from tests.with_lab import WHERE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    pytest.importorskip("hybridkv_lab", reason=WHERE)
    sys.path.insert(0, str(ROOT / "docs"))  # where the generator finds its parts
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_formats_page_is_the_table(generate: ModuleType) -> None:
    assert (ROOT / "docs/formats.md").read_text() == generate.formats_page()


def test_the_map_of_the_source_is_current(generate: ModuleType) -> None:
    assert (ROOT / "docs/architecture.md").read_text() == generate.architecture_page()


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help differently in other versions")
def test_cli_page_is_the_help(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # restored afterwards: the generator sets its own
    assert (ROOT / "docs/cli.md").read_text() == generate.cli_page()


def test_the_page_for_llama_cpp_users_is_the_table(generate: ModuleType) -> None:
    assert (ROOT / "docs/from-llama-cpp.md").read_text() == generate.llama_cpp_page()


def test_features_page_is_the_table_and_its_tests_are_there(generate: ModuleType) -> None:
    from features import GROUPS  # type: ignore[import-not-found]  # in docs, where the generator finds its parts

    assert (ROOT / "docs/features.md").read_text() == generate.features_page()
    for feature in (feature for rows in GROUPS.values() for feature in rows):
        assert (feature.ours == "no") == (not feature.tests), feature.name
        for test in feature.tests:
            path, _, name = test.partition("::")
            assert f"def {name}(" in (ROOT / path).read_text(), test


def test_keys_page_is_the_committed_measurement(generate: ModuleType) -> None:
    assert (ROOT / "docs/gguf-keys.md").read_text() == generate.keys_page()


def test_families_page_is_the_tables(generate: ModuleType) -> None:
    assert (ROOT / "docs/families.md").read_text() == generate.families_page()


def test_performance_tables_are_the_committed_measurements(generate: ModuleType) -> None:
    assert (ROOT / "docs/performance.md").read_text() == generate.performance()


def test_tuning_table_is_the_committed_measurements(generate: ModuleType) -> None:
    assert (ROOT / "docs/tuning.md").read_text() == generate.tuning()


def test_guard_tables_are_the_committed_measurements(generate: ModuleType) -> None:
    assert (ROOT / "docs/decisions/guard-limit.md").read_text() == generate.guard()


def test_serving_tables_are_the_committed_measurements(generate: ModuleType) -> None:
    assert (ROOT / "docs/serve.md").read_text() == generate.serving()


def test_sizing_tables_are_what_plan_counts(generate: ModuleType) -> None:
    assert (ROOT / "docs/scaling.md").read_text() == generate.scaling()


def test_the_planned_example_is_what_plan_prints(generate: ModuleType) -> None:
    assert (ROOT / "docs/weights.md").read_text() == generate.weights()


def test_readme_tables_are_generated(generate: ModuleType) -> None:
    assert generate.readme() == README


def test_readmes_first_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    command = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)[0]
    words = shlex.split(command.split("hybridkv ", 1)[1])
    assert words[0] == "run"
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Hello world")
    assert len(out.split()) > 20
    assert "tokens/s" in err


def test_the_readme_is_short_and_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(README.splitlines()) <= 90
    shown = re.findall(r"```text\n(.*?)\n```", README, re.DOTALL)[0]
    command = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)[0]
    assert main(shlex.split(command.split("hybridkv ", 1)[1])) == 0
    assert capsys.readouterr().out.startswith(shown)


def test_readmes_speeds_are_those_of_the_speed_page() -> None:
    """Each line names its machine; Transformers' figures are left out, for the page has them as ratios or times."""
    table = README.split("## How fast")[1].split("##")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    page = (ROOT / "docs/performance.md").read_text()
    assert len(lines) >= 4
    for line in lines:
        machine, *speeds = line.strip("| ").split(" | ")[-4:-1]
        assert re.match("(AVX2|AVX-512|AMX|NEON),|H[12]00", machine), line
        for figure in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", " ".join(speeds)):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", page), (figure, line)


def test_readmes_python_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load(describe(bundled_model()), dtype=torch.bfloat16, device="cpu")
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    code = re.findall(r"```python\n(.*?)\n```", README, re.DOTALL)[0]
    exec(compile(code, "README.md", "exec"), {"path": str(tmp_path)})
    out = capsys.readouterr().out
    assert out.startswith("Hello world")
    assert out.endswith(" bytes\n")


def test_every_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), ROOT / "CONTRIBUTING.md"]
    checked = 0
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
                checked += 1
    assert checked > 10


def test_nothing_names_a_machine_it_was_made_on() -> None:
    """No absolute path of somebody's machine, and none that leads out of the checkout."""
    words = re.compile(r"(?<![\w.])/(home|root|Users|work|mnt|opt|srv)/")
    files = [p for d in ("src", "lab", "docs", "bench", "tests", ".ci") for p in (ROOT / d).rglob("*") if p.is_file()]
    for path in [*files, ROOT / "README.md", ROOT / "pyproject.toml"]:
        if path.suffix in (".py", ".md", ".toml", ".h", ".cpp", ""):
            text = path.read_text(errors="ignore")
            assert not words.search(text), path
            outside = [
                link for link in re.findall(r"(?:\.\./)+[\w-]+(?:\.\w+)?", text) if not (path.parent / link).exists()
            ]
            assert not outside, path
