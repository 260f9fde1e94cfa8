from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossx.class_names import display_names, lookalikes, naming_problem
from crossx.data.index import DatasetIndex
from layouts import CARS, CUB_CLASSES, DOGS, NABIRDS_SPECIES, VARIANTS
from refusals import refusal


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (CUB_CLASSES, ["Black footed Albatross", "Laysan Albatross", "Sooty Albatross"]),
        (DOGS, ["Chihuahua", "Japanese spaniel", "toy terrier"]),
        (["1_daisy", "0_rose"], ["daisy", "rose"]),
        (["2-daisy", "1 rose", "3_lily__white"], ["daisy", "rose", "lily white"]),
        (["common_daisy", "rose"], ["common daisy", "rose"]),
    ],
)
def test_ids_and_underscores_are_not_shown(names: list[str], shown: list[str]) -> None:
    assert display_names(names) == tuple(shown)


@pytest.mark.parametrize(
    "names",
    [
        CARS,
        VARIANTS,
        NABIRDS_SPECIES,
        ["3 Series", "5 Series", "7 Coupe"],
        ["1", "2", "3"],
        ["001", "002"],
        ["1.5", "2.0"],
        ["1.", "2."],
        ["_", "__"],
        [],
    ],
)
def test_names_without_ids_stay_as_they_are(names: list[str]) -> None:
    assert display_names(names) == tuple(names)


def test_an_id_that_not_all_have_is_part_of_the_name() -> None:
    assert display_names(["012.Blue_Jay", "background"]) == ("012.Blue Jay", "background")


@pytest.mark.parametrize(
    "names",
    [
        ["012.Blue_Jay", "013.Blue_Jay", "014.Blue Jay"],
        ["012.Blue_Jay", "013.blue_jay"],
        ["blue_jay", "blue jay"],
        ["1_x", "2_x"],
    ],
)
def test_names_that_would_look_the_same_are_kept(names: list[str]) -> None:
    assert display_names(names) == tuple(names)


def test_only_those_that_look_the_same_are_kept() -> None:
    assert display_names(["1.a", "2.b_c", "3.b c"]) == ("a", "2.b_c", "3.b c")


@given(st.lists(st.text(alphabet="aA1. _-n\u200b\t\n", min_size=1, max_size=6), unique=True, max_size=8))
def test_no_two_classes_are_shown_alike_unless_their_names_are(names: list[str]) -> None:
    shown = display_names(names)
    assert len(shown) == len(names) == len(set(shown))
    already = {name for group in lookalikes(names) for name in group}
    assert {text for group in lookalikes(shown) for text in group} <= already | set(names)
    assert display_names(list(reversed(names))) == tuple(reversed(shown))


@given(st.lists(st.sampled_from(["auk", "Auk", "jay ", "jay", "", " "]), min_size=1, max_size=6))
def test_names_tell_classes_apart_or_not(names: list[str]) -> None:
    distinct = len(set(names)) == len(names) and "" not in names and " " not in names
    assert (naming_problem(names) is None) == distinct
    if not distinct:
        line = refusal(DatasetIndex, "birds", tuple(names), ())
        assert line == f"dataset 'birds' has classes that cannot be told apart: {naming_problem(names)}."
