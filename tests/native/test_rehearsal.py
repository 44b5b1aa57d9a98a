"""A step rehearsed without weights: what other processes compile is what a launch asks for. No card is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CODE = """
import json, os, pickle, subprocess, sys
import torch
from hybridkv.cache import KVTypes
from hybridkv.kernels.cuda.ahead import Ahead
from hybridkv.kernels.cuda.card import CardFacts
from hybridkv.kernels.cuda.recording import compile_variants, recording
from hybridkv.model import graph_of, kv_facts, layer_facts
from hybridkv.model.tensors import graph_tensors
from hybridkv.native.rehearsal import Request, rehearse
from hybridkv.policy import Policy
from pathlib import Path
from tests.families import build
from triton import knobs
model = build("qwen3_5_text", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
tensors = {t.names[0]: (t.shape, "q8_0" if len(t.shape) == 2 and t.shape[1] % 32 == 0 and t.shape[0] > 1 else "f32")
           for t in graph_tensors(graph_of(model.config), ().__contains__)}
specs = Policy(KVTypes("q8_0", "q8_0")).resolve(kv_facts(layer_facts(model.config)))
request = Request(model.config, tensors, tuple(specs), CardFacts((9, 0), 132))
with recording(request.card) as variants:
    rehearse(request)
words = [sys.executable, "-m", "hybridkv.native.rehearsal"]
process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
ahead = Ahead(process, pickle.dumps(request), Path(os.environ["TRITON_CACHE_DIR"]) / "mark")
with ahead._changed:
    ahead._changed.wait_for(lambda: ahead._over or len(ahead._done) > 0)
    names, compiled = ahead._numbers, set(ahead._done)
ahead.close()
hits = []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
for variant in variants:
    if names[variant.name] in compiled:
        variant.compile()
print(json.dumps({"listed": {v.name for v in variants} <= set(names), "n": len(variants), "hits": hits}))
"""


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_a_launch_asks_for(tmp_path: Path) -> None:
    """Keys of both processes are equal, and what one has compiled the other finds on disk."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["listed"]
    assert found["n"] > 15
    assert found["hits"]
    assert all(found["hits"])
