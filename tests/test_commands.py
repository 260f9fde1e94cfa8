"""Printed commands, as a shell reads them."""

import os
import subprocess
from pathlib import Path

import pytest

from crossx.cli.main import main
from crossx.commands import command, path_word, quoted
from crossx.evaluation.predictions import Predictions
from crossx.runs import Run, find_run, open_run, resume_command
from crossx.terminal import fold_command
from refusals import refusal

WORDS = [
    "runs/mine",
    "my runs/a",
    'it\'s "so"',
    "$HOME `id` \\ !x;&|<>*?[]{}~#(1)",
    "",
    "a\nb\tc'd\\e",
    os.fsdecode(b"latin-\xe9 x"),
    "vögel/日本",
]


def shell_words(line: str, shell: str = "bash") -> list[str]:
    """Return the words of a command as a shell understands them."""
    script = f"crossx() {{ printf '%s\\0' \"$@\"; }}\n{line}"
    found = subprocess.run([shell, "-c", script], check=True, capture_output=True).stdout
    return [os.fsdecode(word) for word in found.split(b"\0")[:-1]]


def test_a_shell_reads_the_words_that_were_given():
    assert shell_words(command("fit", *WORDS)) == ["fit", *WORDS]
    printable = [word for word in WORDS if word.isprintable()]
    assert shell_words(command(*printable), "sh") == printable
    assert all(quoted(word).isprintable() for word in WORDS)


def test_simple_words_stay_as_they_are_and_a_path_is_no_option():
    assert command("test", Path("runs/a-b_c.d"), "--split", "val") == "crossx test runs/a-b_c.d --split val"
    assert command("test", Path("-x")) == "crossx test ./-x"
    assert [path_word(Path(name)) for name in ("-x/a", "x/-a", "/-x")] == ["./-x/a", "x/-a", "/-x"]
    assert resume_command(Run(Path("my runs")), restart=True) == "crossx fit --resume 'my runs' --restart"


@pytest.mark.parametrize("width", [20, 30, 80, 200])
def test_a_folded_command_is_the_same_command(width: int):
    folders = ["it's my own folder of runs/a", "photos and  # so on", "it's a\ttab and  # more"]
    words = ["predict", *folders, "--top", "3"]
    assert shell_words(fold_command(command(*words), width)) == words


def test_messages_about_a_folder_with_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(Path("my runs/a"))
    (run.path / "empty").mkdir(parents=True)
    run.config.touch()
    for message, words in (
        (refusal(open_run, run.path / "empty"), ["fit", "--output", "my runs/a/empty"]),
        (refusal(find_run, run.path / "empty"), ["fit", "--output", "my runs/a/empty"]),
        (refusal(find_run, run.path / "x.ckpt"), ["fit", "--resume", "my runs/a"]),
        (refusal(run.require_results, "val", ()), ["test", "my runs/a", "--split", "val"]),
        (
            refusal(Predictions.load, run.path / "x.npz", run.path, "val"),
            ["test", "my runs/a", "--split", "val"],
        ),
    ):
        assert shell_words(message.split("`")[1]) == words
    assert main(["new-method", "mine", "--output", "my runs/method"]) == 0
    assert "next: pip install -e 'my runs/method' && pytest 'my runs/method'; " in capsys.readouterr().out
