import json
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossx.errors import CrossXError
from crossx.evaluation.comparison import OtherImagesError, compare_runs, mcnemar_exact
from crossx.evaluation.predictions import Predictions, predictions_path

CLASSES = ("auk", "jay", "owl")


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_tail(only_a, only_b):
    n, least = only_a + only_b, min(only_a, only_b)
    tail = sum(comb(n, i) for i in range(least + 1)) / 2**n
    assert mcnemar_exact(only_a, only_b) == pytest.approx(min(1, 2 * tail))


def write_run(folder, predictions, targets, paths, classes=CLASSES, split="test", contents=None):
    folder.mkdir(exist_ok=True)
    (folder / "model.json").write_text("{}")
    (folder / "model.safetensors").touch()
    logits = np.eye(len(classes), dtype=np.float32)[predictions]
    answers = Predictions(logits, np.array(targets), np.array(paths), np.array(classes), contents)
    answers.save(predictions_path(folder, split))
    return folder


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    targets = generator.integers(3, size=60)
    return targets, [f"{CLASSES[label]}/{i}.jpg" for i, label in enumerate(targets)]


def test_runs_are_matched_image_by_image(tmp_path, images):
    targets, paths = images
    right_a, right_b = np.arange(60) % 10 < 8, np.arange(60) % 10 > 3
    a = write_run(tmp_path / "a", (targets + ~right_a) % 3, targets, paths)
    order = np.random.default_rng(1).permutation(60)
    # The second run names its classes in another order and saw the images in another one.
    classes = ("owl", "auk", "jay")
    labels = np.array([1, 2, 0])[targets]
    b = write_run(
        tmp_path / "b",
        ((labels + ~right_b) % 3)[order],
        labels[order],
        np.array(paths)[order],
        classes,
    )
    result = compare_runs(a, b)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["n"] == 60
    assert result["top1"] == {"a": 0.8, "b": 0.6}
    assert result["difference"] == pytest.approx(0.2)
    assert result["correct"] == {"both": 24, "only_a": 24, "only_b": 12, "neither": 0}
    assert result["p_value"] == pytest.approx(2 * sum(comb(36, i) for i in range(13)) / 2**36)
    low, high = result["interval"]["difference"]
    assert low < 0.2 < high


def test_a_run_equals_itself(tmp_path, images):
    targets, paths = images
    run = write_run(tmp_path / "a", targets, targets, paths)
    result = compare_runs(run, run)
    assert (result["difference"], result["p_value"]) == (0, 1)


def test_other_images_are_refused(tmp_path, images):
    targets, paths = images
    a = write_run(tmp_path / "a", targets, targets, paths)
    b = write_run(tmp_path / "b", targets[1:], targets[1:], paths[1:])
    with pytest.raises(
        CrossXError, match=r"\(60 images\).*\(59\).*same images.*Only one of them has .*/0\.jpg"
    ):
        compare_runs(a, b)


def test_images_of_the_same_names_must_be_the_same_files(tmp_path, images):
    targets, paths = images
    contents = np.arange(60, dtype=np.uint64)
    a = write_run(tmp_path / "a", targets, targets, paths, contents=contents)
    order = np.random.default_rng(0).permutation(60)
    same = write_run(
        tmp_path / "same", targets[order], targets[order], np.array(paths)[order], contents=contents[order]
    )
    assert compare_runs(a, same)["difference"] == 0
    changed = contents.copy()
    changed[[7, 9]] += 100
    b = write_run(tmp_path / "b", targets, targets, paths, contents=changed)
    with pytest.raises(OtherImagesError, match=r"Under 2 names they have different files, such as .*\.jpg"):
        compare_runs(a, b)
    # tested by an earlier version
    old = write_run(tmp_path / "old", targets, targets, paths)
    assert compare_runs(a, old)["n"] == 60
    assert Predictions.load(predictions_path(a, "test"), a, "test").contents.tolist() == contents.tolist()


def test_images_of_ones_own_are_matched_by_their_contents(tmp_path, images):
    targets, paths = images
    predictions = {
        "a": (targets + (np.arange(60) % 5 == 0)) % 3,
        "b": (targets + (np.arange(60) % 7 == 0)) % 3,
    }
    contents = np.random.default_rng(1).permutation(60).astype(np.uint64)
    # elsewhere, of the same contents: with other names, which give another order
    renamed, order = [f"{index * 7 % 60}.jpg" for index in range(60)], np.arange(60)[::-1]
    a = write_run(tmp_path / "a", predictions["a"], targets, paths, contents=contents)
    b = write_run(
        tmp_path / "b",
        *(array[order] for array in (predictions["b"], targets, np.array(renamed))),
        contents=contents[order],
    )
    same_names = write_run(tmp_path / "c", predictions["b"], targets, paths)
    found, expected = compare_runs(a, b), compare_runs(a, same_names)
    assert found["correct"] == {"both": 41, "only_a": 7, "only_b": 10, "neither": 2}
    for key in ("correct", "interval", "p_value"):
        assert found[key] == expected[key]
    other = contents.copy()
    other[3] = 99
    c = write_run(tmp_path / "other", targets, targets, renamed, contents=other)
    with pytest.raises(OtherImagesError, match=r"\(60\) were not tested.*Only one of them has .*jpg"):
        compare_runs(a, c)


def test_other_labels_are_refused(tmp_path, images):
    targets, paths = images
    a = write_run(tmp_path / "a", targets, targets, paths)
    changed = targets.copy()
    changed[7] = (changed[7] + 1) % 3
    b = write_run(tmp_path / "b", targets, changed, paths)
    with pytest.raises(CrossXError, match=rf"label {paths[7]} differently"):
        compare_runs(a, b)


def test_other_classes_are_refused(tmp_path, images):
    targets, paths = images
    a = write_run(tmp_path / "a", targets, targets, paths)
    b = write_run(tmp_path / "b", targets, targets, paths, (*CLASSES, "tit"))
    with pytest.raises(CrossXError, match=r"different classes \(3 and 4\)"):
        compare_runs(a, b)


def test_an_untested_run_says_which_command_tests_it(tmp_path, images):
    targets, paths = images
    run = write_run(tmp_path / "a", targets, targets, paths)
    with pytest.raises(CrossXError, match=r"not tested on val yet: run `crossx test .*a --split val` first"):
        compare_runs(run, run, "val")


def test_predictions_whose_classes_cannot_be_told_apart_are_damaged(tmp_path, images):
    targets, paths = images
    run = write_run(tmp_path / "a", targets, targets, paths, (*CLASSES[:-1], CLASSES[0]))
    with pytest.raises(
        CrossXError, match=rf"damaged .classes: '{CLASSES[0]}' is given twice.: write it again"
    ):
        compare_runs(run, run)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no archive at all"])
def test_damaged_predictions(tmp_path, images, content):
    targets, paths = images
    run = write_run(tmp_path / "a", targets, targets, paths)
    predictions_path(run, "test").write_bytes(content)
    with pytest.raises(CrossXError, match=r"predictions\.npz: damaged"):
        compare_runs(run, run)
