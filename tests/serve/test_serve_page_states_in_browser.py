"""The page of the service in Chromium where something goes wrong, on phones, and for screen readers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layouts import FOLDERS

pytest.importorskip("fastapi", reason="needs crossx[serve]")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed (crossx[browser])")

from pages import (
    BUSY,
    MILLISECONDS,
    Served,
    answer,
    expect,
    give,
    needs_chromium,
    serving,
    wait_for_result,
)

from crossx.predict.predictor import Prediction, Predictor
from crossx.serve.app import create_app

pytestmark = needs_chromium


def test_what_is_no_image_is_told_and_the_page_goes_on(
    served: Served, open_page: Callable[..., Any], image: Path
) -> None:
    page = open_page(served)
    page.locator("#file").set_input_files(image)
    wait_for_result(page)
    for content, message in (
        (b"no image", "notes.png is not a JPEG, PNG, WebP"),
        (b"", "notes.png is empty (0 bytes)."),
        (bytes(1_234_567), "notes.png has 1.2 MB; the limit is 1 MB."),
    ):
        give(page, "drop", ("notes.png", "image/png", content))
        expect(page.get_by_role("alert")).to_contain_text(message)
        expect(page.locator("#result")).to_be_hidden()
        expect(page.locator("#status")).to_be_empty()
    page.locator("#file").set_input_files(image)
    wait_for_result(page)
    expect(page.get_by_role("alert")).to_be_empty()


def test_a_full_queue_is_asked_once_more(served: Served, open_page: Callable[..., Any], image: Path) -> None:
    page = open_page(served)
    page.clock.install()
    asked = answer(page, "predict", BUSY, None)
    page.locator("#file").set_input_files(image)
    expect(page.get_by_role("status")).to_have_text("The service is busy: trying again in 20 s …")
    page.clock.fast_forward(20_000)
    wait_for_result(page)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("given", "message", "requests"),
    [
        ({**BUSY, "headers": {"Retry-After": "0"}}, "The service is busy. Try again in a moment.", 2),
        ({**BUSY, "headers": {"Retry-After": "600"}}, "The service is busy. Try again in a moment.", 1),
        ({"status": 413, "body": "<html>"}, "The picture is too large for the service.", 1),
        ({"status": 503, "json": {"detail": "the service is stopping."}}, "The service is stopping.", 1),
        ({"status": 504, "json": {"detail": "the response took longer than 30 s."}},
         "The response took longer than 30 s.", 1),
        ({"status": 502, "body": "<html>"}, "The service's response cannot be read (status 502).", 1),
        ({"abort": "connectionrefused"}, "The service cannot be reached.", 1),
    ],
)  # fmt: skip
def test_a_service_that_does_not_answer(
    served: Served,
    open_page: Callable[..., Any],
    image: Path,
    given: dict[str, Any],
    message: str,
    requests: int,
) -> None:
    page = open_page(served)
    asked = answer(page, "predict", given)
    page.locator("#file").set_input_files(image)
    expect(page.get_by_role("alert")).to_contain_text(message)
    assert len(asked) == requests
    page.unroute_all()
    page.locator("#file").set_input_files(image)
    wait_for_result(page)


def test_names_stand_where_there_are_no_maps(
    served: Served, open_page: Callable[..., Any], image: Path, expected: Prediction
) -> None:
    page = open_page(served)
    answer(page, "explain", {"status": 422, "json": {"detail": "there are no class maps."}}, None)
    page.locator("#file").set_input_files(image)
    expect(page.get_by_role("alert")).to_have_text("There are no class maps.")
    expect(page.locator("#named")).to_contain_text(str(expected.label))
    page.get_by_role("button", name=expected.top[0][0]).click()
    wait_for_result(page)
    expect(page.get_by_role("alert")).to_be_empty()


def test_the_last_picture_wins(served: Served, open_page: Callable[..., Any], image: Path) -> None:
    page = open_page(served)
    page.clock.install()
    asked = answer(page, "predict", BUSY, None)
    page.locator("#file").set_input_files(image)
    expect(page.get_by_role("status")).to_contain_text("trying again in 20 s")
    give(page, "paste", ("other.png", "image/png", image.read_bytes()))
    wait_for_result(page)
    page.clock.fast_forward(60_000)
    expect(page.locator("#seen")).to_have_attribute("alt", "other.png as the network saw it")
    assert len(asked) == 2


def test_a_key_is_asked_for_and_kept_in_the_tab(
    run: Path, open_page: Callable[..., Any], image: Path, expected: Prediction
) -> None:
    with serving(create_app(Predictor.load(run, device="cpu"), api_keys=["open sesame"])) as locked:
        page = open_page(locked)
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        expect(page.get_by_role("alert")).to_be_empty()
        page.locator("#file").set_input_files(image)
        expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("This API key is not valid.")
        field.fill(" open sesame ")
        page.get_by_role("button", name="Use this key").click()
        wait_for_result(page)  # of the picture given before
        expect(page.locator("#named")).to_contain_text(str(expected.label))
        expect(field).to_be_hidden()
        assert field.input_value() == ""
        page.reload()
        expect(page.locator("#model")).to_contain_text("3 classes")
        assert page.evaluate("localStorage.length") == 0
        assert page.context.cookies() == []


@pytest.mark.parametrize("width", [320, 390])
def test_the_page_is_never_wider_than_a_phone(
    served: Served, open_page: Callable[..., Any], image: Path, width: int
) -> None:
    page = open_page(served, viewport={"width": width, "height": 700}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#file").set_input_files(image)
    wait_for_result(page)
    page.get_by_role("button", name=FOLDERS[0]).tap()
    expect(page.locator("#back")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for target in page.locator("button:visible, #choices label").all():
        box = target.bounding_box()
        assert min(box["width"], box["height"]) >= 40


@pytest.mark.parametrize(("mode", "width"), [("light", 1280), ("dark", 390)])
def test_axe_finds_nothing_in_any_state(
    served: Served, open_page: Callable[..., Any], image: Path, mode: str, width: int
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    options = {"color_scheme": mode, "viewport": {"width": width, "height": 800}, "bypass_csp": True}
    page = open_page(served, **options, permissions=["camera"])

    def violations() -> list[Any]:
        return list(axe.run(page).response["violations"])

    expect(page.locator("#model")).not_to_be_empty()
    page.evaluate("document.querySelector('#key-form').hidden = false")
    assert violations() == []
    give(page, "drop", ("notes.png", "image/png", b"no image"))
    expect(page.get_by_role("alert")).not_to_be_empty()
    assert violations() == []
    page.locator("#file").set_input_files(image)
    wait_for_result(page)
    page.get_by_role("button", name=FOLDERS[0]).click()
    expect(page.locator("#back")).to_be_visible()
    page.locator("summary").click()
    assert violations() == []
    page.get_by_role("button", name="Take a photo").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert violations() == []


def test_motion_is_only_where_it_is_welcome(
    served: Served, open_page: Callable[..., Any], image: Path
) -> None:
    animation = "getComputedStyle(document.querySelector('#status'), '::before').animationName"
    for preference, name in (("reduce", "none"), ("no-preference", "turn")):
        page = open_page(served, reduced_motion=preference)
        answer(page, "predict", BUSY)
        page.locator("#file").set_input_files(image)
        expect(page.get_by_role("status")).to_contain_text("busy")
        assert page.evaluate(animation) == name


def test_the_documentation_works_under_its_policy(served: Served, browser: Any) -> None:
    page = browser.new_page()
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
    page.goto(f"{served.url}docs", timeout=MILLISECONDS)
    expect(page.get_by_text("/predict").first).to_be_visible(timeout=MILLISECONDS)
    assert told == []
    page.close()
