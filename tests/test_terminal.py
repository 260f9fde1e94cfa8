from __future__ import annotations

import logging
import os
import pty
import shlex
import threading
import time
from collections.abc import Iterator

import pytest

from crossx import terminal
from crossx.terminal import (
    columns,
    fold,
    fold_command,
    is_first_process,
    later_rank,
    paused_steps,
    showing_steps,
    speaking,
    step,
)


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def window() -> Iterator[int]:
    """A terminal's end that reads what is written to the other."""
    ours, theirs = pty.openpty()
    yield theirs
    os.close(ours)
    os.close(theirs)


def test_a_pipe_has_no_width_and_a_terminal_has_its_own(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl
    import struct
    import termios

    assert columns() is None
    fcntl.ioctl(window, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 66, 0, 0))
    with open(window, "w", closefd=False) as stream:
        assert columns(stream) == 66
        monkeypatch.setenv("COLUMNS", "50")
        assert columns(stream) == 50
    for nonsense in ("0", "1", "x", "-3"):
        monkeypatch.setenv("COLUMNS", nonsense)
        assert columns() is None


def test_lines_are_broken_between_words_and_keep_their_indentation() -> None:
    text = "  note: one two three four\nshort"
    assert fold(text, width=16, hanging="  ") == "  note: one two\n    three four\nshort"
    assert fold(text) == text
    assert fold("name      first second third", width=22) == "name      first second\n          third"


def test_a_long_word_is_kept_in_one_piece() -> None:
    path = "runs/" + "x" * 40
    assert path in fold(f"results of this: {path}", width=30).split("\n")
    assert fold(f"  file  {path}", width=46).split("\n") == ["  file", f" {path}"]


def test_a_command_that_is_broken_is_the_same_command() -> None:
    command = "$ crossx fit --config finetune --data.root images --output runs/mine"
    folded = fold_command(command, 30)
    assert max(map(len, folded.split("\n"))) <= 30
    assert shlex.split(folded.replace("\\\n", " ")) == shlex.split(command)
    assert fold_command(command, 100) == command
    commented = fold_command("  crossx predict runs/mine photos/  # all of them", 40)
    assert commented == "  # all of them\n  crossx predict runs/mine photos/"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(terminal.SILENT, "1")
    monkeypatch.setattr(terminal, "PATIENCE", 0.01)
    with showing_steps():
        yield


def wait_for(capsys: pytest.CaptureFixture[str], text: str) -> str:
    found = ""
    while text not in found:
        found += capsys.readouterr().err
        time.sleep(0.005)
    return found


@pytest.mark.usefixtures("shown")
def test_a_long_step_is_one_line_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with step("Loading"):
        with step("Reading"):
            assert wait_for(capsys, "\n") == "Reading …\n"
        assert wait_for(capsys, "\n") == "Loading …\n"


@pytest.mark.usefixtures("shown")
def test_a_step_is_not_repeated_after_an_inner_one(capsys: pytest.CaptureFixture[str]) -> None:
    with step("Testing"):
        wait_for(capsys, "Testing …\n")
        with step("Reading"):
            wait_for(capsys, "Reading …\n")
        # its thread ends without a line
        for thread in [thread for thread in threading.enumerate() if "_show" in thread.name]:
            thread.join(timeout=10)
            assert not thread.is_alive()
        assert capsys.readouterr().err == ""
        with step("Reading"):
            assert wait_for(capsys, "\n") == "Reading …\n"


@pytest.mark.usefixtures("shown")
def test_a_terminal_shows_the_seconds_and_erases_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with step("Loading"):
        assert wait_for(capsys, " s").startswith("\r\x1b[2KLoading … 0 s")
        with paused_steps():
            assert capsys.readouterr().err.endswith("\r\x1b[2K")
            assert not terminal._steps._shown
        wait_for(capsys, "Loading … ")
    assert capsys.readouterr().err.endswith("\r\x1b[2K")


def test_no_step_is_shown_in_python_or_where_it_is_switched_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE", 0.0)
    with step("Loading"):
        time.sleep(0.01)
    monkeypatch.setenv(terminal.SILENT, "0")
    with showing_steps(), step("Loading"):
        time.sleep(0.01)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        # torchrun: its RANK counts, whatever started it
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "1", "SLURM_PROCID": "1"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0", "GROUP_RANK": "1", "SLURM_PROCID": "0"}, False),
        # Lightning's own processes, on one node and on several
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
        ({"JSM_NAMESPACE_RANK": "2"}, False),
    ],
)
def test_the_first_process_is_known_from_any_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], first: bool
) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first
    name = later_rank()
    assert (name is None) == first
    assert name is None or variables[name] != "0"


def test_a_process_that_does_not_speak_logs_errors_only_and_shows_no_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE", 0.0)
    monkeypatch.delenv(terminal.SILENT, raising=False)
    caplog.set_level(logging.INFO, "crossx")
    # a handler of an earlier command
    monkeypatch.setattr(logging.getLogger("crossx"), "handlers", [])
    log = logging.getLogger("crossx.training.fit")
    for speaks in (False, True):
        with showing_steps(), speaking(speaks), step(f"step {speaks}"):
            log.warning("warning %s", speaks)
            log.error("error %s", speaks)
            time.sleep(0.1)
    assert caplog.messages == ["error False", "warning True", "error True"]
    assert capsys.readouterr().err == "step True …\n"
