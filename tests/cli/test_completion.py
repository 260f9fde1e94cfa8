import os
import subprocess
import sys
from pathlib import Path

import pytest

from crossx.cli.main import VERBS
from crossx.recipes import list_recipes


def completions(line: str, place: Path) -> list[str]:
    """Complete a line as a shell that ``register-python-argcomplete`` has prepared does."""
    answer = place / "answer"
    request = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    command = [sys.executable, "-m", "crossx"]
    done = subprocess.run(
        command, env=os.environ | request, cwd=place, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    return [word.strip() for word in answer.read_text().split("\n")]


def test_verbs(tmp_path: Path) -> None:
    assert {*VERBS} <= {*completions("crossx ", tmp_path)}
    assert completions("crossx cal", tmp_path) == ["calibrate"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("crossx fit --data.ro", ["--data.root"]),
        ("crossx fit --optim.schedule c", ["constant", "cosine"]),
        ("crossx fit --model.use_merged t", ["true"]),
        ("crossx fit --model.method p", ["pdisconet", "plain", "pn_cnn", "probe"]),
        (
            "crossx fit --config crossx_cub",
            [name for name in list_recipes() if name.startswith("crossx_cub")],
        ),
        # the options of the recipe's method, and of the default one where there is no such recipe
        ("crossx fit --config nts_cub_resnet50 --model.num", ["--model.num_proposals", "--model.num_crops"]),
        ("crossx fit --config nonsense --model.num", ["--model.num_parts"]),
        ("crossx explain run photos --maps ", ["activation", "class", "both"]),
        ("crossx predict run ph", ["photos/"]),
        ("crossx datasets check --j", ["--json"]),
        ("crossx import-released file --pre", ["--previous_pooling"]),
    ],
)
def test_options_and_values(line: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert completions(line, tmp_path) == expected
