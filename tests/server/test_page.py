"""The chat page in a real browser: it streams, stops, shows memory, and shows what it is given as text."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from hybridkv.server.gate import GateOptions
from tests.server.conftest import Scripter

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS.split()])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page of a phone's size; whatever goes wrong in it fails the test."""
    context = browser.new_context(viewport={"width": 360, "height": 640})
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda m: problems.append(m.text) if m.type == "error" and "401" not in m.text else None)
    opened.on(
        "request", lambda r: problems.append(r.url) if "127.0.0.1" not in r.url and "data:" not in r.url else None
    )
    yield opened
    context.close()
    assert problems == []


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def test_a_conversation(scripted: Scripter, tokenizer: Any, page: Any) -> None:
    markup = "<img src=x onerror=alert(1)> & <b>bold</b> 😀"
    server = scripted(*encode(tokenizer, markup), 0, wait_s=0.03, chat=True, name="<i>model</i>")
    page.goto(server.url)
    expect = playwright.expect
    expect(page.locator("#types")).to_have_text("q4_0")
    expect(page.locator("h1")).to_have_text("<i>model</i>")
    assert page.evaluate("document.activeElement.id") == "text"  # ready to type
    page.keyboard.type("<script>alert(2)</script>")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    answer = page.locator(".turn").nth(1).locator("span").nth(1)
    expect(answer).to_have_text(re.compile("^<img"))  # the stream has begun
    expect(page.locator("#stop")).to_be_visible()
    expect(answer).to_have_text(markup)
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".turn").nth(1).locator(".who")).to_contain_text(" tokens in ")
    assert page.locator(".turn").first.locator("span").nth(1).inner_text() == "<script>alert(2)</script>\nsecond line"
    assert page.locator("main img, main b, main script").count() == 0
    page.keyboard.type("again")
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(4)
    expect(page.locator("#send")).to_be_visible()
    asked = tokenizer.decode(server.served.runner.handles[-1].request.prompt_ids)
    assert asked == f"<user><script>alert(2)</script>\nsecond line<assistant>{markup}<user>again:"
    assert page.evaluate("document.documentElement.scrollWidth") <= 360  # nothing to scroll sideways
    page.locator("#new").click()
    expect(page.locator(".turn")).to_have_count(0)


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop(scripted: Scripter, tokenizer: Any, page: Any, how: str) -> None:
    server = scripted(*encode(tokenizer, " word") * 500, wait_s=0.05)
    page.goto(server.url)
    expect = playwright.expect
    expect(page.locator("#hint")).to_contain_text("no chat template")
    page.locator("#text").fill("Go on")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.going span").nth(1)).to_contain_text("word word")
    expect(page.locator("#running")).to_have_text("1 of 2")
    expect(page.locator("#kv")).to_have_text("1.0 KiB of 4.0 KiB")
    if how == "button":
        page.locator("#stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    [handle] = server.served.runner.handles
    assert handle.wait(10)
    assert handle.usage.generated_tokens < 500
    expect(page.locator(".turn").nth(1).locator(".who")).to_contain_text("stopped")


def test_a_key_and_an_error(scripted: Scripter, page: Any) -> None:
    server = scripted(5, 6, options=GateOptions(api_keys=("k",)), chat=True)
    page.goto(server.url)
    expect = playwright.expect
    expect(page.locator("#hint")).to_contain_text("API key")
    page.locator("summary").click()
    page.locator("#key").fill("k")
    page.locator("#text").fill("x")
    expect(page.locator("#hint")).to_contain_text("Enter sends")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.wrong")).to_contain_text("the script has ended")
    expect(page.locator("#send")).to_be_visible()


def test_thoughts_are_folded_and_not_sent_back(scripted: Scripter, page: Any) -> None:
    server = scripted(says="<think>Rain, I think.</think>It rains.", chat=True, n_ctx=512)
    page.goto(server.url)
    expect = playwright.expect
    for question in ("weather?", "and now?"):
        page.locator("#text").fill(question)
        page.keyboard.press("Enter")
        expect(page.locator(".turn").last.locator(".who")).to_contain_text(" tokens in ")
        expect(page.locator("#send")).to_be_visible()
    thoughts = page.locator(".turn").nth(1).locator("details")
    expect(thoughts.locator("div")).to_be_hidden()
    thoughts.locator("summary").click()
    expect(thoughts.locator("div")).to_have_text("Rain, I think.")
    expect(page.locator(".turn").nth(1).locator("span").nth(1)).to_have_text("It rains.")
    asked = server.served.tokenizer.decode(server.served.runner.handles[-1].request.prompt_ids)
    assert "It rains." in asked
    assert "I think" not in asked


def test_an_answer_that_is_all_thoughts_says_so(scripted: Scripter, page: Any) -> None:
    server = scripted(says="<think>Rain, I think, and then", chat=True, n_ctx=512)
    page.goto(server.url)
    expect = playwright.expect
    page.locator("details summary", has_text="Options").click()
    page.locator("#max_tokens").fill("6")
    page.locator("#text").fill("weather?")
    page.keyboard.press("Enter")
    expect(page.locator(".turn").last.locator(".who")).to_contain_text("cut at most tokens while thinking")
    expect(page.locator(".turn").last.locator("details div")).to_contain_text("Rain")
