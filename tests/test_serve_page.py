"""The built-in page in a headless browser: three skills side by side, by keyboard, on a small screen, with a key."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect, sync_playwright
from serving import Running, serve_here

from lime_edge.serve.page import read_page, write_policy

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(CHROMIUM is None, reason="NO CHROMIUM HERE: apt-get install chromium (.ci/run does)"),
]
WAIT = 20_000  # milliseconds


@pytest.fixture(scope="module")
def server(marker_bundle: Path) -> Iterator[Running]:
    with serve_here(marker_bundle) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def is_fault(message: str) -> bool:
    """Whether the policy stopped something of the page's own; a test asks example.org on purpose."""
    return "Policy" in message and "example.org" not in message


@pytest.fixture
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page that fails the test where its script does, or where the policy stops something."""
    width = getattr(request, "param", 1200)
    opened, faults = browser.new_page(viewport={"width": width, "height": 800}), list[str]()
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text) if is_fault(message.text) else None)
    yield opened
    opened.close()
    assert not faults, faults


def wait_for_end(page: Any) -> None:
    """Until all answers have ended."""
    expect(page.locator("#status")).to_have_text("done", timeout=WAIT)


def read_cards(page: Any) -> dict[str, str]:
    """Skill to answer."""
    return {
        card.query_selector("h2").text_content(): card.query_selector("p").text_content()
        for card in page.query_selector_all("article")
    }


def test_three_skills_answer_one_text_side_by_side(server: Running, page: Any) -> None:
    page.goto(server.url)
    page.wait_for_selector("#skills input")
    assert page.locator("#skills input").count() == 17, "16 skills, and none"
    for box in page.query_selector_all("#skills input:checked"):
        box.uncheck()
    for skill in ("skill-b", "skill-h", "skill-p"):
        page.get_by_label(skill, exact=True).check()
    page.get_by_label("Text").fill("one text for all")
    page.get_by_label("Tokens at most").fill("1200")
    page.get_by_role("button", name="Answer").click()
    lengths: list[tuple[int, ...]] = []
    while not re.fullmatch("done", page.text_content("#status") or ""):
        lengths.append(tuple(len(text) for text in read_cards(page).values()))
    together = [seen for seen in lengths if len(seen) == 3 and all(0 < length < 1200 for length in seen)]
    assert together, f"they did not stream side by side: {lengths[:20]}"
    assert read_cards(page) == {f"skill-{letter}": letter * 1200 for letter in "bhp"}
    places = [card.bounding_box() for card in page.query_selector_all("article")]
    assert len({place["y"] for place in places}) == 1 and len({place["x"] for place in places}) == 3
    assert "1200 tokens, first after" in page.text_content("article footer")


def test_the_keyboard_is_enough(server: Running, page: Any) -> None:
    """Tab to the skills, space to pick, tab to the text, Ctrl+Enter to ask, tab to Stop."""
    page.goto(server.url)
    page.wait_for_selector("#skills input")
    focused = "document.activeElement.value ?? document.activeElement.id"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "marker:skill-a"
    page.keyboard.press("Space")  # skill-a off; b and c stay
    outlines = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outlines != "none", "the focus is not shown"
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "text":
            break
    page.keyboard.type("typed")
    page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("7")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+Enter")
    wait_for_end(page)
    assert read_cards(page) == {"skill-b": "b" * 7, "skill-c": "c" * 7}


def test_stop_frees_the_rows(server: Running, page: Any) -> None:
    page.goto(server.url)
    page.wait_for_selector("#skills input")
    page.get_by_label("Text").fill("long")
    page.get_by_label("Tokens at most").fill("1900")
    page.get_by_role("button", name="Answer").click()
    expect(page.locator("article p").first).to_have_text(re.compile("aaaa"), timeout=WAIT)
    page.get_by_role("button", name="Stop").click()
    wait_for_end(page)
    assert page.text_content("article footer") == "stopped"
    for _ in range(200):
        if not server.worker.under_way and server.worker.running == 0:
            return
        page.wait_for_timeout(50)
    raise AssertionError("rows are still taken")


@pytest.mark.parametrize("page", [400, 320], indirect=True)
def test_small_screens_scroll_downwards_only(server: Running, page: Any) -> None:
    page.goto(server.url)
    page.wait_for_selector("#skills input")
    page.get_by_label("Text").fill("x" * 300)
    page.get_by_label("Tokens at most").fill("300")
    page.get_by_role("button", name="Answer").click()
    wait_for_end(page)
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    places = [card.bounding_box() for card in page.query_selector_all("article")]
    assert len({place["x"] for place in places}) == 1, "one answer below the other"
    assert all(place["x"] >= 0 and place["x"] + place["width"] <= width for place in places)
    for name in ("button", "input", "textarea"):
        for place in (found.bounding_box() for found in page.query_selector_all(name)):
            assert place is None or place["x"] + place["width"] <= width, name


def test_a_key_is_asked_for_and_sent(marker_bundle: Path, page: Any) -> None:
    with serve_here(marker_bundle, keys=("sk-page",)) as running:
        page.goto(running.url)
        expect(page.locator("#status")).to_contain_text("API key", timeout=WAIT)
        page.get_by_label("API key").fill("sk-page")
        page.keyboard.press("Tab")
        page.wait_for_selector("#skills input")
        page.get_by_label("Text").fill("x")
        page.get_by_label("Tokens at most").fill("4")
        page.get_by_role("button", name="Answer").click()
        wait_for_end(page)
        assert read_cards(page)["skill-a"] == "aaaa"
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0, "the key is kept"
        page.get_by_label("API key").fill("sk-wrong")
        page.get_by_role("button", name="Answer").click()
        expect(page.locator("footer.failed").first).to_be_visible(timeout=WAIT)
        assert "a valid API key is needed" in page.text_content("footer.failed")


def test_answers_are_text_never_markup(server: Running, page: Any) -> None:
    """What a model says is put into the page as text: its script knows no innerHTML."""
    script = read_page().partition("<script>")[2]
    assert "innerHTML" not in script and "outerHTML" not in script and "eval(" not in script
    page.goto(server.url)
    blocked = page.evaluate("fetch('https://example.org/').then(() => 'open', () => 'closed')")
    assert blocked == "closed"
    assert "unsafe" not in write_policy()
