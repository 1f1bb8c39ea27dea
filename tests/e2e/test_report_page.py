"""The page of `megatrain report` in a real browser: drawn, readable, at every width, and without a request."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import recorded
from playwright.sync_api import Browser, Page, Request, sync_playwright

from megatrain.observe.report.page import report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path")
INK = """canvas => {
    const copy = Object.assign(document.createElement("canvas"), { width: 200, height: 100 });
    const context = copy.getContext("2d", { willReadFrequently: true });
    context.drawImage(canvas, 60, 0, canvas.width - 60, canvas.height - 40, 0, 0, 200, 100);
    const pixels = context.getImageData(0, 0, 200, 100).data;
    let coloured = 0;
    for (let at = 0; at < pixels.length; at += 4) {
        const [red, green, blue, opacity] = pixels.slice(at, at + 4);
        coloured += opacity > 40 && Math.max(red, green, blue) - Math.min(red, green, blue) > 60;
    }
    return coloured;
}"""
"""How many pixels of a chart have a colour, as its lines do and its grid and labels do not."""

FITS = "width => innerWidth === width && document.documentElement.scrollWidth <= width"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of a good run, of a hostile one, of one row, of a long one, and of several."""
    root = tmp_path_factory.mktemp("runs")
    texts = [
        {"event": "resume", "step": 100},
        *({"event": "sample", "step": step, "text": f"text at {step}"} for step in (50, 200)),
    ]
    made = {
        "good": recorded.write(root / "good", recorded.rows(200, bad=(77,)), events=texts),
        "long": recorded.write(root / "long", recorded.rows(5000)),
        "one": recorded.write(root / "one", recorded.rows(1)),
        "hostile": recorded.write(
            root / "hostile",
            recorded.rows(30, evals=False),
            events=[
                {"event": "sample", "step": 1, "text": recorded.MARKUP},
                {"event": "notice", "text": recorded.MARKUP},
            ],
            config=f"run:\n  name: '{recorded.MARKUP.replace(chr(39), chr(39) * 2)}'\n{'k' * 200}: {'v' * 400}\n",
            torn='{"step": 31, ',
        ),
    }
    found = {name: report([run], root / f"{name}.html") for name, run in made.items()}
    return found | {"several": report(list(made.values()), root / "several.html")}


class Watched:
    """A page that is opened, and what went wrong on it."""

    def __init__(self, browser: Browser, path: Path) -> None:
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.wrong: list[str] = []
        self.requests: list[Request] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.goto(path.as_uri())

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *failure: object) -> None:
        self.page.close()
        assert self.wrong == []
        assert [request.url.partition(":")[0] for request in self.requests] == ["file"]


@pytest.mark.parametrize("name", ["good", "long", "one", "hostile", "several"])
def test_every_page_is_drawn_at_every_width_in_both_schemes(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    with Watched(browser, pages[name]) as watched:
        page = watched.page
        assert page.locator(".chart").count() >= 6
        assert "owned" not in page.title().replace("'owned'", "")
        for width, scheme in ((1280, "light"), (390, "light"), (390, "dark"), (1280, "dark")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            page.wait_for_function(FITS, arg=width, timeout=10_000)  # charts follow the width a frame later
            drawn = page.locator(".chart canvas").evaluate_all(f"all => all.map({INK})")
            assert min(drawn) > 0
            back = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (int(back[4:].split(",")[0]) < 128) == (scheme == "dark")


def test_pointing_shows_values_and_dragging_zooms(browser: Browser, pages: dict[str, Path]) -> None:
    with Watched(browser, pages["good"]) as watched:
        page = watched.page
        first, second = page.locator(".chart").nth(0), page.locator(".chart").nth(1)
        over = first.locator(".u-over")
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
        tip = first.locator(".tip")
        tip.wait_for(state="visible")
        assert "step 10" in tip.inner_text()  # of 1 to 200, the middle
        assert "training 2." in tip.inner_text()
        assert "validation 2." in tip.inner_text()
        assert "step 10" in second.locator(".tip").inner_text()
        before = page.locator("#charts").bounding_box()
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 50, steps=4)
        page.mouse.up()
        assert page.locator("#reset").is_enabled()
        page.mouse.move(box["x"] + 1, box["y"] + 50)
        assert "step 10" in tip.inner_text()
        page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 50)
        assert "step 150" in tip.inner_text()
        page.locator("#reset").click()
        assert page.locator("#reset").is_disabled()
        assert page.locator("#charts").bounding_box() == before  # nothing has moved


def test_it_is_used_without_a_mouse(browser: Browser, pages: dict[str, Path]) -> None:
    with Watched(browser, pages["several"]) as watched:
        page = watched.page
        plot = page.locator(".plot").first
        assert "training from" in (plot.get_attribute("aria-label") or "")
        plot.focus()
        page.keyboard.press("Home")
        assert "step 1," in page.locator("#said").inner_text()
        page.keyboard.press("End")
        assert "step 5,000" in page.locator("#said").inner_text()
        page.keyboard.press("+")
        assert page.locator("#reset").is_enabled()
        page.keyboard.press("0")
        assert page.locator("#reset").is_disabled()
        toggle = page.locator("#runs button").nth(1)
        toggle.focus()
        page.keyboard.press("Enter")
        assert toggle.get_attribute("aria-pressed") == "false"
        plot.focus()
        page.keyboard.press("End")
        assert "step 200" in page.locator("#said").inner_text()  # the long run is hidden
        assert "long" not in page.locator("#said").inner_text()
        for checkbox in page.locator(".chart input").all():
            checkbox.check()
        page.locator("#axis").select_option("tokens")
        page.keyboard.press("Tab")
        assert min(page.locator(".chart canvas").evaluate_all(f"all => all.map({INK})")) > 0


def test_a_hostile_text_is_shown_as_it_is(browser: Browser, pages: dict[str, Path]) -> None:
    with Watched(browser, pages["hostile"]) as watched:
        page = watched.page
        assert page.locator("h1").inner_text().startswith(recorded.MARKUP)
        assert page.locator("pre").inner_text() == recorded.MARKUP
        assert page.locator("img").count() == 0


def test_values_that_are_not_finite_and_resumes_are_marked(browser: Browser, pages: dict[str, Path]) -> None:
    with Watched(browser, pages["good"]) as watched:
        page = watched.page
        assert "1 not finite" in page.locator(".chart").first.inner_text()
        assert "resumed" in page.locator("#notes").inner_text()
        assert page.locator(".samples pre").all_inner_texts() == ["text at 50", "text at 200"]
