"""The page of the service as Chromium shows it, with a real server; skipped where there is no Chromium."""

import base64
import contextlib
import dataclasses
import io
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from layouts import FOLDERS, write_image, write_run

pytest.importorskip("fastapi", reason="needs crossx[serve]")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed (crossx[browser])")

import uvicorn
from fastapi import FastAPI
from playwright import sync_api

from crossx.export.export import export_run
from crossx.predict.predictor import Prediction, Predictor
from crossx.serve.app import create_app
from crossx.serve.limits import Limits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MILLISECONDS = 300_000
STAGES = ["previous", "last", "merged", "combined"]
MAPS = [f"{stage} part {part}" for stage in STAGES for part in (1, 2)]
GIVE = """([event, contents]) => {
  const data = new DataTransfer();
  for (const [name, type, base64] of contents) {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    data.items.add(new File([bytes], name, { type }));
  }
  const init = { bubbles: true, cancelable: true };
  document.body.dispatchEvent(event === "paste"
    ? new ClipboardEvent("paste", { clipboardData: data, ...init })
    : new DragEvent("drop", { dataTransfer: data, ...init }));
}"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")
expect = sync_api.expect


@dataclass
class Served:
    app: FastAPI
    url: str


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[Served]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=60))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Served(app, f"http://127.0.0.1:{listening.getsockname()[1]}/")
        server.should_exit = True
        thread.join(600)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[Served]:
    with serving(create_app(Predictor.load(run, device="cpu"), Limits(max_upload_mb=1))) as served:
        yield served


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "bird.png"
    write_image(path, 1, 0, size=(120, 90))
    return path


@pytest.fixture(scope="module")
def expected(run: Path, image: Path) -> Prediction:
    return Predictor.load(run, device="cpu").predict(image, top=5)[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            # as root there is no sandbox
            args=["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page; in the end no script has failed, and nothing was asked of another host."""
    contexts, messages, requests = [], [], []
    expect.set_options(timeout=MILLISECONDS)

    def open_(served: Served, **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(MILLISECONDS)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append((served.url, request.url)))
        page.goto(served.url)
        return page

    yield open_
    for context in contexts:
        context.close()
    # Chromium itself writes of answers that are errors
    assert [message for message in messages if not message.startswith("Failed to load resource")] == []
    assert [asked for base, asked in requests if not asked.startswith((base, "data:"))] == []


def give(page: Any, event: str, *files: Path | tuple[str, str, bytes]) -> None:
    """Paste or drop files."""
    contents = [
        (file.name, "image/png", file.read_bytes()) if isinstance(file, Path) else file for file in files
    ]
    page.evaluate(GIVE, [event, [[n, t, base64.b64encode(data).decode()] for n, t, data in contents]])


def wait_for_result(page: Any) -> None:
    expect(page.locator("#maps")).to_be_visible()
    expect(page.locator("body")).not_to_have_attribute("aria-busy", "true")


def top(page: Any) -> list[tuple[str, str]]:
    rows = page.locator("#top button").all()
    return [(row.locator(".label").inner_text(), row.locator(".number").inner_text()) for row in rows]


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def pixels(page: Any, selector: str) -> np.ndarray:
    """The pixels of a data: picture."""
    source = page.locator(selector).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))))


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
    expect(page.locator("#model")).to_have_text("crossx on test_resnet, trained on folder: 3 classes")
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


def test_names_are_shown_as_text(served: Served, open_page: Callable[..., Any]) -> None:
    page = open_page(served)
    give(page, "drop", ("<img src=x onerror=alert(1)>.png", "image/png", b"x"))
    expect(page.get_by_role("alert")).to_contain_text("<img src=x onerror=alert(1)>.png is not a JPEG")
    assert page.locator("#error img").count() == 0


def answer(page: Any, path: str, *answers: dict[str, Any] | None) -> list[str]:
    """Answer the requests to a path in turn, None being the service's own answer; return the list of them."""
    asked: list[str] = []

    def handle(route: Any) -> None:
        asked.append(route.request.url)
        given = answers[min(len(asked), len(answers)) - 1]
        if given is None:
            route.continue_()
        elif "abort" in given:
            route.abort(given["abort"])
        else:
            route.fulfill(**given)

    page.route(re.compile(rf"/{path}\b"), handle)
    return asked


BUSY = {"status": 429, "headers": {"Retry-After": "20"}, "json": {"detail": "the queue is full."}}


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
