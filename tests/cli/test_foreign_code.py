"""What a model brings along is data: templates run in a sandbox, and code does not run unless it is asked for."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch

from hybridkv.text import chat
from tests.cli.conftest import Cli
from tests.cli.models import ModelStore, with_config
from tests.cli.test_bad_input import one_error, refused
from tests.gguf.write_qwen35 import draft, tiny_model

TEMPLATES = {
    "classes": (
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "does something forbidden: access to attribute '__class__' of 'list' object is unsafe",
    ),
    "globals": ("{{ raise_exception.__globals__['os'] }}", "does something forbidden: .*'__globals__' of 'function'"),
    "by filter": ("{{ (messages | attr('__class__')).mro }}", "does something forbidden: .*'__class__'"),
    "by format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "does something forbidden: .*'__class__'"),
    "by code": ("{{ cycler.__init__.__globals__.os.system('touch x') }}", "does something forbidden: .*'__init__'"),
    "changes its input": ("{{ messages.clear() }}", "does something forbidden: .*'clear' of 'list'"),
    "includes a file": ("{% include '/etc/passwd' %}", "fails: no loader for this environment"),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "takes more than 0 s",
    ),
    "range": ("{% for a in range(10 ** 9) %}{% endfor %}", "fails: Range too big"),
    "long": ("{{ 'x' * 2000000 }}", "makes 2000000 characters"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: maximum recursion depth"),
    "syntax": ("{% for %}", "fails: Expected an expression"),
    "its own refusal": ("{{ raise_exception('roles must alternate') }}", "fails: roles must alternate"),
    "nonsense": ("{{ 1 / 0 }}", "fails: division by zero"),
    "missing": ("{{ messages[7].content.x }}", "fails: .*no element 7"),
    "types": ("{{ 'a' + 1 }}", "fails: can only concatenate str"),
}


@pytest.mark.parametrize("name", TEMPLATES)
# What earlier tests left may be collected at the end of a recursion, where no finalizer has a frame to run in.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_chat_templates(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(chat, "MAX_CHARACTERS", 1_000_000)
    monkeypatch.chdir(tmp_path)
    template, message = TEMPLATES[name]
    file = draft(tiny_model())
    file.keys["tokenizer.chat_template"] = template
    path = file.write(tmp_path / "chat.gguf")
    error = one_error(cli("run", "-m", path, "-p", "the", "--chat"))
    assert re.search(message, error), error
    assert "hint: the template is a part of the model; leave --chat out" in error
    assert [file.name for file in tmp_path.iterdir()] == ["chat.gguf"]
    assert cli("run", "-m", path, "-p", "the", "-n", 1).code == 0  # without the template the model runs


CODE = """
from pathlib import Path
from transformers import Qwen3Config, Qwen3ForCausalLM
Path({marker!r}).touch()

class OwnConfig(Qwen3Config):
    model_type = "own"

class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that code from a model directory makes when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


def with_code(model: Path, to: Path, marker: Path, model_type: str) -> Path:
    with_config(model, to, model_type=model_type, auto_map=AUTO_MAP)
    (to / "own.py").write_text(CODE.format(marker=str(marker)))
    return to


def test_code_runs_only_where_it_is_trusted(cli: Cli, models: ModelStore, tmp_path: Path, marker: Path) -> None:
    model = with_code(models.family("qwen3"), tmp_path / "model", marker, "own")
    error = refused(cli, model, message="its model type 'own' needs Python code from the directory: own.OwnConfig, ")
    assert "hint: read that code, and if you trust it, add --trust-remote-code" in error
    assert "--trust-remote-code" in one_error(cli("plan", "-m", model))
    assert not marker.exists()
    done = cli("run", "-m", model, "--ids", "3,4,5", "-n", 4, "--temp", 0, "--trust-remote-code")
    assert done.code == 0, done.err
    assert marker.exists()


def test_code_for_a_known_model_is_left_alone(cli: Cli, models: ModelStore, tmp_path: Path, marker: Path) -> None:
    model = with_code(models.family("qwen3"), tmp_path / "model", marker, "qwen3")
    options = ("--ids", "3,4,5", "-n", 4, "--temp", 0)
    assert cli("run", "-m", model, *options).out == cli("run", "-m", models.family("qwen3"), *options).out
    assert not marker.exists()


def test_a_tokenizer_of_code(cli: Cli, hybrid: Path, tmp_path: Path, marker: Path) -> None:
    model = with_config(hybrid, tmp_path / "model")
    (model / "own.py").write_text(CODE.format(marker=str(marker)))
    content = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(content))
    error = one_error(cli("run", "-m", model, "-p", "x"))
    assert "its tokenizer needs Python code from the directory: " in error
    assert "add --trust-remote-code" in error
    assert not marker.exists()


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("trust", [(), ("--trust-remote-code",)])
def test_pickled_weights_are_not_read(
    cli: Cli, hybrid: Path, tmp_path: Path, marker: Path, trust: tuple[str, ...]
) -> None:
    model = with_config(hybrid, tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(marker)}, model / "pytorch_model.bin")
    refused(cli, model, *trust, message=f"the weights in {model} cannot be loaded: ")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # it would have gone off


def test_trust_that_changes_nothing(cli: Cli, gguf: Path) -> None:
    done = cli("run", "-m", gguf, "-p", "the", "-n", 1, "--trust-remote-code")
    assert done.code == 0
    assert "--trust-remote-code has no effect" in done.err


def test_a_directory_without_tokenizer_takes_ids(cli: Cli, hybrid: Path) -> None:
    done = cli("run", "-m", hybrid, "--ids", "3,4,5", "-n", 4, "--temp", 0, "--ignore-eos")
    assert done.code == 0
    assert len(done.out.split()) == 4
    assert "this model has no tokenizer\nhint: give the prompt as token ids" in one_error(
        cli("run", "-m", hybrid, "-p", "x")
    )
