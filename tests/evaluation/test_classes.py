import pytest

from crossx.errors import CrossXError
from crossx.evaluation.classes import check_classes

TRAINED = ("auk", "jay", "owl", "tit")


def test_equal_names_pass():
    check_classes(TRAINED, list(TRAINED), "birds")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            ("auk", "owl", "jay", "tit"),
            r"run's 4 classes in another order \(class 1 is 'owl', in the run 'jay'\)",
        ),
        (("auk", "tit"), r"has only 2 of the run's 4 classes \(missing: 'jay', 'owl'\)"),
        ((*TRAINED, "emu"), r"has 1 class that the run was not trained on \('emu'\)"),
        (
            ("cat", "dog"),
            r"2 that the run does not know \('cat', 'dog'\), and not 4 .*'auk', 'jay', 'owl' and 1 more",
        ),
    ],
)
def test_differences_are_explained_on_one_line(found, message):
    with pytest.raises(CrossXError, match=message) as caught:
        check_classes(TRAINED, found, "birds")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("dataset 'birds' ")


def test_names_are_compared_as_text_and_shown_apart() -> None:
    check_classes(["cafe\u0301", "wren"], ["caf\u00e9 ", "wren"], "birds")
    with pytest.raises(CrossXError) as caught:
        check_classes(["cat", "wren"], ["c\u0430t", "wren"], "birds")
    assert "('c\\u0430t')" in str(caught.value)
    assert "('cat')" in str(caught.value)
