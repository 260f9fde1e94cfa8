"""The page as Chromium shows it; skipped where there is none."""

import shutil
from pathlib import Path

import pytest

from answers import make_page, make_parts

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (crossx[browser])")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # as root there is no sandbox
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(make_page(parts=make_parts()), encoding="utf-8")
    return path.as_uri()


def new_page(browser, **options):
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(300_000)
    return page


def open_page(browser, address, **options):
    page = new_page(browser, **options)
    page.goto(address)
    return page


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_the_page_is_never_wider_than_the_screen(browser, address, width):
    page = open_page(browser, address, viewport={"width": width, "height": 700})
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_picture_is_decoded_and_nothing_else_is_loaded(browser, address):
    page = new_page(browser)
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.goto(address)
    page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    page.wait_for_function("[...document.images].every(i => i.complete)")
    assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert messages == []


def test_colours_follow_the_mode(browser, address):
    def background(mode):
        page = open_page(browser, address, color_scheme=mode)
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    assert background("light") == "rgb(255, 255, 255)"
    assert sum(map(int, background("dark")[4:-1].split(", "))) < 100


def test_the_keyboard_reaches_links_tables_and_details(browser, address):
    page = open_page(browser, address)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    reached = []
    for _ in range(50):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.className || document.activeElement.localName"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or reached[-1] == "body"
    assert reached[0] == "skip"
    assert {"a", "summary", "scroll", "pre"} <= set(reached)


@pytest.mark.parametrize(("mode", "width"), [("light", 1280), ("dark", 390)])
def test_axe_finds_nothing(browser, tmp_path, mode, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    path = tmp_path / "report.html"
    path.write_text(make_page(num_classes=6, parts=make_parts()), encoding="utf-8")
    options = {"color_scheme": mode, "viewport": {"width": width, "height": 800}, "bypass_csp": True}
    page = open_page(browser, path.as_uri(), **options)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert axe.Axe().run(page).response["violations"] == []
