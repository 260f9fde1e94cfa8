"""How a verb's signature and docstring become its command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from crossx.cli.datasets import DatasetOptions
from crossx.cli.options import RunPath
from crossx.cli.parser import build, call, in_words_of
from crossx.cli.values import Folder, Natural, Positive, Tolerance
from crossx.errors import UsageError


@dataclass(frozen=True)
class Data:
    """images

    Attributes:
        root: Where they are.
        batch_size: Images per step.
    """

    root: Folder | None = None
    batch_size: Positive | None = None


@dataclass(frozen=True)
class Device:
    """device

    Attributes:
        precision: Of the weights; 50% of the memory with fp16.
    """

    precision: str = "fp32"


SEEN: list[dict[str, Any]] = []


def verb(
    run: RunPath,
    images: Sequence[Annotated[str, "IMAGES"]],
    *,
    output: Folder,
    top: Natural = 1,
    crops: Literal[1, 5] = 1,
    seeds: Sequence[Natural] = (0, 1),
    target: Annotated[str, "--class", "NAME"] | None = None,
    tolerance: Tolerance | None = None,
    flip: bool = False,
    data: Data,
    device: Device,
) -> int:
    """Do something.

    It takes several
    lines to say so.

    Args:
        run: The run.
        images: The images.
        output: Where to write.
        top: How many.
        crops: Of an image.
        seeds: Of the run.
        target: The class.
        tolerance: How much.
        flip: Mirror them.

    Examples:
        crossx verb a b --output c    # a comment
    """
    SEEN.append(dict(locals()))
    return 7


def seen(line: str) -> dict[str, Any]:
    assert call(verb, line.split(), "verb") == 7
    return SEEN.pop()


def test_defaults_are_those_of_the_signature() -> None:
    assert seen("r a --output o") == {
        "run": "r", "images": ["a"], "output": "o", "top": 1, "crops": 1, "seeds": [0, 1], "target": None,
        "tolerance": None, "flip": False, "data": Data(), "device": Device(),
    }  # fmt: skip


def test_values_reach_the_function_with_their_types() -> None:
    line = "r a --output o --top 0 --crops 5 --seeds 4 2 --class null --tolerance 1e-3 --flip"
    line += " --data.root 012 --data.batch_size=3 --precision fp16"
    given = seen(line)
    assert (given["top"], given["crops"], given["seeds"], given["target"]) == (0, 5, [4, 2], "null")
    assert (given["tolerance"], given["flip"]) == (1e-3, True)
    numbers = (given["top"], *given["seeds"], given["tolerance"])
    assert [type(number) for number in numbers] == [int, int, int, float]
    assert (given["data"], given["device"]) == (Data("012", 3), Device("fp16"))


@pytest.mark.parametrize(
    ("words", "seeds"),
    [
        ("--seeds 4 --seeds 2", [4, 2]),
        ("--seeds 1 0 --flip --seeds=2 --seeds 3 5", [1, 0, 2, 3, 5]),
        # as in the default, which the first replaces
        ("--seeds 0 --seeds 1", [0, 1]),
        ("--seeds 1", [1]),
    ],
)
def test_an_option_of_several_values_keeps_those_of_every_time_it_is_given(
    words: str, seeds: list[int]
) -> None:
    given = seen(f"r a --output o {words}")
    assert given["seeds"] == seeds
    assert [type(seed) for seed in given["seeds"]] == [int] * len(seeds)


def test_of_an_option_of_one_value_the_last_counts() -> None:
    given = seen("r a --output o --top 3 --output p --top 2")
    assert (given["output"], given["top"]) == ("p", 2)


@pytest.mark.parametrize(
    "line",
    [
        "r a - b --output o --flip",
        "--output o r --flip a - b",
        "r a --output=o - --flip b",
        "r --flip a - --output o -- b",
        "--flip --output o -- r a - b",
        "r a --seeds 0 1 --output o - b",
    ],
)
def test_options_and_positional_arguments_come_in_any_order(line: str) -> None:
    given = seen(line)
    assert (given["run"], given["images"], given["output"]) == ("r", ["a", "-", "b"], "o")


def test_words_after_two_dashes_are_positional() -> None:
    assert seen("--output o -- r --flip -x")["images"] == ["--flip", "-x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: RUN, IMAGES, --output; see `crossx verb --help`."),
        ("r --output o", "the following arguments are required: IMAGES; see `crossx verb --help`."),
        ("r a", "the following arguments are required: --output; see `crossx verb --help`."),
        ("r a --output", "--output: expected one argument; see `crossx verb --help`."),
        ("r a --output o --top", "--top: expected one argument; see `crossx verb --help`."),
        ("r a --output o --top -1", "--top takes a whole number of at least 0, not '-1'."),
        ("r a --output o --top 1.5", "--top takes a whole number of at least 0, not '1.5'."),
        ("r a --output o --top=", "--top takes a whole number of at least 0, not ''."),
        ("r a --output o --seeds 1 x", "--seeds takes a whole number of at least 0, not 'x'."),
        ("r a --output o --seeds 1 -2", "--seeds takes a whole number of at least 0, not '-2'."),
        ("r a --output o --seeds 1 --seeds x", "--seeds takes a whole number of at least 0, not 'x'."),
        ("r a --output o --seeds 1 --seeds", "--seeds: expected at least one argument;"),
        ("r a --output o --crops 3", "--crops takes 1, 5, not '3'."),
        ("r a --output o --tolerance nan", "--tolerance takes a number of at least 0, not 'nan'."),
        (
            "r a --output o --data.batch_size 0",
            "--data.batch_size takes a whole number of at least 1, not '0'.",
        ),
        ("r a --output o --data.rot x", "unknown option '--data.rot'. Did you mean '--data.root'?"),
        ("r a --output o --root x", "unknown option '--root'. Did you mean '--data.root'?"),
        ("r a --output o --flip=1", "--flip: ignored explicit argument '1'; see `crossx verb --help`."),
        ("r a --outpu o", "unknown option '--outpu'. Did you mean '--output'?"),
        ("r a --output o --seeds+ 3", "unknown option '--seeds+'. Did you mean '--seeds'?"),
        ("r a -x --output o", "unknown option '-x'."),
    ],
)
def test_a_wrong_line_is_refused_in_one_line(line: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        call(verb, line.split(), "verb")
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_further_options_are_passed_on_in_their_order() -> None:
    passed = []

    def outer(*others: str, output: Folder, jobs: Positive = 1) -> None:
        """Pass on.

        Args:
            output: Where.
            jobs: At once.
        """
        passed.append((others, output, jobs))

    assert call(outer, ["--optim.lr", "-1", "--jobs", "2", "--seed=3", "--output", "o", "x"], "outer") == 0
    assert passed == [(("--optim.lr", "-1", "--seed=3", "x"), "o", 2)]


def test_help_is_made_of_the_docstring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        call(verb, ["--bogus", "--help"], "verb")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: crossx verb --output DIR [--top N] [--crops {1,5}]")
    assert "\nDo something.\n\nIt takes several lines to say so.\n" in shown
    assert "examples:\n  crossx verb a b --output c    # a comment\n" in shown
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    for line in (
        "RUN The run.",
        "--top N How many. (default: 1)",
        "--seeds N [N ...] Of the run. (default: 0 1)",
        "--class NAME The class.",
        "--tolerance X How much.",
        "--flip Mirror them.",
        "images:",
        "--data.root DIR Where they are.",
        "--precision PRECISION Of the weights; 50% of the memory with fp16. (default: fp32)",
    ):
        assert line in lines


def test_options_of_other_verbs_are_named_as_the_verb_takes_them() -> None:
    def verb(dataset: Annotated[str, "NAME"], root: Annotated[str, "ROOT"], *, batch_size: int = 1) -> None:
        pass

    def own(*, data: DatasetOptions) -> None:
        pass

    message = (
        "Check --data.root, and --data.dataset (`crossx fit --data.root DIR`): --data.batch_size --optim.lr."
    )
    expected = "Check ROOT, and NAME (`crossx fit --data.root DIR`): --batch_size --optim.lr."
    assert in_words_of(build(verb, "verb"), message) == expected
    assert in_words_of(build(own, "verb"), "Give --data.level.") == "Give --data.level."
