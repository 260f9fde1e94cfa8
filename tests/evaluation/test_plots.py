import warnings

import numpy as np
import pytest
from PIL import Image

from crossx.evaluation.plots import plot_confusion


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
