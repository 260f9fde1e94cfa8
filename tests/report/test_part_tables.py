import pytest

from answers import make_parts
from crossx.report.part_tables import part_tables


def test_shares_have_a_column_for_each_stage_and_part():
    shares, moves, agreement = part_tables(make_parts())
    assert shares.columns == ("part", "images", "last · 1", "last · 2", "merged · 1", "merged · 2")
    assert shares.rows == (
        ("beak", "200", *["2.00"] * 4),
        ("wing", "180", *["—"] * 4),
        ("whole object", "", *["1.50"] * 4),
    )
    assert agreement.rows[1][:4] == ("merged", "0.250 (0.200 to 0.300)", "0.010", "0.001")
    # as an earlier version measured
    assert [tuple(row) for row in moves.rows] == [("flipped", *["0.75"] * 4), ("zoomed", *["0.50"] * 4)]


def test_one_part_has_nothing_to_agree_with():
    shares, _ = part_tables(make_parts(excitations=1))
    assert len(shares.columns) == 4


def test_measures_of_part_discovery_and_views():
    measures = make_parts(stages=("last",))
    level = {"value": 0.3, "interval": [0.2, 0.4], "chance": 0.1}
    with_frame = {**level, "frame": 0.15}
    measures["stages"]["last"] |= {
        "keypoints": {"nmi": with_frame, "ari": with_frame, "error": None},
        "prototypes": {"consistency": level, "stability": level},
    }
    for excitation in measures["stages"]["last"]["excitations"]:
        excitation |= {"upside_down": {"value": 0.2, "frame": 0.9}, "any_part": {"value": 0.8, "chance": 0.3}}
    shares, moves, _, field = part_tables(measures)
    assert shares.rows[-2:] == (("peak in a part", "", "0.80", "0.80"), ("  by chance", "", "0.30", "0.30"))
    assert ("upside down", "0.20 / 0.90", "0.20 / 0.90") in [tuple(row) for row in moves.rows]
    assert [tuple(row) for row in field.rows] == [
        ("keypoint NMI", "0.300 (0.200 to 0.400) (0.100; 0.150)"),
        ("keypoint ARI", "0.300 (0.200 to 0.400) (0.100; 0.150)"),
        ("keypoint error, in the object's box", "—"),
        ("consistency", "0.300 (0.200 to 0.400) (0.100)"),
        ("stability under noise", "0.300 (0.200 to 0.400) (0.100)"),
    ]


def test_without_parts_there_are_only_maps():
    measures = make_parts()
    for stage in measures["stages"].values():
        stage["consistency"] = None
        for excitation in stage["excitations"]:
            excitation |= {"share": {}, "object": None}
    (moves,) = part_tables(measures | {"parts": {}})
    assert moves.columns[0] == "map"


@pytest.mark.parametrize("measures", [{}, {"stages": 3}, {"stages": {"last": {"iou": 0.5}}}, {"stages": []}])
def test_an_unknown_form_is_no_table(measures):
    assert part_tables(measures) == []
