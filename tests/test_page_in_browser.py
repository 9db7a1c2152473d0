"""The first page in a browser, as its readers have it: a headless Chromium."""

import shutil

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from ensdistill.page import first_page
from tests.pages import SYSTEMS, TITLES, claims, findings, make_folder, results, study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (on Debian: apt-get install chromium)"
)
LONG = "W" * 90


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a page whose labels cannot be broken."""
    long = {"KD+ConfODS": LONG}
    tables = {"results": results(), "findings": findings(), "claims": claims()}
    folder = make_folder(
        tmp_path_factory.mktemp("study"), **{name: it.replace(long) for name, it in tables.items()}
    )
    html = first_page(folder, "tiny", study(), TITLES, folder / "report")
    (folder / "index.html").write_text(html, encoding="utf-8")
    return (folder / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Its sandbox needs what containers and root do not have.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, address):
    """Opens the page; asks afterwards that nothing was said on the console or asked of others."""
    contexts, said, asked = [], [], []

    def opener(scheme="light", width=1440, height=900, **options):
        viewport = {"width": width, "height": height}
        context = browser.new_context(color_scheme=scheme, viewport=viewport, **options)
        context.set_default_timeout(5000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        return page

    yield opener
    for context in contexts:
        context.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} <= {address}


def order(page):
    return page.locator("#table tbody th").all_text_contents()


def expected(key, ascending):
    """Systems by the numbers of the table, those without a number last."""
    frame = results().replace({"KD+ConfODS": LONG})
    known = frame.dropna(subset=key)
    values, names = known[key].tolist(), known["system"].tolist()
    ranked = [name for _, name in sorted(zip(values, names, strict=True), reverse=not ascending)]
    return ranked + frame["system"][frame[key].isna()].tolist()


@pytest.mark.parametrize(("key", "ascending"), [("nll", True), ("acc", False), ("diversity", True)])
def test_a_press_sorts_better_first_then_worse_first_then_as_it_was(opened, key, ascending):
    page = opened()
    given = order(page)
    assert given == [*SYSTEMS[:-1], LONG]
    button = page.locator(f"button[data-key={key}]")
    head = page.locator("#table thead th", has=button)
    for turn in (ascending, not ascending):
        button.click()
        assert order(page) == expected(key, turn)
        assert head.get_attribute("aria-sort") == ("ascending" if turn else "descending")
        assert page.locator("#table [aria-sort]").count() == 1
    button.click()
    assert order(page) == given
    assert page.locator("#table [aria-sort]").count() == 0


def test_numbers_sort_as_numbers(opened):
    """As texts 12 million would stand before 2 million."""
    page = opened()
    page.locator("button[data-key=macs]").click()
    values = page.locator("#table tbody tr").evaluate_all(
        "rows => rows.map((row) => Number(row.cells[4].dataset.value))"
    )
    assert values == sorted(results()["macs"].tolist())


def test_sorting_and_verdicts_by_keyboard(opened):
    page = opened()
    page.keyboard.press("Tab")
    skip = page.locator(":focus")
    assert skip.text_content() == "Skip to the answer"
    assert skip.bounding_box()["y"] >= 0
    for key, press in (("nll", "Enter"), ("bs", "Space")):
        page.locator(f"button[data-key={key}]").focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Shift+Tab")
        outline = page.locator(":focus").evaluate("it => getComputedStyle(it).outlineStyle")
        assert outline == "solid"
        page.keyboard.press(press)
        assert order(page) == expected(key, True)
    summary = page.locator("#verdicts summary").first
    row = page.locator("#verdicts details tbody tr").first
    assert not row.is_visible()
    summary.focus()
    page.keyboard.press("Enter")
    assert row.is_visible()


CONTRASTS = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((it) => it / 255)
    .map((it) => it <= 0.04045 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4)
    .reduce((sum, it, place) => sum + it * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (element) => {
    for (let it = element; it; it = it.parentElement) {
      const [r, g, b, a = 1] = channels(getComputedStyle(it).backgroundColor);
      if (a === 1) return [r, g, b];
      if (a !== 0) throw new Error("half transparent");
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    const pair = [light(channels(getComputedStyle(element).color)), light(behind(element))];
    pair.sort((a, b) => b - a);
    found.push([(pair[0] + 0.05) / (pair[1] + 0.05), element.outerHTML.slice(0, 80)]);
  }
  return found;
}"""


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_both_themes(opened, scheme):
    page = opened(scheme)
    page.evaluate("document.querySelectorAll('details').forEach((it) => { it.open = true })")
    page.locator("#all-metrics").check()
    seen = set()
    for _ in range(2):
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 150
        assert min(contrasts)[0] >= 4.5, min(contrasts)
        seen.add(background(page))
        page.locator("#theme").click()
    assert len(seen) == 2


def test_the_theme_is_the_system_s_until_it_is_chosen_and_then_remembered(opened):
    light, page = background(opened("light")), opened("dark")
    dark = background(page)
    assert np.mean([int(it) for it in dark[4:-1].split(",")]) < 60
    assert dark != light
    button = page.locator("#theme")
    assert (button.text_content(), button.get_attribute("aria-label")) == (
        "Light",
        "Change to the light theme",
    )
    button.click()
    assert background(page) == light
    assert button.text_content() == "Dark"
    page.reload()
    assert background(page) == light
    button.click()
    page.reload()
    assert background(page) == dark


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_the_page_never_scrolls_sideways(opened, width):
    page = opened(width=width, height=700)
    page.evaluate("document.querySelectorAll('details').forEach((it) => { it.open = true })")
    page.locator("#all-metrics").check()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # But its tables do, and the first column stays where it is.
    box = page.locator(".scroll", has=page.locator("#table"))
    assert box.evaluate("it => it.scrollWidth > it.clientWidth")
    first, second = (page.locator(f"#table tbody tr:first-child > :nth-child({i})") for i in (1, 2))
    before = [it.first.bounding_box()["x"] for it in (first, second)]
    box.evaluate("it => { it.scrollLeft = 200 }")
    after = [it.first.bounding_box()["x"] for it in (first, second)]
    assert after[0] == before[0]
    assert after[1] == pytest.approx(before[1] - 200, abs=1)
    # The name leaves room for numbers.
    assert first.first.bounding_box()["width"] < 0.6 * width


def test_all_metrics_are_shown_when_asked_for(opened):
    page = opened()
    extra = page.locator("#table .extra").first
    assert not extra.is_visible()
    page.get_by_label("all metrics").check()
    assert extra.is_visible()


def test_without_scripts_everything_is_there(opened):
    page = opened("dark", java_script_enabled=False)
    assert not page.locator("#theme").is_visible()
    assert not page.locator(".sorting").is_visible()
    assert page.locator("#table tbody tr").count() == len(SYSTEMS)
    assert page.locator("#figures img").first.is_visible()
    page.get_by_label("all metrics").check()
    assert page.locator("#table .extra").first.is_visible()


def test_every_figure_is_shown(opened):
    page = opened()
    images = page.locator("img").evaluate_all(
        "all => all.map((it) => [it.complete, it.naturalWidth, it.naturalHeight])"
    )
    assert images == [[True, 30, 20]] * len(TITLES)


def test_on_paper_everything_is_open_and_dark_on_white(opened):
    page = opened("dark", width=800)
    page.emulate_media(media="print", color_scheme="dark")
    assert background(page) == "rgb(255, 255, 255)"
    assert min(page.evaluate(CONTRASTS))[0] >= 4.5
    for row in page.locator("#verdicts details tbody tr").all():
        assert row.is_visible()
        assert row.bounding_box()["height"] > 10
    for hidden in ("nav", "#theme", ".skip", "#all-metrics"):
        assert not page.locator(hidden).is_visible()
    page.locator("html").evaluate("it => { it.dataset.theme = 'dark' }")
    assert background(page) == "rgb(255, 255, 255)"
    assert page.pdf().startswith(b"%PDF")
