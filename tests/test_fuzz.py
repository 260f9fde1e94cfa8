"""The fuzz targets: inputs that failed once, and a few seconds of each."""

import subprocess
import sys
from pathlib import Path

import pytest

import fuzzing

CORPUS = list(fuzzing.corpus())


pytestmark = pytest.mark.usefixtures("forked_mat")


@pytest.mark.parametrize("parser", sorted({parser for parser, _, _ in CORPUS}))
@pytest.mark.filterwarnings("ignore")
def test_inputs_that_failed_once_are_read_or_refused_in_one_line(parser: str, tmp_path: Path) -> None:
    target = fuzzing.TARGETS[parser]
    target.write(tmp_path)
    for name, path in [(name, path) for own, name, path in CORPUS if own == parser]:
        original = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(path.read_bytes())
        assert fuzzing.problem_of(target.read, tmp_path) == "", path
        (tmp_path / name).write_bytes(original)


@pytest.mark.slow
def test_a_traceback_a_second_line_and_a_signal_are_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> None:
        content = (path / "file").read_bytes()
        if content != b"abc" * 9 and len(content) <= 200:
            raise ZeroDivisionError("x")
        if len(content) > 200:
            fuzzing.os.kill(fuzzing.os.getpid(), fuzzing.signal.SIGKILL)

    target = fuzzing.Target(
        lambda path: (path / "file").write_bytes(b"abc" * 9), ("file",), read, (b"x" * 500,)
    )
    monkeypatch.setitem(fuzzing.TARGETS, "broken", target)
    fuzzer = fuzzing.Fuzzer("broken", tmp_path / "work", tmp_path / "failures")
    for _ in range(20):
        fuzzer.run(0.2)
    found = "\n".join(fuzzer.figures.failures)
    assert "SIGKILL" in found
    assert "ZeroDivisionError" in found
    assert fuzzer.figures.inputs > 0
    assert any(path.is_file() for path in (tmp_path / "failures").rglob("*"))


@pytest.mark.slow
def test_a_few_seconds_of_each_target_find_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, fuzzing.__file__, "--seconds", "60", "--failures", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in fuzzing.TARGETS)
