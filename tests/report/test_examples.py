import numpy as np
import pytest

from crossx.report.examples import PAIRS, RIGHT, WRONG, choose_examples


def test_the_most_confident_wrong_images_are_shown(tested):
    shown = choose_examples(tested)
    probability = np.exp(tested.logits) / np.exp(tested.logits).sum(1, keepdims=True)
    wrong = [i for i in range(len(tested.targets)) if tested.logits[i].argmax() != tested.targets[i]]
    assert shown.wrong == sorted(wrong, key=lambda i: -probability[i].max())[:WRONG]


def test_right_images_are_right_and_the_same_each_time(tested):
    shown = choose_examples(tested)
    assert len(set(shown.right)) == RIGHT
    assert all(tested.correct[shown.right])
    assert choose_examples(tested) == shown


def test_each_pair_has_an_image_of_both_classes(tested):
    shown = choose_examples(tested)
    assert len(shown.pairs) == PAIRS
    for pair, taken, other in shown.pairs:
        assert (tested.targets[taken], tested.predictions[taken]) == (pair.target, pair.prediction)
        assert tested.targets[other] == tested.predictions[other] == pair.prediction
    assert set(shown.images) == {
        *shown.wrong,
        *shown.right,
        *(image for _, *both in shown.pairs for image in both),
    }


@pytest.mark.parametrize("answer", ["all right", "all wrong"])
def test_nothing_to_show_is_no_error(tested, answer):
    labels = tested.targets if answer == "all right" else (tested.targets + 1) % 30
    np.put_along_axis(tested.logits, labels[:, None], 50, axis=1)
    shown = choose_examples(tested)
    assert (len(shown.wrong), len(shown.right)) == ((0, RIGHT) if answer == "all right" else (WRONG, 0))
    assert all(other is None for _, _, other in shown.pairs)
