"""Exported files against the network that they were made of. ONNX, OpenVINO and NNCF are in ``crossx[export]``."""

import errno
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TypeAlias

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import layouts
from crossx.data.image_files import find_images
from crossx.export import export as export_module
from crossx.export.export import ExportReport, export_run
from crossx.export.options import PACKAGES
from crossx.methods import create_method, list_methods
from crossx.methods.weights import describe, load_method, save_weights
from crossx.predict.exported import ExportedModel, is_exported, without_telemetry
from crossx.predict.predictor import Predictor
from crossx.runs import (
    EXPORT_SUFFIXES,
    EXPORTED,
    PREDICTS_ALONE,
    ModelSpec,
    Preprocessing,
    Run,
    write_json,
)
from refusals import refusal
from slow import slow_except

pytestmark = pytest.mark.usefixtures("one_onnx_export")

CLASSES = tuple(sorted(layouts.FOLDERS))
TEMPERATURE = 1.7
EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_without_crossx.py"


def require(format_: str, precision: str = "fp32") -> None:
    """Skip the test where the packages of a format are missing."""
    packages = {"onnx": ["onnxscript", "onnxruntime"], "openvino": ["onnxscript", "openvino"]}.get(
        format_, []
    )
    for package in packages + ["nncf"] * (format_ == "openvino" and precision == "int8"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Cross-X run with a temperature, whose data are not there."""
    root = layouts.write_run(tmp_path_factory.mktemp("run"), CLASSES)
    spec = replace(Run(root).read_spec(), temperature=TEMPERATURE)
    write_json(Run(root).spec, spec.to_json())
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.write_folder(tmp_path_factory.mktemp("photos"), classes=3, images_per_class=8)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough images for int8: 33 in the test split."""
    return layouts.write_folder(tmp_path_factory.mktemp("many"), classes=3, images_per_class=55)


Exports: TypeAlias = Callable[..., ExportReport]


@pytest.fixture(scope="module")
def export(run: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Export the run once for each format and precision, into a folder of its own."""

    @functools.cache
    def export(format_: str, precision: str = "fp32") -> ExportReport:
        require(format_)
        output = tmp_path_factory.mktemp("exported") / f"network{EXPORT_SUFFIXES[format_]}"
        return export_run(run, output, format=format_, precision=precision, images=photos)

    return export


@pytest.fixture(scope="module")
def batch(run: Path, photos: Path) -> Tensor:
    """Real images as the run's evaluation prepares them, uint8 (5, 3, 64, 64)."""
    predictor = Predictor.load(run, device="cpu")
    return torch.stack([predictor.prepare(path) for path in find_images(photos)[:5]])


def probabilities(run: Path, images: Tensor) -> Tensor:
    """Classify with the run itself, in label order."""
    predictor = Predictor.load(run, device="cpu")
    rows = [dict(row) for row in predictor.classify(images, top=len(CLASSES))]
    return torch.tensor([[row[name] for name in predictor.classes] for row in rows])


@pytest.mark.parametrize("format_", slow_except(EXPORT_SUFFIXES, "onnx", "openvino", "safetensors"))
@pytest.mark.slow
def test_the_file_gives_the_runs_numbers(format_: str, run: Path, export: Exports, batch: Tensor) -> None:
    report = export(format_)
    assert sorted(report.files[0].parent.iterdir()) == sorted(report.files)
    assert report.comparison.difference <= 1e-4
    assert (report.comparison.images, report.comparison.same_class) == (16, 16)
    model = ExportedModel.load(report.files[0], trust=True)
    assert model.classes == CLASSES
    assert model.spec == Run(run).read_spec()
    assert model.description == json.loads(json.dumps(report.description))
    for images in (batch[:1], batch[:3], batch):
        torch.testing.assert_close(model.classify(images), probabilities(run, images), rtol=1e-4, atol=1e-6)
        expected = (model.logits(images) / TEMPERATURE).softmax(1)
        torch.testing.assert_close(model.classify(images), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_methods())
def test_every_method_exports_to_onnx(name: str, photos: Path, tmp_path: Path) -> None:
    require("onnx")
    torch.manual_seed(0)
    method = create_method(name, backbone="test_resnet", num_classes=3, image_size=64)
    preprocessing = Preprocessing(64, None, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    spec = describe(method, classes=CLASSES, preprocessing=preprocessing, dataset="folder")
    write_json(Run(tmp_path).spec, spec.to_json())
    save_weights(method, Run(tmp_path).weights)
    report = export_run(tmp_path, tmp_path / "network.onnx", images=photos)
    assert report.description["method"] == name
    assert report.comparison.same_class == report.comparison.images


@pytest.mark.slow
def test_the_onnx_file_holds_no_path_of_this_machine(export: Exports) -> None:
    content = export("onnx").files[0].read_bytes()
    assert b"stack_trace" not in content
    assert str(Path(__file__).parents[2]).encode() not in content


@pytest.mark.slow
def test_the_onnx_file_convolves_maps_no_more_often_than_the_trunk(export: Exports) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(export("onnx").files[0]).graph
    trunk = create_method("plain", backbone="test_resnet", num_classes=3)
    # the convolutions of gates, merge and heads are on pooled maps, without padding
    padded = [
        node
        for node in graph.node
        if node.op_type == "Conv" and any(any(a.ints) for a in node.attribute if a.name == "pads")
    ]
    of_trunk = [m for m in trunk.modules() if isinstance(m, torch.nn.Conv2d) and any(m.padding)]
    assert len(padded) == len(of_trunk)
    assert "Einsum" not in {node.op_type for node in graph.node}


@pytest.mark.parametrize("format_", slow_except(EXPORT_SUFFIXES, "safetensors"))
def test_half_precision_halves_the_file(format_: str, export: Exports) -> None:
    whole, half = export(format_), export(format_, "fp16")
    assert half.description["precision"] == "fp16"
    assert 0 < half.comparison.difference <= 2e-2
    sizes = [sum(file.stat().st_size for file in report.files) for report in (whole, half)]
    assert sizes[1] < 0.75 * sizes[0]


@pytest.mark.parametrize("format_", slow_except(["onnx", "openvino"], "onnx"))
@pytest.mark.slow
def test_int8_tells_its_accuracy(format_: str, run: Path, many: Path, tmp_path: Path) -> None:
    require(format_, "int8")
    photos, output = many, tmp_path / f"network{EXPORT_SUFFIXES[format_]}"
    report = export_run(
        run, output, precision="int8", root=photos, dataset="folder", tolerance=1.0, calibration_images=40
    )
    accuracy = report.accuracy
    assert accuracy is not None
    assert (accuracy.split, accuracy.images, accuracy.calibration_images) == ("test", 33, 40)
    assert accuracy.lost.low <= accuracy.before - accuracy.after <= accuracy.lost.high
    assert accuracy.agreement.low < accuracy.same_class / accuracy.images <= accuracy.agreement.high
    method, spec = load_method(run)
    predictor = Predictor.from_method(method, spec, "cpu")
    model = ExportedModel.load(output)
    assert model.description["accuracy"]["after"] == accuracy.after
    images = torch.stack([predictor.prepare(path) for path in find_images(photos)])
    expected = probabilities(run, images)
    found = model.classify(images)
    assert 0 < (found - expected).abs().max() < 0.1
    torch.testing.assert_close(found, (model.logits(images) / TEMPERATURE).softmax(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "dataset 'folder' has 18 images to calibrate int8 on and 6 to measure its accuracy, and 32 of each",
        ),
        ({"calibration_images": 31}, "--calibration must be at least 32, not 31"),
        ({"accuracy_images": 2}, "--accuracy must be at least 32, not 2"),
    ],
)
def test_few_images_are_refused_for_int8(
    options: dict[str, int], message: str, run: Path, photos: Path, tmp_path: Path
) -> None:
    require("onnx")
    output = tmp_path / "x.onnx"
    assert message in refusal(
        export_run, run, output, precision="int8", root=photos, dataset="folder", **options
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["onnx", "openvino"])
def test_max_drop_tells_what_was_kept(format_: str, run: Path, tmp_path: Path) -> None:
    require(format_, "int8")
    pytest.importorskip("nncf")
    photos = layouts.write_folder(tmp_path / "photos", classes=3, images_per_class=150)
    output = tmp_path / f"network{EXPORT_SUFFIXES[format_]}"
    report = export_run(
        run, output, precision="int8", root=photos, dataset="folder", tolerance=1.0, max_drop=100
    )
    control = report.control
    assert control is not None
    assert (control.max_drop, control.reverted, control.trained_on) == (100, (), False)
    assert (control.accuracy.split, control.accuracy.images) == ("val", 36)
    # the convolutions and heads of the network
    assert {"backbone.trunk.layer1.0.conv1", "heads.previous"} <= {*control.layers}
    assert len({*control.layers}) == len(control.layers) > 10
    described = ExportedModel.load(output).description["control"]
    assert described["accuracy"]["after"] == control.accuracy.after
    assert described["layers"] == list(control.layers)


def test_max_drop_needs_validation_images(run: Path, many: Path, tmp_path: Path) -> None:
    require("onnx")
    pytest.importorskip("nncf")
    options = {"root": many, "dataset": "folder", "max_drop": 0.2}
    message = refusal(export_run, run, tmp_path / "x.onnx", precision="int8", **options)
    assert message.startswith("dataset 'folder' has 12 validation images for --max-drop, and 32 are needed. ")
    assert not list(tmp_path.iterdir())


def test_a_format_without_nncf_says_so(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("onnx")
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nncf" else found(name))
    message = refusal(export_run, run, tmp_path / "x.onnx", precision="int8", max_drop=1)
    assert message == "--max-drop needs nncf: pip install 'crossx[export]'."


class OpenVINOError(RuntimeError):
    """An exporter's own error without a reason."""


@pytest.mark.parametrize("format_", EXPORT_SUFFIXES)
@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False),
        (RuntimeError("I/O error: No space left on device (os error 28)"), False),
        (OpenVINOError("cannot write"), True),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    format_: str, error: Exception, full: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(format_)

    def save(graph: object, description: str, precision: str, file: Path) -> None:
        file.write_bytes(b"half")
        raise error

    if full:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    kind = replace(export_module._FORMATS[format_], build=lambda *_: None, save=save)
    monkeypatch.setitem(export_module._FORMATS, format_, kind)
    output = tmp_path / f"x{EXPORT_SUFFIXES[format_]}"
    message = refusal(export_run, run, output, images=None)
    assert message.startswith(f"{output}: no space left on the disk.")
    assert not list(tmp_path.iterdir())


def test_without_images_random_pixels_are_compared(run: Path, tmp_path: Path) -> None:
    report = export_run(run, tmp_path / "x.safetensors")
    assert report.comparison.source.startswith("random pixels: dataset 'folder' needs --data.root")


def test_past_the_tolerance_no_file_is_left(run: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    message = refusal(export_run, run, output, precision="fp16", images=photos, tolerance=0.0)
    assert "x.safetensors: not written, its logits differ" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("x.onx", {}, "must end in the suffix of a format: .onnx (onnx)"),
        ("x.xml", {"format": "onnx"}, "a file of --format onnx must end in .onnx"),
        ("x.onnx", {"format": "onxx"}, "unknown format 'onxx'. Did you mean 'onnx'?"),
        ("x.pt2", {"precision": "fp8"}, "unknown precision 'fp8'"),
        (
            "x.pt2",
            {"precision": "int8"},
            "--format torch-export has no int8. Choose from: onnx, openvino.",
        ),
        ("x.onnx", {"max_drop": 0.5}, "--calibration, --accuracy and --max-drop require --precision int8."),
        (
            "x.onnx",
            {"precision": "int8", "max_drop": 101},
            "--max-drop takes percentage points, from 0 to 100, not 101.",
        ),
        (
            "x.onnx",
            {"precision": "int8", "max_drop": math.nan},
            "--max-drop takes percentage points, from 0 to 100, not nan.",
        ),
        (
            "x.onnx",
            {"precision": "int8", "max_drop": 2.5},
            "--max-drop 2.5 accepts more than --tolerance 0.02, which is 2 points on the test images: give --tolerance "
            "0.025 too, or a lower --max-drop.",
        ),
        (
            "x.xml",
            {"precision": "int8", "max_drop": 0.7, "tolerance": 0.005},
            "--max-drop 0.7 accepts more than --tolerance 0.005, which is 0.5 points on the test images",
        ),
        ("x.safetensors", {"images": "missing"}, "missing"),
        ("x.safetensors", {"root": "missing"}, "missing"),
    ],
)
def test_what_cannot_work_is_refused(
    output: str, options: dict[str, str], message: str, run: Path, tmp_path: Path
) -> None:
    assert message in refusal(export_run, run, tmp_path / output, **options)
    assert not list(tmp_path.iterdir())


def test_the_formats_are_those_whose_packages_are_named() -> None:
    assert set(PACKAGES) == set(EXPORT_SUFFIXES) == set(export_module._FORMATS)
    for name, kind in export_module._FORMATS.items():
        assert (PACKAGES[name].int8 is None) == (kind.quantize is None)


def test_int8_needs_the_data(run: Path, tmp_path: Path) -> None:
    require("onnx")
    message = refusal(export_run, run, tmp_path / "x.onnx", precision="int8")
    assert "needs --data.root" in message


def test_a_missing_package_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(export_run, run, tmp_path / "x.onnx")
    assert message.endswith("needs onnx, onnxscript, onnxruntime: pip install 'crossx[export]'.")


def test_other_files_are_no_exported_ones(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"nothing")
    assert is_exported(broken)
    assert not is_exported(run)
    assert not is_exported(Run(run).weights)
    (tmp_path / "folder.onnx").mkdir()
    assert not is_exported(tmp_path / "folder.onnx")
    assert {*EXPORTED, ".safetensors"} == set(EXPORT_SUFFIXES.values())
    require("onnx")
    assert "broken.onnx: cannot be read as an exported network" in refusal(ExportedModel.load, broken)
    assert "gone.onnx: no such file" in refusal(ExportedModel.load, tmp_path / "gone.onnx")
    assert "exported files end in" in refusal(ExportedModel.load, run)
    assert "was not exported by crossx" in refusal(ExportedModel.load, Run(run).weights)


def test_the_predictor_takes_an_exported_file(run: Path, photos: Path, export: Exports) -> None:
    file = export("safetensors").files[0]
    exported, own = Predictor.load(file), Predictor.load(run, device="cpu")
    for found, expected in zip(exported.predict(photos, top=3), own.predict(photos, top=3), strict=True):
        assert found.path == expected.path
        assert dict(found.top) == pytest.approx(dict(expected.top), rel=1e-4)
    assert PREDICTS_ALONE in refusal(lambda: exported.method)
    assert "runs only on the CPU" in refusal(Predictor.load, file, device="cuda")


def test_the_description_says_how_an_image_becomes_the_input(run: Path, export: Exports) -> None:
    said = export("safetensors").description
    assert said["classes"] == CLASSES
    assert said["temperature"] == TEMPERATURE
    assert said["input"]["resize"] == {"width": 72, "height": 72}
    assert ModelSpec.from_json(said, run) == Run(run).read_spec()


@pytest.mark.slow
def test_the_example_needs_no_crossx(run: Path, photos: Path, export: Exports) -> None:
    paths = find_images(photos)
    # -I: neither PYTHONPATH nor the working folder; what the script imports of crossx would be installed
    answer = subprocess.run(
        [sys.executable, "-I", EXAMPLE, export("onnx").files[0], *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "crossx" not in "".join(re.findall(r"^(?:import|from) .*$", EXAMPLE.read_text(), re.MULTILINE))
    rows = [line.split("\t") for line in answer.stdout.splitlines()]
    predictions = Predictor.load(run, device="cpu").predict(paths)
    assert [row[:2] for row in rows] == [[str(p.path), p.label] for p in predictions]
    # Pillow's resizing differs from the run's by a grey level here and there
    assert [float(row[2]) for row in rows] == pytest.approx([p.probability for p in predictions], abs=2e-3)


def test_the_page_shows_the_example() -> None:
    page = EXAMPLE.parents[1] / "docs" / "export.md"
    assert EXAMPLE.read_text(encoding="utf-8") in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_is_wrong_with_an_openvino_file_is_told(export: Exports, tmp_path: Path) -> None:
    graph, weights = (Path(file) for file in export("openvino").files)
    copied = tmp_path / "mine.xml"
    copied.write_bytes(graph.read_bytes())
    missing = refusal(ExportedModel.load, copied)
    assert missing.endswith("mine.xml: its weights are missing: copy mine.bin to the same folder.")
    copied.with_suffix(".bin").write_bytes(weights.read_bytes()[:100])
    assert "exported network (Incorrect weights in bin file" in refusal(ExportedModel.load, copied)


@pytest.mark.parametrize(
    ("format_", "damaged"),
    [
        ("onnx", "network.onnx"),
        ("openvino", "network.bin"),
        ("openvino", "network.xml"),
        pytest.param("torch-export", "network.pt2", marks=pytest.mark.slow),
        ("safetensors", "network.safetensors"),
    ],
)
def test_a_changed_byte_is_found(format_: str, damaged: str, export: Exports, tmp_path: Path) -> None:
    for file in export(format_).files:
        shutil.copy(file, tmp_path)
    changed = tmp_path / damaged
    opened = tmp_path / f"network{EXPORT_SUFFIXES[format_]}"
    assert ExportedModel.load(opened, trust=True).classes == CLASSES
    intact = bytearray(changed.read_bytes())
    content = intact.copy()
    if damaged == "network.xml":
        # still a network, but another one
        content = content.replace(b'exclude-pad="false"', b'exclude-pad="true"', 1)
    else:
        content[len(content) * 6 // 10] ^= 1
    assert content != intact
    changed.write_bytes(content)
    assert refusal(ExportedModel.load, opened, trust=True) == (
        f"{changed}: damaged, its checksum is not that of the export: copy it or export it again."
    )
    changed.write_bytes(intact)
    ExportedModel.load(opened, trust=True)


@pytest.mark.parametrize("format_", ["onnx", "openvino", "safetensors"])
def test_the_checksums_are_those_of_the_files(format_: str, export: Exports) -> None:
    report = export(format_)
    checksums = report.description["sha256"]
    assert set(checksums) == {file.suffix for file in report.files}
    for file in report.files:
        content = file.read_bytes()
        if file == report.files[0]:
            content = content.replace(checksums[file.suffix].encode(), b"")
        assert hashlib.sha256(content).hexdigest() == checksums[file.suffix]


@pytest.mark.parametrize("stored", [["x"], {".safetensors": 1}, {".safetensors": "\ud800"}, {}])
def test_a_checksum_that_is_none_is_refused(stored: object, export: Exports, tmp_path: Path) -> None:
    file = export("safetensors").files[0]
    with safe_open(file, "pt") as opened:
        described = json.loads(opened.metadata()["crossx"])
    copy = tmp_path / "copy.safetensors"
    save_file(load_file(file), copy, {"crossx": json.dumps({**described, "sha256": stored})})
    assert "copy.safetensors: damaged" in refusal(ExportedModel.load, copy)


def test_openvino_sends_no_usage_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "openvino_telemetry")
    without_telemetry()
    assert sys.modules["openvino_telemetry"] is None
    pytest.importorskip("openvino")
    assert "openvino.tools.ovc.telemetry_stub" in sys.modules
    # a program that has imported it has its own reasons
    monkeypatch.setitem(sys.modules, "openvino_telemetry", json)
    without_telemetry()
    assert sys.modules["openvino_telemetry"] is json


CLOSED_IN_A_THREAD = """
import gc, signal, subprocess, sys, threading
from crossx.predict.exported import ExportedModel

signal.signal(signal.SIGCHLD, lambda *_: None)
opened = [ExportedModel.load(sys.argv[1])]
thread = threading.Thread(target=lambda: (opened.clear(), gc.collect()))
thread.start()
thread.join()
for _ in range(3):
    subprocess.run([sys.executable, "-c", ""], check=True)
print("alive")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="this system has no signal at the end of a child")
def test_a_process_survives_signals_after_a_thread_closed_its_openvino_file(export: Exports) -> None:
    file = export("openvino").files[0]
    ended = subprocess.run(
        [sys.executable, "-c", CLOSED_IN_A_THREAD, file], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "alive\n"), ended.stderr
