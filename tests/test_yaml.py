from typing import Any

import pytest
import yaml as pyyaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from crossx.errors import UsageError
from crossx.yaml import dump_yaml, load_yaml

ambiguous = st.from_regex(r"[-+0-9:.,eExob_yesnoff~=<!&*?|>'\"#%@` ]{1,6}", fullmatch=True)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | ambiguous
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@hypothesis_settings(max_examples=200)
@given(values, st.booleans())
def test_what_is_written_is_read_back_here_and_by_yaml_1_1(value: Any, flow: bool) -> None:
    text = dump_yaml({"value": value}, flow=flow)
    assert load_yaml(text, "text") == {"value": value}
    assert pyyaml.safe_load(text) == {"value": value}


def test_written_form() -> None:
    values = {"b": [1, 2.5, 1e-5], "a": {"text": "Cross-X, as printed (87.7%)", "none": None}, "c": "32"}
    block = "b:\n- 1\n- 2.5\n- 1.0e-05\na:\n  text: Cross-X, as printed (87.7%)\n  none: null\nc: '32'\n"
    assert dump_yaml(values) == block
    assert dump_yaml((1, "no"), flow=True) == "[1, 'no']\n"


@hypothesis_settings(max_examples=200)
@given(st.text() | st.text(alphabet="[]{}:,-?&*!|>'\"%@`#\n a1<~"))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        load_yaml(text, "file.yaml")
    except UsageError as error:
        message = str(error)
        assert message.startswith("file.yaml: ")
        assert "\n" not in message
        assert message.endswith(".")


@pytest.mark.parametrize(
    "text",
    [
        "&x [*x]",
        "a: 1\nb: &x {c: [*x]}",
        "a: 1\nb: &x\n  <<: *x",
        "a: 1\nb: &x {<<: [{<<: *x}]}",
        "a: 1\n? &x [*x]\n: 1",
    ],
)
def test_a_value_that_contains_itself_is_refused(text: str) -> None:
    line = text.count("\n", 0, text.index("&x")) + 1
    # a block begins on the line after its anchor
    with pytest.raises(UsageError, match=rf"file\.yaml: line ({line}|{line + 1}) is not valid YAML"):
        load_yaml(text, "file.yaml")


def test_a_value_may_be_given_several_times() -> None:
    assert load_yaml("a: &a [1, 2]\nb: [*a, *a]", "file.yaml") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


def test_nested_aliases_cost_no_more_than_their_text() -> None:
    """A thousand million values by name; visiting each would not end."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{name}: &{name} [{', '.join(['*' + last] * 9)}]"
        for last, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    assert len(load_yaml("\n".join(lines), "file.yaml")["i"]) == 9


def test_an_empty_text_is_nothing() -> None:
    assert load_yaml("", "file.yaml") is None
    with pytest.raises(UsageError, match=r"file\.yaml: line 2 gives 'a' again\."):
        load_yaml("a: 1\na: 2", "file.yaml")
