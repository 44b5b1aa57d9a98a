"""`hybridkv serve --ray`: the bundled model on two replicas, in a Ray of its own, behind the real client."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import httpx2
import openai
import pytest

from hybridkv.engine.load import Loaded
from tests.server.test_real import PROMPTS, real_server

if find_spec("ray") is None:
    pytest.skip('ray is not installed: pip install "hybridkv[ray]"', allow_module_level=True)

pytestmark = pytest.mark.slow

HEADER = "x-hybridkv-replica"
MODEL = "reference"
OPTIONS = ("-a", MODEL, "-t", "1", "-np", "4", "-c", "512", "--prefill-chunk", "64", "--kv-guard", "warn")
TYPES = ("-ctk", "q8_0", "-ctv", "q8_0")


class Cluster:
    """`hybridkv serve --ray` as a process, and what it started."""

    def __init__(self) -> None:
        # Sockets have short names only, so this is not pytest's directory.
        self.directory = Path(tempfile.mkdtemp(prefix="hkv-", dir="/tmp"))
        self.lines: list[str] = []
        self.environment = os.environ | {
            "RAY_TMPDIR": str(self.directory),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # what else runs on the machine is not what is tested
            "HYBRIDKV_TEST": str(self.directory),
        }
        self.popen = subprocess.Popen(
            self.command("--ray", "--port", "0", *TYPES),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=self.environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def wait(self) -> None:
        """Until it listens."""
        wait_for(lambda: self._at() is not None or self.popen.poll() is not None, 300)
        found = self._at()
        assert found is not None, self.lines
        self.url = found

    def command(self, *options: str) -> list[str]:
        return [sys.executable, "-m", "hybridkv.cli", "serve", "--replicas", "2", *OPTIONS, *options]

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.lines.append(line.rstrip("\n"))

    def _at(self) -> str | None:
        said = re.search(rf"^{MODEL} at (http://\S+), 2 replicas$", "\n".join(self.lines), re.MULTILINE)
        return said and said[1]

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(self, prompt: str, n: int = 8, **options: object) -> tuple[str, str, int]:
        """The answer to a prompt, the replica that gave it, and how many tokens it had of the prompt already."""
        raw = self.client.completions.with_raw_response.create(
            model=MODEL, prompt=prompt, max_tokens=n, temperature=0, extra_body=options
        )
        reply = raw.parse()
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        return reply.choices[0].text, raw.headers[HEADER], reply.usage.prompt_tokens_details.cached_tokens or 0

    def counts(self, name: str) -> dict[str, float]:
        """A count of each replica."""
        text = httpx2.get(f"{self.url}/metrics", timeout=30).text
        found = re.findall(rf'^{name}{{replica="(\w+)"}} (\S+)$', text, re.MULTILINE)
        return {replica: float(value) for replica, value in found}

    def processes(self, title: str) -> list[int]:
        """Processes of this Ray by their title."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                mine = f"HYBRIDKV_TEST={self.directory}".encode() in (path / "environ").read_bytes()
                if mine and (path / "cmdline").read_bytes().startswith(title.encode()):
                    found.append(int(path.name))
            except OSError:  # it has ended
                continue
        return found

    def end(self) -> int:
        """Ask it to stop; its exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(60)
        finally:
            self.popen.kill()
            self._reader.join(10)
            if self.popen.stderr is not None:
                self.popen.stderr.close()
            shutil.rmtree(self.directory, ignore_errors=True)


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("it never came")
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.wait()
        yield cluster
    finally:
        cluster.end()


def test_answers_are_those_of_one_server(cluster: Cluster, reference: Loaded) -> None:
    with real_server(reference) as plain:
        for prompt in PROMPTS:
            reply = plain.client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
            expected = reply.choices[0].text
            assert cluster.ask(prompt)[0] == expected
            stream = cluster.client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=8, temperature=0, stream=True
            )
            pieces = [chunk.choices[0].text for chunk in stream]
            assert "".join(pieces) == expected
            assert len(pieces) > 1


def test_a_stream_comes_as_it_is_made(cluster: Cluster) -> None:
    stream = cluster.client.completions.create(
        model=MODEL, prompt="Count:", max_tokens=200, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    times = [time.monotonic() for chunk in stream if chunk.choices[0].text]
    assert len(times) > 50
    assert times[len(times) // 2] - times[0] > 0.2 * (times[-1] - times[0]) > 0


def test_a_conversation_stays_where_its_prefix_is(cluster: Cluster) -> None:
    homes = set()
    for number in range(6):
        text = f"Conversation {number} begins with something of its own. " * 8
        answer, home, n_cached = cluster.ask(text)
        assert n_cached == 0
        homes.add(home)
        for turn in range(2):
            text += answer + f" And then, in turn {turn}, more was asked for."
            answer, there, n_cached = cluster.ask(text)
            assert there == home
            assert n_cached > 60
    for number in range(6, 30):  # chance decides where the others begin
        if len(homes) == 2:
            break
        homes.add(cluster.ask(f"Conversation {number} begins with something of its own. " * 8)[1])
    assert len(homes) == 2


def test_errors_pass_through(cluster: Cluster) -> None:
    passed_over = cluster.client.completions.with_raw_response.create(model="another", prompt="x", max_tokens=1)
    assert passed_over.headers["x-hybridkv-ignored"] == "model"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        cluster.client.completions.create(model=MODEL, prompt="x", temperature=9)
    wrong_kind = httpx2.post(f"{cluster.url}/v1/completions", content="x", headers={"Content-Type": "text/plain"})
    assert wrong_kind.status_code == 415
    foreign = httpx2.get(f"{cluster.url}/v1/models", headers={"Host": "example.com"})
    assert foreign.status_code == 403
    assert httpx2.get(f"{cluster.url}/health").json() == {"status": "ok"}


def test_a_client_that_leaves_ends_its_request(cluster: Cluster) -> None:
    before = sum(cluster.counts("hybridkv_cancelled_total").values())
    stream = cluster.client.completions.create(
        model=MODEL, prompt="On", max_tokens=500, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_for(lambda: sum(cluster.counts("hybridkv_cancelled_total").values()) > before, 20)


def test_a_replica_that_dies_is_replaced(cluster: Cluster) -> None:
    before = set(cluster.counts("hybridkv_running"))
    assert len(before) == 2
    victim = cluster.processes("ray::ServeReplica:hybridkv:replica")[0]
    os.kill(victim, signal.SIGKILL)
    for number in range(4):  # the other one answers meanwhile
        assert cluster.ask(f"Anybody there? {number}")[1] in before
    wait_for(lambda: len(set(cluster.counts("hybridkv_running")) - before) == 1)
    after = set(cluster.counts("hybridkv_running"))
    assert len(after) == 2
    used = set()
    for number in range(40):
        used.add(cluster.ask(f"Who is it {number}?", 1)[1])
        if used == after:
            return
    raise AssertionError(f"{after - used} is never asked")


def test_what_is_served_is_replaced_without_a_refusal(cluster: Cluster) -> None:
    failed: list[BaseException] = []
    said: list[str] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            try:
                reply = cluster.client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, temperature=0)
                said.append(reply.system_fingerprint or "")
            except openai.OpenAIError as error:
                failed.append(error)
            time.sleep(0.02)  # replicas that start need the processor, too

    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        again = subprocess.run(
            cluster.command("--ray", "auto", "-ctk", "q8_0", "-ctv", "q4_0"),
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert again.returncode == 0, again.stderr
        wait_for(lambda: said[-1].endswith("q8_0/q4_0"), 60)
    finally:
        stop.set()
        thread.join(60)
    assert not failed
    assert said[0].endswith("-q8_0")
    assert {kind.rpartition("-")[2] for kind in said} == {"q8_0", "q8_0/q4_0"}


def test_a_signal_ends_it_all(cluster: Cluster) -> None:
    assert cluster.end() == 0
    wait_for(lambda: not cluster.processes("ray::"), 30)
