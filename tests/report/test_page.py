import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from answers import MARKUP, make_page, make_parts, make_pictures, make_tested
from crossx.report.examples import choose_examples, data_uri, tile_side
from crossx.report.page import render

VOID = {"meta", "link", "img", "wbr"}
SECTIONS = [
    "Training",
    "Accuracy",
    "Calibration",
    "Worst and best classes",
    "Confusion",
    "Most confused pairs",
    "Most confident mistakes",
    "Correct predictions",
    "Configuration",
    "Provenance",
]


class Page(HTMLParser):
    """What the page consists of; elements must be nested properly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.broken = False
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.broken = tag == "wbr"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.broken:
            tag, before = self.texts.pop()
            self.texts.append((tag, before + data))
            self.broken = False
        elif data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, *tags):
        return " ".join(" ".join(data.split()) for tag, data in self.texts if not tags or tag in tags)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(make_page())


def test_every_section_is_there_and_linked(page):
    headings = page.text("h2")
    assert all(section in headings for section in SECTIONS)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for attributes in page.of("a")]
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert len(links) == len(SECTIONS) + 1


def test_a_method_titles_its_own_curves():
    spec = make_tested().spec
    assert "C3S term" in Page(make_page(spec=spec)).text("h3")
    unknown = Page(make_page(spec=replace(spec, method="not_installed_here"))).text("h3")
    assert "C3S term" not in unknown
    assert "Classification term c3s" in unknown


def test_nothing_is_loaded(page):
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert not page.of("script")
    text = make_page()
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = (a["content"] for a in page.of("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_names_are_text(page):
    assert MARKUP in page.text("th", "span", "title")
    assert "</pre><script>" in page.text("pre")
    assert any(MARKUP in attributes.get("alt", "") for attributes in page.of("img"))


def test_names_from_the_results_are_text():
    results = make_tested().results
    text = make_page(
        notices=(MARKUP,),
        results={**results, "dataset": MARKUP, "heads": {MARKUP: 0.5, "b": 0.4}, "skipped": [MARKUP]},
        parts={**make_parts(stages=(MARKUP,)), "weights": MARKUP},
        history=[{"epoch": 1, f"train/{MARKUP}": 0.5}],
    )
    assert not Page(text).of("script")


def test_every_picture_has_a_text_and_every_table_headers(page):
    assert all(attributes["alt"] for attributes in page.of("img"))
    drawings = [attributes for attributes in page.of("svg") if "aria-hidden" not in attributes]
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in drawings)
    assert len(page.of("caption")) == len(page.of("table"))
    assert {attributes.get("scope") for attributes in page.of("th")} == {"col", "row"}


def test_numbers_are_the_results(page):
    results = make_tested().results
    assert f"{results['top1']:.2%} 40.00% to 90.00%" in page.text("dd", "span")
    assert "61.00% 52.00% 63.00% 87.00%" in page.text("span")
    assert "epoch 7, value 0.86" in page.text("dd")
    assert "0123abcd, with uncommitted changes" in page.text("dd")
    assert "/data/bad.jpg: is empty (0 bytes)" in page.text("li")


def test_one_of_a_kind_is_named_in_the_singular():
    tested = make_tested(num_classes=6, images_per_class=1, history=make_tested().history[:1])
    tested.logits[np.arange(6), (tested.targets + 1) % 6] = 50
    text = Page(render(tested, choose_examples(tested), {})).text()
    assert "1 epoch; the weights" in text
    assert "1 image could not be read and was skipped" in text
    assert "1 of 1 image; in the other direction" in text
    assert not re.search(r"\b(?<![,.])1 (\w+ )?(images|epochs|classes)\b", text)


def test_each_example_shows_every_part(page):
    tested = make_tested()
    choice = choose_examples(tested)
    shown = len(choice.wrong) + len(choice.right) + 2 * len(choice.pairs)
    assert len(page.of("article")) == shown
    assert len(page.of("img")) == shown * (1 + 3 * 2)
    number = choice.wrong[0]
    probability = np.exp(tested.logits[number]).max() / np.exp(tested.logits[number]).sum()
    assert f"{probability:.1%}" in page.text("span")


def test_pictures_are_what_was_given():
    tested = make_tested()
    choice, pictures = choose_examples(tested), make_pictures(tested)
    (uri, *_) = re.findall(r'src="data:image/webp;base64,([^"]+)"', render(tested, choice, pictures))
    with Image.open(io.BytesIO(base64.b64decode(uri))) as image:
        shown = np.asarray(image.convert("RGB")).astype(float)
    given = pictures[choice.pairs[0][1]].image
    assert shown.shape == given.shape
    assert np.abs(shown - given).mean() < 12


@pytest.mark.parametrize("count", [1, 60, 28 * 7, 28 * 25])
def test_pictures_stay_small_whatever_they_show(count):
    side = tile_side(count)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    assert count * len(data_uri(noise, side)) < 4.7e6


def test_the_rest_of_the_page_stays_small():
    tested = make_tested(num_classes=1000, images_per_class=2)
    assert len(render(tested, choose_examples(tested), {})) < 0.4e6


def test_the_same_run_gives_the_same_page():
    assert make_page() == make_page()


@pytest.mark.slow
def test_part_measures_have_a_section_of_their_own(page):
    assert "Parts" not in page.text("h2")
    with_parts = Page(make_page(parts=make_parts()))
    assert "Parts" in with_parts.text("h2")
    assert "merged · 2" in with_parts.text("th")
    assert "does not know" in Page(make_page(parts={"form": "another"})).text("p")


def test_a_page_without_pictures_history_and_configuration():
    tested = make_tested(num_classes=4, history=[], config="", info={})
    page = Page(render(tested, choose_examples(tested), {}, ["The page has no pictures: gone."]))
    assert "The page has no pictures: gone." in page.text("p")
    assert "no training history" in page.text("p")
    assert not page.of("img")
    assert "All classes, worst first" in page.text("caption")


@pytest.mark.parametrize("classes", [5, 6])
def test_top_5_is_shown_where_it_can_be_wrong(classes):
    tested = make_tested(num_classes=classes)
    page = Page(render(tested, choose_examples(tested), {}))
    assert ("top-5" in page.text("dt", "th")) == (classes > 5)


@pytest.mark.parametrize("shift", [0, 1])
def test_all_right_and_all_wrong(shift):
    tested = make_tested(num_classes=6)
    tested.logits[np.arange(len(tested.targets)), (tested.targets + shift) % 6] = 50
    text = Page(render(tested, choose_examples(tested), {})).text("p")
    assert ("No prediction is wrong." in text) == (shift == 0)
    assert ("No prediction is correct." in text) == (shift == 1)


def test_what_the_reader_must_know_is_said():
    results = {**make_tested().results, "run_status": "stopped", "seen_in_training": True}
    text = Page(make_page(results=results)).text("p")
    assert "The run is not finished (stopped)" in text
    assert "These images were trained on" in text


def test_the_start_and_the_lengths_of_a_run_are_part_of_its_origin():
    init = {"run": "/runs/a", "weights": "model.safetensors", "sha256": "0" * 64, "method": "plain"}
    init |= {"num_classes": 7, "dataset": "cub"}
    text = Page(make_page(info={**make_tested().info, "init": init, "extended_after": [5, 20]})).text()
    # names may be broken after slashes and hyphens
    text = text.replace(" ", "")
    assert "/runs/a(plain,7classesofcub),model.safetensors,SHA-2560000" in text
    assert "trainedforlongerafterepochs5,20" in text


def test_the_page_shows_the_calibrated_probabilities_and_the_error_without():
    raw = make_tested()
    calibration = {"n": 240, "split": "val"}
    more = {"temperature": 0.5, "ece_calibrated": 0.0123, "calibration": calibration}
    tested = replace(raw, results={**raw.results, **more})
    np.testing.assert_allclose(tested.probabilities, softmax(2 * raw.logits, axis=1), atol=1e-6)
    text = render(tested, choose_examples(tested), {})
    assert "<dt>calibration error</dt><dd>1.23%</dd>" in text
    assert "divided by the temperature 0.5, fitted on 240 val images; without it the error is 4.00%." in text
    assert "temperature" not in render(raw, choose_examples(raw), {})
