"""What ``crossx serve`` refuses; that it serves is tested in test_server.py."""

import sys
from pathlib import Path
from typing import Any

import pytest

from crossx.cli import serve
from crossx.cli.main import main
from crossx.errors import CrossXError
from layouts import write_run


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.txt"


def test_without_its_libraries_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = [name for name in sys.modules if name.startswith("crossx.serve.")]
    for name in set(served) - {"crossx.serve.limits"}:  # whose options the command has
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "run"]) == 2
    told = capsys.readouterr().err
    assert told == "crossx serve: error: crossx serve needs uvicorn: pip install 'crossx[serve]'.\n"


def test_keys_come_from_the_file_or_else_the_environment(
    key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CROSSX_API_KEY", raising=False)
    assert serve._api_keys(None) == []
    monkeypatch.setenv("CROSSX_API_KEY", "secret")
    assert serve._api_keys(None) == ["secret"]
    key_file.write_text("one\n\n two \n")
    assert serve._api_keys(str(key_file)) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("\n \n", "there is no API key in it"), ("schlüssel\n", "may have printable ASCII characters only")],
)
def test_keys_that_cannot_work_are_refused(key_file: Path, content: str, message: str) -> None:
    key_file.write_text(content)
    with pytest.raises(CrossXError, match=message):
        serve._api_keys(str(key_file))


def test_a_key_file_that_is_no_text_is_refused(key_file: Path) -> None:
    key_file.write_bytes(b"\xff\xfe\0")
    with pytest.raises(CrossXError, match="may have printable ASCII characters only"):
        serve._api_keys(str(key_file))


def test_an_empty_variable_is_not_taken_for_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSX_API_KEY", "")
    with pytest.raises(CrossXError, match="CROSSX_API_KEY: there is no API key"):
        serve._api_keys(None)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run", "--queue", "0"], 2, "queue must be at least 1, not 0"),
        (["run", "--api_key", "secret"], 2, "unknown option '--api_key'. Did you mean '--api_key_file'?"),
        (["run", "--api_key_file", "none.txt"], 1, "none.txt: No such file or directory"),
    ],
)
def test_wrong_options_are_told(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert main(["serve", *words]) == code
    assert message in capsys.readouterr().err


def test_a_run_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="needs crossx[serve]")
    assert main(["serve", str(tmp_path / "none"), "--port", "0"]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_the_models_name_and_version_can_be_given(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = pytest.importorskip("crossx.serve.server", reason="needs crossx[serve]")
    apps: list[Any] = []
    monkeypatch.setattr(server, "run", lambda app, *_, **__: apps.append(app))
    monkeypatch.setattr(server, "log_as_json", lambda: None)
    words = ["serve", str(write_run(tmp_path / "model")), "--port", "0", "--device", "cpu"]
    assert main([*words, "--model_name", "birds", "--model_version", "2026-03"]) == 0
    (app,) = apps
    identity = app.state.service.identity
    app.state.service.close()
    assert (identity.name, identity.version, len(identity.checksum)) == ("birds", "2026-03", 64)
    assert main([*words, "--model_version", "2026\t03"]) == 2
    assert "model_version must be 1 to 100 printable characters" in capsys.readouterr().err
