"""``crossx share`` and RUN as the name of a model on the Hub."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import hub_stub
import layouts
from crossx.cli.main import main
from crossx.runs import Run, write_json
from hub_stub import Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    layouts.write_image(tmp_path / "bird.jpg", 0, 0)
    with hub_stub.serve() as (content, address):
        hub_stub.use(monkeypatch, address, str(tmp_path / "cache"), token="secret")
        content.writers.add("secret")
        yield content


@pytest.mark.slow
def test_a_run_is_shared_and_used_by_its_name(hub: Hub, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["share", run, "--hub", "me/birds", "--private", "--license", "mit"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("shared: http://127.0.0.1:")
    assert f"the model card has no results: run `crossx test {run}` first." in shown.err
    assert hub.private == {"me/birds"}
    assert main(["predict", "me/birds", "bird.jpg", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert main(["predict", run, "bird.jpg", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == table
    assert main(["predict", "me/birds", ".", "--output", "../out", "--device", "cpu"]) == 0
    assert main(["explain", "me/birds", "bird.jpg", "--output", "maps", "--device", "cpu"]) == 0
    assert Path("maps/bird.png").is_file()


def test_a_folder_is_shared(hub: Hub, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["share", run, "--output", "shared", "--figure", "bird.jpg"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "shared: shared\n"
    assert "--license ID names one" in shown.err
    assert "activation_maps.png" in ModelCard.load(Path("shared/README.md")).text
    assert main(["predict", "shared", "bird.jpg", "--device", "cpu"]) == 0
    assert hub.requests == []


def test_a_run_calibrated_after_its_test_is_told(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(layouts.write_run(tmp_path / "run"))
    results = {
        "weights": "model.safetensors",
        "n": 4,
        "split": "test",
        "top1": 0.5,
        "class_mean": 0.5,
        "ece": 0.25,
    }
    write_json(run.path / "test.json", {**results, "dataset": "folder", "temperature": 1.0})
    assert main(["share", "run", "--output", "shared", "--license", "mit"]) == 0
    assert capsys.readouterr().err == ""
    write_json(run.spec, {**run.read_spec().to_json(), "temperature": 2.0})
    assert main(["share", "run", "--output", "shared", "--license", "mit"]) == 0
    assert capsys.readouterr().err == (
        "crossx share: the model card has no calibration error, since the run was calibrated after its test: "
        "run `crossx test run` first.\n"
    )


@pytest.fixture
def refused(hub: Hub, run: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(code: int, *words: str) -> str:
        assert main([run if word == "RUN" else word for word in words]) == code
        lines = capsys.readouterr().err.splitlines()
        (line,) = [line for line in lines if not line.startswith("downloading ")]
        return line

    return call


@pytest.mark.parametrize(
    ("code", "words", "expected"),
    [
        (2, "share RUN", "give either --output DIR or --hub USER/NAME."),
        (2, "share RUN --output a --hub me/a", "give either"),
        (2, "share RUN --output a --private", "--private needs --hub"),
        (2, "share RUN --hub birds", "'birds' names no repository"),
        (2, "share RUN --output a --license CC_BY", "license 'CC_BY' is not a licence identifier"),
        (2, "share RUN --output .", ".: holds other files (bird.jpg)"),
        (1, "share nowhere --output a", "nowhere: no such run folder or checkpoint file"),
        (1, "share RUN --output a --figure none.jpg", "none.jpg: no such file"),
        (1, "predict me/none bird.jpg", "no such run folder or checkpoint file, and no such model on the"),
        (2, "test me/none --split no", "unknown split"),
    ],
)
def test_what_cannot_work_is_refused(
    refused: Callable[..., str], code: int, words: str, expected: str
) -> None:
    assert expected in refused(code, *words.split())
    assert not Path("a/model.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["test", "report"])
def test_results_of_a_model_on_the_hub_have_no_place(
    hub: Hub, run: str, refused: Callable[..., str], capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert main(["share", run, "--hub", "me/birds", "--license", "mit"]) == 0
    capsys.readouterr()
    assert "`hf download me/birds --local-dir DIR`" in refused(2, verb, "me/birds")
