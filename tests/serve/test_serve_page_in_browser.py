"""The page of the service as Chromium shows it, with a real server; skipped where there is no Chromium."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layouts import write_run

pytest.importorskip("fastapi", reason="needs crossx[serve]")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed (crossx[browser])")

from pages import (
    BUSY,
    MAPS,
    Served,
    answer,
    expect,
    give,
    needs_chromium,
    percent,
    pixels,
    serving,
    top,
    wait_for_result,
)

from crossx.export.export import export_run
from crossx.predict.predictor import Prediction, Predictor
from crossx.serve.app import create_app

pytestmark = needs_chromium


def test_an_exported_file_names_pictures_and_offers_no_maps(
    open_page: Callable[..., Any], image: Path, expected: Prediction, run: Path, tmp_path: Path
) -> None:
    file = export_run(run, tmp_path / "x.safetensors", images=image.parent).files[0]
    with serving(create_app(Predictor.load(file))) as served:
        page = open_page(served)
        page.get_by_label("Choose a picture").set_input_files(image)
        expect(page.locator("#result")).to_be_visible()
        expect(page.locator("body")).not_to_have_attribute("aria-busy", "true")
        assert top(page) == [(label, percent(share)) for label, share in expected.top]
        expect(page.locator("#top button").first).to_be_disabled()
        expect(page.locator("#top-hint")).to_be_hidden()
        expect(page.locator("#maps")).to_be_hidden()
        expect(page.locator("#error")).to_be_empty()
        # the picture itself is shown
        assert page.evaluate("document.querySelector('#seen').naturalWidth") == 120
        expect(page.locator("#caption")).to_have_text("bird.png")


def test_a_chosen_picture_is_named_as_the_predictor_does(
    served: Served, open_page: Callable[..., Any], image: Path, expected: Prediction, run: Path
) -> None:
    page = open_page(served)
    expect(page.locator("#model")).to_have_text("crossx on test_resnet: 3 classes")
    expect(page.locator("#bounds")).to_have_text("Up to 1 MB and 50 megapixels.")
    page.get_by_label("Choose a picture").set_input_files(image)
    wait_for_result(page)
    assert expected.probability is not None
    expect(page.locator("#named")).to_have_text(f"{expected.label} {percent(expected.probability)}")
    assert top(page) == [(label, percent(share)) for label, share in expected.top]
    expect(page.locator("#status")).to_be_empty()
    (explained,) = Predictor.load(run, device="cpu").iter_explain(image)
    assert np.array_equal(pixels(page, "#seen"), explained.pixels)
    assert page.locator("#seen").get_attribute("alt") == "bird.png as the network saw it"


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_pictures_are_pasted_and_dropped(
    served: Served, open_page: Callable[..., Any], image: Path, expected: Prediction, event: str
) -> None:
    page = open_page(served)
    give(page, event, image, image)
    wait_for_result(page)
    assert [label for label, _ in top(page)] == [label for label, _ in expected.top]
    expect(page.locator("#status")).to_have_text("This is the first of 2 pictures; the others were ignored.")
    give(page, "drop")
    expect(page.locator("#error")).to_contain_text("That is not a file.")


def test_a_photo_is_taken_with_the_camera(served: Served, open_page: Callable[..., Any]) -> None:
    page = open_page(served, permissions=["camera"])
    page.get_by_role("button", name="Take a photo").click()
    page.get_by_role("dialog", name="Take a photo").get_by_role("button", name="Take it").click()
    wait_for_result(page)
    expect(page.locator("#seen")).to_have_attribute("alt", "photo.jpg as the network saw it")
    assert page.evaluate("document.querySelector('video').srcObject === null")


def test_a_phone_takes_the_photo_itself(served: Served, open_page: Callable[..., Any], image: Path) -> None:
    page = open_page(served, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page.on("filechooser", lambda _: None)
    expect(page.locator("#model")).not_to_be_empty()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Take a photo").tap()
    assert chooser.value.element.get_attribute("capture") == "environment"
    chooser.value.set_files(image)
    wait_for_result(page)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("NotAllowedError", "The browser does not allow access to the camera."),
        ("NotFoundError", "No camera is available."),
    ],
)
def test_no_camera_is_told(served: Served, open_page: Callable[..., Any], error: str, message: str) -> None:
    page = open_page(served)
    page.evaluate(
        "name => { navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', name); } }",
        error,
    )
    page.get_by_role("button", name="Take a photo").click()
    expect(page.get_by_role("alert")).to_have_text(message)
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_a_file_that_cannot_be_read_is_told(
    served: Served, open_page: Callable[..., Any], image: Path
) -> None:
    page = open_page(served)
    page.evaluate(
        "() => { Blob.prototype.arrayBuffer = () => Promise.reject(new DOMException('', 'NotReadableError')); }"
    )
    page.locator("#file").set_input_files(image)
    expect(page.get_by_role("alert")).to_have_text(
        "bird.png cannot be read. Is it a folder, or was it moved?"
    )


def test_maps_are_switched(served: Served, open_page: Callable[..., Any], image: Path) -> None:
    page = open_page(served)
    page.locator("#file").set_input_files(image)
    wait_for_result(page)
    radios = page.get_by_role("radio")
    assert [radio.get_attribute("aria-label") for radio in radios.all()] == ["picture, no map", *MAPS]
    opacity = "getComputedStyle(document.querySelector('#overlay')).opacity"
    expect(page.get_by_role("radio", name="picture, no map")).to_be_checked()
    expect(page.locator("#overlay")).to_be_hidden()
    expect(page.get_by_label("Strength of the map")).to_be_disabled()
    sources = set()
    for name in MAPS:
        page.get_by_role("radio", name=name).check(force=True)
        expect(page.locator("#caption")).to_have_text(name)
        assert pixels(page, "#overlay").shape == (64, 64, 4)
        sources.add(page.locator("#overlay").get_attribute("src"))
    assert len(sources) > 1
    assert page.evaluate(opacity) == "0.5"
    expect(page.locator("#share")).to_have_text("50%")
    page.get_by_label("Strength of the map").fill("40")
    assert page.evaluate(opacity) == "0.4"
    expect(page.locator("#share")).to_have_text("40%")
    assert page.evaluate("getComputedStyle(document.querySelector('#seen')).filter") == "grayscale(1)"
    expect(page.locator("#regions")).to_be_hidden()
    expect(page.locator("#outlining")).to_be_hidden()
    page.get_by_role("radio", name="picture, no map").check(force=True)
    expect(page.locator("#overlay")).to_be_hidden()
    assert page.evaluate("getComputedStyle(document.querySelector('#seen')).filter") == "none"


def test_regions_are_framed(open_page: Callable[..., Any], image: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, method="nts")
    predictor = Predictor.load(run, device="cpu")
    (explained,) = predictor.iter_explain([image])
    boxes = np.clip(explained.explanation.boxes, 0, 64)
    with serving(create_app(predictor)) as served:
        page = open_page(served)
        page.locator("#file").set_input_files(image)
        wait_for_result(page)
        frames = page.get_by_role("img", name=f"{len(boxes)} regions that the network examines again")
        expect(frames).to_be_visible()
        lines, numbers = (
            page.locator("#regions .line").all(),
            page.locator("#regions text").all_text_contents(),
        )
        # the first is drawn last, on top
        assert numbers == [str(number) for number in range(len(boxes), 0, -1)]
        for line, (left, top_, right, bottom) in zip(reversed(lines), boxes, strict=True):
            found = [float(line.get_attribute(name) or "") for name in ("x", "y", "width", "height")]
            assert found == pytest.approx([left, top_, right - left, bottom - top_], abs=0.01)
        page.get_by_label("Regions that the network examines again", exact=True).uncheck()
        expect(frames).to_be_hidden()


def test_a_class_shows_what_speaks_for_it(
    served: Served, open_page: Callable[..., Any], image: Path, expected: Prediction
) -> None:
    page = open_page(served)
    page.locator("#file").set_input_files(image)
    wait_for_result(page)
    second, third = (expected.top[rank][0] for rank in (1, 2))
    page.get_by_role("button", name=second).click()
    expect(page.locator("#maps-name")).to_have_text(f"Evidence for {second}")
    expect(page.get_by_role("button", name=second)).to_have_attribute("aria-pressed", "true")
    page.get_by_role("radio", name="CAM last part 2").check(force=True)
    of_second = page.locator("#overlay").get_attribute("src")
    page.get_by_role("button", name=third).click()
    expect(page.locator("#maps-name")).to_have_text(f"Evidence for {third}")
    expect(page.get_by_role("radio", name="CAM last part 2")).to_be_checked()
    assert page.locator("#overlay").get_attribute("src") != of_second
    assert page.locator("#top [aria-pressed=true]").count() == 1
    page.get_by_role("button", name="Back to the maps of the parts").click()
    expect(page.locator("#maps-name")).to_have_text("Where the network looks")
    expect(page.get_by_role("radio", name="combined part 1")).to_be_focused()
    assert page.locator("#top [aria-pressed=true]").count() == 0


def test_the_keyboard_is_enough(
    served: Served, open_page: Callable[..., Any], image: Path, expected: Prediction
) -> None:
    page = open_page(served)
    page.on("filechooser", lambda _: None)  # from here on no dialog of the system opens
    expect(page.locator("#model")).not_to_be_empty()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Choose a picture")).to_be_focused()
    outline = "getComputedStyle(document.querySelector('[for=file]')).outlineStyle"
    assert page.evaluate(outline) == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(image)
    wait_for_result(page)
    expect(page.locator("#named")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name=expected.top[0][0])).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#maps-name")).to_have_text(f"Evidence for {expected.label}")
    for _ in range(3):
        page.keyboard.press("Tab")
    expect(page.locator("#back")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("radio", name="combined part 1")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#caption")).to_have_text("combined part 2")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#caption")).to_have_text("as the network saw it")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    assert page.get_by_label("Strength of the map").input_value() == "45"


def test_the_picture_is_shown_before_the_answer(
    served: Served, open_page: Callable[..., Any], image: Path
) -> None:
    page = open_page(served)
    page.clock.install()
    answer(page, "predict", BUSY, None)
    page.locator("#file").set_input_files(image)
    expect(page.locator("#seen")).to_have_attribute("alt", "bird.png")
    expect(page.locator("#seen")).to_be_visible()
    for selector in ("#answer", "#named", "#maps"):
        expect(page.locator(selector)).to_be_hidden()
    page.clock.fast_forward(20_000)
    wait_for_result(page)
    expect(page.locator("#answer")).to_be_visible()


def test_classes_have_names_that_people_read(
    open_page: Callable[..., Any], image: Path, tmp_path: Path
) -> None:
    predictor = Predictor.load(write_run(tmp_path), device="cpu")
    classes = ("001.Black_footed_Albatross", "002.Blue_Jay", "003.Blue Jay")
    predictor.spec = dataclasses.replace(predictor.spec, classes=classes)
    with serving(create_app(predictor)) as served:
        page = open_page(served)
        page.locator("#file").set_input_files(image)
        wait_for_result(page)
        # those that would read alike are left as they are
        assert {name for name, _ in top(page)} == {"Black footed Albatross", *classes[1:]}
        page.get_by_role("button", name="Black footed Albatross").click()
        expect(page.locator("#maps-name")).to_have_text("Evidence for Black footed Albatross")
        expect(page.get_by_role("radio", name="CAM last part 1")).not_to_be_checked()
        assert page.get_by_role("radio", checked=True).get_attribute("aria-label") != "picture, no map"
        near = {"label": classes[0], "similarity": 0.5, "path": "a.jpg", "webp": None}
        ranked = [{"label": classes[0], "probability": 0.9}]
        prediction = {"label": classes[0], "probability": 0.9, "top": ranked, "neighbors": [near]}
        answer(page, "predict", {"json": {"predictions": [prediction]}})
        page.locator("#file").set_input_files(image)
        expect(page.locator("#similar-images")).to_have_text("Black footed Albatross0.50")
        wait_for_result(page)
        hint, heading = page.evaluate(
            "['#top-hint', '#similar h3'].map((one) => document.querySelector(one).getBoundingClientRect().toJSON())"
        )
        assert heading["top"] - hint["bottom"] >= 8


def test_names_are_shown_as_text(served: Served, open_page: Callable[..., Any]) -> None:
    page = open_page(served)
    give(page, "drop", ("<img src=x onerror=alert(1)>.png", "image/png", b"x"))
    expect(page.get_by_role("alert")).to_contain_text("<img src=x onerror=alert(1)>.png is not a JPEG")
    assert page.locator("#error img").count() == 0
