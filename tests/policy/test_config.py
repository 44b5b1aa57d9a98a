"""kv.toml: written, read back, and refused where it is wrong or of another model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hybridkv.cache import AttentionFacts, KVSpec, KVTypes
from hybridkv.errors import UsageError
from hybridkv.policy import KVConfig, config_of, format_config, read_config

FACTS = [AttentionFacts(layer=n, n_heads=4, n_kv_heads=2, head_dim_k=64, head_dim_v=32) for n in (3, 7, 11)]
TYPES = [
    KVTypes("q8_0", "q4_0", rotate_k=True, rotate_v=True),
    KVTypes("f16", "hq3_nl", rotate_v=True),
    KVTypes("q5_0", "q5_0"),
]


def config(**common: object) -> KVConfig:
    specs = [KVSpec(f, replace(t, **common)) for f, t in zip(FACTS, TYPES, strict=True)]  # type: ignore[arg-type]
    return config_of("kv.toml", 'a "model"', specs)


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "kv.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    "common", [{}, {"scale": "absmax"}, {"tail": 128, "sink": 4, "center": True}], ids=["plain", "scale", "exact"]
)
def test_it_is_read_back(tmp_path: Path, common: dict[str, object]) -> None:
    made = config(**common)
    text = format_config(made, ["what it is", "", "and how"])
    assert text.startswith("# what it is\n#\n# and how\n\nformat = ")
    found = read_config(written(tmp_path, text))
    assert found == made
    assert found.resolve(FACTS) == made.resolve(FACTS)
    assert [s.types for s in found.resolve(FACTS)] == [replace(t, **common) for t in TYPES]  # type: ignore[arg-type]


def test_a_name_cannot_break_a_message(tmp_path: Path) -> None:
    text = format_config(replace(config(), model="two\nlines \x1b[31m"))
    assert read_config(written(tmp_path, text)).model == "two?lines ?[31m"


def test_a_type_changed_by_hand_brings_its_rotation(tmp_path: Path) -> None:
    text = (
        format_config(config())
        .replace('"q5_0", type_v', '"hq2_nl", type_v')
        .replace('"q5_0",  type_v', '"hq2_nl", type_v')
    )
    spec = read_config(written(tmp_path, text)).resolve(FACTS)[2]
    assert (spec.types.type_k, spec.types.rotate_k, spec.types.rotate_v) == ("hq2_nl", True, False)


def test_what_all_layers_share() -> None:
    shared = config(tail=32).types
    assert (shared.type_k, shared.type_v, shared.tail) == ("per layer", "per layer", 32)
    one = config_of("x", "y", [KVSpec(f, KVTypes("q8_0", "q4_0")) for f in FACTS])
    assert one.types == KVTypes("q8_0", "q4_0")


def test_exact_rows_without_effect_are_said() -> None:
    made = config(tail=128)
    assert made.notices(made.resolve(FACTS), 4096) == []
    assert "all 64 tokens of the context stay f16" in made.notices(made.resolve(FACTS), 64)[0]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (FACTS[:2], "kv.toml has types for 3 KV layers .*; this model has 2"),
        ([], "this model has 0"),
        (
            [*FACTS[:2], replace(FACTS[2], layer=12)],
            "layer 11 with 2 KV heads of 64/32 values; this model has layer 12",
        ),
        ([replace(FACTS[0], head_dim_v=64), *FACTS[1:]], "of 64/32 values; this model has layer 3 with 2 .* of 64/64"),
        ([replace(FACTS[0], n_kv_heads=1), *FACTS[1:]], "this model has layer 3 with 1 KV heads"),
    ],
)
def test_another_model_is_refused(facts: list[AttentionFacts], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config().resolve(facts)


GOOD = format_config(config())

BAD: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "format, version, model, scale, tail missing"),
    "no TOML": ("layers = [", "is not TOML: "),
    "binary": (b"GGUF\x00\xff\xfe", "is not TOML: "),
    "deep": ("x = " + "[" * 100_000, "is not TOML: "),
    "long number": (GOOD.replace("tail = 0", "tail = " + "9" * 5000), "is not TOML: "),
    "absurd size": ("#" * 2_000_000, "has more than 1048576 bytes"),
    "another format": (GOOD.replace("hybridkv-kv-config", "x"), 'format is .x.; allowed: "hybridkv-kv-config"'),
    "another version": (GOOD.replace("version = 1", "version = 2"), "version is '2'; allowed: 1"),
    "version that is true": (GOOD.replace("version = 1", "version = true"), "version is 'True'; allowed: 1"),
    "missing": (GOOD.replace("sink = 0\n", ""), ": sink missing"),
    "unknown": (GOOD + 'extra = "x"\n', "unknown entry 'extra'; allowed: format, version"),
    "missing of a layer": (
        GOOD.replace("rotate_v = true }", "}").replace(",  }", " }"),
        r"is not TOML|rotate_v missing",
    ),
    "unknown of a layer": (
        GOOD.replace("rotate_v = false", "rotate_w = 1, rotate_v = false"),
        r"'layers\[2\].rotate_w'",
    ),
    "unknown type": (GOOD.replace('"hq3_nl"', '"q3_0"'), r"layers\[1\].type_v: unknown KV cache type 'q3_0'"),
    "type that is a number": (GOOD.replace('"hq3_nl"', "3"), r"layers\[1\].type_v is '3'; allowed: a string"),
    "unknown scale": (GOOD.replace('"auto"', '"best"'), "scale: unknown scale rule 'best'"),
    "rotation that is a word": (GOOD.replace("rotate_k = true", 'rotate_k = "k"'), "allowed: true or false"),
    "negative": (GOOD.replace("tail = 0", "tail = -1"), "tail is '-1'; allowed: 0 to"),
    "absurd tail": (GOOD.replace("tail = 0", "tail = 99999999"), "tail is '99999999'; allowed: 0 to"),
    "tail that is true": (GOOD.replace("tail = 0", "tail = true"), "tail is 'True'; allowed: a whole number"),
    "center without a tail": (GOOD.replace("center = false", "center = true"), "--kv-center with --kv-tail 0"),
    "no layers": (GOOD[: GOOD.index("layers")] + "layers = []\n", "layers is empty"),
    "layers that are none": (GOOD[: GOOD.index("layers")] + "layers = [1]\n", r"layers\[0\] is no table"),
    "one layer": (GOOD[: GOOD.index("layers")] + "layers = 3\n", "layers is '3'; allowed: a list of layers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path: Path, case: str) -> None:
    text, message = BAD[case]
    assert text != GOOD
    with pytest.raises(UsageError, match=message) as caught:
        read_config(written(tmp_path, text))
    assert str(caught.value).startswith("--kv-config ")
    assert caught.value.hint


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_config(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="Is a directory"):
        read_config(tmp_path)
