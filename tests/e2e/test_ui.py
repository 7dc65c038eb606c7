"""The page at /ui in a real browser, against real services: the chat streams, the map shows the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

import pagoda
from gateway_svc.ui.live import MANY_BLOCKS, LiveState
from tests.support.browser import Browser, chromium
from tests.support.cluster import Cluster, cluster
from tests.support.cluster_sched import scheduler, sim_worker, wait_until

pytestmark = pytest.mark.timeout(600)

NUM_BLOCKS, BLOCK = 800, 16
# Ends when its client leaves and not before, on any machine that runs this.
ENDLESS = 2000
TOKEN = "a-token-for-this-test"
SECRET = "Zanzibar"  # a word of a prompt, which must not be in a log


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    """One worker with a cache that a screen can show."""
    flags = ("--num-blocks", str(NUM_BLOCKS), "--block-size", str(BLOCK))
    with cluster(dtype="bfloat16", worker_args=flags, gateway_args=()) as services:
        yield services


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A fresh browser."""
    with chromium(tmp_path / "profile") as window:
        yield window


@contextlib.contextmanager
def load(running: Cluster) -> Iterator[list[str]]:
    """Requests that go on for as long as the block; their ids. They share a beginning, some have samples."""
    beginning = list(range(1000, 1000 + 6 * BLOCK))
    ids = [f"load-{i}" for i in range(8)]
    with pagoda.Client(running.grpc) as client, contextlib.ExitStack() as streams:
        for i, name in enumerate(ids):
            prompt = beginning + list(range(2000 + 1000 * i, 2000 + 1000 * i + 20 * BLOCK))
            options = {"max_tokens": ENDLESS, "ignore_eos": True, "n": 1 + i % 4, "request_id": name}
            stream = client.stream(prompt, **options)
            streams.enter_context(stream)
            next(iter(stream))
        yield ids


def blocks(browser: Browser, state: str) -> int:
    """The legend's number of blocks in a state."""
    return int(browser.text(f"#legend [data-state={state}] b").replace(",", ""))


def open_page(browser: Browser, url: str) -> None:
    """Open the page and wait until it shows the live state."""
    browser.driver.get(f"{url}/ui")
    wait_until(lambda: browser.text("#link") == "Live", 30, "the page is live")


def ask(browser: Browser, prompt: str) -> None:
    """Send a message of the chat and wait for the whole answer; every text seen on the way is kept."""
    browser.run(
        """window.seen = new Set();
        new MutationObserver(() => {
          const text = document.querySelector(".said.assistant:last-child p")?.textContent;
          if (text) window.seen.add(text);
        }).observe(document.getElementById("log"), {subtree: true, childList: true, characterData: true});"""
    )
    browser.find("#prompt").send_keys(prompt, Keys.ENTER)
    answered = ".said.assistant:last-child[data-state=done] small"
    wait_until(lambda: "tokens" in browser.text(answered), 120, "the answer is complete")


def place_of(browser: Browser, block: int) -> tuple[float, float]:
    """The middle of a block's cell on the map."""
    canvas = browser.find("figure canvas")
    pitch, columns = (int(canvas.get_attribute(f"data-{name}") or 0) for name in ("pitch", "columns"))
    return (block % columns + 0.4) * pitch, (block // columns + 0.4) * pitch


def test_the_chat_streams_and_the_map_follows(running: Cluster, browser: Browser, tmp_path: Path) -> None:
    open_page(browser, running.url)
    assert blocks(browser, "free") + blocks(browser, "cached") == NUM_BLOCKS
    browser.run("document.getElementById('max-tokens').value = 48")
    ask(browser, "Name three cities by the sea, and say in a sentence each what they are known for.")
    texts = sorted(browser.run("return [...window.seen]"), key=len)
    assert len(texts) > 5 and all(texts[-1].startswith(text) for text in texts)
    wait_until(lambda: not blocks(browser, "owned") and blocks(browser, "cached") > 0, 30, "cached again")

    with pagoda.Client(running.grpc) as client:
        client.batch([list(range(i, i + 24 * BLOCK)) for i in range(20000, 28000, 1000)], max_tokens=2)
    with load(running) as ids:
        wait_until(lambda: blocks(browser, "owned") > 50, 60, "blocks are owned")
        wait_until(lambda: blocks(browser, "shared") >= 6, 60, "blocks are shared")
        rows = "return [...document.querySelectorAll('#requests code')].map((row) => row.textContent)"
        wait_until(lambda: set(ids) <= set(browser.run(rows)), 30, "every request has a row")
        wait_until(lambda: float(browser.text("#rate").replace(",", "")) > 0, 60, "tokens are counted")

        canvas = browser.find("figure canvas")
        table = next(r for r in running.snapshot(True, True).requests if r.request_id == ids[4])
        own, first = table.samples[0].blocks[-1], table.samples[0].blocks[0]
        browser.hover(canvas, *place_of(browser, own))
        assert f"Block {own}" in browser.text("#tip")
        wait_until(lambda: ids[4] in browser.text("#tip"), 10, "the owner is named")
        assert "Owned by one sequence" in browser.text("#tip")
        assert browser.text("#requests tr.lit code") == ids[4]
        picture(browser, tmp_path)
        # The beginning that all of them have is one block for all.
        browser.hover(canvas, *place_of(browser, first))
        wait_until(lambda: "Shared by" in browser.text("#tip"), 10, "it is shared")
        assert "more" in browser.text("#tip")
        canvas.send_keys(Keys.ESCAPE)
        assert browser.run("return document.getElementById('tip').hidden")
        canvas.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
        assert "Block 1" in browser.text("#tip")

    held = lambda: blocks(browser, "owned") + blocks(browser, "shared")  # noqa: E731
    wait_until(lambda: not held() and blocks(browser, "cached") > 50, 60, "cached and not held")
    assert browser.complaints() == []
    assert browser.origins() == {running.url}


def picture(browser: Browser, folder: Path) -> None:
    """Keep the page as it is; where UI_PICTURE says, for docs/ui.png."""
    browser.dark(bool(os.environ.get("UI_DARK")))
    file = Path(os.environ.get("UI_PICTURE") or folder / "ui.png")
    assert browser.driver.save_screenshot(str(file))
    assert file.stat().st_size < 300_000


def test_an_answer_can_be_stopped_and_errors_are_said_in_words(running: Cluster, browser: Browser) -> None:
    open_page(browser, running.url)
    browser.run(f"document.getElementById('max-tokens').value = {ENDLESS}")
    # From within the page, with the first text: an answer could end before this process sees it.
    browser.run(
        """new MutationObserver((_, observer) => {
          if (!document.querySelector(".said[data-state=streaming] p")?.textContent) return;
          observer.disconnect();
          document.getElementById("stop").click();
        }).observe(document.getElementById("log"), {subtree: true, childList: true});"""
    )
    browser.find("#prompt").send_keys("Write a long story of a fox, a river and a village.", Keys.ENTER)
    wait_until(lambda: browser.text(".said[data-state=done] small") == "Stopped.", 30, "it is stopped")
    running.assert_idle()
    assert browser.complaints() == []
    browser.run("document.getElementById('prompt').value = 'And then? '.repeat(20000)")
    browser.find("#prompt").send_keys(Keys.ENTER)
    failed = ".said[data-state=failed] small"
    wait_until(lambda: "the model's context is" in browser.text(failed), 30, "it says why")


def test_the_page_asks_for_the_token(running: Cluster, browser: Browser) -> None:
    guarded = dataclasses.replace(running, gateway=None)
    try:
        guarded.start_gateway("--token", TOKEN)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{guarded.url}/ui/state", timeout=10)
        browser.driver.get(f"{guarded.url}/ui")
        dialog_open = "return document.getElementById('token-dialog').open"
        wait_until(lambda: browser.run(dialog_open), 30, "the page asks for the token")
        assert not browser.find("#token-wrong").is_displayed()
        browser.find("#token").send_keys("wrong", Keys.ENTER)
        wait_until(lambda: browser.find("#token-wrong").is_displayed(), 30, "it says that it was refused")
        browser.find("#token").send_keys(TOKEN, Keys.ENTER)
        wait_until(lambda: browser.text("#link") == "Live", 30, "the page is live")
        browser.run("document.getElementById('max-tokens').value = 8")
        ask(browser, f"What is {SECRET}?")
        kept = browser.run("return [Object.values(sessionStorage), localStorage.length, document.cookie]")
        assert kept == [[TOKEN], 0, ""]
        assert all("status of 401" in line for line in browser.complaints())
    finally:
        assert guarded.gateway is not None
        # At once, though a page looks on: that stream is ended, and not waited for.
        assert guarded.gateway.stop() == 0
    wait_until(lambda: "cannot be reached" in browser.text("#trouble"), 30, "the page says what is wrong")
    assert browser.find("#trouble").is_displayed()
    log = "".join(guarded.gateway.text)
    assert SECRET not in log and TOKEN not in log


async def test_all_viewers_share_one_watch(running: Cluster) -> None:
    live = LiveState(running.scheduler.address, "")
    assert not live.watching
    one, other = live.events(), live.events()
    first = await anext(one)
    assert first.startswith(b'data: {"unix_us":') and live.watching
    assert await anext(other) is first  # what is there is shown at once
    second, third = await anext(one), await anext(other)
    assert second is third and second is not first
    await one.aclose()
    assert live.watching
    await other.aclose()
    assert not live.watching
    again = live.events()
    assert await anext(again) is not second
    await live.close()
    assert not live.watching
    with pytest.raises(StopAsyncIteration):
        await anext(again)


async def test_a_large_cache_is_watched_less_often_and_without_a_break() -> None:
    with scheduler() as process, sim_worker(process.address, blocks=MANY_BLOCKS + 1):
        live = LiveState(process.address, "")
        async with contextlib.aclosing(live.events()) as events:
            # The second comes from a Watch that was begun anew, with a longer interval.
            states = [json.loads((await anext(events)).removeprefix(b"data: ")) for _ in range(4)]
    assert [state["workers"][0]["cells"] for state in states] == [[0, MANY_BLOCKS + 1]] * 4
    assert len({state["unix_us"] for state in states}) == 4
