"""Methods of installed packages: found by their entry points, and imported when asked for."""

from pathlib import Path

import pytest
from plugin_files import MARKED, OWN, TINY, Forget, package, run_verb

import crossx
from crossx import plugins
from crossx.methods import Method, create_method, list_methods, registry
from crossx.runs import read_json
from refusals import refusal


@pytest.fixture
def installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with the method ``own``, which notes that it is imported."""
    folder = place / "site"
    folder.mkdir()
    package(folder, "own_package", MARKED.format(marker=str(place / "ran")) + OWN, "own = own_package:Own")
    monkeypatch.syspath_prepend(folder)
    plugins._offers.cache_clear()
    return folder


@pytest.mark.slow
def test_a_method_of_a_package_is_known_to_every_verb(
    installed: Path, place: Path, forget: Forget, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = place / "own.yaml"
    recipe.write_text("model: {method: own, scale: 3.0}\n")
    assert run_verb("fit", "--config", "own.yaml", *TINY, "--output", "run") == 0
    about = read_json(place / "run" / "run.json")
    assert about["imports"] == []
    assert about["environment"]["versions"]["own-package"] == "1.2"
    for line in (
        "test run",
        "predict run photos",
        "fit --resume run --trainer.max_epochs 2",
        "explain run photos --output maps --maps activation",
        "share run --output shared",
        "predict shared photos",
    ):
        forget()
        (place / "ran").rmdir()
        assert run_verb(*line.split()) == 0, line
    assert crossx.load("shared").method.options == {"scale": 3.0}


def test_a_package_is_imported_only_when_its_method_is_asked_for(
    installed: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "own" in list_methods()
    assert run_verb("fit", "--model.method", "dfl", "--help") == 0
    assert "own" in capsys.readouterr().out.split("dfl (others: ")[1].split(")")[0].replace("\n", " ").split(
        ", "
    )
    assert run_verb("fit", "--model.method", "ownn") == 2
    assert run_verb("fit", "--model.method", "plain", "--model.scal", "1") == 2
    assert "Did you mean 'own'?" in capsys.readouterr().err
    assert not (place / "ran").exists()
    assert run_verb("fit", "--model.method", "own", "--help") == 0
    assert "--model.scale X" in capsys.readouterr().out
    assert (place / "ran").exists()


def test_a_class_that_is_not_decorated_gets_the_name_of_its_entry_point(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(place, "own_bare", OWN.replace('@register_method("own")', ""), "bare = own_bare:Own")
    monkeypatch.syspath_prepend(place)
    assert create_method("bare", backbone="test_resnet", num_classes=2, scale=2.0).name == "bare"


BROKEN = {
    "import own_nothing": "ModuleNotFoundError: No module named 'own_nothing'",
    "1 / 0": "ZeroDivisionError: division by zero",
    "raise SystemExit(1)": "SystemExit: 1",
    "def": "SyntaxError: invalid syntax, line 1",
    "Own = 3": "offers it as own_broken:Own, which registers no method of this name",
    "": "AttributeError: module 'own_broken' has no attribute 'Own'",
    OWN.replace('"own"', '"plain"'): "ValueError: method 'plain' is registered twice",
    OWN.replace('"own"', '"owner"'): "offers it as own_broken:Own, which registers no method of this name",
    "class Own: pass": "TypeError: Own is not a subclass of crossx.methods.Method",
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_broken_package_is_one_line_and_breaks_no_other_method(
    source: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package(place, "own_broken", source, "broken = own_broken:Own")
    monkeypatch.syspath_prepend(place)
    assert "broken" in list_methods()
    assert run_verb("fit", "--model.method", "broken", "--data.root", "photos") == 1
    error = capsys.readouterr().err
    assert error.startswith("crossx fit: error: method 'broken': package own-broken ")
    assert BROKEN[source] in error
    assert error.count("\n") == 1
    assert issubclass(registry.method_class("plain"), Method)
    assert run_verb("fit", "--model.method", "plain", "--model.nothing", "1") == 2
    assert "own-broken" not in capsys.readouterr().err
    assert "owner" not in list_methods()


def test_metadata_of_a_package_that_cannot_be_read_hides_no_other(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, content in enumerate((b"\xff\xfe", b"[crossx.methods]\nx", b"[crossx.methods]\nbad = :::\n")):
        about = installed / f"own_rubbish{number}-1.dist-info"
        about.mkdir()
        (about / "entry_points.txt").write_bytes(content)
    assert "own" in list_methods()


def test_two_packages_with_one_name_are_named(
    installed: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(place, "own_second", OWN, "own = own_second:Own")
    monkeypatch.syspath_prepend(place)
    message = refusal(registry.method_class, "own")
    assert "'own' is offered by the packages own-" in message
    assert "own-second" in message
    assert "own-package" in message


def test_the_methods_of_crossx_keep_their_names(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(place, "own_plain", "1 / 0", "plain = own_plain:Plain")
    monkeypatch.syspath_prepend(place)
    assert registry.method_class("plain").__module__ == "crossx.methods.plain"
    assert list_methods().count("plain") == 1
