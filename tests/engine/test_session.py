"""Sessions: what is saved goes on as if nothing had been; what is not whole, or another model's, is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
import warnings
from dataclasses import replace
from fcntl import LOCK_EX, flock
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridkv.cache import KVTypes
from hybridkv.engine import Request
from hybridkv.engine.session import Session, load_session, resume, save_session, stays_raised
from hybridkv.engine.steps import resolve_step
from hybridkv.engine.whole_files import remove_leftovers
from hybridkv.errors import SessionError
from hybridkv.formats import get_format
from hybridkv.hf import ModelCache
from hybridkv.policy import Guard
from hybridkv.runtime import Step
from tests.engine.serving import (
    GREEDY,
    Q8,
    Q8_TAILED,
    TAILED,
    alone,
    drain,
    model,
    prompt,
    scheduler,
    specs_for,
    tokens,
)
from tests.families import FAMILIES, HYBRIDS
from tests.thin import slow_but

Q4 = KVTypes("q4_0", "q4_0")
STORED = (Q8, TAILED, KVTypes("f32", "f16"), KVTypes("hq4_nl", "q5_1"))


def step_for(family: str) -> Step:
    return resolve_step(model(family).config, "cpu")(model(family))


def cache_for(family: str, types: KVTypes) -> ModelCache:
    return ModelCache(model(family).config, specs_for(model(family), types), n_ctx=256, guard=Guard())


def begun(family: str = "qwen3_5_text", types: KVTypes = Q8, length: int = 75) -> tuple[Session, Tensor, ModelCache]:
    """A sequence of `length` tokens and 3 decoded ones, the logits after it, and its cache."""
    cache, ids = cache_for(family, types), prompt(length)
    step = step_for(family)
    with torch.inference_mode():
        logits = step.forward(torch.tensor([ids]), cache, 0)
        for _ in range(3):
            ids = (*ids, int(logits.argmax()))
            logits = step.forward(torch.tensor([ids[-1:]]), cache, len(ids) - 1)
        stored = cache.stored()
    return Session((*ids, int(logits.argmax())), len(ids), stored), logits, cache


def go_on(family: str, cache: ModelCache, ids: tuple[int, ...]) -> Tensor:
    """Logits `[8, V]` of 8 more decoded tokens."""
    step, rows = step_for(family), []
    with torch.inference_mode():
        for position in range(len(ids) - 1, len(ids) + 7):
            rows.append(step.forward(torch.tensor([ids[-1:]]), cache, position))
            ids = (*ids, int(rows[-1].argmax()))
    return torch.cat(rows)


FIRST = [*(("qwen3_5_text", types) for types in STORED), ("falcon_h1", TAILED)]
EACH = [(family, Q8) for family in FAMILIES]


@pytest.mark.parametrize(("family", "types"), slow_but([*FIRST, *EACH], [*FIRST, *EACH[1::2]]))
def test_goes_on_to_the_bit(tmp_path: Path, family: str, types: KVTypes) -> None:
    session, _, cache = begun(family, types)
    path = tmp_path / "a.session"
    assert save_session(path, session, model(family)) == path.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["a.session"]
    back = load_session(path, model(family))
    assert (back.tokens, back.n_cached, back.cache.specs) == (session.tokens, session.n_cached, session.cache.specs)
    restored, notice = resume(back, cache.specs, lambda _: cache_for(family, types))
    assert notice is None
    assert (restored.kv_bytes_used, restored.state_bytes) == (cache.kv_bytes_used, cache.state_bytes)
    assert torch.equal(go_on(family, restored, session.tokens), go_on(family, cache, session.tokens))


def test_a_long_sequence_behind_a_window(tmp_path: Path) -> None:
    """Rows that the window let go are not in the file, and not missed."""
    session, _, cache = begun("gemma3_text", Q8, length=700 // 4)
    save_session(tmp_path / "s", session, model("gemma3_text"))
    back = load_session(tmp_path / "s", model("gemma3_text"))
    restored, _ = resume(back, cache.specs, lambda _: cache_for("gemma3_text", Q8))
    assert torch.equal(go_on("gemma3_text", restored, session.tokens), go_on("gemma3_text", cache, session.tokens))


@pytest.mark.parametrize(
    ("saved", "asked", "limit"),
    [
        (KVTypes("f32", "f32"), Q8, 0.05),
        (Q8, Q8_TAILED, 0.05),
        (Q8_TAILED, KVTypes("f16", "f16"), 0.05),
        (KVTypes("f16", "f16", rotate_k=True), Q8, 0.05),
        (Q8, TAILED, 0.6),
    ],
)
def test_other_types_are_converted_and_said(tmp_path: Path, saved: KVTypes, asked: KVTypes, limit: float) -> None:
    session, _, cache = begun(types=saved)
    save_session(tmp_path / "s", session, model())
    back = load_session(tmp_path / "s", model())
    restored, notice = resume(back, specs_for(model(), asked), lambda s: ModelCache(model().config, s, n_ctx=256))
    assert notice is not None
    assert "decoded and encoded again" in notice
    assert [s.types for s in restored.specs] == [asked] * 2
    assert restored.kv_layers[0].n_seen == session.n_cached
    exact, got = (go_on("qwen3_5_text", c, session.tokens)[0] for c in (cache, restored))
    assert float((got - exact).norm() / exact.norm()) < limit


def test_types_that_the_guard_has_raised_stay(tmp_path: Path) -> None:
    """Asked for the same types again, rows are not encoded in fewer bits than those that held."""
    asked = specs_for(model(), Q4)
    cache = ModelCache(model().config, asked, n_ctx=256, guard=Guard(limit=0.03))
    ids = prompt(75)
    with torch.inference_mode():
        ids = (*ids, int(step_for("qwen3_5_text").forward(torch.tensor([ids]), cache, 0).argmax()))
    assert cache.specs != asked
    types = tuple(spec.types for spec in asked)
    session = Session(ids, 75, cache.stored(), asked=types)
    save_session(tmp_path / "s", session, model())
    back = load_session(tmp_path / "s", model())
    assert back.asked == types
    rewound = replace(back, earlier=(20, back.cache)).rewound()
    assert rewound is not None
    assert rewound.asked == types
    restored, notice = resume(back, asked, lambda s: ModelCache(model().config, s, n_ctx=256))
    assert (notice, restored.specs) == (None, cache.specs)
    assert stays_raised(asked, restored) == "2 KV layers stay at the larger types that the guard gave them"
    assert torch.equal(go_on("qwen3_5_text", restored, ids), go_on("qwen3_5_text", cache, ids))
    others = specs_for(model(), Q8)
    restored, notice = resume(back, others, lambda s: ModelCache(model().config, s, n_ctx=256))
    assert notice is not None
    assert restored.specs == others


def test_rows_are_ggml_blocks(tmp_path: Path) -> None:
    """Anyone who reads safetensors and ggml's blocks reads the keys."""
    session, _, cache = begun(types=Q8)
    save_session(tmp_path / "s", session, model())
    found = load_file(tmp_path / "s")
    k, v = cache.kv_layers[1].decode()
    for name, rows in (("kv.1.k", k), ("kv.1.v", v)):
        blocks = found[name].numpy().reshape(1, 2, session.n_cached, 2, 34)
        scales = torch.from_numpy(blocks[..., :2].copy()).view(torch.float16).float()
        codes = torch.from_numpy(blocks[..., 2:].copy()).view(torch.int8).float()
        assert torch.equal((scales * codes).flatten(-2), rows)
    assert found["tokens"].tolist() == list(session.tokens)
    assert get_format("q8_0").row_bytes(64) == 68


def test_every_damage_is_refused(tmp_path: Path) -> None:
    """Any byte that changes, any length that is not the whole."""
    session, _, _ = begun(length=20)
    path = tmp_path / "s"
    save_session(path, session, model())
    whole = path.read_bytes()
    dice = random.Random(0)
    for _ in range(60):
        broken = bytearray(whole)
        place = dice.choice([dice.randrange(len(whole)), dice.randrange(3000)])
        broken[place] ^= 1 << dice.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(SessionError):
            load_session(path, model())
    for length in [0, 1, 8, 100, len(whole) - 1, *(dice.randrange(len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:length])
        with pytest.raises(SessionError, match="is no session, or is torn"):
            load_session(path, model())
    path.write_bytes(whole)
    assert load_session(path, model()).tokens == session.tokens


def resealed(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A file whose checksum is right and whose contents are not."""
    from hybridkv.engine import session as module

    metadata = {k: v for k, v in metadata.items() if k != "sha256"}
    save_file(tensors, path, {**metadata, "sha256": module._checksum(tensors, metadata)})


@pytest.mark.parametrize(
    "change",
    [
        lambda t, m: t.update({"kv.0.k": t["kv.0.k"][:, :, :-1].contiguous()}),
        lambda t, m: t.update({"kv.0.k": t["kv.0.k"][:, :1].contiguous()}),
        lambda t, m: t.update({"kv.0.v": t["kv.0.v"].float()}),
        lambda t, m: t.pop("kv.1.v"),
        lambda t, m: t.update({"state.0.0.recurrent": torch.zeros(1, 2, 3)}),
        lambda t, m: t.update({"kv.0.center": torch.zeros(1, 2, 64)}),
        lambda t, m: m.update(n_cached="0"),
        lambda t, m: m.update(n_cached="1000"),
        lambda t, m: m.update(n_cached="many"),
        lambda t, m: m.update(types=json.dumps([{"type_k": "q8_0"}])),
        lambda t, m: m.update(types=json.dumps([{"type_k": "q9", "type_v": "q9"}] * 2)),
        lambda t, m: m.update(types="[{]"),
        lambda t, m: m.update(asked=json.dumps([{"type_k": "q8_0", "type_v": "q8_0"}])),
        lambda t, m: m.update(fed="[]"),
        lambda t, m: m.pop("errors"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, change: object) -> None:
    """Native code trusts these shapes, so a file is checked against the model whoever has sealed it."""
    session, _, _ = begun(length=20)
    path = tmp_path / "s"
    save_session(path, session, model())
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)  # type: ignore[operator]
    resealed(path, tensors, metadata)
    with pytest.raises(SessionError, match="contradicts itself"):
        load_session(path, model())


def test_strangers_are_refused(tmp_path: Path) -> None:
    session, _, _ = begun(length=20)
    path = tmp_path / "s"
    save_session(path, session, model())
    with pytest.raises(SessionError, match="of another model"):
        load_session(path, model("bamba"))
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    resealed(path, tensors, {**metadata, "version": "2"})
    with pytest.raises(SessionError, match="is of version 2; this hybridkv reads 1"):
        load_session(path, model())
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(SessionError, match="is no session of hybridkv"):
        load_session(path, model())
    with pytest.raises(SessionError, match="no session at"):
        load_session(tmp_path / "none", model())
    with pytest.raises(SessionError):
        load_session(tmp_path, model())
    with pytest.raises(SessionError, match="cannot be written"):
        save_session(tmp_path / "no" / "s", session, model())


def test_killed_at_any_moment_nothing_is_lost(tmp_path: Path) -> None:
    """A process that saves without end is killed 25 times: what is there then is one of what it saved, whole."""
    first, _, _ = begun(length=70)
    sessions = [replace(first, messages=({"role": "user", "content": str(i)},)) for i in range(3)]
    path = tmp_path / "s"
    save_session(path, sessions[0], model())
    dice, torn = random.Random(1), 0
    for _ in range(25):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
            child = os.fork()
        if child == 0:
            try:
                while True:
                    for session in sessions:
                        save_session(path, session, model())
            finally:
                os._exit(1)
        time.sleep(dice.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += len(list(tmp_path.iterdir())) - 1
        assert load_session(path, model()).messages in [s.messages for s in sessions]
    assert torn > 0, "no kill met a file half written: the test shows nothing"
    save_session(path, first, model())
    assert [p.name for p in tmp_path.iterdir()] == ["s"]  # what the killed left is gone with the next


def test_leftovers_of_dead_writers_are_removed_and_no_others(tmp_path: Path) -> None:
    first, _, _ = begun(length=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    alive = os.getppid()

    def leave(name: str, pid: int, age_s: float = 0.0) -> Path:
        part = tmp_path / f".{name}.safetensors.{pid}.part"
        part.write_bytes(b"half")
        os.utime(part, (time.time() - age_s,) * 2)
        return part

    dead = [leave("dead", child), leave("restarted-in-a-container", os.getpid()), leave("id-of-another", alive, 3600)]
    kept = [leave("just-begun", alive), tmp_path / ".notes.part", tmp_path / "a.safetensors.1.part"]
    kept[1].write_text("not ours")
    kept[2].write_text("not ours")
    slow = leave("slow", alive, 3600)
    save_session(tmp_path / "a.safetensors", first, model())
    with slow.open("r+b") as file:
        flock(file, LOCK_EX)  # as its writer does, on whatever machine it is
        assert remove_leftovers(tmp_path) == len(dead)
    assert {*tmp_path.iterdir()} == {*kept, slow, tmp_path / "a.safetensors"}
    assert remove_leftovers(tmp_path) == 1  # its writer has ended
    assert remove_leftovers(tmp_path / "none") == 0


def test_a_save_survives_the_removal_of_leftovers(tmp_path: Path) -> None:
    """Another process that starts meanwhile leaves a file alone that is being written."""
    first, _, _ = begun(length=70)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            for _ in range(200):
                remove_leftovers(tmp_path)
        finally:
            os._exit(0)
    for name in range(30):
        save_session(tmp_path / f"{name}.safetensors", first, model())
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 30


def test_the_scheduler_saves_and_restores(tmp_path: Path) -> None:
    """A conversation moves to another scheduler through a file, and processes there only what is new."""
    run = scheduler(prefix_bytes=1 << 24)
    worker = threading.Thread(target=run.run_forever)
    worker.start()
    handle = run.submit(Request(prompt(60), 10, GREEDY))
    assert handle.wait(60)
    assert run.save(handle, tmp_path / "s") == 69
    other = run.submit(Request(prompt(3, 9), 2, GREEDY, reuse=False))
    assert other.wait(60)
    with pytest.raises(SessionError, match="none of the 5 tokens of request 2"):
        run.save(other, tmp_path / "t")
    run.shutdown(drain=True)
    worker.join(30)

    said: list[str] = []
    fresh = scheduler(prefix_bytes=1 << 24, types=KVTypes("f16", "f16"), notify=said.append)
    worker = threading.Thread(target=fresh.run_forever)
    worker.start()
    ids = fresh.restore(tmp_path / "s")
    assert ids == handle.token_ids
    again = fresh.submit(Request((*ids, 4, 5), 6, GREEDY))
    assert again.wait(60)
    fresh.shutdown(drain=True)
    worker.join(30)
    assert again.usage.cached_tokens == 69
    assert len(said) == 1
    assert "(q8_0 -> f16)" in said[0]

    same = scheduler(prefix_bytes=1 << 24)
    worker = threading.Thread(target=same.run_forever)
    worker.start()
    same.restore(tmp_path / "s")
    reply = same.submit(Request((*ids, 4, 5), 6, GREEDY))
    assert reply.wait(60)
    same.shutdown(drain=True)
    worker.join(30)
    assert tokens(reply) == alone(Request((*ids, 4, 5), 6, GREEDY))
    drain(same)
    small = scheduler(prefix_bytes=100)
    worker = threading.Thread(target=small.run_forever)
    worker.start()
    with pytest.raises(SessionError, match="no room for the 69 tokens"):
        small.restore(tmp_path / "s")
    small.shutdown(drain=True)
    worker.join(30)


@pytest.mark.parametrize(
    ("family", "types"),
    [
        ("qwen3_5_text", Q8),
        ("qwen3_5_text", TAILED),
        ("lfm2", Q8_TAILED),
        ("bamba", KVTypes("f32", "f16")),
        ("gemma3_text", Q8),
        *[(family, Q8) for family in HYBRIDS],
    ],
)
def test_the_same_prompt_again_goes_on_near_its_end(tmp_path: Path, family: str, types: KVTypes) -> None:
    """A state cannot go back from the reply's end, so the file holds the last place within the prompt too."""
    asked, run = Request(prompt(150), 8, GREEDY), scheduler(family, types=types, prefix_bytes=1 << 26)
    handle = run.submit(asked)
    drain(run)
    saved = run._reuse.export_session(asked, handle.token_ids, "it")
    save_session(tmp_path / "s", saved, model(family))
    session = load_session(tmp_path / "s", model(family))
    assert session.n_cached == 157
    assert session.earlier is not None
    assert session.earlier[0] == 128
    fresh = scheduler(family, types=types, prefix_bytes=1 << 26)
    fresh._reuse.import_session(session, tmp_path / "s")
    again = fresh.submit(asked)
    longer = Request((*handle.token_ids, 4, 5), 6, GREEDY)
    drain(fresh)
    assert again.usage.cached_tokens == 128
    assert tokens(again) == tokens(handle) == alone(asked, family, types=types)
    after = fresh.submit(longer)
    drain(fresh)
    assert after.usage.cached_tokens == 157
    assert tokens(after) == alone(longer, family, types=types)
    # Packed rows are held once, in the file and in memory.
    short = scheduler(family, types=types, prefix_bytes=1 << 26)
    short._reuse.import_session(replace(session, earlier=None), tmp_path / "s")
    own = session.earlier[1].own_bytes + (0 if family != "gemma3_text" else session.earlier[1].packed_bytes)
    assert fresh.prefixes.nbytes >= short.prefixes.nbytes
    whole = scheduler(family, types=types, prefix_bytes=1 << 26)
    whole._reuse.import_session(session, tmp_path / "s")
    assert short.prefixes.nbytes < whole.prefixes.nbytes <= short.prefixes.nbytes + own


def test_an_earlier_place_is_checked_and_converted(tmp_path: Path) -> None:
    asked, run = Request(prompt(70), 4, GREEDY), scheduler(prefix_bytes=1 << 26)
    handle = run.submit(asked)
    drain(run)
    path = tmp_path / "s"
    save_session(path, run._reuse.export_session(asked, handle.token_ids, "it"), model())
    said: list[str] = []
    other = scheduler(prefix_bytes=1 << 26, types=KVTypes("f16", "f16"), notify=said.append)
    other._reuse.import_session(load_session(path, model()), path)
    again = other.submit(asked)
    drain(other)
    assert (again.usage.cached_tokens, len(said)) == (64, 1)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["earlier."])
    for wrong in ({"n_cached": 90}, {"n_cached": 0}, {"n_packed": [65, 65]}, {"n_packed": []}, {"fed": []}):
        resealed(path, tensors, metadata | {"earlier.": json.dumps(record | wrong)})
        with pytest.raises(SessionError, match="contradicts itself"):
            load_session(path, model())
