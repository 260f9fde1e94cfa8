import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import yaml as pyyaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from crossx.errors import UsageError
from crossx.yaml import dump_yaml, load_yaml, read_yaml
from refusals import refusal

ambiguous = st.from_regex(r"[-+0-9:.,eExob_yesnoff~=<!&*?|>'\"#%@` ]{1,6}", fullmatch=True)
# no path and no name has a NUL, which YAML refuses
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts | ambiguous
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
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


def test_aliases_that_repeat_a_thousand_million_values_are_refused() -> None:
    """Printing, copying or checking them would not end."""
    names = "abcdefghijklmnopqrs"
    for nested in ("[*{0}, *{0}, *{0}]", "{{x: *{0}, y: *{0}}}", "{{<<: [*{0}, *{0}]}}"):
        lines = ["a: &a {k: v}"]
        lines += [f"{new}: &{new} {nested.format(old)}" for old, new in itertools.pairwise(names)]
        with pytest.raises(UsageError, match=r"file\.yaml: line \d+ is not valid YAML \(its aliases repeat"):
            load_yaml("\n".join(lines), "file.yaml")


def test_an_empty_text_is_nothing() -> None:
    assert load_yaml("", "file.yaml") is None
    with pytest.raises(UsageError, match=r"file\.yaml: line 2 gives 'a' again\."):
        load_yaml("a: 1\na: 2", "file.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: !!int x",
        "a: !!float x",
        "a: !!bool x",
        "a: !!int [1]",
        "a: !!map x",
        "a: !!seq x",
        "a: !!binary x",
        "a: !!binary aGk=",
        "a: !!set {x}",
        "a: !!omap [b: 1]",
        "a: !!pairs [b: 1]",
        "a: !own x",
        "a: !!python/object/apply:os.system [x]",
        "? [a]\n: 1",
        "? {a: 1}\n: 1",
        "{[]: 1}",
        "<<: x",
        "<<: [x]",
        "<<: 1",
        "a: *b",
        "a\x00: 1",
        "a: \x1b",
        "a: \ud800",
        'a: "\\0"',
        'a: "\\uD800"',
        'a: "\\UFFFFFFFF"',
        "a: 1\n---\nb: 2",
        "%YAML 9.9\n---\na: 1",
        "%TAG ! x\n%TAG ! x\n---\na: 1",
        "a: 0x" + "f" * 5000,
        "a: " + "1" * 5000,
        "[" * 5000,
        "[" * 60 + "]" * 60,
        "a: " + "- " * 5000,
        "a: {" * 60 + "}" * 60,
        "&a [*a]",
        "a: 1\n" * 2,
        "? " * 3000,
        "\t- a",
        "a: 'x",
        'a: "x',
        "a: |9x\n b",
        "a: !!timestamp x",
        "a: !!timestamp [x]",
        "a: 2001-99-99",
        "a: 1:99:99x\n b: c: d",
    ],
    ids=lambda text: ascii(text[:24]),
)
def test_other_types_and_damage_are_one_line(text: str) -> None:
    message = refusal(load_yaml, text, "file.yaml")
    assert message.startswith("file.yaml: ")
    assert len(message) < 300


def test_files_that_are_no_text_or_have_no_end_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert read_yaml(tmp_path / "text.yaml") == "a: 1\n"
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "utf16.yaml").write_bytes("a: 1".encode("utf-16"))
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(1 << 40)
    for name, problem in {
        "missing": "no such file",
        "folder": "is a folder, not a file",
        "pipe": "is a pipe or device, not a file",
        "device": "is a pipe or device, not a file",
        "loop": "cannot be read (Too many levels of symbolic links)",
        "utf16": "not UTF-8 text (byte 1)",
        "huge": "larger than the 1 MiB that such a file may have",
        "n" * 300: "cannot be read (File name too long)",
        "nul\0": "cannot be read (embedded null byte)",
    }.items():
        path = tmp_path / f"{name}.yaml"
        assert refusal(read_yaml, path) == str(UsageError(f"{path}: {problem}."))


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 50_000, "a: [" + "[" * 3000 + "]" * 3001])
def test_many_open_brackets_are_refused_before_they_are_parsed(text: str) -> None:
    with pytest.raises(UsageError, match=r"f\.yaml: not valid YAML \(nested too deeply\)"):
        load_yaml(text, "f.yaml")


def test_brackets_in_texts_are_texts() -> None:
    assert load_yaml("a: '[[{{'  # [[[\nb: [1, [2]]\n", "f.yaml") == {"a": "[[{{", "b": [1, [2]]}
