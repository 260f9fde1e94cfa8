"""Methods of other packages and files: found, imported when asked for, and never for a stranger's run."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import crossx
import layouts
from crossx import plugins
from crossx.cli.main import IMPORTING, main
from crossx.methods import Method, create_method, list_methods, registry
from crossx.methods.start import Start
from crossx.methods.weights import load_method
from crossx.predict.predictor import Predictor
from crossx.runs import Run, read_json, write_json
from crossx.training.config import Config
from crossx.training.fit import resume
from refusals import refusal

OWN = '''\
"""A method of one's own."""
from crossx.methods import Plain, register_method


@register_method("own")
class Own(Plain):
    """A backbone with a scale.

    Args:
        scale: Factor of the logits.
    """

    def __init__(self, backbone, num_classes, *, scale: float = 1.0):
        super().__init__(backbone, num_classes)
        self.scale = scale

    def head_logits(self, images):
        return {"last": self.scale * self.classifier(self.embeddings(images))}
'''
MARKED = "import os; os.mkdir({marker!r})\n"
OPTIONS = """
    --model.backbone=test_resnet --model.pretrained=false --data.root=photos --data.image_size=64 --data.num_workers=0
    --data.batch_size=2 --data.val_fraction=0 --data.test_fraction=0.34 --trainer.max_epochs=1
    --trainer.accelerator=cpu --trainer.logger=false --trainer.enable_progress_bar=false
"""
TINY = OPTIONS.split()


Forget = Callable[[], None]


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Forget]:
    """Give each test a registry and a list of trusted files of its own; the function makes this a new process."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    own = {name: cls for name, cls in registry._REGISTRY.items() if cls.__module__.startswith("crossx.")}
    modules = {*sys.modules}

    def forget() -> None:
        for name, values in (("_REGISTRY", own), ("_IMPORTED", {}), ("_LOADED", {})):
            monkeypatch.setattr(registry, name, dict(values))
        for name in {*sys.modules} - modules:
            if name.startswith(("crossx_import_", "own_")):
                del sys.modules[name]
        plugins._offers.cache_clear()

    forget()
    yield forget
    forget()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with ``mine.py`` and six photos of two classes."""
    monkeypatch.chdir(tmp_path)
    layouts.write_folder(tmp_path / "photos", classes=2, images_per_class=3)
    (tmp_path / "mine.py").write_text(OWN)
    return tmp_path


def package(root: Path, name: str, source: str, entry: str) -> Path:
    """Write a package as pip installs it: a module, and the entry point ``entry`` in its metadata."""
    (root / f"{name}.py").write_text(source)
    about = root / f"{name}-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{entry}\n")
    return root


def run_verb(*words: str) -> int:
    return main([str(word) for word in words])


def train(source: str = "mine.py", *words: str) -> None:
    """Train the method ``own`` of a file or module as the run ``run``."""
    named = ["--import", source] if source else []
    assert run_verb("fit", *named, "--model.method", "own", *words, *TINY, "--output", "run") == 0


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


def write_stranger(folder: Path, imports: Any) -> Run:
    """Write the run of a stranger, whose method is nobody's."""
    run = Run(layouts.write_run(folder))
    write_json(run.spec, {**read_json(run.spec), "method": "own"})
    write_json(run.info, {"imports": imports})
    run.config.write_text(
        Config.from_dict({"model": {"method": "own"}, "data": {"root": "x"}, "output": "x"}).to_yaml()
    )
    return run


NOT_IMPORTED = "have not imported on this machine"


def attacks(place: Path, run: Path, evil: Path) -> dict[str, Any]:
    """Return what a run of ``run.json`` may say, and what the refusal then says."""
    digest = plugins.digest(evil)
    inside = plugins.digest(run / "evil.py")
    link = place / "link.py"
    link.symlink_to(run / "evil.py")
    return {
        "in the run": ({"module": "", "path": str(run / "evil.py"), "sha256": inside}, "in the run folder"),
        "a link into the run": ({"module": "", "path": str(link), "sha256": inside}, "in the run folder"),
        "out of the run and back": (
            {"module": "", "path": str(run / ".." / run.name / "evil.py"), "sha256": inside},
            "no absolute path",
        ),
        "relative": ({"module": "", "path": "evil.py", "sha256": inside}, "no absolute path"),
        "relative to the home": ({"module": "", "path": "~/evil.py", "sha256": inside}, "no absolute path"),
        "never imported": ({"module": "", "path": str(evil), "sha256": digest}, NOT_IMPORTED),
        "another digest": ({"module": "", "path": str(evil), "sha256": "0" * 64}, NOT_IMPORTED),
        "a module": ({"module": "own_evil", "path": str(evil), "sha256": digest}, NOT_IMPORTED),
        "a module of Python": (
            {"module": "antigravity", "path": str(plugins.find_module("antigravity")),
             "sha256": plugins.digest(plugins.find_module("antigravity"))},
            NOT_IMPORTED,
        ),
        "a module in the run": (
            {"module": "evil", "path": str(run / "evil.py"), "sha256": inside},
            "in the run folder",
        ),
        "a device": ({"module": "", "path": "/dev/zero", "sha256": digest}, NOT_IMPORTED),
        "nothing": (None, "If it is one of your own, "),
    }  # fmt: skip


ATTACKS = (
    "in the run", "a link into the run", "out of the run and back", "relative", "relative to the home",
    "never imported", "another digest", "a module", "a module of Python", "a module in the run", "a device", "nothing",
)  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_strangers_run_executes_nothing(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marker, folder, evil = tmp_path / "ran", tmp_path / "run", tmp_path / "own_evil.py"
    folder.mkdir()
    # as if it were started in the run folder, which is then on Python's path
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.syspath_prepend(str(tmp_path))
    for path in (evil, folder / "evil.py", folder / "own.py", folder / "sitecustomize.py"):
        path.write_text(MARKED.format(marker=str(marker)) + OWN)
    cases = attacks(tmp_path, folder, evil)
    assert tuple(cases) == ATTACKS
    named, words = cases[attack]
    run = write_stranger(folder, named and [named])
    for call in (load_method, Predictor.load, Start.read, resume):
        assert words in refusal(call, str(run.path)), call
    if attack == "in the run":
        for line in ("test RUN", "predict RUN .", "export RUN --output m.onnx", "fit --resume RUN"):
            assert main([str(folder) if word == "RUN" else word for word in line.split()]) == 1
            assert capsys.readouterr().err.count("\n") == 1
    assert not marker.exists()
    assert not plugins.trusted_file().exists()


@pytest.mark.parametrize(
    "imports",
    [
        [{"module": "", "path": "/x.py"}],
        [{"module": "", "path": 3, "sha256": "0" * 64}],
        [{"module": "os; import evil", "path": "/x.py", "sha256": "0" * 64}],
        "mine.py",
        [["mine.py"]],
        [{"module": "", "path": "/x.py", "sha256": "0" * 64}] * 65,
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, imports: Any) -> None:
    run = write_stranger(tmp_path / "run", imports)
    assert "run.json: not provenance of a run (imports" in refusal(load_method, run.path)


def test_a_list_that_others_can_write_to_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    source = plugins.Source.find(str(tmp_path / "mine.py"))
    assert not plugins.is_trusted(source)
    plugins.trust(source)
    plugins.trust(source)
    trusted = plugins.trusted_file()
    assert len(trusted.read_text().split()) == len(json.dumps(source.to_json()).split())
    assert stat.S_IMODE(trusted.stat().st_mode) == 0o600
    assert plugins.is_trusted(source)
    trusted.chmod(0o620)
    assert not plugins.is_trusted(source)
    trusted.chmod(0o600)
    # a line that a killed process has left, and rubbish
    trusted.write_bytes(b'{"module": ""\n\xff\n[[[\n' + trusted.read_bytes()[:-1])
    assert plugins.is_trusted(source)
    (tmp_path / "mine.py").write_text(OWN + "#")
    assert not plugins.is_trusted(plugins.Source.find(str(tmp_path / "mine.py")))


@pytest.mark.slow
def test_without_a_home_a_run_is_trained_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "state").write_text("a file")
    train()
    assert "mine.py: not remembered for later commands: " in capsys.readouterr().err


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
