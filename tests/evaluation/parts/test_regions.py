import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from crossx.data.index import Record, part_names
from crossx.evaluation.parts.regions import KEYPOINT_RADIUS, CropRegions, find_regions
from crossx.runs import Preprocessing

STATS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def regions(*boxes, radius=0.1, visible=True):
    """One crop with these regions."""
    return CropRegions(
        torch.tensor([boxes]), torch.tensor([radius]), torch.full((1, len(boxes)), visible, dtype=torch.bool)
    )


def is_in(region, radius, x, y):
    left, top, right, bottom = region
    if left == right and top == bottom:
        return (x - left) ** 2 + (y - top) ** 2 <= radius**2
    return left <= x < right and top <= y < bottom


@st.composite
def a_region(draw):
    """A box within or beyond the crop, or a keypoint."""
    left, top, width, height = (
        draw(st.integers(*ends)) / 64 for ends in ((-20, 84), (-20, 84), (3, 64), (3, 64))
    )
    if draw(st.booleans()):
        return left, top, left, top
    return left, top, left + width, top + height


@example(((0.25, 0.5, 0.75, 1.0), (0.5, 0.5, 0.5, 0.5)), (4, 4), 0.2)
@settings(max_examples=25)
@given(
    st.tuples(a_region(), a_region()), st.tuples(st.integers(1, 6), st.integers(1, 6)), st.floats(0.05, 0.4)
)
def test_places_against_points_looked_at_one_by_one(boxes, size, radius):
    height, width = size
    found = regions(*boxes, radius=radius)
    coverage, contained = found.coverage(height, width)[0], found.contain(height, width)[0]
    points = 24
    for k, box in enumerate(boxes):
        for i in range(height):
            for j in range(width):
                inside = sum(
                    is_in(box, radius, (j + (b + 0.5) / points) / width, (i + (a + 0.5) / points) / height)
                    for a in range(points)
                    for b in range(points)
                )
                assert coverage[k, i, j] == pytest.approx(inside / points**2, abs=0.17)
        y, x = ((torch.arange(side) + 0.5) / side for side in size)
        expected = [[is_in(torch.tensor(box), torch.tensor(radius), b, a) for b in x] for a in y]
        assert contained[k].tolist() == [[bool(value) for value in row] for row in expected]


def test_coverage_is_exact_for_boxes_and_close_for_discs():
    box, point = (0.1, 0.2, 0.65, 0.9), (0.45, 0.55, 0.45, 0.55)
    for size in ((3, 3), (7, 7), (28, 28), (5, 9)):
        coverage = regions(box, point, radius=0.3).coverage(*size)[0]
        assert coverage[0].mean() == pytest.approx(0.55 * 0.7)
        assert coverage[1].mean() == pytest.approx(torch.pi * 0.09, rel=0.01)
        assert coverage.min() >= 0
        assert coverage.max() <= 1 + 1e-5


def test_boxes_along_places_cover_them_whole():
    assert regions((0.25, 0.5, 0.75, 0.75)).coverage(4, 4)[0, 0].tolist() == [
        [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]
    ]  # fmt: skip


def test_what_is_not_visible_covers_nothing():
    hidden = regions((0.0, 0.0, 1.0, 1.0), (0.5, 0.5, 0.5, 0.5), visible=False)
    assert not hidden.coverage(4, 4).any()
    assert not hidden.contain(4, 4).any()


def write_record(path, size, parts, box=None):
    Image.new("RGB", size).save(path)
    return Record(path, 0, "test", box, parts)


def test_positions_go_through_the_preprocessing(tmp_path):
    preprocessing = Preprocessing(64, 80, "bilinear", *STATS, crop_bottom=20)
    records = [
        # 100 x 60 after the cut: scaled by 0.8 and 80/60, then 8 pixels are cropped on each side
        write_record(
            tmp_path / "a.png",
            (100, 80),
            {"wing": (20.0, 15.0, 30.0, 30.0), "eye": (50.0, 30.0, 0.0, 0.0), "tail": (0.0, 0.0, 9.0, 9.0)},
            (10.0, 10.0, 60.0, 30.0),
        ),
        write_record(tmp_path / "b.png", (80, 100), {"eye": (40.0, 79.0, 0.0, 0.0)}),
    ]
    names = part_names(records)
    assert names == ("wing", "eye", "tail")
    parts, objects = find_regions(records, names, preprocessing)
    assert parts.visible.tolist() == [[True, True, False], [False, False, False]]
    wing = [(20 * 0.8 - 8) / 64, (20 - 8) / 64, (50 * 0.8 - 8) / 64, (60 - 8) / 64]
    assert parts.boxes[0, 0].tolist() == pytest.approx(wing)
    assert parts.boxes[0, 1].tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5])
    # 48 crop pixels wide, 40 high
    assert parts.radii.tolist() == pytest.approx([KEYPOINT_RADIUS * 48 / 64, KEYPOINT_RADIUS])
    assert objects.visible[:, 0].tolist() == [True, False]


def test_some_of_the_crops():
    both = CropRegions(torch.rand(5, 3, 4), torch.rand(5), torch.rand(5, 3) > 0.5)
    some = both[slice(1, 4)]
    assert torch.equal(some.coverage(4, 4), both.coverage(4, 4)[1:4])
