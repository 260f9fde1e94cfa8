import csv

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy

from crossx.evaluation import metrics
from crossx.evaluation.tables import write_class_table, write_confused_pairs, write_confusion


def draw_case(seed, n=200, num_classes=7):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, num_classes, generator=generator)
    # The last class has no image; it is predicted all the same.
    targets = torch.randint(num_classes - 1, (n,), generator=generator)
    logits[torch.arange(n), targets] += 1.5
    return logits, targets


# Few different values, so that many logits are equal.
cases = st.integers(1, 8).flatmap(
    lambda k: st.lists(
        st.tuples(st.lists(st.integers(-2, 2), min_size=k, max_size=k), st.integers(0, k - 1)),
        min_size=1,
        max_size=12,
    )
)


@given(cases, st.integers(1, 10))
@settings(max_examples=100)
def test_top_k_is_a_stable_sort(case, k):
    logits = torch.tensor([row for row, _ in case], dtype=torch.float)
    targets = torch.tensor([target for _, target in case])
    right = [target in sorted(range(len(row)), key=lambda i: -row[i])[:k] for row, target in case]
    assert metrics.top_k_accuracy(logits, targets, k) == pytest.approx(np.mean(right))
    if k == 1:
        assert np.mean(right) == pytest.approx((logits.argmax(1) == targets).double().mean().item())


@pytest.mark.parametrize("k", [1, 5])
def test_top_k_agrees_with_torchmetrics(k):
    logits, targets = draw_case(0)
    expected = multiclass_accuracy(logits, targets, num_classes=7, average="micro", top_k=k)
    assert metrics.top_k_accuracy(logits, targets, k) == pytest.approx(expected.item())


def test_top_5_of_fewer_classes_is_always_right():
    logits, targets = draw_case(0, num_classes=3)
    assert metrics.top_k_accuracy(logits, targets, 5) == 1


@pytest.mark.parametrize("num_classes", [1, 2, 7])
def test_confusion_counts_pairs(num_classes):
    generator = torch.Generator().manual_seed(1)
    predictions, targets = torch.randint(num_classes, (2, 50), generator=generator)
    expected = np.zeros((num_classes, num_classes), int)
    for prediction, target in zip(predictions.tolist(), targets.tolist(), strict=True):
        expected[target, prediction] += 1
    np.testing.assert_array_equal(metrics.confusion_matrix(predictions, targets, num_classes), expected)


def test_class_mean_leaves_out_classes_without_images():
    logits, targets = draw_case(2)
    predictions = logits.argmax(1)
    assert (predictions == 6).any()
    assert not (targets == 6).any()
    accuracies = [(predictions[targets == c] == c).double().mean().item() for c in range(6)]
    confusion = metrics.confusion_matrix(predictions, targets, 7)
    assert metrics.class_mean_accuracy(confusion) == pytest.approx(np.mean(accuracies))


def naive_calibration_error(logits, targets, bins):
    z = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = z / z.sum(1, keepdims=True)
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == targets
    error = 0.0
    for b in range(bins):
        inside = (confidence >= b / bins) & ((confidence < (b + 1) / bins) | (b == bins - 1))
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


# With scale 0.1 all logits lie near 0 and could be taken for probabilities; with 100 the softmax rounds to 1.
@pytest.mark.parametrize("scale", [0.1, 1, 100])
def test_calibration_error_agrees_with_a_loop(scale):
    logits, targets = draw_case(3)
    logits = (logits - logits.min()) / (logits.max() - logits.min()) * scale
    expected = naive_calibration_error(logits.double().numpy(), targets.numpy(), 15)
    assert metrics.calibration_error(logits, targets) == pytest.approx(expected, abs=1e-6)


def test_level_accuracy_compares_groups():
    groups = ("gulls", "gulls", "terns", "gulls")
    predictions, targets = torch.tensor([0, 1, 2, 3, 3]), torch.tensor([1, 1, 0, 2, 0])
    assert metrics.level_accuracy(predictions, targets, groups) == pytest.approx(3 / 5)


CLASSES = ("auk", "jay", "owl", "tit, great")
CONFUSION = torch.tensor([[5, 2, 3, 0], [0, 4, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]])


def test_class_table():
    assert metrics.class_table(CONFUSION, CLASSES) == [
        ("auk", 10, 0.5, "owl"),
        ("jay", 4, 1.0, None),
        ("owl", 3, 0.0, "auk"),
        ("tit, great", 0, None, None),
    ]


def test_confused_pairs_come_most_frequent_first():
    assert metrics.confused_pairs(CONFUSION, CLASSES) == [
        ("auk", "owl", 3, 0.3),
        ("auk", "jay", 2, 0.2),
        ("owl", "auk", 1, pytest.approx(1 / 3)),
        ("owl", "jay", 1, pytest.approx(1 / 3)),
        ("owl", "tit, great", 1, pytest.approx(1 / 3)),
    ]


def test_tables_are_read_back(tmp_path):
    write_class_table(CONFUSION, CLASSES, tmp_path / "per_class.csv")
    write_confused_pairs(CONFUSION, CLASSES, tmp_path / "pairs.csv")
    write_confusion(CONFUSION, CLASSES, tmp_path / "confusion.csv")

    def read(name):
        with (tmp_path / name).open(newline="") as file:
            return list(csv.reader(file))

    assert read("per_class.csv")[0] == ["class", "n", "accuracy", "most_confused_with"]
    assert read("per_class.csv")[1] == ["auk", "10", "0.5", "owl"]
    assert read("per_class.csv")[4] == ["tit, great", "0", "", ""]
    assert read("pairs.csv")[:2] == [["target", "prediction", "n", "fraction"], ["auk", "owl", "3", "0.3"]]
    confusion = read("confusion.csv")
    assert confusion[0] == ["class", *CLASSES]
    assert [row[0] for row in confusion[1:]] == list(CLASSES)
    assert [[int(n) for n in row[1:]] for row in confusion[1:]] == CONFUSION.tolist()
