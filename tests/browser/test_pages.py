"""The pages in a real browser, at both widths and in both schemes: what moves, what shows, that nothing overflows."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from job.coordination.sealed import utc_now
from job.runs.records import read_status, run_store
from job.store import open_store
from tests.job.command_line import ddpm_here, succeeded
from tests.job.conftest import cache_folder, made_once, tiles, walked  # noqa: F401 -- fixtures
from tests.job.launching import eventually
from tests.job.report.hostile import CLASSES, fill_hostile, lengthen, multiply

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
OVERFLOWING = """[...document.querySelectorAll('canvas, img, figure')].filter(
    e => e.getBoundingClientRect().right > innerWidth && !e.closest('.scroll')).length"""
UNNAMED = """[...document.querySelectorAll('input, select, button')].filter(
    e => !e.labels?.length && !e.ariaLabel && !e.textContent.trim()).length"""
LINES_OF_OPTIONS = """(() => {
    const lines = [], walker = document.createTreeWalker(document.querySelector('pre'), NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode())
        for (const match of node.data.matchAll(/--\\w+/g)) {
            const range = document.createRange();
            range.setStart(node, match.index);
            range.setEnd(node, match.index + match[0].length);
            lines.push(new Set([...range.getClientRects()].map(rect => rect.top)).size);
        }
    return lines;
})()"""
"""On how many lines each option of the first command stands."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        yield playwright.chromium.launch(executable_path=path, args=list(QUIET))


@pytest.fixture(scope="module")
def bucket(walked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Two runs: `walk`, made long, and `odd`, whose classes are markup; with their pages, and that of the bucket."""
    folder = tmp_path_factory.mktemp("pages") / "bucket"
    fill_hostile(folder)
    shutil.copytree(walked, folder, dirs_exist_ok=True)
    # A bucket of many runs.
    multiply(shutil.copytree(walked, folder / "many"), "walk", 59)
    succeeded(ddpm_here("report", "--bucket", folder / "many"))
    lengthen(folder, "walk", epochs=500, grids=50, rows=8000)
    for words in (("walk",), ("odd",), ()):
        succeeded(ddpm_here("report", *words, "--bucket", folder))
    return folder


@pytest.fixture
def opened(browser: Browser, bucket: Path, request: pytest.FixtureRequest):
    """Opens a file of the bucket; at the end nothing was logged, and nothing asked for but the file."""
    said, pages = list[str](), list[Any]()

    def open_page(name: str = "runs/walk/report.html", width: int = 1400, scheme: str = "light") -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}") or dialog.dismiss())
        page.on("request", lambda asked: asked.url.startswith(("data:", "file:")) or said.append(asked.url))
        # A page that reloads itself does so by a clock that the test turns.
        if "going" in name:
            page.clock.install()
        page.goto((bucket / name).as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        if shots := os.environ.get("SCREENSHOTS"):
            size, scheme = page.viewport_size, page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
            name = f"{request.node.name}-{size['width']}-{'dark' if scheme else 'light'}.png".replace("/", "-")
            page.screenshot(path=Path(shots, name), full_page=True)
        page.close()
    assert said == []


@pytest.mark.parametrize("name", ["runs/walk/report.html", "runs/odd/report.html", "report.html"])
@pytest.mark.parametrize("width", [380, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_or_lacks_a_name(opened, name, width, scheme):
    page = opened(name, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOWING) == page.evaluate(UNNAMED) == page.locator("img:not([alt])").count() == 0
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(e => Number(e.tagName[1]))")
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))
    ink, paper = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    assert (sum(map(int, paper[4:-1].split(","))) < sum(map(int, ink[4:-1].split(",")))) == (scheme == "dark")


def test_options_of_commands_are_not_broken(opened):
    page = opened(width=390)
    assert page.evaluate(LINES_OF_OPTIONS) == [1] * page.locator("pre").all_inner_texts()[0].count("--")
    assert page.evaluate("[...document.querySelectorAll('pre')].every(e => e.clientWidth <= innerWidth)")


def test_mouse_and_keys_move_the_scrubber(opened):
    page = opened()
    grid, moment, scrubber = (page.locator(f"#{name}") for name in ("grid", "moment", "scrubber"))
    assert moment.text_content() == "epoch 500"
    newest = grid.get_attribute("src")
    scrubber.press("Home")
    assert (moment.text_content(), grid.get_attribute("alt")) == ("epoch 1", "Sample grid of epoch 1")
    assert grid.get_attribute("src") != newest
    page.locator("#later").click()
    assert moment.text_content() == scrubber.get_attribute("aria-valuetext") == "epoch 3"
    box = scrubber.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert 200 < int(moment.text_content().split()[1]) < 300
    page.locator("#beside").select_option("0")
    assert page.locator("#other-grid").is_visible() and page.locator("#other-caption").text_content() == "epoch 1"
    # Both are as large as they look: pictures that did not load have no size.
    for name in ("grid", "other-grid"):
        assert page.evaluate(f"document.getElementById('{name}').naturalWidth") > 100


def test_tooltips_and_scales_of_a_chart(opened):
    chart = opened().locator("#chart-loss")
    tooltip, plot, legend, line = (chart.locator(name) for name in (".tooltip", ".u-over", ".legend", ".plot"))
    assert not tooltip.is_visible()
    plot.hover()
    assert tooltip.is_visible()
    said = tooltip.inner_text()
    assert "epoch " in said and "loss 0.0" in said and "quarter" not in said + legend.inner_text()
    assert "loss, each row: not smoothed" in legend.inner_text()
    chart.get_by_label("By quarter of the noise").check()
    plot.hover(position={"x": 99, "y": 9})
    assert "1st quarter of the noise 0.0" in tooltip.inner_text()
    assert "1st quarter of the noise: the timesteps with the least noise" in legend.inner_text()
    box, frame = tooltip.bounding_box(), chart.bounding_box()
    assert frame["x"] <= box["x"] and box["x"] + box["width"] <= frame["x"] + frame["width"]
    line.press("Home")
    first = tooltip.inner_text()
    line.press("ArrowRight")
    assert first != tooltip.inner_text() and "epoch " in first
    before = chart.locator("canvas").screenshot()
    chart.get_by_label("Logarithmic scale").uncheck()
    assert chart.locator("canvas").screenshot() != before


def test_markup_in_a_run_is_text(opened):
    shown = " ".join(opened("runs/odd/report.html").locator("#data ~ p").all_inner_texts())
    assert [name for name in (*CLASSES, "{{7*7}}") if name.replace("/", "∕") not in shown] == []


def check_all(page: Page) -> None:
    for mark in page.locator("#runs .mark input").all():
        mark.check()


def test_runs_are_sorted_and_compared(opened):
    page = opened("report.html")
    names = lambda: page.locator("#runs tbody th").all_inner_texts()  # noqa: E731
    assert names() == ["odd", "walk"]
    for _ in range(2):
        page.locator("#runs th button", has_text="Run").click()
    assert names() == ["walk", "odd"]
    assert page.locator("#runs th[aria-sort=descending]").count() == 1
    # Of two datasets: only that of the newest status is compared until somebody asks for both.
    assert page.locator("#runs .mark input:checked").count() == 1 and not page.locator("#differing").is_visible()
    check_all(page)
    keys = page.locator("#differing tbody th").all_inner_texts()
    assert "data.dataset" in keys and "model.kind" not in keys
    # Their losses share an axis; the first row of `odd` is of 8 images in 24.
    plot, tooltip, canvas = (page.locator(name) for name in ("#losses", "#losses + .tooltip", "#losses canvas"))
    for axis, begin in (("hours", "hours"), ("images", "images seen 24"), ("epochs", "epoch 1")):
        page.locator("#axis").select_option(axis)
        plot.press("Home")
        said = tooltip.inner_text().splitlines()[0]
        assert said == begin or (axis == "hours" and said.startswith(begin))
    before = canvas.screenshot()
    page.locator("#smoothing").press("End")
    assert canvas.screenshot() != before
    page.locator("#runs a", has_text="walk").click()
    assert page.url.endswith("/runs/walk/report.html")


def test_many_runs_share_their_pictures(opened):
    page = opened("many/report.html")
    sizes = page.evaluate("[...document.querySelectorAll('.thumbnail img')].map(image => image.naturalWidth)")
    assert len(sizes) == 60 and min(sizes) > 100
    for _ in range(2):
        page.locator("#runs th button", has_text="Run").click()
    assert page.locator("#runs tbody th").first.inner_text() == "walk-058"
    page.locator("#clear").click()
    assert page.locator("#losses canvas").count() == page.locator("#grids img").count() == 0
    for name in ("walk-058", "walk-007", "walk-030"):
        page.get_by_label(f"Compare {name}").check()
    # In the order of the table when the page was written.
    shown = ["walk-007", "walk-030", "walk-058"]
    assert page.locator("#losses + .tooltip + .legend li").all_inner_texts() == shown
    for number, name in enumerate(shown):
        thumbnail = page.locator(f"#runs img[alt='Newest sample grid of {name}']")
        image = page.locator("#grids img").nth(number)
        assert image.get_attribute("src") == thumbnail.get_attribute("src")
        assert image.evaluate("image => image.naturalWidth") > 100
    assert page.locator("#differing thead th").all_inner_texts() == ["Key", *shown]
    assert page.locator("#differing tbody td").all_inner_texts() == ["8", "31", "59"]


@pytest.mark.parametrize(("name", "width"), [("report.html", 1400), ("runs/walk/report.html", 380)])
def test_pictures_are_enlarged(opened, name, width):
    page = opened(name, width, "dark")
    image, dialog = page.locator("main .picture img").first, page.locator("#enlarged")
    large = dialog.locator("img")
    # A dimmed picture would lie on grey, in colours that no sample has.
    assert image.evaluate("image => getComputedStyle(image).filter") == "none"
    image.click()
    assert large.bounding_box()["width"] > image.bounding_box()["width"]
    assert large.bounding_box()["width"] >= image.evaluate("image => image.naturalWidth")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    page.locator("main .picture").first.press("Enter")
    dialog.locator("button").click()
    assert not dialog.is_visible()


def at_rest(place) -> float | None:
    """Where a part of a page is, unless it moves: a browser scrolls smoothly to a picture, and back after a reload."""
    before = place.bounding_box()["y"]
    time.sleep(0.3)
    return before if place.bounding_box()["y"] == before else None


def test_pages_of_running_runs_reload_themselves(opened, bucket):
    run = shutil.copytree(bucket / "many/runs/walk", bucket / "runs/going")
    samples, path = run / "samples", run / "report.html"

    def write(state: str, epoch: int = 1, minutes_ago: int = 0) -> None:
        shutil.copy(samples / "epoch-0003-ddim-4.png", samples / f"epoch-{epoch:04d}-ddim-4.png")
        status = read_status(run_store(open_store(str(bucket)), "going"))
        status = status.model_copy(update={"state": state, "updated": utc_now()})
        (run / "status.json").write_bytes(status.to_json())
        succeeded(ddpm_here("report", "going", "--bucket", bucket))
        written = datetime.now(UTC) - timedelta(minutes=minutes_ago)
        now = r'(written <time datetime=")[^"]*'
        path.write_text(re.sub(now, rf"\g<1>{written:%Y-%m-%dT%H:%M:%SZ}", path.read_text()))

    # One grid has no slider.
    succeeded(ddpm_here("report", "going", "--bucket", bucket))
    page = opened("runs/going/report.html")
    assert page.locator("#grid").is_visible() and page.locator("#caption").inner_text() == "epoch 3"
    assert page.locator("input[type=range]").count() == 0
    for epoch in (1, 2):
        write("running", epoch)
    page = opened("runs/going/report.html")
    scale, curves = page.locator("#chart-loss").get_by_label("Logarithmic scale"), page.locator("#curves")
    scale.uncheck()
    page.locator("#beside").select_option("0")
    page.locator("#all-keys summary").click()
    write("running", 4)
    # Not while a picture is enlarged.
    page.locator(".picture").first.press("Enter")
    page.clock.run_for(60_000)
    assert page.locator("#moment").text_content() == "epoch 3"
    page.keyboard.press("Escape")
    page.evaluate("scrollTo({top: 700, behavior: 'instant'})")
    top = eventually(lambda: at_rest(curves))
    with page.expect_event("load"):
        page.clock.run_for(20_000)
    assert page.locator("#moment").text_content() == "epoch 4"
    assert not scale.is_checked()
    assert page.locator("#other-caption").text_content() == "epoch 1"
    assert page.locator("#all-keys").get_attribute("open") is not None
    assert eventually(lambda: at_rest(curves)) == pytest.approx(top, abs=2)
    # A run that was killed writes no more.
    write("running", minutes_ago=25 * 60)
    with page.expect_event("load"):
        page.clock.run_for(20_000)
    page.clock.run_for(5_000)
    assert page.locator("#silent").is_visible() and "25 h ago" in page.locator("header").inner_text()
    write("finished")
    page.clock.run_for(4 * 3600_000)
    assert page.locator("#silent").is_visible()
    page.reload()
    page.clock.run_for(4 * 3600_000)
    assert page.locator(".state").inner_text() == "finished"


def test_pages_print_numbers_without_script(browser, bucket):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((bucket / "runs/walk/report.html").as_uri())
    assert page.locator("#grid").is_visible() and "epoch 3.0 of 3" in page.locator("dl").inner_text()
    context.close()
