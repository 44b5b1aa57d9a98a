"""The tutorial and the how-tos, executed on the bundled model, and the site, built with warnings as errors."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridkv.cli.main import main
from hybridkv.engine.load import bundled_model
from tests.with_lab import WHERE, WITH_LAB

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs/tutorial.md", *sorted((ROOT / "docs/how-to").glob("*.md"))]
SHORTER = {
    "eval": ["-c", "128", "-n", "0", "--mode", "prefill"],
    "tune": ["--types", "q8_0,hq4_nl,hq3_nl", "--window", "64", "--calibrate", "1", "--verify", "1", "--rounds", "0"],
    "run": ["-n", "8"],
}
"""What a test adds to a command so that it takes seconds; the last of two equal options counts."""


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Give a page's fenced blocks in order: language and text, without their indentation."""
    for indent, language, text in re.findall(
        r"^( *)```(\w+)\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE
    ):
        yield language, "\n".join(line.removeprefix(indent) for line in text.splitlines())


class Server:
    """The server that a page starts, on a free port in place of 8080."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "hybridkv.cli", *words, "--port", "0", "-t", "1"],
            stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        deadline = time.monotonic() + 300
        while not (self.lines and " at http://" in self.lines[-1]):
            assert self.popen.poll() is None, self.lines
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.05)
        self.port = int(self.lines[-1].rpartition(":")[2])

    def _read(self) -> None:
        assert self.popen.stderr is not None
        self.lines.extend(line.rstrip("\n") for line in iter(self.popen.stderr.readline, ""))

    def end(self) -> None:
        self.popen.send_signal(signal.SIGTERM)
        assert self.popen.wait(120) == 0
        self._reader.join(10)
        assert self.popen.stderr is not None
        self.popen.stderr.close()


class Reader:
    """Somebody who types what a page says."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.servers: list[Server] = []
        self.printed = ""
        self.ports: dict[str, str] = {}

    def shell(self, line: str) -> None:
        words = shlex.split(line)
        environment = {}
        while "=" in words[0] and words[0].partition("=")[0].isupper():
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if words[:2] == ["hybridkv", "serve"]:
            self.servers.append(Server(words[1:], environment))
            self.ports["8080"] = str(self.servers[-1].port)
        elif words[0] == "hybridkv":
            assert main([*words[1:], *SHORTER.get(words[1], [])]) == 0, line
            out, err = self._capsys.readouterr()
            self.printed += out + err
        else:
            assert words[0] == "curl", line
            if shutil.which("curl") is None or self.is_unknown(line):
                return
            done = subprocess.run(
                shlex.split(self.moved(line)), capture_output=True, text=True, timeout=120, check=True
            )
            assert '"text"' in done.stdout, done

    def is_unknown(self, text: str) -> bool:
        """Ask whether nothing was started that listens there: nginx is not everywhere."""
        return not set(re.findall(r"127\.0\.0\.1:(\d+)", text)) <= set(self.ports)

    def moved(self, text: str) -> str:
        return re.sub(r"127\.0\.0\.1:(\d+)", lambda m: f"127.0.0.1:{self.ports[m[1]]}", text)

    def python(self, code: str, page: Path) -> None:
        exec(compile(self.moved(code), str(page), "exec"), {})
        assert self._capsys.readouterr().out.strip()

    def sees(self, shown: str) -> None:
        """Require each shown line among those printed so far, whatever its numbers, kernels and spaces."""
        lines = {same(line) for line in self.printed.splitlines()}
        missing = [line for line in shown.splitlines() if same(line) not in lines]
        assert not missing, self.printed


def same(line: str) -> str:
    words = re.sub("─+", "─", " ".join(line.split()))  # as wide as the kernel's name
    return re.sub(r"[\d.]+", "#", re.sub(r"(cpu|native)-\w+", "KERNEL", words))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not WITH_LAB and "hybridkv[lab]" in page.read_text():
        pytest.skip(WHERE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("model.gguf", "Qwen3.5-35B-A3B-Q4_K_M.gguf"):
        (tmp_path / name).symlink_to(bundled_model())
    (tmp_path / "prompt.txt").write_text("A recurrent layer keeps a state of fixed size. " * 20)
    for folder in ("HF_HUB_CACHE", "OLLAMA_MODELS"):
        monkeypatch.setenv(folder, str(tmp_path))
    reader = Reader(capsys)
    try:
        for language, text in blocks(page):
            if language == "sh":
                for line in text.splitlines():
                    reader.shell(line)
            elif language == "python":
                reader.python(text, page)
            elif language == "nginx":
                nginx(text, reader, tmp_path)
            elif not text.startswith(("pip ", "python3 ", "weights on cpu: 14.68")):
                reader.sees(text)
    finally:
        for server in reader.servers:
            server.end()


def nginx(text: str, reader: Reader, folder: Path) -> None:
    """Start nginx with a page's server block, where it is installed; it ends with the shell that holds its stdin."""
    program = shutil.which("nginx")
    if program is None:
        return
    server = reader.servers[-1]
    port = str(server.port + 1)
    block = reader.moved(text.replace("127.0.0.1:8443", f"127.0.0.1-{port}")).replace("127.0.0.1-", "127.0.0.1:")
    temporary = "".join(f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{ access_log off; {temporary}\n{block}\n}}\n"
    )
    started = subprocess.Popen([program, "-p", str(folder), "-c", str(folder / "nginx.conf")])
    time.sleep(1)
    assert started.poll() is None
    reader.ports["8443"] = port
    end, server.end = server.end, lambda: (started.terminate(), started.wait(30), end())  # type: ignore[method-assign]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Every page is in a table of contents, every link and anchor leads somewhere, the API's docstrings are sound."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    options = ["-W", "--keep-going", "-q", "-d", str(tmp_path / "tree")]
    words = [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(tmp_path / "site")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site/api.html").read_text()
    import hybridkv

    missing = [name for name in hybridkv.__all__ if f'id="hybridkv.{name}"' not in api and not name.startswith("_")]
    assert not missing
