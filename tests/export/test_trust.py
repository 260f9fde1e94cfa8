"""A file of torch.export runs code when it is loaded: none may be loaded without trust, whatever it is called."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import crossx
import layouts
from crossx.backbones import read_state_dict
from crossx.cli.main import main
from crossx.errors import CrossXError
from crossx.explain import figure
from crossx.methods.weights import load_method
from crossx.predict.collection import predict_collection
from crossx.predict.exported import ExportedModel
from crossx.predict.predictor import Predictor
from crossx.released import import_released
from crossx.training.checkpoints import read_checkpoint
from malice import pickled, write_pt2
from refusals import refusal


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the evil file, a run, an image, and, once code has run, ``pwned``."""
    folder = tmp_path_factory.mktemp("files")
    write_pt2(folder / "evil.pt2", folder / "pwned")
    layouts.write_run(folder / "run")
    layouts.write_image(folder / "photos" / "bird.jpg", 0, 0)
    return folder


@pytest.fixture
def place(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(files / "pwned", ignore_errors=True)


def ran(files: Path) -> bool:
    return (files / "pwned").exists()


def test_with_trust_the_file_runs_its_code(files: Path, place: Path) -> None:
    with pytest.raises(CrossXError):
        crossx.load("evil.pt2", trust=True)
    assert ran(files)


@pytest.mark.parametrize("name", ["evil.pt2", "evil.PT2", "evil.Pt2"])
@pytest.mark.parametrize(
    "load",
    [
        crossx.load,
        Predictor.load,
        ExportedModel.load,
        lambda path: predict_collection(path, "photos", "out"),
    ],
)
def test_without_trust_it_is_refused_in_one_line(
    load: Callable[[str], Any], name: str, files: Path, place: Path
) -> None:
    shutil.move("evil.pt2", name)
    line = refusal(load, name)
    assert line.startswith(f"{name}: loading a .pt2 file can run any code")
    assert all(word in line for word in ("ONNX", "OpenVINO", "safetensors", "--trust", "trust=True"))
    assert not Path("out").exists()
    assert not ran(files)


TRUST = "loading a .pt2 file can run any code"
ALONE = "only `crossx predict` and `crossx serve` take an exported file"
FIT = (
    "fit --data.dataset folder --data.root labelled --data.image_size 64 --output out --model.method plain "
    "--model.backbone test_resnet --model.pretrained false --trainer.max_epochs 1"
)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("predict evil.pt2 photos/bird.jpg", TRUST),
        ("predict evil.pt2 photos --output out/", TRUST),
        ("predict evil.pt2 photos --output out.csv", TRUST),
        ("predict evil.pt2 photos --features out.parquet", TRUST),
        ("predict evil.pt2 photos --output out/ --engine ray", "takes a run, not an exported file"),
        ("predict evil.pt2 photos --output out/ --engine ray --trust", "takes a run, not an exported file"),
        ("serve evil.pt2 --port 0", TRUST),
        ("explain evil.pt2 photos/bird.jpg --output out", ALONE),
        ("export evil.pt2 --output out.onnx", ALONE),
        ("share evil.pt2 --output out", ALONE),
        ("test evil.pt2", ALONE),
        ("report evil.pt2", ALONE),
        ("calibrate evil.pt2", "Give the run folder"),
        ("compare evil.pt2 run", ALONE),
        ("import-released evil.pt2 --dataset cub --output out", "not a weights file"),
        ("fit --resume evil.pt2", "no run to resume"),
        (f"{FIT} --model.backbone_weights evil.pt2", "not a weights file"),
    ],
)
def test_no_command_runs_it(
    words: str, reason: str, files: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts.write_folder(place / "labelled")
    code = main(words.split())
    err = capsys.readouterr().err
    assert code in (1, 2)
    assert err.count("\n") == 1
    assert reason in err
    assert not ran(files)


@pytest.mark.parametrize("suffix", ["onnx", "xml", "safetensors", "pt", "pth", "ckpt", "bin", ""])
@pytest.mark.parametrize("content", ["program", "pickle"])
def test_no_other_name_lets_it_in(suffix: str, content: str, files: Path, place: Path) -> None:
    name = f"renamed.{suffix}".rstrip(".")
    if content == "pickle":
        Path("evil.pt2").write_bytes(pickled(files / "pwned"))
    for folder in (Path(), Path("run"), Path("run/checkpoints")):
        folder.mkdir(exist_ok=True)
        shutil.copy("evil.pt2", folder / name)
        for load in (crossx.load, load_method, lambda path: figure(path, ["photos/bird.jpg"])):
            refusal(load, folder / name)
    for read in (read_state_dict, read_checkpoint, lambda path: import_released(path, "cub", "out")):
        refusal(read, Path(name))
    assert not ran(files)


@pytest.mark.parametrize("weights", ["model.safetensors", "checkpoints/best.ckpt", "checkpoints/last.ckpt"])
def test_no_folder_lets_it_in(weights: str, files: Path, place: Path) -> None:
    for content in (Path("evil.pt2").read_bytes(), pickled(files / "pwned")):
        Path("run/model.safetensors").unlink(missing_ok=True)
        Path("run/checkpoints").mkdir(exist_ok=True)
        Path("run", weights).write_bytes(content)
        refusal(crossx.load, "run")
        refusal(predict_collection, "run", "photos", "out", engine="ray")
    assert not ran(files)


def test_pretrained_weights_of_a_folder_run_no_code(files: Path, place: Path) -> None:
    Path("weights").mkdir()
    Path("weights/config.json").write_text('{"architecture": "test_resnet"}')
    Path("weights/pytorch_model.bin").write_bytes(pickled(files / "pwned"))
    refusal(crossx.create_method, "plain", backbone="local-dir:weights", num_classes=3, pretrained=True)
    assert not ran(files)


def test_the_help_says_what_trust_means(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("predict", "serve"):
        assert main([verb, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert (
            "can run any code on this machine when it is loaded: only for files that you made yourself"
            in text
        )


def _write_onnx(path: Path, weights: str) -> None:
    """Write a network of one sum whose weights are in another file."""
    onnx = pytest.importorskip("onnx")
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=1)
    for key, value in {"location": weights, "length": "16"}.items():
        tensor.external_data.add(key=key, value=value)
    ends = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in ("x", "y")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [tensor]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def test_weights_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = tmp_path / "model" / "evil.onnx"
    model.parent.mkdir()
    for path in (tmp_path / "secret.bin", model.parent / "own.bin"):
        path.write_bytes(bytes(16))
    (model.parent / "link.bin").symlink_to(tmp_path / "secret.bin")
    for weights in ("../secret.bin", "../model/../secret.bin", str(tmp_path / "secret.bin"), "link.bin"):
        _write_onnx(model, weights)
        assert "cannot be read as an exported network" in refusal(ExportedModel.load, model)
    _write_onnx(model, "own.bin")
    assert "was not exported by crossx" in refusal(ExportedModel.load, model)


def test_openvino_reads_nothing_but_its_own_format(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "own.bin").write_bytes(bytes(16))
    _write_onnx(tmp_path / "evil.xml", "own.bin")
    assert "it is not XML" in refusal(ExportedModel.load, tmp_path / "evil.xml")
