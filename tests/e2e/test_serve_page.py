"""The page of `megatrain serve` in a real browser: text that grows, stops, and is readable at every width."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
from numerics.test_export import make_run
from numerics.test_huggingface_parity import MODELS
from playwright.sync_api import Page, expect, sync_playwright
from served import SECONDS, Served

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path")
KEY = "a-key-for-the-tests"
LIMIT_MS = SECONDS * 1000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = replace(MODELS["qwen3"], max_seq_len=4096)
    run = make_run(tmp_path_factory.mktemp("made") / "<b>tiny", model, seq_len=4096)
    with Served(run, env={"MEGATRAIN_API_KEYS": KEY}) as served:
        yield served


@pytest.fixture(scope="module")
def opened(server: Served) -> Iterator[Page]:
    """The page, on which nothing goes wrong, and which asks no other server."""
    wrong: list[str] = []
    hosts: set[str] = set()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(LIMIT_MS)
        expect.set_options(timeout=LIMIT_MS)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: hosts.add(request.url.rpartition(server.url)[0] or server.url))
        page.goto(server.url)
        yield page
        browser.close()
    assert all("status of 40" in each for each in wrong), wrong  # without a key, and with too many tokens
    assert hosts == {server.url}


def test_a_key_is_asked_for(opened: Page) -> None:
    expect(opened.locator("#about")).to_contain_text("No API key")
    opened.get_by_label("API key").fill(KEY)


def test_a_conversation_grows_and_ends(opened: Page) -> None:
    opened.get_by_label("Most tokens").fill("12")
    opened.get_by_label("Seed").fill("3")
    opened.get_by_label("Message", exact=True).fill("the square")
    opened.keyboard.press("Enter")
    expect(opened.locator("article")).to_have_count(2)
    expect(opened.locator("#said")).to_contain_text("12 tokens")
    assert opened.locator("h1").inner_text() == "<b>tiny"
    assert opened.title() == "<b>tiny"
    assert opened.locator("article div").first.inner_text() == "the square"
    assert len(opened.locator("article div").last.inner_text()) > 2
    opened.get_by_label("Message", exact=True).fill("<img src=x onerror=alert(1)>")
    opened.get_by_role("button", name="Send").click()
    expect(opened.locator("article")).to_have_count(4)
    expect(opened.locator("article p")).to_have_count(2)
    assert opened.locator("img").count() == 0


def test_a_text_is_continued_until_it_is_stopped(opened: Page, server: Served) -> None:
    opened.get_by_role("button", name="Clear").click()
    expect(opened.locator("article")).to_have_count(0)
    opened.get_by_label("Mode").select_option("complete")
    opened.get_by_label("Most tokens").fill("4000")
    opened.get_by_label("Temperature").fill("0")
    opened.get_by_label("Text to continue").fill("the number")
    opened.get_by_role("button", name="Send").click()
    said = opened.locator("article div")
    expect(said).to_have_text(re.compile(r"^the number.{20,}", re.DOTALL))
    opened.get_by_role("button", name="Stop").click()
    expect(opened.locator("article p")).to_have_text("stopped")
    assert said.inner_text().startswith("the number")
    expect(opened.get_by_role("button", name="Send")).to_be_enabled()
    expect(opened.get_by_role("button", name="Stop")).to_be_disabled()
    while server.metric("megatrain_texts_running"):
        pass


def test_a_wrong_setting_is_said(opened: Page) -> None:
    opened.get_by_label("Most tokens").fill("5000")
    opened.get_by_role("button", name="Send").click()
    expect(opened.locator("article p.wrong")).to_contain_text("do not fit")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_readable_at_every_width_in_both_schemes(opened: Page, width: int, scheme: str) -> None:
    opened.set_viewport_size({"width": width, "height": 800})
    opened.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    opened.wait_for_function("width => innerWidth === width", arg=width, timeout=10_000)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    for element in opened.locator("button, input, select, textarea").all():
        box = element.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    back = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(back[4:].split(",")[0]) < 128) == (scheme == "dark")
    assert opened.evaluate(CONTRAST) >= 4.5


CONTRAST = """() => {
    const channels = color => color.match(/[0-9.]+/g).slice(0, 3).map(Number);
    const light = color => {
        const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = channels(color).map(c => linear(c / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = element => {
        for (; element; element = element.parentElement) {
            const color = getComputedStyle(element).backgroundColor;
            if (!color.includes("rgba(0, 0, 0, 0)")) return color;
        }
        return "rgb(255, 255, 255)";
    };
    const texts = "h1, h2, p, label, button:enabled, input, summary, article div, .faint";
    const ratios = [...document.querySelectorAll(texts)].map(element => {
        const pair = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
        return (pair[0] + 0.05) / (pair[1] + 0.05);
    });
    return Math.min(...ratios);
}"""
"""The least contrast of text, as WCAG 2 computes it."""
