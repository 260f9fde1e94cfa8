import numpy as np
import pytest

from crossx.report.confusion import confused_block, mutual_confusions


def test_pairs_are_counted_in_both_directions_and_the_more_frequent_one_comes_first():
    confusion = np.array([[9, 1, 0], [4, 5, 2], [0, 2, 7]])
    assert mutual_confusions(confusion) == [(1, 0, 4, 1), (1, 2, 2, 2)]


def test_few_classes_are_all_shown_in_order():
    assert confused_block(np.eye(5, dtype=int), 5) == [0, 1, 2, 3, 4]


def test_of_many_classes_the_most_confused_stand_side_by_side():
    confusion = 9 * np.eye(12, dtype=int)
    confusion[2, 9] = confusion[9, 7] = 5
    confusion[0, 11] = 4
    confusion[3, 4] = 1
    block = confused_block(confusion, 5)
    assert set(block) == {0, 2, 7, 9, 11}
    places = {label: place for place, label in enumerate(block)}
    assert abs(places[2] - places[9]) == abs(places[9] - places[7]) == abs(places[0] - places[11]) == 1


@pytest.mark.parametrize("pairs", [0, 1])
def test_a_block_of_hardly_any_confusion(pairs):
    confusion = 9 * np.eye(12, dtype=int)
    confusion[5, 1] = pairs
    assert confused_block(confusion, 5) == ([1, 5] if pairs else [])
