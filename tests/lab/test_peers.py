"""Peers: what is said of one that is there, or not, and what its library computes."""

from __future__ import annotations

import struct
from importlib import util

import pytest
import torch

from hybridkv.formats import FORMATS
from hybridkv_lab.peers import ik_library
from hybridkv_lab.peers.ik_attention import flash_attention, runs
from hybridkv_lab.peers.ik_model import repeat_rows
from hybridkv_lab.shape import Shape
from tests.oracles.attention import exact_attention, relative_rmse

HERE = util.find_spec("ik_llama_cpp") is not None
needs_ik = pytest.mark.skipif(not HERE, reason="ik-llama-cpp-python is not installed (x86-64 Linux only)")


def test_a_missing_peer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ik_library, "library_folder", lambda: None)
    found = ik_library.find()
    assert found.about == "not installed (pip install ik-llama-cpp-python)"
    assert found.path is None


@needs_ik
@pytest.mark.parametrize(
    ("flags", "build", "said"),
    [
        ("avx2 fma f16c", "native", "native build, "),
        ("avx2 fma f16c avx512f avx512_vnni", "plain AVX2", "(not compiled for this processor's AVX512 AVX512_VNNI)"),
    ],
)
def test_the_build_is_what_the_library_was_compiled_for(
    monkeypatch: pytest.MonkeyPatch, flags: str, build: str, said: str
) -> None:
    monkeypatch.setattr(ik_library, "_compiled_for", lambda: ("AVX2", "FMA", "F16C"))
    monkeypatch.setattr(ik_library, "cpu_flags", lambda: set(flags.split()))
    found = ik_library.find()
    assert found.build == build
    assert said in found.about
    assert found.version in found.about


@needs_ik
def test_the_library_itself_names_its_instructions() -> None:
    assert "AVX2" in ik_library.find().flags


@needs_ik
@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_ik_reads_our_rows(kv_type: str) -> None:
    """The same bytes, the same numbers: what is timed side by side is the same work."""
    shape = Shape(64, 4, 2, 3, 256)
    assert runs(shape, kv_type)
    torch.manual_seed(0)
    q = torch.randn(1, 4, 3, 64)
    planes = [FORMATS[kv_type].encode(torch.randn(1, 2, 256, 64)) for _ in range(2)]
    k, v = (FORMATS[kv_type].decode(p, 64) for p in planes)
    rows = [FORMATS[kv_type].to_ggml(p, 64) for p in planes]
    with flash_attention(shape, kv_type, q, rows[0], rows[1], 1) as call:
        out = call().clone()
    assert relative_rmse(out, exact_attention(q, k, v, scale=64**-0.5)) < 0.02


def test_ik_is_not_asked_for_what_it_cannot_do() -> None:
    assert not runs(Shape(64, 4, 2, 1, 300), "q8_0")  # its threads would wait for ever
    assert not runs(Shape(64, 4, 2, 1, 256), "q5_0")


def test_rows_of_a_saved_state_repeat() -> None:
    def state(n: int, k: bytes, v: bytes) -> bytes:
        cells = b"".join(struct.pack("<iI", position, 0) for position in range(n))
        layers = [struct.pack("<iQ", 8, 2) + k, struct.pack("<iQ", -1, 0), struct.pack("<iQ", 8, 1) + v]
        return struct.pack("<I", n) + cells + struct.pack("<II", 0, 2) + b"".join([*layers, layers[1], b"recurrent"])

    assert repeat_rows(state(3, b"aabbcc", b"xyz"), 7) == state(7, b"aabbccaabbccaa", b"xyzxyzx")
