import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossx.report.bars import Bar, plot_bars


def bar_tops(path: Path) -> list[int]:
    """Return the highest pixel of each bar, from its colour."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    blue = np.abs(pixels - (0x56, 0xB4, 0xE9)).sum(2) < 12
    columns = np.flatnonzero(blue.sum(0) > 5)
    groups = np.split(columns, np.flatnonzero(np.diff(columns) > 10) + 1)
    return [int(np.flatnonzero(blue[:, group].any(1)).min()) for group in groups]


def test_heights_are_in_proportion_to_the_means(tmp_path: Path) -> None:
    path = tmp_path / "chart.png"
    means = [0.80, 0.82, 0.85, 0.81]
    plot_bars([Bar(str(mean), [mean]) for mean in means], path, title="t")
    tops = bar_tops(path)
    steps = [(tops[0] - top) / (mean - means[0]) for top, mean in zip(tops[1:], means[1:], strict=True)]
    assert all(a == pytest.approx(b, rel=0.1) for a, b in itertools.pairwise(steps))
    assert steps[0] > 0


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0], [0.5, 0.5]])
def test_one_bar_and_values_at_the_ends_are_drawn(tmp_path: Path, values: list[float]) -> None:
    path = tmp_path / "chart.png"
    plot_bars([Bar("$only_one$", values, (values[0], values[0]))], path, title="50% of $x$", note="note")
    with Image.open(path) as picture:
        assert picture.width > 400
