import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from PIL import Image

from crossx.evaluation import plots
from crossx.evaluation.plots import plot_confusion
from crossx.explain import plotting


def draw_case(num_classes, n=20):
    generator = np.random.default_rng(0)
    return generator.multinomial(n, np.full(num_classes, 1 / num_classes), size=num_classes)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize(("num_classes", "least_side"), [(1, 500), (5, 500), (60, 1000)])
@pytest.mark.slow
def test_picture_has_room_for_every_class(tmp_path, num_classes, least_side):
    path = tmp_path / "confusion.png"
    names = [f"{i:03d}.A_bird_of_kind_{i}" for i in range(num_classes)]
    plot_confusion(draw_case(num_classes), names, path, title="test")
    height, width, _ = pixels(path).shape
    assert min(height, width) > least_side


def test_right_is_blue_and_wrong_is_vermilion(tmp_path):
    path = tmp_path / "confusion.png"

    def shares(confusion):
        plot_confusion(np.array(confusion), ("a", "b"), path, title="test")
        red, _, blue = np.moveaxis(pixels(path), -1, 0)
        return (blue - red > 60).mean(), (red - blue > 60).mean()

    all_right, all_wrong = shares([[9, 0], [0, 9]]), shares([[0, 9], [9, 0]])
    assert all_right[0] > 2 * all_wrong[0]
    assert all_wrong[1] > 2 * all_right[1]


def test_names_are_drawn_as_they_are(tmp_path):
    names = ["$100 and $200", r"a_{b}^$\frac$", "x" * 300, "麻雀"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_confusion(np.eye(4, dtype=int), names, tmp_path / "confusion.png", title="$x$ on $y")
    height, width, _ = pixels(tmp_path / "confusion.png").shape
    assert max(height, width) < 2000


def test_classes_without_images_are_empty_rows(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_confusion(np.zeros((4, 4), dtype=int), list("abcd"), tmp_path / "confusion.png", title="test")
    assert (tmp_path / "confusion.png").stat().st_size > 0


def test_long_title_is_not_drawn_over_the_colour_bars(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_png", lambda figure, *_, **__: figures.append(figure))
    title = "plain on folder photographs of nearly identical products, test: top-1 91.4%"
    plot_confusion(np.eye(3, dtype=int), ["a", "b", "c"], tmp_path / "confusion.png", title=title)
    (figure,) = figures
    figure.draw_without_rendering()
    boxes = {
        text.get_text(): text.get_window_extent() for text in figure.findobj(Text) if text.get_text().strip()
    }
    assert {"correct", "wrong", title} <= boxes.keys()
    assert [name for name, box in boxes.items() if name != title and box.overlaps(boxes[title])] == []


def test_names_are_drawn_in_an_installed_font_that_has_their_characters(tmp_path, monkeypatch):
    """The font has one character, a black square."""
    monkeypatch.setattr(plotting, "_families", {})
    monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist])
    character = "\U0010fffd"

    def black_pixels():
        plot_confusion(np.eye(2, dtype=int), ["a", character * 8], tmp_path / "confusion.png", title="test")
        return (pixels(tmp_path / "confusion.png").max(axis=2) < 40).sum()

    boxes = black_pixels()
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord(character): "square"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=1000)
    font.setupPost()
    font.save(tmp_path / "squares.ttf")
    fontManager.addfont(tmp_path / "squares.ttf")
    monkeypatch.setattr(plotting, "_families", {})
    # 16 squares of 9 points at 150 dots per inch
    assert black_pixels() - boxes > 16 * (9 / 72 * 150) ** 2 / 2
