"""`ModelCache` as a whole: bytes, crop, reset, sequences, types per layer, and errors that help."""

from __future__ import annotations

import contextlib
import gc
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3_5ForCausalLM, pipeline

from hybridkv import ContextError, ModelError, NoKernelError, UsageError, quantized_cache
from hybridkv.formats import get_format
from hybridkv.hf import EagerStep, ModelCache, pack_model
from hybridkv.runtime.view import LayerView
from tests.chat_models import CHATML, byte_level
from tests.families import FAMILIES, build, remembering
from tests.hf.test_families import change, run, tokens
from tests.thin import mostly_long, slow_but

needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is in [test-all]")


@pytest.fixture(scope="module")
def hybrid() -> PreTrainedModel:
    return build("qwen3_5_text", attention="hybridkv")


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return build("qwen3", attention="hybridkv")


def live_bytes() -> int:
    """Bytes of all tensor storages that are alive, each once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):  # isinstance would ask lazy objects for their class
            with contextlib.suppress(RuntimeError):  # one whose memory another test's code has taken away
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_no_full_precision_copy_is_alive(dense: PreTrainedModel) -> None:
    """Everything that a long prompt leaves in memory is codes and scales."""
    ids = tokens(1, 400)
    run(
        dense, quantized_cache(dense, type_k="q4_0", type_v="q4_0"), ids, chunks=(400,)
    )  # the guard keeps the mask of a call
    before = live_bytes()
    cache = quantized_cache(dense, type_k="q4_0", type_v="q4_0", n_ctx=400)
    with torch.inference_mode():
        dense(ids, **remembering(cache), logits_to_keep=1)
    grown = live_bytes() - before
    rows = get_format("q4_0").row_bytes(48)
    assert cache.kv_bytes == 2 * 2 * 2 * 400 * rows
    assert cache.kv_bytes <= grown <= cache.kv_bytes + 4096
    assert grown < 0.4 * 2 * 2 * 2 * 400 * 48 * 2  # of what float16 rows alone would take


def test_bytes_by_type(hybrid: PreTrainedModel) -> None:
    used = {}
    for name in ("f32", "q8_0", "q4_0"):
        cache = quantized_cache(hybrid, type_k=name, type_v=name)
        run(hybrid, cache, tokens())
        used[name] = cache.kv_bytes_used
        assert cache.state_bytes == 2 * 2 * 4 * (160 * 4 + 6 * 16 * 16)
    assert used["f32"] == 2 * 2 * 2 * 2 * 21 * 64 * 4
    assert used["q8_0"] / used["f32"] == pytest.approx(8.5 / 32)
    assert used["q4_0"] / used["f32"] == pytest.approx(4.5 / 32)


OF_EACH_KIND = ("qwen3_5_text", "jamba", "bamba", "zamba2", "lfm2", "falcon_h1", "gemma3_text")
"""One family of each kind of state, and one with windows."""


@pytest.mark.parametrize("family", slow_but(FAMILIES, OF_EACH_KIND))
def test_reset_starts_over(family: str) -> None:
    model = build(family, attention="hybridkv")
    cache = quantized_cache(model)
    first = run(model, cache, tokens())
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(run(model, cache, tokens(1)), run(model, quantized_cache(model), tokens(1)))
    cache.reset()
    assert torch.equal(run(model, cache, tokens()), first)


@pytest.mark.parametrize("family", ["qwen3_5_text", "bamba", "lfm2", "falcon_h1", "llama", "gemma3_text"])
def test_a_filled_cache_refuses_another_prompt(family: str) -> None:
    """Also one that `generate` would cut to its last tokens and process behind the first, in silence."""
    model = build(family, attention="hybridkv")
    fresh = model.generate(tokens(1, 12), cache=quantized_cache(model), max_new_tokens=4, do_sample=False)
    for n_prompt in (1, 5, 8, 12, 17):
        cache = quantized_cache(model)
        model.generate(tokens(1, 12), cache=cache, max_new_tokens=6, do_sample=False)
        with pytest.raises(ContextError, match=r"^the cache holds 17 tokens of another prompt") as caught:
            model.generate(tokens(1, n_prompt), cache=cache, max_new_tokens=4, do_sample=False)
        assert "hint: reset() the cache" in str(caught.value)
    cache.reset()
    assert torch.equal(model.generate(tokens(1, 12), cache=cache, max_new_tokens=4, do_sample=False), fresh)
    again = model.generate(fresh, cache=cache, max_new_tokens=3, do_sample=False)  # this is how to go on
    assert torch.equal(again[:, :16], fresh)


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "bamba", "falcon_h1", "nemotron_h", "llama"])
def test_a_filled_cache_refuses_another_number_of_sequences(family: str) -> None:
    model = build(family, attention="hybridkv")
    cache = quantized_cache(model)
    model.generate(tokens(1, 12), cache=cache, max_new_tokens=6, do_sample=False)
    with pytest.raises(ModelError, match=r"holds 1 sequences and was given 2\nhint: use one cache per batch, or reset"):
        model.generate(tokens(2, 30), cache=cache, max_new_tokens=4, do_sample=False)


def test_a_pipeline_with_a_filled_cache() -> None:
    tokenizer = byte_level(CHATML)
    model = build("qwen3_5_text", attention="hybridkv", vocab_size=len(tokenizer))
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    cache = quantized_cache(model)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "cache": cache}
    first = pipe("A first prompt", **options)
    with pytest.raises(ContextError, match=r"the cache holds \d+ tokens of another prompt"):
        pipe("Another", **options)
    cache.reset()
    assert pipe("A first prompt", **options) == first


def test_with_another_attention_a_call_without_new_tokens_is_refused() -> None:
    model = build("llama")
    cache = quantized_cache(model)
    model.generate(tokens(1, 12), cache=cache, max_new_tokens=6, do_sample=False)
    with pytest.raises(ContextError, match="the cache holds 17 tokens of another prompt"):
        model.generate(tokens(1, 5), cache=cache, max_new_tokens=4, do_sample=False)


def test_crop_goes_back_where_all_layers_can(dense: PreTrainedModel) -> None:
    ids = tokens()
    cache = quantized_cache(dense)
    assert cache.is_croppable
    whole = run(dense, cache, ids)
    cache.crop(-5)
    assert cache.get_seq_length() == 16
    with torch.inference_mode():
        again = dense(ids[:, 16:], **remembering(cache)).logits
    assert change(again, whole[:, 16:]) <= 1e-4


def test_crop_refuses_when_a_layer_cannot_and_changes_nothing(hybrid: PreTrainedModel) -> None:
    cache = quantized_cache(hybrid)
    run(hybrid, cache, tokens())
    assert not cache.is_croppable
    with pytest.raises(ContextError, match=r"crop\(-5\): layers 0, 2 cannot go back"):
        cache.crop(-5)
    assert cache.get_seq_length() == 21
    cache.crop(0)
    with pytest.raises(ContextError, match="allowed: 0 or a negative number"):
        cache.crop(3)


def drafter(family: str, noise: float) -> PreTrainedModel:
    """A family's model, or one that does not agree with it."""
    model = build(family)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def decided(model: PreTrainedModel, length: int, type_: str, asked: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Find a prompt whose greedy text hangs on no near-tie: a code that rounds the other way moves logits by 1e-3."""
    for seed in range(4, 60):
        ids = tokens(1, length, seed)
        kept = remembering(quantized_cache(model, type_k=type_, type_v=type_))
        text = model.generate(ids, **kept, **asked, return_dict_in_generate=True, output_logits=True)
        best = torch.stack(text.logits).topk(2).values
        if (best[..., 0] - best[..., 1]).min() > 5e-3:
            return ids, text.sequences
    raise AssertionError("each prompt has a near-tie")


@pytest.mark.parametrize(
    ("family", "type_", "length"),
    mostly_long(
        product(["lfm2", "lfm2_moe", "gemma3_text", "qwen3"], ["f32", "q8_0"], [1, 2, 25]),
        [("lfm2", "f32", 25), ("lfm2_moe", "q8_0", 2), ("gemma3_text", "q8_0", 25), ("qwen3", "f32", 1)],
        step=4,
    ),
)
def test_assisted_decoding(family: str, type_: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions and windows go back over drafts that were refused; other states never do (Transformers refuses)."""
    model = build(family, attention="hybridkv")
    asked: dict[str, Any] = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    ids, expected = decided(model, length, type_, asked)
    dropped: list[int] = []
    crop = ModelCache.crop
    monkeypatch.setattr(ModelCache, "crop", lambda self, n: (dropped.append(-n), crop(self, n)))
    for noise in (0.0, 0.3):
        cache, assistant = quantized_cache(model, type_k=type_, type_v=type_), drafter(family, noise)
        got = model.generate(ids, **remembering(cache), **asked, assistant_model=assistant)
        assert torch.equal(got, expected)
        assert cache.get_seq_length() == length + 29
    assert min(dropped) == 0
    assert length == 1 or max(dropped) >= 3  # behind one token, some models say one for ever


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1", "jamba"])
def test_assisted_decoding_of_recurrent_states_is_refused_before_the_first_token(
    family: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Transformers does not refuse it by itself, and would give another text without a word."""
    model, ids = build(family, attention="hybridkv"), tokens(1, 12)
    asked: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    asked |= {"prompt_lookup_num_tokens": 3} if how == "prompt lookup" else {"assistant_model": build(family)}
    cache = quantized_cache(model, type_k="q8_0", type_v="q8_0")
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(ids, **remembering(cache), **asked)
    monkeypatch.setattr(type(model), "_is_stateful", False)
    with pytest.raises(ContextError, match="a recurrent state cannot go back"):
        model.generate(ids, **remembering(cache), **asked)
    assert cache.get_seq_length() == 0
    cache.reset()
    with pytest.raises(ContextError, match="a recurrent state cannot go back"):
        cache.activate_past_recording()


def test_prompt_lookup_of_convolutions_gives_the_greedy_text() -> None:
    model, ids = build("lfm2", attention="hybridkv"), tokens(1, 12).repeat(1, 3)
    asked: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    texts = [
        model.generate(ids, **remembering(quantized_cache(model, type_k="q8_0", type_v="q8_0")), **asked, **more)
        for more in ({}, {"prompt_lookup_num_tokens": 4})
    ]
    assert torch.equal(*texts)


def test_a_convolution_goes_back_no_further_than_its_inputs_are_kept() -> None:
    model, ids = build("lfm2", attention="hybridkv"), tokens(1, 21)
    cache = quantized_cache(model, type_k="f32", type_v="f32")
    run(model, cache, ids[:, :10], chunks=(10,))
    assert not cache.is_croppable
    cache.activate_past_recording()
    with pytest.raises(ContextError, match=r"crop\(-1\): layers .* cannot go back"):
        cache.crop(-1)
    with torch.inference_mode():
        whole = model(ids[:, 10:], **remembering(cache)).logits
    assert cache.is_croppable
    with pytest.raises(ContextError, match="cannot go back"):
        cache.crop(-12)
    assert cache.get_seq_length() == 21
    cache.crop(-6)
    with torch.inference_mode():
        again = model(ids[:, 15:], **remembering(cache)).logits
    assert change(again, whole[:, 5:]) <= 1e-5
    cache.crop(0)
    with pytest.raises(ContextError, match="cannot go back"):
        cache.crop(-1)


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1", "lfm2", "gemma3_text"])
def test_sequences_can_be_repeated_and_selected(family: str) -> None:
    model = build(family, attention="hybridkv")
    ids = tokens(3)
    exact = run(model, quantized_cache(model, type_k="f32", type_v="f32"), ids)
    cache = quantized_cache(model, type_k="f32", type_v="f32")
    run(model, cache, ids[:1, :15])
    cache.batch_repeat_interleave(3)
    with torch.inference_mode():
        next_logits = model(ids[:1, 15:16].repeat(3, 1), **remembering(cache)).logits
    assert change(next_logits, exact[:1, 15:16].repeat(3, 1, 1)) <= 1e-4
    cache = quantized_cache(model, type_k="f32", type_v="f32")
    run(model, cache, ids[:, :15])
    cache.batch_select_indices(torch.tensor([2, 0]))
    with torch.inference_mode():
        next_logits = model(ids[[2, 0], 15:16], **remembering(cache)).logits
    assert change(next_logits, exact[[2, 0], 15:16]) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_several_sequences_repeated(family: str) -> None:
    model = build(family, attention="hybridkv")
    step, begin, then = EagerStep(model), tokens(2)[:, :15], tokens(2)[:, 15:16]
    with torch.inference_mode():
        cache, repeated = (quantized_cache(model, type_k="f32", type_v="f32") for _ in range(2))
        for one in (cache, repeated):
            step.forward(begin, one, 0)
        repeated.batch_repeat_interleave(3)
        exact = step.forward(then, cache, 15).repeat_interleave(3, 0)
        assert change(step.forward(then.repeat_interleave(3, 0), repeated, 15), exact) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_and_its_original_go_on_alone(family: str) -> None:
    """Each as a cache that nothing was copied from, in turns; a copy of an empty cache is an empty cache."""
    model = build(family, attention="hybridkv")
    step, begin, ways = EagerStep(model), tokens(2)[:, :15], (tokens(2)[:, 15:17], tokens(2)[:, :2])
    with torch.inference_mode():
        alone = []
        for then in ways:
            cache = quantized_cache(model, type_v="q4_0")
            step.forward(begin, cache, 0)
            alone.append([step.forward(then[:, i : i + 1], cache, 15 + i) for i in range(2)])
        cache = quantized_cache(model, type_v="q4_0").copy()
        step.forward(begin, cache, 0)
        twin = cache.copy(n_ctx=17)
        for i in range(2):
            for one, then, exact in ((twin, ways[1], alone[1]), (cache, ways[0], alone[0])):
                assert torch.equal(step.forward(then[:, i : i + 1], one, 15 + i), exact[i])
        with pytest.raises(ContextError, match="18 tokens do not fit a context of 17"):
            step.forward(ways[0][:, :1], twin, 17)
        twin.reset()
    assert cache.get_seq_length() == 17


def test_first_and_last_layers_change_the_numbers(hybrid: PreTrainedModel) -> None:
    def logits(**options: Any) -> Tensor:
        return run(hybrid, quantized_cache(hybrid, type_k="q4_0", type_v="q4_0", guard="off", **options), tokens())

    plain = logits()
    seen = [plain]
    for option in ("k_first", "k_last", "v_first", "v_last"):
        changed = logits(**{option: "f32,1"})
        assert all(not torch.equal(changed, other) for other in seen), option
        seen.append(changed)
    assert torch.equal(logits(k_first="q4_0,1"), plain)


@pytest.mark.parametrize(
    "option", [{"rotate_k": True}, {"rotate_v": True}, {"scale": "absmax"}, {"scale": "refit"}], ids=str
)
def test_each_option_changes_the_numbers(hybrid: PreTrainedModel, option: dict[str, Any]) -> None:
    other = {"scale": "absmax" if option.get("scale") == "refit" else "refit"}
    results = [
        run(hybrid, quantized_cache(hybrid, type_k="q4_0", type_v="q4_0", guard="off", **o), tokens())
        for o in (option, other)
    ]
    assert not torch.equal(*results)


def test_context_limit(hybrid: PreTrainedModel) -> None:
    cache = quantized_cache(hybrid, n_ctx=20)
    with pytest.raises(ContextError, match="21 tokens do not fit a context of 20"):
        run(hybrid, cache, tokens())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type_k": "q3_9"}, "q3_9"),
        ({"scale": "best"}, "allowed: absmax, refit"),
        ({"guard": "maybe"}, "allowed: check, upgrade"),
        ({"k_first": "q8_0"}, "TYPE,N"),
        ({"v_last": "q8_0,3"}, "this model has 2 KV layers"),
    ],
)
def test_bad_options(hybrid: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantized_cache(hybrid, **options)


def test_head_dim_that_no_block_fits(dense: PreTrainedModel) -> None:
    config = build("qwen3").config
    config.head_dim = 20
    model = type(dense)(config)
    with pytest.raises(NoKernelError, match="20"):
        quantized_cache(model, type_k="q4_0")
    cache = quantized_cache(model, type_k="f16", type_v="q8_KV")
    run(model, cache, tokens())


def test_a_model_without_attention_layers_runs() -> None:
    config = build("qwen3_5_text").config
    config.layer_types = ["linear_attention"] * 4
    torch.manual_seed(0)
    model = type(build("qwen3_5_text"))(config).eval()
    with torch.inference_mode():  # DynamicCache itself cannot be used without an attention layer
        exact = model(tokens(), use_cache=False).logits
    cache = quantized_cache(model)
    assert change(run(model, cache, tokens()), exact) <= 1e-4
    assert cache.kv_bytes == 0
    assert cache.state_bytes > 0


@pytest.mark.parametrize(
    ("change_config", "message"),
    [
        ({"layer_types": ["full_attention"] * 3}, "4 layers and 3 layer types"),
        ({"layer_types": ["full_attention", "chunked_attention"] * 2, "attention_chunk_size": 8}, "chunked_attention"),
        ({"num_hidden_layers": 0}, "0 layers"),
        ({"layer_types": None}, "no layer types"),
        ({"num_key_value_heads": 3}, "4 query heads do not divide into 3"),
    ],
)
def test_configs_that_cannot_be_cached(change_config: dict[str, Any], message: str) -> None:
    model = build("qwen3_5_text")
    for name, value in change_config.items():
        object.__setattr__(model.config, name, value)
    with pytest.raises(ModelError, match=message):
        quantized_cache(model)


def test_a_model_that_looks_into_packed_rows_is_told_what_to_do(dense: PreTrainedModel) -> None:
    cache = quantized_cache(dense)
    view, _ = cache.update(torch.randn(1, 2, 3, 48), torch.randn(1, 2, 3, 48), 0)
    assert isinstance(view, LayerView)
    with pytest.raises(AttributeError, match="attn_implementation='sdpa'"):
        view.shape  # noqa: B018


def test_dropout_and_biases_are_refused(dense: PreTrainedModel) -> None:
    from hybridkv.hf.attention import attention_forward

    q = torch.randn(1, 4, 3, 48)
    with pytest.raises(ModelError, match="dropout"):
        attention_forward(dense, q, q, q, None, dropout=0.1)
    with pytest.raises(ModelError, match="position bias"):
        attention_forward(dense, q, q, q, None, position_bias=torch.zeros(1))


def test_masks_that_weigh_are_refused_and_masks_that_hide_are_not(dense: PreTrainedModel) -> None:
    from hybridkv.hf.attention import attention_forward

    q = torch.randn(1, 4, 3, 48)
    hides = torch.zeros(1, 1, 3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), torch.finfo(torch.float32).min)
    out, _ = attention_forward(dense, q, q, q, hides)
    torch.testing.assert_close(out, attention_forward(dense, q, q, q, None)[0])
    with pytest.raises(ModelError, match="adds a bias"):
        attention_forward(dense, q, q, q, hides + 0.5)


def test_attention_that_is_not_causal_sees_everything(dense: PreTrainedModel) -> None:
    from hybridkv.hf.attention import attention_forward

    q, k = torch.randn(1, 4, 3, 48), torch.randn(1, 4, 5, 48)
    out, _ = attention_forward(dense, q, k, k, None, is_causal=False)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, k)
    torch.testing.assert_close(out.transpose(1, 2), exact)


def test_training_is_refused_rather_than_without_gradient() -> None:
    model = build("qwen3", attention="hybridkv").train()
    with pytest.raises(ModelError, match="is being trained; this attention has no backward pass"):
        model(tokens(), use_cache=False)
    model.eval()(tokens(), use_cache=False)
    with torch.no_grad():
        model.train()(tokens(), use_cache=False)


def test_only_causal_masks_are_left_out() -> None:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    from hybridkv.hf.attention import attention_mask

    sizes = {"batch_size": 1, "q_length": 3, "kv_length": 3}
    assert attention_mask(**sizes, mask_function=causal_mask_function, allow_is_causal_skip=True) is None
    both = attention_mask(**sizes, mask_function=bidirectional_mask_function, allow_is_bidirectional_skip=True)
    assert both is not None
    assert both.all()
    padded = torch.tensor([[0, 1, 1]]).bool()
    causal = attention_mask(
        **sizes, mask_function=causal_mask_function, allow_is_causal_skip=True, attention_mask=padded
    )
    assert causal is not None
    assert causal[0, 0].tolist() == [[False, False, False], [False, True, False], [False, True, True]]


def test_without_any_cache_attention_is_plain(hybrid: PreTrainedModel) -> None:
    with torch.inference_mode():
        plain = build("qwen3_5_text")(tokens(), use_cache=False).logits
        ours = hybrid(tokens(), use_cache=False).logits
    assert change(ours, plain) <= 1e-4


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build("qwen3_5_text").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "where",
    [{"device_map": {"": "disk"}}, {"device_map": "auto", "max_memory": {"cpu": 100_000}}, {"device_map": "cpu"}],
    ids=str,
)
@needs_accelerate
def test_layers_on_disk_get_the_kernels_of_the_device_that_they_run_on(saved: Path, where: dict[str, Any]) -> None:
    model = Qwen3_5ForCausalLM.from_pretrained(
        saved, attn_implementation="hybridkv", offload_folder=saved.parent / "offloaded", **where
    )
    assert next(model.parameters()).is_meta is (where != {"device_map": "cpu"})
    plain, ids = build("qwen3_5_text", attention="hybridkv"), tokens(1, 7)
    cache, expected = quantized_cache(model), quantized_cache(plain)
    assert [layer.kernels for layer in cache.kv_layers] == [layer.kernels for layer in expected.kv_layers]
    assert change(run(model, cache, ids, chunks=(5,)), run(plain, expected, ids, chunks=(5,))) <= 1e-5


@needs_accelerate
def test_weights_without_values_are_refused(saved: Path) -> None:
    model = Qwen3_5ForCausalLM.from_pretrained(saved, device_map={"": "meta"})
    message = r"55 of 55 tensors .* meta device, model.embed_tokens.weight .*; allowed: .*\nhint: .*device_map"
    with pytest.raises(ModelError, match=message):
        quantized_cache(model)
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight is on the meta device .*; allowed: .*\nhint: "):
        pack_model(model)
    half = build("qwen3_5_text")
    half.model.layers[2].to("meta")
    with pytest.raises(ModelError, match=r"tensors of this model are on the meta device, model.layers.2"):
        quantized_cache(half)
    with pytest.raises(ModelError, match=r"model.layers.2.* is on the meta device"):
        pack_model(half)
    assert type(half.model.embed_tokens.weight) is torch.nn.Parameter
