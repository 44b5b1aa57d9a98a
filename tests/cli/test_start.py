"""What a start imports: the native engine runs a GGUF file without Transformers, and help needs nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.with_lab import needs_lab

HEAVY = ("transformers", "torch._dynamo", "triton", "sympy", "huggingface_hub", "safetensors", "matplotlib", "ray")


def imported(code: str, *modules: str) -> dict[str, bool]:
    """Which modules a fresh process has imported after some code."""
    probe = f"import json, sys\n{code}\nprint(json.dumps({{m: m in sys.modules for m in {list(modules)!r}}}))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "options",
    [
        ["-p", "Hello world", "-ctk", "q4_0", "-ctv", "q4_0", "-khad", "-vhad"],
        ["-p", "Hello world", "--temp", "0", "-np", "2", "--kv-tail", "32"],
        ["--ids", "5,6,7", "--weights", "int8", "--json"],
    ],
)
def test_a_native_run_needs_no_transformers(options: list[str]) -> None:
    run = f"from hybridkv.cli.main import main\nassert main(['run', '-n', '2', *{options!r}]) == 0"
    assert imported(run, *HEAVY) == dict.fromkeys(HEAVY, False)


def test_a_plan_needs_no_transformers() -> None:
    plan = "from hybridkv.cli.main import main\nassert main(['plan', '-ctk', 'q4_0']) == 0"
    assert imported(plan, *HEAVY) == dict.fromkeys(HEAVY, False)


def test_help_needs_nothing() -> None:
    light = ("torch", "numpy", "gguf", "tokenizers", "jinja2", *HEAVY)
    assert imported("from hybridkv.cli.main import build_parser\nbuild_parser()", *light) == dict.fromkeys(light, False)


def test_serving_needs_no_transformers() -> None:
    modules = "hybridkv.engine.load, hybridkv.engine.scheduler, hybridkv.server.app, hybridkv.server.request_handler"
    assert imported(f"import {modules}", "transformers") == {"transformers": False}


@needs_lab
def test_evaluating_needs_no_transformers() -> None:
    modules = "hybridkv.engine.load, hybridkv_lab.evaluate, hybridkv_lab.run"
    assert imported(f"import {modules}", "transformers") == {"transformers": False}
