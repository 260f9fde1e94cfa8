"""Methods of other files and modules: imported when asked for, and remembered by their runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_files import MARKED, OWN, TINY, Forget, run_verb, train

import crossx
import layouts
from crossx import plugins
from crossx.cli.main import IMPORTING
from crossx.methods import create_method, list_methods, registry
from crossx.methods.start import Start
from crossx.methods.weights import load_method
from crossx.predict.predictor import Predictor
from crossx.runs import Run, read_json, write_json
from refusals import refusal


def test_a_run_imports_what_its_user_has_named(place: Path, forget: Forget) -> None:
    registry.import_methods(["mine.py"])
    run = Run(layouts.write_run(place / "run", method="own"))
    write_json(
        run.info,
        {"imports": [source.to_json() for source in registry.origin(registry.method_class("own"))[0]]},
    )
    for call in (load_method, Predictor.load, Start.read):
        forget()
        assert "own" not in list_methods()
        call(str(run.path))
        assert "own" in list_methods()
    forget()
    (place / "mine.py").write_text(OWN + "1 / 0")
    assert f"{place / 'mine.py'} has changed since the training: give --import" in refusal(
        load_method, run.path
    )
    (place / "mine.py").unlink()
    assert "Its code cannot be found" in refusal(load_method, run.path)
    # downloaded, it is a stranger's, whatever it says
    (place / "mine.py").write_text(OWN)
    load_method(run.path)
    forget()
    assert "If it is one of your own, " in refusal(
        registry.recall_method, "own", Run(run.path, hub="user/name")
    )


@pytest.mark.slow
def test_a_file_is_remembered_by_its_run(
    place: Path, forget: Forget, capsys: pytest.CaptureFixture[str]
) -> None:
    train("mine.py", "--model.scale", "2")
    (source,) = read_json(place / "run" / "run.json")["imports"]
    assert source == plugins.Source.find("mine.py").to_json()
    assert source["path"] == str(place / "mine.py")
    assert plugins.VARIABLE not in os.environ

    for line in ("test run", "predict run photos", "report run", "export run --output m.safetensors"):
        forget()
        assert run_verb(*line.split()) == 0, line
    forget()
    assert run_verb("fit", "--resume", "run", "--trainer.max_epochs", "2") == 0
    forget()
    assert run_verb("fit", "--init", "run", "--model.method", "plain", *TINY, "--output", "other") == 0
    assert read_json(place / "other" / "run.json")["imports"] == []
    forget()
    method = crossx.load("run").method
    assert (method.name, method.options) == ("own", {"scale": 2.0})
    capsys.readouterr()

    # an exported file and a copy without run.json belong to nobody
    forget()
    assert run_verb("predict", "m.safetensors", "photos") == 1
    assert "m.safetensors: unknown method 'own'. If it is one of your own, " in capsys.readouterr().err
    assert run_verb("predict", "m.safetensors", "photos", "--import=mine.py") == 0
    forget()
    (place / "run" / "run.json").unlink()
    assert run_verb("test", "run") == 1
    assert "model.json: unknown method 'own'. If it is one of your own, " in capsys.readouterr().err


@pytest.mark.slow
def test_a_changed_file_is_imported_only_if_it_is_named(
    place: Path, forget: Forget, capsys: pytest.CaptureFixture[str]
) -> None:
    train()
    marker = place / "ran"
    (place / "mine.py").write_text(OWN + MARKED.format(marker=str(marker)))
    forget()
    capsys.readouterr()
    assert run_verb("test", "run") == 1
    assert f"{place / 'mine.py'} has changed since the training: give --import" in capsys.readouterr().err
    assert not marker.exists()
    assert run_verb("test", "run", "--import", "mine.py") == 0
    assert marker.exists()

    # in one process, the newer content counts
    marker.rmdir()
    (place / "mine.py").write_text(OWN.replace("self.scale * ", "0 * ") + MARKED.format(marker=str(marker)))
    assert run_verb("fit", "--resume", "run", "--trainer.max_epochs", "2", "--import", "mine.py") == 0
    assert marker.exists()
    assert read_json(place / "run" / "run.json")["imports"] == [plugins.Source.find("mine.py").to_json()]
    forget()
    (place / "mine.py").unlink()
    capsys.readouterr()
    assert run_verb("predict", "run", "photos") == 1
    assert "Its code cannot be found" in capsys.readouterr().err


@pytest.mark.slow
def test_a_module_is_remembered_too(place: Path, forget: Forget, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "own_package").mkdir()
    (place / "own_package" / "__init__.py").write_text("")
    (place / "own_package" / "method.py").write_text(OWN)
    monkeypatch.syspath_prepend(place)
    train("own_package.method")
    assert read_json(place / "run" / "run.json")["imports"][0]["module"] == "own_package.method"
    forget()
    assert run_verb("test", "run") == 0
    forget()
    (place / "own_package" / "method.py").write_text(OWN + "\n# changed\n")
    assert "has changed since the training" in refusal(load_method, "run")


WRONG = {
    "missing.py": "missing.py: no such file.",
    "folder": "folder: a folder. Give the file",
    "folder.py": "folder.py: a folder. Give the file",
    "./notes.txt": "./notes.txt: a file of Python ends in .py.",
    "no-module": "neither a file that ends in .py nor the name of a module.",
    "own_nowhere": "own_nowhere: no such module on Python's path",
    "os.nowhere": "os.nowhere: no such module on Python's path",
    "sys": "sys: a module without a source file.",
    "": "the value is empty",
    "nothing.py": "nothing.py: registers no method: decorate a subclass",
    "syntax.py": "syntax.py: cannot be imported (SyntaxError: invalid syntax, line 1).",
    "raises.py": "raises.py: cannot be imported (ZeroDivisionError: division by zero, line 2).",
    "exits.py": "exits.py: cannot be imported (SystemExit: 3, line 1).",
    "twice.py": "twice.py: cannot be imported (ValueError: method 'plain' is registered twice, line ",
    "other.py": "other.py: cannot be imported (TypeError: Other is not a subclass of crossx.methods.Method, line ",
    "named.py": "named.py: cannot be imported (ValueError: 'a b' is not the name of a method: use letters",
    "two:parts.py": "two:parts.py: the path contains ':': rename it.",
}


@pytest.mark.parametrize("word", WRONG)
def test_what_cannot_be_imported_is_one_line(
    word: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("folder", "folder.py"):
        (place / folder).mkdir()
    for name, text in {
        "notes.txt": "",
        "nothing.py": "import crossx",
        "syntax.py": "def",
        "raises.py": f"{OWN.splitlines()[0]}\n1 / 0",
        "exits.py": "raise SystemExit(3)",
        "twice.py": OWN.replace('"own"', '"plain"'),
        "other.py": "from crossx.methods import register_method\n@register_method('other')\nclass Other: pass",
        "named.py": OWN.replace('"own"', '"a b"'),
        "two:parts.py": OWN,
    }.items():
        (place / name).write_text(text)
    before = list_methods()
    assert run_verb("test", "run", "--import", word) in (1, 2)
    error = capsys.readouterr().err
    assert WRONG[word] in error
    assert error.count("\n") == 1
    assert list_methods() == before
    assert not plugins.trusted_file().exists()


def test_verbs_without_methods_do_not_import(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("recipes", "--import", "mine.py") == 2
    assert capsys.readouterr().err.startswith(
        "crossx recipes: error: --import belongs to verbs that use a method: fit, "
    )
    for words in (["--import"], ["--import", "--output", "x"]):
        assert run_verb("test", *words) == 2
        assert "--import takes a file or a module of Python" in capsys.readouterr().err


@pytest.mark.parametrize("verb", IMPORTING)
def test_help_shows_it(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(verb, "--help") == 0
    assert "--import FILE_OR_MODULE" in capsys.readouterr().out


def test_the_variable_imports_as_the_option_does(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, str(place / "mine.py"))
    assert create_method("own", backbone="test_resnet", num_classes=2).name == "own"


@pytest.mark.slow
def test_child_processes_know_it(place: Path, forget: Forget) -> None:
    (place / "suite.yaml").write_text("variants:\n  own: {}\n  plain: {model: {method: plain}}\n")
    words = [
        "ablate",
        "--import",
        "mine.py",
        "--suite",
        "suite.yaml",
        "--model.method",
        "own",
        *TINY,
        "--output",
        "out",
    ]
    assert run_verb(*words) == 0
    results = read_json(place / "out" / "results.json")
    assert results
    about = read_json(place / "out" / "own" / "seed-0" / "run.json")
    assert about["imports"] == [plugins.Source.find("mine.py").to_json()]


@pytest.mark.slow
def test_processes_of_a_training_know_it(place: Path) -> None:
    command = [sys.executable, "-m", "crossx", "fit", "--import", "mine.py", "--model.method", "own", *TINY]
    done = subprocess.run(
        [*command, "--trainer.devices", "2", "--output", "run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "crossx", "test", "run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
