"""Tables of KV options and samplers: what takes them has all of them, by these names and with these defaults."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest

from hybridkv.cache import KVTypes
from hybridkv.engine import SamplingParams
from hybridkv.errors import UsageError
from hybridkv.hf import quantized_cache
from hybridkv.options import COMMON, DEFAULT_TYPE, KV_OPTIONS, OWN, SAMPLERS, kv_option
from hybridkv.policy import LayerConfig, Policy, common_types, policy_of


def test_kv_options_are_the_fields_of_types_and_policies() -> None:
    fields = [f.name for cls in (KVTypes, Policy) for f in dataclasses.fields(cls) if f.name != "types"]
    assert sorted(option.name for option in KV_OPTIONS) == sorted(fields)
    arguments = inspect.signature(quantized_cache).parameters
    assert {option.name for option in KV_OPTIONS} == set(arguments) - {"model", "config", "n_ctx", "guard", "notify"}
    assert {option.name for option in OWN} == {f.name for f in dataclasses.fields(LayerConfig)} & set(arguments)
    assert {option.name for option in (*OWN, *COMMON)} == {f.name for f in dataclasses.fields(KVTypes)}
    assert KVTypes().type_k == DEFAULT_TYPE


def test_requests_take_what_is_said_of_one_cache() -> None:
    from hybridkv.server.schema import KVTypesField

    fields = KVTypesField.model_fields
    assert list(fields) == ["type_k", "type_v", "rotate_k", "rotate_v", "tail", "sink"]
    defaults = {name: field.default for name, field in fields.items() if not field.is_required()}
    assert defaults == {name: getattr(KVTypes(), name) for name in defaults}


def test_a_policy_by_names() -> None:
    given = {"type_k": "q4_0", "rotate_v": True, "k_first": "q8_0,2", "scale": "absmax", "tail": 64, "center": True}
    found = policy_of(given, default_type="q6_0")
    assert found.types == KVTypes("q4_0", "q6_0", rotate_v=True, scale="absmax", tail=64, center=True)
    assert found.k_first is not None
    assert (found.k_first.type_name, found.k_first.n_layers) == ("q8_0", 2)
    assert common_types(given) == KVTypes(scale="absmax", tail=64, center=True)
    assert policy_of({}, default_type="q8_0") == Policy(KVTypes("q8_0", "q8_0"))


@pytest.mark.parametrize(("in_python", "named"), [(False, "-ctv-last"), (True, "v_last")])
def test_messages_name_an_option_as_it_was_written(in_python: bool, named: str) -> None:
    with pytest.raises(UsageError, match=f"^{named} 'q8_0'"):
        policy_of({"v_last": "q8_0"}, default_type="f16", in_python=in_python)


@pytest.mark.parametrize("name", ["tail", "sink"])
def test_counts_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match=kv_option(name).flag):
        common_types({name: -1})


def test_samplers_are_the_fields_of_the_parameters() -> None:
    others = {"temp", "seed", "logit_bias", "dry_breakers", "order"}
    defaults = {f.name: f.default for f in dataclasses.fields(SamplingParams) if f.name not in others}
    assert {option.name: option.default for option in SAMPLERS} == defaults


@pytest.mark.parametrize("option", SAMPLERS, ids=lambda option: option.name)
def test_a_sampler_refuses_what_its_record_excludes(option) -> None:  # type: ignore[no-untyped-def]
    SamplingParams(**{option.name: option.kind(option.default_in_requests)})
    for value in (option.least if option.open_below else option.least - 1, math.nan):
        with pytest.raises(UsageError, match=f"^{option.flags[0]} "):
            SamplingParams(**{option.name: value})
    if option.most is not None:
        with pytest.raises(UsageError, match=option.allowed.split()[0]):
            SamplingParams(**{option.name: option.most + 1})
