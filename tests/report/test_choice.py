import numpy as np
import pytest

from crossx.report.choice import PAIRS, RIGHT, WRONG, choose_examples, confused_block, confused_pairs


def test_pairs_are_counted_in_both_directions_and_the_more_frequent_one_comes_first():
    confusion = np.array([[9, 1, 0], [4, 5, 2], [0, 2, 7]])
    assert confused_pairs(confusion) == [(1, 0, 4, 1), (1, 2, 2, 2)]


def test_the_most_confident_wrong_images_are_shown(tested):
    choice = choose_examples(tested)
    probability = np.exp(tested.logits) / np.exp(tested.logits).sum(1, keepdims=True)
    wrong = [i for i in range(len(tested.targets)) if tested.logits[i].argmax() != tested.targets[i]]
    assert choice.wrong == sorted(wrong, key=lambda i: -probability[i].max())[:WRONG]


def test_right_images_are_right_and_the_same_each_time(tested):
    choice = choose_examples(tested)
    assert len(set(choice.right)) == RIGHT
    assert all(tested.correct[choice.right])
    assert choose_examples(tested) == choice


def test_each_pair_has_an_image_of_both_classes(tested):
    choice = choose_examples(tested)
    assert len(choice.pairs) == PAIRS
    for pair, taken, other in choice.pairs:
        assert (tested.targets[taken], tested.predictions[taken]) == (pair.target, pair.prediction)
        assert tested.targets[other] == tested.predictions[other] == pair.prediction
    assert set(choice.images) == {
        *choice.wrong,
        *choice.right,
        *(image for _, *both in choice.pairs for image in both),
    }


@pytest.mark.parametrize("answer", ["all right", "all wrong"])
def test_nothing_to_show_is_no_error(tested, answer):
    labels = tested.targets if answer == "all right" else (tested.targets + 1) % 30
    np.put_along_axis(tested.logits, labels[:, None], 50, axis=1)
    choice = choose_examples(tested)
    assert (len(choice.wrong), len(choice.right)) == ((0, RIGHT) if answer == "all right" else (WRONG, 0))
    assert all(other is None for _, _, other in choice.pairs)


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
