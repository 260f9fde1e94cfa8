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
        ((*TRAINED, "emu"), r"has 1 classes that the run was not trained on \('emu'\)"),
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
