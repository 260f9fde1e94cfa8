import itertools
import warnings

import numpy as np
import pytest
from PIL import Image

from crossx.evaluation.parts import plots
from crossx.evaluation.parts.plots import plot_parts


def numbers(value, low, high):
    return {"over_chance": value, "over_chance_interval": None if low is None else [low, high]}


def stage(excitations, names, *, with_object=True):
    several = excitations > 1
    share = {name: numbers(0.5 + 0.3 * k, 0.4 + 0.3 * k, 0.7 + 0.3 * k) for k, name in enumerate(names)}
    return {
        "size": (7, 7),
        "excitations": [{"share": share, "object": numbers(1.1, 1, 1.2) if with_object else None}]
        * excitations,
        "consistency": {"nmi": 0.1, "chance": 0.01} if several else None,
        "diversity": {"overlap": {"value": 0.5, "chance": 0.1}, "correlation": {"value": 0.9}}
        if several
        else None,
    }


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("excitations", [1, 2, 9])
@pytest.mark.parametrize("with_object", [True, False])
@pytest.mark.slow
def test_each_excitation_has_its_colour(tmp_path, excitations, with_object):
    names = [f"part {k}" for k in range(15)]
    stages = {name: stage(excitations, names, with_object=with_object) for name in ("last", "merged")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_parts(stages, names, tmp_path / "parts.png", title="test", map_name="excitation")
    picture = pixels(tmp_path / "parts.png")
    shown = [(np.abs(picture - colour).sum(-1) < 9).sum() for colour in ((0, 114, 178), (213, 94, 0))]
    assert shown[0] > 300
    assert (shown[1] > 300) == (excitations > 1)


def test_what_has_no_place_on_the_axis_is_left_out(tmp_path):
    measured = stage(2, ["$a_1", "b", "c"])
    measured["excitations"][0]["share"] |= {"$a_1": numbers(None, None, None), "b": numbers(0.0, 0.0, 0.5)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_parts(
            {"last": measured}, ["$a_1", "b", "c"], tmp_path / "parts.png", title="$x$", map_name="excitation"
        )
    assert min(pixels(tmp_path / "parts.png").shape[:2]) > 300


def test_the_legend_is_of_the_stage_with_the_most_excitations(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_png", lambda figure, path: drawn.append(figure))
    stages = {"last": stage(1, ["a"]), "attention": stage(3, ["a"]), "merged": stage(2, ["a"])}
    plot_parts(stages, ["a"], tmp_path / "parts.png", title="test", map_name="excitation")
    ((legend,),) = (figure.legends for figure in drawn)
    assert [text.get_text() for text in legend.get_texts()] == ["1", "2", "3"]


@pytest.mark.parametrize("lowest", [0.8, 0.1, 0.02, 1e-3, 5e-5, 1e-9])
def test_the_numbers_beside_the_shares_do_not_overlap(lowest, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_png", lambda figure, path: drawn.append(figure))
    measured = stage(2, ["a", "b"])
    measured["excitations"][0] = measured["excitations"][0] | {
        "share": {"a": numbers(lowest, lowest / 2, lowest * 2), "b": numbers(9, 8, 10)}
    }
    plot_parts(
        {"last": measured, "merged": measured},
        ["a", "b"],
        tmp_path / "parts.png",
        title="test",
        map_name="excitation",
    )
    (figure,) = drawn
    figure.draw_without_rendering()
    for axes in figure.axes[:2]:
        low, high = axes.get_ylim()
        shown = [tick.label1 for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = sorted(
            (label.get_window_extent() for label in shown if label.get_text()), key=lambda box: box.y0
        )
        assert len(boxes) >= 2
        assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
