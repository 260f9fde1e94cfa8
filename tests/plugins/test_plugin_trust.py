"""What a run of a stranger says is never imported."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from plugin_files import MARKED, OWN, train

import layouts
from crossx import plugins
from crossx.cli.main import main
from crossx.methods.start import Start
from crossx.methods.weights import load_method
from crossx.predict.predictor import Predictor
from crossx.runs import Run, read_json, write_json
from crossx.training.config import Config
from crossx.training.fit import resume
from refusals import refusal


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
