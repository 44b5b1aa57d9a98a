"""`hybridkv serve` as a process: what it prints, how it ends, and what it refuses before a model is loaded."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hybridkv.cache import KVTypes
from hybridkv.cli import serve
from hybridkv.cli.fits import Demand
from hybridkv.cli.main import build_parser
from hybridkv.cli.model_options import open_model
from hybridkv.cli.prefix_memory import default_prefix_bytes
from hybridkv.memory import Available
from hybridkv.model import kv_facts
from hybridkv.planner import plan
from hybridkv.policy import Policy
from tests.cli.conftest import Cli
from tests.cli.test_bad_input import one_error


class Process:
    """A server in a process of its own."""

    def __init__(self, *options: str, **environment: str) -> None:
        self.lines: list[str] = []
        words = [sys.executable, "-m", "hybridkv.cli", "serve", "--port", "0", "-t", "1", *options]
        self.popen = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        deadline = time.monotonic() + 120
        while not (self.lines and " at http://" in self.lines[-1]):
            assert self.popen.poll() is None, self.lines
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.05)
        self.url = self.lines[-1].rpartition(" at ")[2]

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.lines.append(line.rstrip("\n"))

    def post(self, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps({"prompt": "Hello world", "temperature": 0, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=60)

    def end(self) -> int:
        code = self.popen.wait(60)
        self._reader.join(10)
        assert self.popen.stderr is not None
        self.popen.stderr.close()
        return code


@contextmanager
def process(*options: str, **environment: str) -> Iterator[Process]:
    running = Process(*options, **environment)
    try:
        yield running
    finally:
        running.popen.kill()
        running.end()


def test_a_server_from_start_to_end() -> None:
    """The table, an answer, and a shutdown that lets a stream finish while it refuses everybody else."""
    with process("-ctk", "q4_0", "-ctv", "q4_0", "-np", "2", "-c", "600") as server:
        table = "\n".join(server.lines)
        assert re.search(r"^ +11 +q4_0 +q4_0 +- +cpu-", table, re.MULTILINE)
        assert re.search(r"^memory: .* for a sequence of 600 tokens, at most .* for 2 at once", table, re.MULTILINE)
        with server.post(max_tokens=8) as response:
            assert json.load(response)["choices"][0]["text"].startswith(".\n\nThe following")
        stream = server.post(max_tokens=500, stream=True, ignore_eos=True, stream_options={"include_usage": True})
        assert stream.readline().startswith(b": hello")
        server.popen.send_signal(signal.SIGTERM)
        with first_refusal(server) as refusal:
            assert (refusal.code, json.load(refusal)["error"]["code"]) == (503, "stopping")
            assert int(refusal.headers["Retry-After"]) >= 1
        with stream:
            text = stream.read().decode()
        assert text.endswith("data: [DONE]\n\n")
        assert '"completion_tokens":500' in text
        assert server.end() == 0
        assert "note: finishing what is being answered (1); Ctrl-C again ends at once" in "\n".join(server.lines)
        assert not any("Traceback" in line for line in server.lines)


def first_refusal(server: Process) -> urllib.error.HTTPError:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            server.post(max_tokens=1).close()
        except urllib.error.HTTPError as refusal:
            return refusal
    raise AssertionError("nothing was refused")


def test_a_second_signal_ends_at_once() -> None:
    with process("-np", "1", "-c", "0", "--reasoning", "off") as server:
        assert any("for a sequence of 32768 tokens" in line for line in server.lines), server.lines
        assert "note: the chat template does not read enable_thinking: no effect" in server.lines
        stream = server.post(max_tokens=4000, stream=True, ignore_eos=True)
        assert stream.readline().startswith(b": hello")
        server.popen.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.popen.poll() is None
        start = time.monotonic()
        server.popen.send_signal(signal.SIGINT)
        assert server.end() == serve.EXIT_INTERRUPTED
        assert time.monotonic() - start < 10
        with stream:
            try:
                rest = stream.read()
            except http.client.IncompleteRead as cut:
                rest = cut.partial
        assert b"[DONE]" not in rest  # it does not look as if it were whole


def refused(cli: Cli, *options: object) -> str:
    return one_error(cli("serve", *options))


def test_what_is_refused_before_a_model_is_loaded(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "open_model", lambda _: pytest.fail("a model was opened"))
    assert "-np 0; allowed: 1 to 256" in refused(cli, "-np", 0)
    assert "--port 65536; allowed: 0 to 65535" in refused(cli, "--port", 65536)
    assert "--prefill-chunk 0; allowed" in refused(cli, "--prefill-chunk", 0)
    assert "--memory '0'; allowed" in refused(cli, "--memory", 0)
    assert "--max-body 'much'; allowed" in refused(cli, "--max-body", "much")
    assert "--host 'no.such.host.invalid'" in refused(cli, "--host", "no.such.host.invalid")
    assert "--api-key is empty or not plain ASCII" in refused(cli, "--api-key", " ")
    assert "--session-dir '/no/such' is not a directory" in refused(cli, "--session-dir", "/no/such")
    assert "sessions are made of stored prefixes" in refused(cli, "--session-dir", ".", "--prefix-memory", 0)
    assert "q9_0" in refused(cli, "-ctk", "q9_0")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        error = refused(cli, "--port", port)
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in error
        assert "hint: try another --port; 0 takes a free one" in error
    assert "cannot listen on 192.0.2.1" in refused(cli, "--host", "192.0.2.1")


def test_missing_packages_are_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else object())
    error = refused(cli)
    assert "hybridkv serve needs packages that are not installed: uvicorn" in error
    assert 'hint: pip install "hybridkv[serve]"' in error


def test_what_cannot_be_served(cli: Cli, hybrid: Path) -> None:
    assert "no tokenizer" in refused(cli, "-m", hybrid, "--port", 0)
    assert "--memory 1.0 KiB: not a single token fits" in refused(cli, "--port", 0, "--memory", "1KiB")


@pytest.mark.parametrize("n_ctx", [32768, 131072])
@pytest.mark.parametrize("parallel", [1, 4])
def test_stored_prefixes_hold_a_conversation_of_a_large_model(
    n_ctx: int, parallel: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the 35B-A3B: its states take 63 MiB, and 256 MiB held four places of a short conversation."""
    config = Path(__file__).parents[1] / "data/qwen3.5-35b-a3b/config.json"
    a = build_parser()[1]["serve"].parse_args(["-m", str(config), "-c", str(n_ctx), "-ctk", "q8_0", "-ctv", "q8_0"])
    opened = open_model(a)
    specs = Policy(KVTypes("q8_0", "q8_0")).resolve(kv_facts(opened.description.facts))
    rest = Demand(specs, n_ctx, parallel)
    states = plan((), opened.description.facts, n_ctx=0).state_bytes
    one = sum(spec.bytes_at(n_ctx) for spec in specs) + 8 * states
    monkeypatch.setattr("hybridkv.cli.fits.bytes_beside", lambda *_: 30 * 2**30)
    for free, expected in ((256, parallel * one), (31, 2**28)):
        monkeypatch.setattr("hybridkv.memory.available_memory", lambda free=free: Available(free * 2**30, "free"))
        capsys.readouterr()
        assert default_prefix_bytes(opened, specs, rest) == expected
        said = " ".join(capsys.readouterr().err.split())
        assert (f"where -c is {n_ctx}; --prefix-memory {one // 2**20 + 1}MiB holds one whole" in said) is (free == 31)
    assert 55 * 2**20 < states < 70 * 2**20
