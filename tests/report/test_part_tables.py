import pytest

from answers import make_parts
from crossx.report.part_tables import part_tables


def test_shares_have_a_column_for_each_stage_and_part():
    shares, agreement = part_tables(make_parts())
    assert shares.columns == ("part", "images", "last · 1", "last · 2", "merged · 1", "merged · 2")
    assert shares.rows[:3] == (
        ("beak", "200", *["2.00"] * 4),
        ("wing", "180", *["—"] * 4),
        ("whole object", "", *["1.50"] * 4),
    )
    assert agreement.rows[1][:4] == ("merged", "0.250 (0.200 to 0.300)", "0.010", "0.001")


def test_one_part_has_nothing_to_agree_with():
    (shares,) = part_tables(make_parts(excitations=1))
    assert len(shares.columns) == 4


@pytest.mark.parametrize("measures", [{}, {"stages": 3}, {"stages": {"last": {"iou": 0.5}}}, {"stages": []}])
def test_an_unknown_form_is_no_table(measures):
    assert part_tables(measures) == []
