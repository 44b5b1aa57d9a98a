"""`hybridkv.load`: three lines from import to text."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

import hybridkv
from hybridkv import errors
from hybridkv.cli.main import main
from hybridkv.engine.describe import bundled_model, describe
from hybridkv.engine.engine import Engine
from hybridkv.engine.load import load as load_described
from hybridkv.engine.sampling import SamplingParams
from hybridkv.errors import ContextError, ModelError, ModelFileError, UsageError
from hybridkv.gguf.load import load_gguf
from hybridkv.text.breakers import breaker_ids
from tests.gguf.write_qwen35 import draft, tiny_model

THREE_LINES = """
import hybridkv
model = hybridkv.load(type_k="q8_0", type_v="q8_0")
print(model.generate("Hello world", n_predict=8, temp=0))
"""


def test_importing_stays_light() -> None:
    """Nothing but the standard library and the errors; a misspelt name imports nothing either."""
    code = """
import sys
before = set(sys.modules)
import hybridkv
try:
    hybridkv.Enigne
except AttributeError:
    new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
    print(new, sorted(name for name in sys.modules if name.startswith("hybridkv.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "{'hybridkv'} ['hybridkv.errors']\n"


PUBLIC = (
    *("AdmissionError", "ContextError", "Engine", "Event", "Guard", "GuardError", "HybridKVError", "KVTypes", "Model"),
    *(
        "ModelCache",
        "ModelError",
        "ModelFileError",
        "NoKernelError",
        "Plan",
        "Policy",
        "Request",
        "RequestHandle",
        "SamplingParams",
    ),
    *("Scheduler", "SessionError", "UsageError", "__version__", "load", "plan", "quantized_cache"),
)


def test_what_is_public() -> None:
    """Sorted, importable, documented; every error of the package is among it."""
    assert hybridkv.__all__ == sorted(hybridkv.__all__) == list(PUBLIC) == dir(hybridkv)
    for name in PUBLIC:
        value = getattr(hybridkv, name)
        assert name == "__version__" or value.__doc__, name
        assert value.__name__ == name if isinstance(value, type) else True
    own = {n for n, e in vars(errors).items() if isinstance(e, type) and issubclass(e, errors.HybridKVError)}
    assert own <= set(PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'TextModel'"):
        hybridkv.TextModel  # noqa: B018


def test_a_module_does_not_take_the_place_of_a_function() -> None:
    """As `hybridkv.plan` would if there were a file of that name."""
    root = Path(hybridkv.__file__).parent
    assert not [name for name in PUBLIC if (root / f"{name}.py").exists() or (root / name).exists()]


@pytest.mark.parametrize("name", ["load", "plan", "quantized_cache", "Model.generate", "Model.chat", "Model.score"])
def test_every_parameter_is_documented(name: str) -> None:
    value: object = hybridkv
    for part in name.split("."):
        value = getattr(value, part)
    parameters = [p for p in inspect.signature(value).parameters if p not in ("self", "prompt", "messages")]  # type: ignore[arg-type]
    text = inspect.getdoc(value) or ""
    assert text.splitlines()[0].endswith(".")
    if name != "Model.score":
        assert not [p for p in parameters if p not in text]


def test_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    exec(THREE_LINES, {})
    assert len(capsys.readouterr().out.split()) > 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = draft(tiny_model())
    file.keys["tokenizer.chat_template"] = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ tail }}"
    return file.write(tmp_path_factory.mktemp("api") / "chat.gguf")


def test_text_streams_and_chats(model: Path) -> None:
    m = hybridkv.load(model, n_ctx=64)
    text = m.generate("the", n_predict=8, temp=0)
    assert "".join(m.stream("the", n_predict=8, temp=0)) == text
    assert m.generate("the", n_predict=8, seed=1, temp=2.0) == m.generate("the", n_predict=8, seed=1, temp=2.0)
    one = m.chat("the", n_predict=4, temp=0)
    assert one == m.chat([{"role": "user", "content": "the"}], n_predict=4, temp=0)
    assert one == m.generate("<user>the", n_predict=4, temp=0)
    assert m.chat("the", variables={"tail": "!"}, n_predict=4, temp=0) == m.generate("<user>the!", n_predict=4, temp=0)


def test_dry_has_llama_cpps_breakers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m, seen = hybridkv.load(model, n_ctx=64), []
    generate = Engine.generate

    def noting(self: Engine, ids: Any, params: SamplingParams, **options: Any) -> Any:
        seen.append(params.dry_breakers)
        return generate(self, ids, params, **options)

    monkeypatch.setattr(Engine, "generate", noting)
    m.generate("the", n_predict=2, dry_multiplier=0.8)
    m.generate("the", n_predict=2, dry_multiplier=0.8, dry_breakers=frozenset({3}))
    m.generate("the", n_predict=2)
    assert seen == [breaker_ids(m.tokenizer), frozenset({3}), frozenset()]
    assert seen[0]


class Chosen(Exception):  # noqa: N818 - an end, not an error
    """What a loader was asked for."""


def chosen(monkeypatch: pytest.MonkeyPatch, where: str, load: Any) -> Any:
    """How the weights are to be held, where loading begins."""

    def refuse(description: Any, *, dtype: Any, device: str, weights: str, backend: str = "auto", **_: Any) -> Any:
        raise Chosen(dtype, device, weights, backend)

    monkeypatch.setattr(where, refuse)
    with pytest.raises(Chosen) as found:
        load()
    return found.value.args


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("directory", [False, True])
def test_weights_are_those_of_run(
    device: str, directory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA too, where the weights of a GGUF file stay packed."""
    path: Path | None = None
    if directory:
        loaded = load_described(describe(bundled_model()), dtype=torch.float32, device="cpu")
        loaded.model.config.save_pretrained(path := tmp_path / "model")
    monkeypatch.setattr("hybridkv.cli.model_options.find_device", lambda name: name)
    monkeypatch.setattr("hybridkv.cli.model_options.compile_ahead", lambda *_: None)
    monkeypatch.setattr("hybridkv.engine.placed.free_on_card", lambda *_: 8 * 2**30)
    options = ["run", "--device", device, "-p", "x", *([] if path is None else ["-m", str(path)])]
    theirs = chosen(monkeypatch, "hybridkv.engine.load.load", lambda: main(options))
    ours = chosen(monkeypatch, "hybridkv.engine.api.load_described", lambda: hybridkv.load(path, device=device))
    assert ours == theirs
    packed = device == "cpu" or not directory
    assert ours[2] == ("auto" if packed else "plain")
    assert ours[0] == (torch.float32 if packed else torch.bfloat16)


def test_scores(model: Path) -> None:
    """Of one token, the log probability that Transformers gives it; of several, their sum."""
    m = hybridkv.load(model, n_ctx=64, type_k="f32", type_v="f32")
    exact = load_gguf(model, attn_implementation="eager")
    words = (" of", " the", " of the")
    got = m.score("the", words)
    for word, score in zip(words, got, strict=True):
        ids, n_prompt = exact.tokenizer("the" + word)["input_ids"], len(exact.tokenizer("the")["input_ids"])
        logits = exact.model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
        want = sum(float(logits[i - 1, ids[i]]) for i in range(n_prompt, len(ids)))
        assert score == pytest.approx(want, abs=1e-3), word
    with pytest.raises(UsageError, match="no two labels to the same tokens"):
        m.score("the", [" of", " of"])


def test_a_plan_is_what_is_held(model: Path) -> None:
    """Bytes counted from the header, and those of a cache that is full."""
    m = hybridkv.load(model, n_ctx=64, type_k="q8_0", type_v="q4_0")
    planned = hybridkv.plan(model, n_ctx=64, type_k="q8_0", type_v="q4_0")
    engine = hybridkv.Engine(m.model, m.specs, n_ctx=64, guard=m.guard, notify=pytest.fail, step=m.step)
    list(engine.generate([3, 4, 5], hybridkv.SamplingParams(temp=0), n_predict=-1))
    assert planned.kv_bytes == engine.cache.kv_bytes
    assert planned.state_bytes == engine.cache.state_bytes > 0
    assert planned.weight_bytes > 0
    assert hybridkv.plan(model, n_ctx=64, n_seqs=3).kv_bytes == 3 * hybridkv.plan(model, n_ctx=64).kv_bytes


def test_a_scheduler_over_a_loaded_model(model: Path) -> None:
    m = hybridkv.load(model, n_ctx=64)
    scheduler = hybridkv.Scheduler(
        m.model, m.specs, n_parallel=2, n_ctx=64, prefill_chunk=2, guard=m.guard, notify=pytest.fail, step=m.step
    )
    greedy = hybridkv.SamplingParams(temp=0)
    handles = [scheduler.submit(hybridkv.Request((3, 4, n), max_tokens=4, params=greedy)) for n in (5, 6)]
    while scheduler.iterate():
        pass
    for n, handle in zip((5, 6), handles, strict=True):
        engine = hybridkv.Engine(m.model, m.specs, n_ctx=64, guard=m.guard, notify=pytest.fail, step=m.step)
        alone = [token for (token,) in engine.generate([3, 4, n], greedy, n_predict=4)]
        assert [event.token for event in handle] == alone


def test_a_blob_without_a_suffix_opens(model: Path, tmp_path: Path) -> None:
    blob = tmp_path / "sha256-0123456789abcdef"
    blob.write_bytes(model.read_bytes())
    assert hybridkv.load(blob).generate("the", n_predict=4, temp=0)


def test_what_is_wrong(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFileError, match="no model at"):
        hybridkv.load("/nowhere.gguf")
    with pytest.raises(UsageError, match="unknown KV cache type"):
        hybridkv.load(model, type_k="q9")
    with pytest.raises(ContextError, match="the context holds 8"):
        hybridkv.load(model, n_ctx=8).generate("the first question of all")
    with pytest.raises(ModelFileError, match="no network is to be used"):
        hybridkv.load("owner/name:Q8_0")


def test_what_lies_beside_a_card(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `run` has it: the loader is told which tensors stay in main memory; elsewhere the options are errors."""
    from tests.gguf.test_bad_metadata import copied

    experts = copied("qwen35moe").write(tmp_path / "experts.gguf", lambda _: GGMLQuantizationType.Q8_0)
    told: list[frozenset[str]] = []

    def load(*_: object, hosted: frozenset[str], **__: object) -> None:
        told.append(hosted)
        raise ModelError("stop")

    asked: Any
    for asked in ({"n_cpu_moe": 1}, {"cpu_moe": True}, {"device_memory": "8GiB"}, {"n_gpu_layers": 99}):
        with pytest.raises(UsageError, match="a model that is divided: "):
            hybridkv.load(model, device="cpu", **asked)
    with pytest.raises(UsageError, match="-ncmoe -1; allowed: 0 or more layers"):
        hybridkv.load(experts, device="cuda", n_cpu_moe=-1)
    monkeypatch.setattr("hybridkv.engine.api.load_described", load)
    for asked, n_hosted in (
        ({}, 0),
        ({"n_cpu_moe": 3}, 9),
        ({"cpu_moe": True, "override_tensor": "token_embd=CPU"}, 13),
        ({"override_tensor": ["blk.0.ffn_up_exps=CPU"], "n_gpu_layers": "all"}, 3),
    ):
        with pytest.raises(ModelError, match="stop"):
            hybridkv.load(experts, device="cuda", device_memory="8GiB", n_ctx=100, **asked)
        assert len(told.pop()) == n_hosted, asked
    with pytest.raises(ContextError, match="not enough memory on the card"):
        hybridkv.load(experts, device="cuda", device_memory=1 << 29, n_ctx=100)
