"""Commands in README, documentation and the examples of ``--help`` name what exists: verbs, options, recipes."""

import contextlib
import functools
import io
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossx.ablation.suite import list_suites
from crossx.cli.main import VERBS, main
from crossx.methods import list_methods, method_options
from crossx.recipes import list_recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGED = {"--config": list_recipes(), "--suite": list_suites()}


@functools.cache
def help_of(verb: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*verb.split(), "--help"]) == 0
    return printed.getvalue().split("\nexamples:")[0]


@functools.cache
def options_of(verb: str) -> set[str]:
    options = set(re.findall(r"(?<![\w-])--\w[\w.-]*\w", help_of(verb)))
    if verb == "datasets":
        return options | options_of("datasets check") | options_of("datasets audit")
    if verb in ("ablate", "tune"):
        return options | options_of("fit")
    if verb == "fit":
        # its help shows the options of one method
        return options | {f"--model.{name}" for method in list_methods() for name in method_options(method)}
    return options


def commands(page: Path) -> list[list[str]]:
    """Return the words of every ``crossx VERB ...`` in a page's code blocks and code spans."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`(crossx [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    lines = "\n".join([*blocks, *spans]).replace("\\\n", " ").splitlines()
    return [found for line in lines for found in commands_of(line)]


def commands_of(line: str) -> Iterator[list[str]]:
    for part in re.split(r"[|;&]{1,2}", line.split(" #")[0]):
        match = re.search(r"(?:^|\s)crossx ([a-z][a-z-]+)( .*)?$", part.strip())
        if match:
            with contextlib.suppress(ValueError):  # a sentence with an apostrophe
                yield [match[1], *shlex.split(match[2] or "")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_a_page_exist(page: Path) -> None:
    wrong = []
    for verb, *words in commands(page):
        if verb not in VERBS:
            wrong.append(verb)
            continue
        for word, following in itertools.pairwise([*words, ""]):
            option = word.split("=")[0]
            if not option.startswith("--"):
                continue
            if option not in {*options_of(verb), "--debug"}:
                wrong.append(f"{verb} {option}")
            packaged = PACKAGED.get(option)
            if packaged and re.fullmatch(r"[a-z0-9_]+", following) and following not in packaged:
                wrong.append(f"{verb} {option} {following}")
    assert not wrong


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_help_exist(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    examples = capsys.readouterr().out.split("\nexamples:\n")[1].replace("\\\n", " ")
    found = [words for line in examples.splitlines() for words in commands_of(line)]
    assert found
    for name, *words in found:
        assert {word for word in words if word.startswith("--")} <= options_of(name)


def test_the_readme_shows_commands() -> None:
    assert {"quickstart", "fit", "test", "predict"} <= {words[0] for words in commands(ROOT / "README.md")}
