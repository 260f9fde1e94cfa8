from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossx.data.names import (
    class_name,
    lookalikes,
    missing_label_note,
    quoted,
    several_labels_note,
    split_name,
)


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            "Train TRAINING xtrain training_set training-data trn train2017 train_01 TrainImages images.train trainval",
        ),
        ("val", "val valid Validation validation_set dev DEV devset val2017 imgs_val development"),
        ("test", "test testing test_set TestSet tst test-images 1_test test.data"),
        ("unclear", "eval evaluation eval_set holdout hold_out Held-Out"),
    ],
)
def test_names_of_splits(split: str, names: str) -> None:
    for name in names.split():
        assert split_name(name) == (split, ()), name


@pytest.mark.parametrize(
    "name", ["car", "bus", "protest", "restrain", "contest", "devil", "value", "trains", "2017", ""]
)
def test_names_of_classes_are_not_those_of_splits(name: str) -> None:
    assert split_name(name)[0] is None


def test_other_words_are_told() -> None:
    assert split_name("birds_train") == ("train", ("birds",))
    assert split_name("test tube") == ("test", ("tube",))
    assert split_name("train_test")[0] is None


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("red", "red (1)"),
        ("Red", "red - Copy"),
        ("red", "red - Copy (2)"),
        ("red", "red copy 2"),
        ("7", "\u0667"),
    ],
)
def test_copies_and_other_digits_look_the_same(name: str, other: str) -> None:
    assert lookalikes([name, other, "blue"]) == [tuple(sorted((name, other)))]


def test_names_that_do_not_look_the_same() -> None:
    assert (
        lookalikes(["BMW (2011)", "BMW (2012)", "copy", "hard copy", "photocopy", "photo", "1e3", "1000"])
        == []
    )


def test_names_of_missing_labels_are_noted() -> None:
    assert missing_label_note(["banana", "nanny"]) == []
    (note,) = missing_label_note(["NaN", "wren", "<NA>"])
    assert note.startswith("'NaN', '<NA>' read as classes: ")


@given(st.text(st.characters(blacklist_categories=("Cs",)), min_size=1))
def test_one_name_per_text(text: str) -> None:
    name = class_name(text)
    assert class_name(unicodedata.normalize("NFD", text)) == class_name(f" {text}\u00a0") == name
    assert class_name(name) == name


def test_bytes_that_are_not_utf8_become_escapes() -> None:
    assert class_name("caf\udce9") == "caf\\xe9"
    class_name("\ud800").encode()


@pytest.mark.parametrize(
    "group",
    [
        ("Red", "red"),
        ("1", "1.0", "01"),
        ("+1", "1,00"),
        ("house finch", "house\u00a0finch", "house_finch"),
        ("re\u200bd", "red"),
        ("\uff32\uff25\uff24", "RED"),
        ("\u0441\u0430t", "cat"),
    ],
)
def test_names_that_look_the_same(group: tuple[str, ...]) -> None:
    assert lookalikes([*group, "wren", "2"]) == [tuple(sorted(group))]
    assert len(set(quoted(group))) == len(group)
    assert all(text.isascii() for text in quoted(group))


def test_different_numbers_and_names_do_not_look_the_same() -> None:
    long = "1" * 40
    assert (
        lookalikes(["1", "-1", "10", "1.5", "100", long + "1", long + "2", "a", "b", "caf\xe9", "cafe"]) == []
    )


def test_several_labels_in_one() -> None:
    (note,) = several_labels_note(
        ["daisy|white", "daisy", "['a', 'b']", "x;y", "x", "y", "Ram C/V Cargo Van"]
    )
    assert note.startswith("3 names that look like several labels are each one class")
    assert "'daisy|white'" in note
    assert several_labels_note(["Finch, House", "F/A-18", "daisy", "black & white"]) == []
