import dataclasses
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageColor

import layouts
from crossx.explain import figure, overlay
from crossx.explain.figures import BOX_COLOURS, FigureRow, caption, draw, layer, outline, to_pixels
from crossx.explain.maps import Explanation
from crossx.explain.overlays import overlay_parts
from crossx.methods import create_method
from crossx.methods.weights import load_method
from refusals import refusal

CLASSES = ("auk", "jay", "owl")


def picture(height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def explanation(target: int = 1, **maps: np.ndarray) -> Explanation:
    return Explanation(np.array([0.1, 0.7, 0.2], np.float32), target, maps)


def heads(drawn: Figure) -> list[str]:
    return [axes.get_title() for axes in drawn.axes if axes.get_title()]


def test_overlay_mixes_grey_and_colour() -> None:
    image, colours = picture(), matplotlib.colormaps["viridis"]
    values = np.random.default_rng(1).normal(size=(12, 16))
    unit = (values - values.min()) / (values.max() - values.min())
    grey = np.asarray(Image.fromarray(image).convert("L")).astype(float)
    expected = 0.3 * grey[..., None] + 0.7 * 255 * colours(unit)[..., :3]
    mixed = overlay(image, values, colormap="viridis", opacity=0.7)
    assert (mixed.dtype, mixed.shape) == (np.uint8, (12, 16, 3))
    assert np.abs(mixed - expected).max() <= 2


def test_parts_have_the_colour_of_the_largest_map() -> None:
    image = picture()
    maps = np.random.default_rng(2).normal(size=(3, *image.shape[:2]))
    mixed = overlay_parts(image, maps, opacity=0.4)
    grey = np.asarray(Image.fromarray(image).convert("L")).astype(float)
    seen = set()
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            scaled = [(m[y, x] - m.min()) / (m.max() - m.min()) for m in maps]
            expected = np.repeat(grey[y, x], 3)
            if max(scaled) > 0.5:
                part = int(np.argmax(scaled))
                seen.add(part)
                expected = 0.6 * expected + 0.4 * np.array(ImageColor.getrgb(BOX_COLOURS[part]))
            assert np.abs(mixed[y, x] - expected).max() <= 1.5
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("scale", [1, -3])
def test_overlay_resizes_as_pillow_does_whatever_the_scale(scale: int) -> None:
    values = np.random.default_rng(1).uniform(size=(3, 4)).astype(np.float32)
    unit = (values - values.min()) / (values.max() - values.min())
    if scale < 0:
        unit = 1 - unit
    resized = np.asarray(Image.fromarray(unit).resize((16, 12), Image.Resampling.BILINEAR))
    expected = 255 * matplotlib.colormaps["inferno"](resized)[..., :3]
    assert np.abs(overlay(picture(), scale * values + 5, opacity=1) - expected).max() <= 3


def test_a_layer_over_the_grey_image_is_the_overlay() -> None:
    image, values = picture(), np.random.default_rng(0).normal(size=(5, 7))
    drawn = Image.fromarray(layer(values, image.shape[:2], opacity=0.6))
    grey = Image.fromarray(overlay(image, values, opacity=0)).convert("RGBA")
    laid = np.asarray(Image.alpha_composite(grey, drawn).convert("RGB")).astype(int)
    assert np.abs(laid - overlay(image, values, opacity=0.6)).max() <= 2


def test_overlay_of_opacity_0_is_the_grey_image() -> None:
    image = picture()
    grey = np.asarray(Image.fromarray(image).convert("L")).astype(int)
    shown = overlay(image, np.ones((2, 2)), opacity=0)
    assert np.abs(shown - grey[..., None]).max() <= 1


def test_default_colormap_survives_grey_printing() -> None:
    ramp = overlay(np.zeros((1, 256, 3), np.uint8), np.arange(256.0)[None], opacity=1)
    grey = np.asarray(Image.fromarray(ramp).convert("L")).astype(int)[0]
    assert (np.diff(grey) >= 0).all()
    assert grey[-1] - grey[0] > 200


def test_unknown_names_and_numbers_are_refused() -> None:
    message = refusal(overlay, picture(), np.ones((2, 2)), colormap="infrno")
    assert message.startswith("unknown colormap 'infrno'. Did you mean 'inferno'?")
    for opacity in (-0.1, 1.1, float("nan")):
        assert "from 0 to 1" in refusal(overlay, picture(), np.ones((2, 2)), opacity=opacity)


def test_text_says_what_is_known() -> None:
    assert caption(explanation(), CLASSES) == "predicted, 70%:\njay"
    assert caption(explanation(), CLASSES, name="a.jpg", label="jay") == "a.jpg\npredicted, 70%:\njay\nright"
    text = caption(explanation(2), CLASSES, label="auk")
    assert text == "predicted, 70%:\njay\nwrong, it is:\nauk\nclass maps of:\nowl"
    name = caption(explanation(), ("auk", "x" * 50 + "$y$", "owl"), name="b" * 60 + "_17.jpg").split("\n")
    assert max(map(len, name)) == 32
    assert name[0].endswith("_17.jpg")


def test_class_maps_stand_below_the_activation_maps_of_their_part() -> None:
    names = ("previous part 1", "last part 1", "combined part 1", "CAM previous part 1", "CAM last part 1")
    shown = explanation(**dict.fromkeys(names, np.eye(2)))
    drawn = draw([FigureRow(picture(), shown, "a"), FigureRow(picture(), shown, "b")])
    assert heads(drawn) == ["image", "previous\npart 1", "last\npart 1", "combined\npart 1"]
    pictures = [axes for axes in drawn.axes if axes.images]
    assert len(pictures) == 2 * (1 + len(names))
    left = {round(axes.get_position().x0, 4) for axes in pictures}
    assert len(left) == 4
    assert [text.get_text() for text in drawn.texts] == ["a", "CAM", "b", "CAM"]
    only = explanation(**dict.fromkeys(names[3:], np.eye(2)))
    assert heads(draw([FigureRow(picture(), only, "")])) == [
        "image",
        "CAM\nprevious\npart 1",
        "CAM\nlast\npart 1",
    ]


def test_class_maps_of_a_head_without_activation_map_have_a_title_of_their_own() -> None:
    names = ("previous", "last", "CAM last", "CAM side")
    shown = explanation(**dict.fromkeys(names, np.eye(2)))
    drawn = draw([FigureRow(picture(), shown, "a"), FigureRow(picture(), shown, "b")])
    assert heads(drawn) == ["image", "previous", "last", "CAM\nside"]


def test_class_maps_below_none_of_the_activation_maps_start_at_the_left() -> None:
    shown = explanation(**dict.fromkeys(("previous", "last", "CAM whole", "CAM side"), np.eye(2)))
    drawn = draw([FigureRow(picture(), shown, "a"), FigureRow(picture(), shown, "b")])
    assert heads(drawn) == 2 * ["image", "previous", "last", "CAM\nwhole", "CAM\nside"]
    left = {axes.get_title(): round(axes.get_position().x0, 4) for axes in drawn.axes if axes.images}
    assert left["CAM\nwhole"] == left["previous"]
    assert left["CAM\nside"] == left["last"]


def test_many_maps_continue_on_the_next_line_with_titles_of_their_own() -> None:
    names = [f"{stage} part {part}" for stage in ("previous", "last") for part in range(1, 8)]
    shown = explanation(**dict.fromkeys(names, np.eye(2)))
    drawn = draw([FigureRow(picture(), shown, "a"), FigureRow(picture(), shown, "b")])
    titles = ["image", *(name.replace(" part", "\npart") for name in names)]
    assert heads(drawn) == 2 * titles
    lines: dict[float, int] = {}
    for axes in drawn.axes:
        if axes.images:
            bottom = round(axes.get_position().y0, 4)
            lines[bottom] = lines.get(bottom, 0) + 1
    # the image and the seven maps of a stage, and those of the other stage, of each row from the top
    assert [count for _, count in sorted(lines.items(), reverse=True)] == [8, 7, 8, 7]


def test_rows_next_to_each_other_have_heads_each() -> None:
    drawn = draw([FigureRow(picture(), explanation(last=np.eye(2)), text) for text in "abcde"], across=2)
    assert heads(drawn) == ["image", "last"] * 2
    places = [(round(text.get_position()[0], 3), round(text.get_position()[1], 3)) for text in drawn.texts]
    assert len({x for x, _ in places}) == 2
    assert len({y for _, y in places}) == 3
    assert places[0][1] == places[1][1] > places[2][1]


def test_an_image_without_maps_is_drawn() -> None:
    drawn = draw([FigureRow(picture(), explanation(), "a")])
    assert heads(drawn) == ["image"]
    assert len([axes for axes in drawn.axes if axes.images]) == 1


def test_boxes_are_outlined_and_numbered_with_the_first_on_top() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    boxes = np.array([[30, 30, 80, 80], [-50, 60, 50, 300]], np.float32)
    drawn = outline(image, boxes)
    first, second = ((drawn == colour).all(2) for colour in map(ImageColor.getrgb, BOX_COLOURS[:2]))
    assert first[30:81, 80].all()
    assert first[80, 30:81].all()
    # what lies beyond the image is not shown: the box ends with it
    assert second[60:99, 0].all()
    assert second[99, :29].all()
    # where the second box's top edge crosses the first's left edge, the first is on top
    assert first[60, 30]
    assert second[60, 29]
    assert not drawn[:25, :].any()
    # the numbers are black on a ground of the box's colour
    ground = first[32:46, 32:46]
    assert 0 < ground.sum() < ground.size
    assert not image.any()


def test_boxes_at_the_same_place_all_show_their_number() -> None:
    boxes = np.array([[20, 30, 80, 90]] * 4, np.float32)
    drawn = outline(np.zeros((100, 100, 3), np.uint8), boxes)
    for colour in map(ImageColor.getrgb, BOX_COLOURS[1:4]):
        # the ground of a number, since the outline is covered by that of the first
        assert (drawn == colour).all(2).sum() > 30


def test_boxes_are_drawn_on_the_image_and_not_on_the_maps() -> None:
    boxes = np.array([[2, 2, 9, 9]], np.float32)
    with_boxes = dataclasses.replace(explanation(last=np.eye(2)), boxes=boxes)
    shown = [
        axes.images[0].get_array()
        for axes in draw([FigureRow(picture(), with_boxes, "")]).axes
        if axes.images
    ]
    assert np.array_equal(shown[0], outline(picture(), boxes))
    assert np.array_equal(shown[1], overlay(picture(), np.eye(2)))


@pytest.mark.slow
def test_the_figure_grows_with_columns_and_rows() -> None:
    small = draw([FigureRow(picture(), explanation(last=np.eye(2)), "")]).get_size_inches()
    wide = draw(
        [FigureRow(picture(), explanation(**{f"s{i}": np.eye(2) for i in range(9)}), "")]
    ).get_size_inches()
    tall = draw([FigureRow(picture(), explanation(last=np.eye(2)), "")] * 3).get_size_inches()
    assert wide[0] - small[0] == pytest.approx(8 * 1.56)
    assert tall[1] - small[1] == pytest.approx(2 * 1.56)


def test_pixels_are_those_before_the_normalisation() -> None:
    pixels = torch.randint(256, (2, 3, 5, 7), generator=torch.Generator().manual_seed(0))
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    normalised = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert np.array_equal(to_pixels(normalised, mean, std), pixels.permute(0, 2, 3, 1).numpy())


@pytest.mark.slow
def test_figure_of_a_run_and_of_its_method_are_the_same(tmp_path: Path) -> None:
    run = layouts.write_run(tmp_path / "run")
    batch = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    method, spec = load_method(run)
    by_run = figure(run, batch, names=["a.jpg", "b.jpg"], labels=["wren", "robin"], maps="both")
    by_method = figure(method, batch, spec, names=["a.jpg", "b.jpg"], labels=["wren", "robin"], maps="both")
    assert by_run._repr_png_() == by_method._repr_png_()
    assert len([axes for axes in by_run.axes if axes.images]) == 2 * (1 + 8 + 6)
    assert by_run.texts[0].get_text().startswith("a.jpg\npredicted, ")


def test_a_figure_shows_classes_as_people_read_them(tmp_path: Path) -> None:
    method, spec = load_method(layouts.write_run(tmp_path / "run"))
    spec = dataclasses.replace(spec, classes=layouts.CUB_CLASSES)
    texts = figure(method, torch.zeros(1, 3, 64, 64), spec, labels=["002.Laysan_Albatross"]).texts
    assert "." not in texts[0].get_text()
    assert "_" not in texts[0].get_text()
    assert " Albatross\nright" in texts[0].get_text() or "is:\nLaysan Albatross" in texts[0].get_text()


def test_figure_needs_no_run_and_one_name_an_image() -> None:
    method = create_method("plain", backbone="resnet10t", num_classes=3)
    batch = torch.zeros(2, 3, 64, 64)
    assert "class " in figure(method, batch).texts[0].get_text()
    assert refusal(figure, method, batch, names=["a"]).startswith(
        "figure takes one of names for each of the 2"
    )
    assert "unknown colormap" in refusal(figure, method, batch, colormap="no")
    assert refusal(figure, method, batch[:0]) == "figure needs at least one image."


@pytest.mark.slow
def test_the_room_loads_nothing_before_it_is_used() -> None:
    code = (
        "import sys, crossx.explain as room; first = {'torch', 'matplotlib', 'captum'} & set(sys.modules)\n"
        "room.overlay, room.figure, room.explain_images\n"
        "print(sorted(first), sorted({'matplotlib.pyplot', 'captum'} & set(sys.modules)), sorted(room.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] [] ['explain_images', 'figure', 'overlay']"
