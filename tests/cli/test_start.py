"""What a start imports: the native backend runs a GGUF file without Transformers, and help needs nothing heavy."""

from __future__ import annotations

import subprocess
import sys

from tests.with_lab import WITH_LAB

HEAVY = ("transformers", "torch._dynamo", "triton", "sympy", "huggingface_hub", "safetensors", "matplotlib", "ray")


def imported_after(*codes: str) -> list[list[str]]:
    """Which of `HEAVY` a fresh process has imported after each piece of code; they are run in turn."""
    probe = f"print('heavy', *(m for m in {HEAVY!r} if m in sys.modules))"
    program = "\n".join(["import sys", *(f"{code}\n{probe}" for code in codes)])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split()[1:] for line in done.stdout.splitlines() if line.split()[:1] == ["heavy"]]


def test_what_runs_natively_needs_no_transformers() -> None:
    """Nor what serves, nor what evaluates."""
    runs = (
        ["plan", "-ctk", "q4_0"],
        ["run", "-n", "2", "-p", "Hello world", "-ctk", "q4_0", "-ctv", "q4_0", "-khad", "-vhad"],
        ["run", "-n", "2", "-p", "Hello world", "--temp", "0", "-np", "2", "--kv-tail", "32"],
        ["run", "-n", "2", "--ids", "5,6,7", "--weights", "int8", "--json"],
    )
    found = imported_after(
        *(f"from hybridkv.cli.main import main\nassert main({words!r}) == 0\nprint()" for words in runs),
        "import hybridkv.engine.scheduler, hybridkv.server.app, hybridkv.server.request_handler",
        *(["import hybridkv_lab.evaluate, hybridkv_lab.run"] if WITH_LAB else []),
    )
    assert found[: len(runs)] == [[]] * len(runs)
    assert all("transformers" not in heavy for heavy in found)


def test_help_needs_nothing() -> None:
    light = {"torch", "numpy", "gguf", "tokenizers", "jinja2", *HEAVY}
    help_ = "import sys; from hybridkv.cli.main import build_parser; build_parser(); "
    words = [sys.executable, "-c", f"{help_} print(*({light!r} & sys.modules.keys()))"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
