"""A head of multi-token prediction: read from a file, right against Transformers, and never a change of the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from torch import Tensor
from transformers import Qwen3_5ForCausalLM

from hybridkv.cache import KVTypes
from hybridkv.engine import Engine, Request, SamplingParams, Scheduler
from hybridkv.engine.heads import HeadGuesser
from hybridkv.engine.ngrams import NGrams
from hybridkv.engine.pace import Costs, Pace
from hybridkv.engine.speculation import Speculation
from hybridkv.errors import ModelFileError
from hybridkv.gguf.mapped import map_gguf
from hybridkv.kernels import cpu_native
from hybridkv.model import graph_of, kv_facts, layer_facts
from hybridkv.native import NativeModel, NativeStep, native_model
from hybridkv.native.predict import rows_bytes
from hybridkv.policy import Guard, Policy
from hybridkv.runtime import ModelCache
from tests.engine.serving import GREEDY, drain, tokens
from tests.gguf.write_qwen35 import Draft, draft, tiny_model
from tests.native.quantized import plain_file
from tests.native.test_drafts import differences

pytestmark = pytest.mark.skipif(cpu_native.available() is not None, reason="the native extension is not built")

MODEL = tiny_model()
NEXTN = "blk.4.nextn."


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def head_model() -> Qwen3_5ForCausalLM:
    """The head's block, and what follows it, as a model of one layer that reads embeddings."""
    config = deepcopy(MODEL.config)
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    torch.manual_seed(7)
    model = Qwen3_5ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.lm_head.weight = MODEL.lm_head.weight
    return model.eval()


HEAD = head_model()


def projections() -> dict[str, np.ndarray]:
    """What a head has beside its block."""
    draw, width = np.random.default_rng(3), MODEL.config.hidden_size
    numbers = {
        "eh_proj": draw.normal(0, 0.2, (width, 2 * width)),
        "enorm": draw.normal(1, 0.1, width),
        "hnorm": draw.normal(1, 0.1, width),
    }
    return {f"{NEXTN}{name}.weight": values.astype(np.float32) for name, values in numbers.items()}


def with_head() -> Draft:
    file, block = draft(MODEL), draft(HEAD).tensors
    file.keys |= {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1}
    file.tensors |= {f"blk.4.{n.removeprefix('blk.0.')}": x for n, x in block.items() if n.startswith("blk.0.")}
    file.tensors |= {**projections(), f"{NEXTN}shared_head_norm.weight": block["output_norm.weight"]}
    return file


def loaded(path: Path, file: Draft | None = None) -> NativeModel:
    mapped = map_gguf((file or with_head()).write(path / "x.gguf"))
    assert mapped.notices == ()
    return native_model(mapped.config, mapped.source, "auto", mapped.end_ids)


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(text: list[int], guesses: list[int]) -> Tensor:
    """Logits after a text, and behind each guess, by Transformers in float64: `[1 + guesses, V]`."""
    model, head = deepcopy(MODEL).double(), deepcopy(HEAD).double()
    own = {name.removeprefix(NEXTN): torch.from_numpy(x).double() for name, x in projections().items()}
    embed = model.get_input_embeddings().weight

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + MODEL.config.rms_norm_eps) * weight

    def joined(token: int, hidden: Tensor) -> Tensor:
        parts = [norm(embed[token], own["enorm.weight"]), norm(hidden, own["hnorm.weight"])]
        return own["eh_proj.weight"] @ torch.cat(parts)

    hidden = model.model(input_ids=torch.tensor([text])).last_hidden_state[0]
    rows = [joined(token, hidden[i]) for i, token in enumerate(text[1:])]
    logits = []
    for guess in (*guesses, None):
        last = head.model(inputs_embeds=torch.stack(rows)[None]).last_hidden_state[0, -1]
        logits.append(embed @ last)
        if guess is not None:
            rows.append(joined(guess, last))
    return torch.stack(logits)


def test_another_cache_between_two_tokens_changes_no_hidden_states(tmp_path: Path) -> None:
    """Its longer prompt is scored in buffers that are made anew, while the first cache's steps are prepared."""
    model, text = loaded(tmp_path), prompt(12)
    found = []
    for n_between in (0, 60):
        step = NativeStep(model)
        assert step.predictor is not None
        cache, other = (engine(model, None, step).cache for _ in range(2))
        step.forward(torch.tensor([text[:8]]), cache, 0)
        for position in range(8, 12):
            if n_between and position == 11:
                step.logits(torch.tensor([prompt(n_between, 2)]), other, 0)
            step.forward(torch.tensor([[text[position]]]), cache, position)
        found.append(step.take_hidden(cache))
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0], found[1])


def guessed(
    step: NativeStep, cache: ModelCache, text: list[int], n_read: list[int], n: int
) -> tuple[list[int], Tensor]:
    """Have a head read a text in pieces and guess `n` tokens; they, and the logits before each and behind the last."""
    predictor = step.predictor
    assert predictor is not None
    step.forward(torch.tensor([text[:-1]]), cache, 0)
    hidden, rows, at = step.take_hidden(cache), predictor.new_rows(), 0
    assert hidden is not None
    for n_new in n_read:
        predictor.read(rows, text[at + 1 : at + 1 + n_new], hidden[at : at + n_new], at)
        at += n_new
    guesses, found = [], [predictor._one.buffer("logits")[0].clone()]
    for place in range(n):
        token, share = predictor.guess()
        assert share == pytest.approx(float(found[-1].softmax(0)[token]), rel=1e-5)
        guesses.append(token)
        predictor.add(rows, token, at + place)
        found.append(predictor._one.buffer("logits")[0].clone())
    return guesses, torch.stack(found)


@pytest.mark.parametrize("n_read", [[39], [1] * 39, [20, 3, 1, 15]])
def test_guesses_are_those_of_transformers(tmp_path: Path, n_read: list[int]) -> None:
    """The final norm comes before the head's own, the embedding before the hidden state, and its result goes on."""
    model, text = loaded(tmp_path), prompt(40)
    step = NativeStep(model)
    guesses, found = guessed(step, engine(model, None, step).cache, text, n_read, 3)
    wanted = expected(text, guesses)
    assert [int(row.argmax()) for row in wanted[:3]] == guesses
    assert float((found - wanted).norm() / wanted.norm()) < 2e-3


def test_a_head_s_cache_goes_back_to_the_byte(tmp_path: Path) -> None:
    model, text = loaded(tmp_path), prompt(60)
    step = NativeStep(model)
    predictor = step.predictor
    assert predictor is not None
    hidden = torch.randn(60, 64, generator=torch.Generator().manual_seed(1))
    one, other = predictor.new_rows(), predictor.new_rows()
    at = 0
    for n, n_guesses, n_kept in ((30, 3, 0), (1, 7, 2), (4, 1, 1), (2, 5, 5), (1, 1, 0)):
        for rows in (one, other):
            predictor.read(rows, text[at : at + n], hidden[at : at + n], at)
        at += n
        for place in range(n_guesses):
            predictor.add(one, 5 + place, at + place)
        one.store.take_back(n_guesses - n_kept)
        predictor.read(other, text[at - 1 : at], hidden[at - 1 : at], at - 1)  # where guesses begin again
        other.store.take_back(1)
        predictor.read(other, text[at - 1 : at], hidden[at - 1 : at], at - 1)
        other.store.take_back(1)
        other.store.take_back(n)
        predictor.read(other, text[at - n : at], hidden[at - n : at], at - n)
        for place in range(n_kept):
            predictor.add(other, 5 + place, at + place)
        assert differences(one.store.stored(), other.store.stored()) == []
        at += n_kept


class Free(Costs):
    """Runs that cost the same whatever their rows: any guess pays."""

    def of(self, n_rows: int) -> float:
        return 1.0

    def knows(self, n_rows: int) -> bool:
        return True


def speculation(step: NativeStep, *, ngrams: bool = False) -> Speculation:
    predictor = step.predictor
    assert predictor is not None
    return Speculation(lambda: HeadGuesser(predictor, NGrams() if ngrams else None), n_max=4, costs=Free())


@pytest.fixture
def _eager_to_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random head is hardly ever right; it is to be asked and run all the same."""
    monkeypatch.setattr(Pace, "pauses_beyond", lambda self, n_tokens: False)
    monkeypatch.setattr(Pace, "goes_on", lambda self, kinds, n_others, seconds_each: True)
    monkeypatch.setattr(Pace, "choose", lambda self, kinds, n_others, seconds_each=0.0: len(kinds))


def engine(model: NativeModel, how: Speculation | None, step: NativeStep, guard: Guard | None = None) -> Engine:
    specs = Policy(KVTypes("q8_0", "q8_0")).resolve(kv_facts(layer_facts(model.config)))
    return Engine(model, specs, n_ctx=160, guard=guard or Guard(), notify=lambda _: None, step=step, speculation=how)


@pytest.mark.usefixtures("_eager_to_guess")
@pytest.mark.parametrize("ngrams", [False, True])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temp=1.1, top_k=12, seed=5)], ids=["greedy", "sampled"])
def test_the_text_is_that_without_guesses(tmp_path: Path, params: SamplingParams, ngrams: bool) -> None:
    """And the cache, to the byte."""
    model = loaded(tmp_path)
    runs = []
    for guesses in (False, True):
        step = NativeStep(model)
        run = engine(model, speculation(step, ngrams=ngrams) if guesses else None, step)
        runs.append(([t for (t,) in run.generate(prompt(40), params, n_predict=80)], run))
    (without, plain), (text, guessing) = runs
    assert text == without
    assert differences(guessing.cache.stored(), plain.cache.stored()) == []
    assert guessing.timings.n_guessed >= 80


class Counted(HeadGuesser):
    """Counts what is shown to it."""

    n_seen = 0

    def see(self, hidden: Tensor, end: int) -> None:
        Counted.n_seen += 1
        super().see(hidden, end)


def test_a_head_costs_nothing_in_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a run of its block nor a copy of hidden states; and steps are held as they are without a head."""
    model, n_held = loaded(tmp_path), Counter[str]()
    continues = NativeStep._continue
    for how in ("off", "paused", "ends"):
        step = NativeStep(model)
        predictor = step.predictor if how != "off" else None

        def counted(self: NativeStep, *given: Any, how: str = how) -> Tensor:
            n_held[how] += 1
            return continues(self, *given)

        monkeypatch.setattr(NativeStep, "_continue", counted)
        guesses = None
        if predictor is not None:
            guesses = Speculation(lambda p=predictor: Counted(p))  # type: ignore[misc]
            guesses.trial.pause = 10**6 if how == "paused" else 40
            if how == "paused":
                monkeypatch.setattr(predictor, "read", pytest.fail)
        Counted.n_seen = 0
        run = engine(model, guesses, step)
        assert sum(1 for _ in run.generate(prompt(40), GREEDY, n_predict=60)) == 60
        if how == "paused":
            assert Counted.n_seen == 1  # the prompt, before anything is asked
            assert step.take_hidden(run.cache) is None
        elif how == "ends":
            assert Counted.n_seen > 8  # from before the first guess on
    assert n_held["paused"] == n_held["off"] >= 50


@pytest.mark.usefixtures("_eager_to_guess")
def test_several_sequences_are_guessed_each(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    specs = Policy(KVTypes("q8_0", "q8_0")).resolve(kv_facts(layer_facts(model.config)))
    asked = [Request(prompt_ids=tuple(prompt(n, n)), params=GREEDY, max_tokens=25) for n in (12, 45, 70)]
    found = []
    for guesses in (False, True):
        step = NativeStep(model)
        run = Scheduler(
            model,
            specs,
            n_parallel=3,
            n_ctx=160,
            guard=Guard(),
            notify=lambda _: None,
            prefill_chunk=32,
            step=step,
            speculation=speculation(step) if guesses else None,
        )
        handles = [run.submit(request) for request in asked]
        drain(run)
        found.append([tokens(handle) for handle in handles])
    assert found[0] == found[1]


@pytest.mark.usefixtures("_eager_to_guess")
def test_a_token_has_its_own_distribution(tmp_path: Path) -> None:
    """Chi-square over 800 draws of the second token behind a prompt, which the head guesses."""
    model, start = loaded(tmp_path), prompt(12)
    step = NativeStep(model)
    params = SamplingParams(temp=0.9, top_k=4, top_p=1.0, min_p=0.0)

    def shares(text: list[int]) -> Tensor:
        best = engine(model, None, step).prefill(text)[0].topk(params.top_k)
        return torch.zeros(288).index_copy_(0, best.indices, torch.softmax(best.values / params.temp, -1))

    first = shares(start)
    wanted = sum((first[t] * shares([*start, int(t)]) for t in first.nonzero()[:, 0]), torch.zeros(288))
    n, seen, how = 800, Counter[int](), speculation(step)
    for seed in range(n):
        run = engine(model, how, step, Guard(mode="off"))
        seen[[t for (t,) in run.generate(start, replace(params, seed=seed), n_predict=3)][1]] += 1
    support = [t for t in range(288) if wanted[t] * n >= 5]
    chi = sum((seen[t] - n * float(wanted[t])) ** 2 / (n * float(wanted[t])) for t in support)
    assert sum(seen[t] for t in support) > 0.97 * n
    assert chi < len(support) + 3 * (2 * len(support)) ** 0.5


@pytest.mark.usefixtures("_eager_to_guess")
@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"])
def test_families_with_heads(tmp_path: Path, family: str) -> None:
    """The head's block is one of the model's own attention layers here, experts included."""
    plain = GGUFReader(plain_file(family))
    name = str(plain.fields["general.architecture"].contents())
    n_blocks = int(plain.fields[f"{name}.block_count"].contents())
    width = int(plain.fields[f"{name}.embedding_length"].contents())
    writer = GGUFWriter(tmp_path / "x.gguf", name)
    for field in plain.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", f"{name}.block_count"):
            continue
        more = {"sub_type": field.types[-1]} if field.types[0] == GGUFValueType.ARRAY else {}
        writer.add_key_value(field.name, field.contents(), field.types[0], **more)
    writer.add_block_count(n_blocks + 1)
    writer.add_uint32(f"{name}.nextn_predict_layers", 1)
    attends = next(t.name.split(".")[1] for t in plain.tensors if t.name.endswith("attn_output.weight"))
    for tensor in plain.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        if tensor.name.startswith(f"blk.{attends}."):
            own = tensor.name.replace(f"blk.{attends}.", f"blk.{n_blocks}.")
            writer.add_tensor(own, tensor.data, raw_dtype=tensor.tensor_type)
    draw = np.random.default_rng(3)
    for part, shape in (("eh_proj", (width, 2 * width)), ("enorm", width), ("hnorm", width)):
        values = draw.normal(0.5, 0.2, shape).astype(np.float32)
        writer.add_tensor(f"blk.{n_blocks}.nextn.{part}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    mapped = map_gguf(tmp_path / "x.gguf")
    assert mapped.notices == ()
    model = native_model(mapped.config, mapped.source, "auto", mapped.end_ids)
    found = []
    for guesses in (False, True):
        step = NativeStep(model)
        run = engine(model, speculation(step) if guesses else None, step)
        found.append([t for (t,) in run.generate(prompt(30), GREEDY, n_predict=40)])
    assert found[0] == found[1]
    assert run.timings.n_guessed >= 40


def test_a_head_s_cache_takes_what_is_counted(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    predictor = NativeStep(model).predictor
    assert predictor is not None
    rows = predictor.new_rows()
    predictor.read(rows, prompt(20), torch.randn(20, 64), 0)
    assert rows.store.nbytes == rows_bytes(graph_of(model.config)) > 0
    assert rows_bytes(graph_of(MODEL.config)) == 0


def test_a_head_that_lacks_a_tensor_is_skipped(tmp_path: Path) -> None:
    file = with_head()
    del file.tensors[f"{NEXTN}enorm.weight"]
    mapped = map_gguf(file.write(tmp_path / "x.gguf"))
    assert mapped.notices == ("14 tensors of multi-token prediction blocks were skipped",)
    assert NativeStep(native_model(mapped.config, mapped.source, "auto")).predictor is None


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    file = with_head()
    file.tensors[f"{NEXTN}eh_proj.weight"] = np.ones((64, 64), np.float32)
    with pytest.raises(ModelFileError, match=r"eh_proj.weight' has shape \[64, 64\]; .* \[64, 128\]"):
        map_gguf(file.write(tmp_path / "x.gguf"))


@pytest.mark.parametrize("listed", [[5, 5, 6], [5, 288]])
def test_frequent_tokens_are_tokens(tmp_path: Path, listed: Any) -> None:
    file = with_head()
    file.keys["qwen35.nextn_draft_tokens"] = listed
    with pytest.raises(ModelFileError, match="nextn_draft_tokens"):
        map_gguf(file.write(tmp_path / "x.gguf"))
