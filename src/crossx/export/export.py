"""Export a trained run to ONNX, OpenVINO, torch.export or safetensors.

Each file is loaded and compared with the network in eager float32 before it gets its final name.
"""

from __future__ import annotations

import copy
import errno
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from crossx.data.datamodule import DataModule
from crossx.data.transforms import Normalize
from crossx.errors import CrossXError, counted, first_line
from crossx.evaluation.data import trained_splits
from crossx.evaluation.network import TorchNetwork
from crossx.evaluation.subject import open_data
from crossx.export.onnx_graph import export_onnx, several_images
from crossx.export.options import ROUNDING, ExportOptions
from crossx.export.quantize import Control, Quantized, quantize_onnx, quantize_openvino
from crossx.export.recalibration import Recalibration, recalibrate
from crossx.export.verify import (
    Accuracy,
    Comparison,
    LabelledBatches,
    QuantizationData,
    compare,
    images_to_compare,
    measure_accuracy,
    prepared_batches,
    quantization_data,
)
from crossx.methods.weights import load_method
from crossx.predict.checksums import CHECKSUMS, exported_files, fill_checksums, reserve_checksums
from crossx.predict.exported import (
    EXTRA_FILE,
    KEY,
    ExportedModel,
    describe_export,
    without_telemetry,
)
from crossx.predict.inference import Inference
from crossx.runs import ModelSpec, Run, atomic_path, open_run, storage_error

if TYPE_CHECKING:
    import onnx

CALIBRATION_IMAGES = 300
NEARLY_FULL = 1 << 20
"""Free bytes below which a disk counts as full."""


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        build: Maps a network and an example input to a graph.
        save: Writes a graph, given its JSON description and precision.
        quantize: Maps a graph, images and, on request, the accuracy to keep to an int8 graph; None if the format has
            no int8.
    """

    build: Callable[[Inference, Tensor], Any]
    save: Callable[[Any, str, str, Path], None]
    quantize: Callable[[Any, Sequence[Tensor], Control | None], Quantized] | None = None


@dataclass(frozen=True)
class ControlledAccuracy:
    """How the accuracy of int8 was kept.

    Attributes:
        max_drop: The accepted loss of top-1 accuracy, in percentage points.
        accuracy: The accuracy on the validation images before and after.
        layers: Names of the layers with int8 weights before layers were reverted.
        reverted: Names of those that compute in float again.
        trained_on: Whether the run was trained on the validation images, too.
    """

    max_drop: float
    accuracy: Accuracy
    layers: tuple[str, ...]
    reverted: tuple[str, ...]
    trained_on: bool


@dataclass(frozen=True)
class ExportReport:
    """The exported files, and their comparison with the network in eager float32.

    Attributes:
        files: The files; the first is the one to open.
        description: See ``describe_export``.
        comparison: Comparison of the logits.
        tolerance: The accepted difference, see ``TOLERANCES``.
        accuracy: Accuracy before and after int8 quantisation.
        control: How the accuracy was kept, with ``max_drop``.
        recalibration: The thresholds that were set again for int8.
        not_recalibrated: Why the thresholds are still those of float32.
    """

    files: tuple[Path, ...]
    description: Mapping[str, Any]
    comparison: Comparison
    tolerance: float
    accuracy: Accuracy | None
    control: ControlledAccuracy | None = None
    recalibration: Recalibration | None = None
    not_recalibrated: str | None = None


def export_run(
    path: str | Path,
    output: str | Path,
    *,
    format: str | None = None,
    precision: str = "fp32",
    images: str | Path | None = None,
    root: str | Path | None = None,
    dataset: str | None = None,
    tolerance: float | None = None,
    calibration_images: int | None = None,
    accuracy_images: int | None = None,
    max_drop: float | None = None,
) -> ExportReport:
    """Export a run for any batch size, and verify the file against the network in eager float32.

    Args:
        path: A run folder (its selected weights) or a checkpoint file in one.
        output: The file to write; OpenVINO adds a ``.bin`` file with the weights.
        format: One of ``EXPORT_SUFFIXES``; by default that of the output's suffix.
        precision: ``fp32``, ``fp16`` or, for ONNX and OpenVINO, ``int8``.
        images: A folder of images for the comparison; by default the run's dataset, or random pixels if that is
            missing.
        root: Folder of the dataset; by default that of the training.
        dataset: Name of the dataset; by default the run's.
        tolerance: Accepted difference, by default that of ``TOLERANCES``.
        calibration_images: For int8, number of images to calibrate on, at least ``MIN_QUANTIZED``; by default
            ``CALIBRATION_IMAGES``.
        accuracy_images: For int8, number of images to measure accuracy on, likewise; by default the whole test split.
        max_drop: For int8, the accepted loss of top-1 accuracy on the validation images, in percentage points. Layers
            that cost more stay in float.

    Raises:
        UsageError: If the options do not fit together, or a package is missing.
        CrossXError: If the run, its images or the output cannot be used, the network cannot be exported, or the file
            differs by more than ``tolerance`` or loses more than ``max_drop``; then no file is left.
    """
    options = ExportOptions(
        Path(output), format, precision, tolerance, images, calibration_images, accuracy_images, max_drop
    )
    name = options.check()
    run, weights = open_run(path)
    method, spec = load_method(weights)
    read = cache(partial(open_data, run, spec, root=root, dataset=dataset))
    if precision == "int8" or root is not None or dataset is not None:
        read()
    compared, source = images_to_compare(read, images, spec.preprocessing)
    chosen = None
    if precision == "int8":
        chosen = quantization_data(
            read(), calibration_images or CALIBRATION_IMAGES, accuracy_images, controlled=max_drop is not None
        )

    kind = _FORMATS[name]
    network = Inference(copy.deepcopy(method), spec)
    graph = _build_graph(name, network, spec, precision)
    quantized = None
    if chosen is not None:
        quantized = _quantize(kind, graph, chosen, spec, max_drop)
        graph = quantized.graph
    reference = TorchNetwork(method, Normalize(spec.preprocessing), "cpu")
    description = describe_export(spec, name, precision, _opset(graph), network.outputs)
    with tempfile.TemporaryDirectory(prefix=f".{options.output.name}.", dir=options.output.parent) as folder:
        file = Path(folder) / options.output.name
        write = partial(_write, kind, graph, precision, file, options.output)
        model = write(description)
        recalibration, not_recalibrated = None, None
        if chosen is not None:
            recalibration, not_recalibrated = _set_thresholds_again(model, run, spec, read)
        if recalibration is not None:
            description |= recalibration.to_json()
            model = write(description)
        specs = spec, model.spec
        comparison = compare(model, reference, specs, compared, source)
        accuracy, control = None, None
        if chosen is None:
            _require_same(options.output, options.precision, comparison, options.allowed)
        else:
            assert quantized is not None
            measure = partial(measure_accuracy, model, reference, specs, len(chosen.calibration))
            if max_drop is not None:
                seen = "val" in trained_splits(run, read().config)
                control = ControlledAccuracy(
                    max_drop, measure(chosen.controlled), quantized.layers, quantized.reverted, seen
                )
                _require_kept(options.output, control)
                description["control"] = asdict(control)
            accuracy = measure(chosen.measured)
            _require_accurate(options.output, accuracy, options.allowed)
            description["accuracy"] = asdict(accuracy)
            model = write(description)
        if CHECKSUMS in model.description:
            description[CHECKSUMS] = model.description[CHECKSUMS]
        files = _publish(Path(folder), options.output.parent)
    return ExportReport(
        files, description, comparison, options.allowed, accuracy, control, recalibration, not_recalibrated
    )


def _set_thresholds_again(
    model: ExportedModel, run: Run, spec: ModelSpec, read: Callable[[], DataModule]
) -> tuple[Recalibration | None, str | None]:
    """Return the thresholds of the file, or why they are still those of float32; neither if the run has none."""
    if spec.rejection is None and spec.sets is None:
        return None, None
    try:
        return recalibrate(model, run, spec, read), None
    except CrossXError as error:
        return None, str(error)


def _write(
    kind: Format, graph: Any, precision: str, file: Path, output: Path, description: Mapping[str, Any]
) -> ExportedModel:
    """Write the graph to ``file``, which becomes ``output``, and open it."""
    # OpenVINO maps the weights of an opened file into memory, which must not change
    for earlier in exported_files(file):
        earlier.unlink(missing_ok=True)
    _save(kind, graph, {**description, **reserve_checksums(file)}, precision, file, output)
    return ExportedModel.load(file, trust=True)  # written just now


def _publish(folder: Path, destination: Path) -> tuple[Path, ...]:
    """Move all files of a folder to another one; the first one returned is the one to open."""
    # .bin before .xml, which needs it
    parts = sorted(folder.iterdir())
    for part in parts:
        with atomic_path(destination / part.name) as temporary:
            part.replace(temporary)
    return tuple(destination / part.name for part in reversed(parts))


def _build_graph(name: str, network: Inference, spec: ModelSpec, precision: str) -> Any:
    kind, size = _FORMATS[name], spec.preprocessing.image_size
    if kind.save is not _save_safetensors:
        network.use_inference_form()
    # OpenVINO stores fp16 weights and chooses the arithmetic itself
    if precision == "fp16" and name != "openvino":
        network.method.half()
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    with warnings.catch_warnings():
        # warnings of torch.export and the converters about their internals
        warnings.simplefilter("ignore")
        try:
            return kind.build(network, example)
        except OSError as error:
            raise storage_error(Path(tempfile.gettempdir()), error) from error
        except Exception as error:  # exporters raise many types for unsupported networks
            raise CrossXError(
                f"method {spec.method!r} on {spec.backbone!r} cannot be exported to {name} ({first_line(error)})."
            ) from error


def _quantize(
    kind: Format, graph: Any, images: QuantizationData, spec: ModelSpec, max_drop: float | None
) -> Quantized:
    assert kind.quantize is not None
    batches = list(prepared_batches([record.path for record in images.calibration], spec.preprocessing))
    control = None
    if max_drop is not None:
        control = Control(LabelledBatches(images.controlled, spec.preprocessing), max_drop / 100)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind.quantize(graph, batches, control)
    except CrossXError:
        raise
    except OSError as error:
        raise storage_error(Path(tempfile.gettempdir()), error) from error
    except Exception as error:  # quantisers raise many types for unsupported networks
        raise CrossXError(
            f"method {spec.method!r} on {spec.backbone!r} cannot be quantized to int8 ({first_line(error)}). Use "
            "--precision fp16."
        ) from error


def _save(
    kind: Format, graph: Any, description: Mapping[str, Any], precision: str, file: Path, output: Path
) -> None:
    """Write the graph to ``file``, which becomes ``output``."""
    try:
        kind.save(graph, json.dumps(description, ensure_ascii=False), precision, file)
        fill_checksums(file)
    except OSError as error:
        raise storage_error(output, error) from error
    except Exception as error:  # OpenVINO's and others' own errors; they do not always tell the reason
        if shutil.disk_usage(file.parent).free > NEARLY_FULL and "No space left" not in str(error):
            raise
        raise storage_error(output, OSError(errno.ENOSPC, "")) from error


def _save_onnx(graph: onnx.ModelProto, description: str, precision: str, file: Path) -> None:
    import onnx

    # the exporter notes for each node which lines of which files on this machine it comes from
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.graph.initializer):
        del part.metadata_props[:]
    onnx.helper.set_model_props(graph, {KEY: description})
    onnx.save(graph, file)


def _build_onnx(network: Inference, images: Tensor) -> onnx.ModelProto:
    return export_onnx(network, images, network.outputs)


def _build_openvino(network: Inference, images: Tensor) -> Any:
    without_telemetry()
    import onnx
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        onnx.save(_build_onnx(network, images), path)
        return openvino.convert_model(path)


def _save_openvino(graph: Any, description: str, precision: str, file: Path) -> None:
    import openvino

    graph.set_rt_info(description, KEY)
    openvino.save_model(graph, file, compress_to_fp16=precision == "fp16")


def _build_torch_export(network: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    dynamic = ({0: torch.export.Dim("batch")},)
    return torch.export.export(network, (several_images(images),), dynamic_shapes=dynamic)


def _save_torch_export(
    graph: torch.export.ExportedProgram, description: str, precision: str, file: Path
) -> None:
    # not to the file: on a full disk torch ends the process
    content = io.BytesIO()
    torch.export.save(graph, content, extra_files={EXTRA_FILE: description})
    file.write_bytes(content.getbuffer())


def _keep_network(network: nn.Module, images: Tensor) -> nn.Module:
    return network


def _save_safetensors(graph: Inference, description: str, precision: str, file: Path) -> None:
    state = {key: value.contiguous() for key, value in graph.method.state_dict().items()}
    save_file(state, file, {KEY: description})


_FORMATS = {
    "onnx": Format(_build_onnx, _save_onnx, quantize_onnx),
    "openvino": Format(_build_openvino, _save_openvino, quantize_openvino),
    "torch-export": Format(_build_torch_export, _save_torch_export),
    "safetensors": Format(_keep_network, _save_safetensors),
}


def _opset(graph: Any) -> int | None:
    """Return the version of ONNX's operators; None for other formats."""
    imports = getattr(graph, "opset_import", ())
    return next((entry.version for entry in imports if not entry.domain), None)


def _require_same(output: Path, precision: str, comparison: Comparison, allowed: float) -> None:
    """Raise ``CrossXError`` if a difference exceeds the tolerance or is NaN."""
    logits, similarities = comparison.logits, comparison.similarities
    if not logits <= allowed:
        what, how_much = "logits", f"{logits:.1e} of the largest"
    elif similarities is not None and not similarities <= allowed:
        what, how_much = "similarities to class means", f"{similarities:.1e}"
    else:
        return
    advice = "Allow" if precision == "fp32" else "Try --precision fp32, or allow"
    raise CrossXError(
        f"{output}: not written, its {what} differ from those of eager float32 by {how_much}, more than the "
        f"tolerance of {allowed:.1e} ({comparison.source}). {advice} it with --tolerance."
    )


def _require_accurate(output: Path, accuracy: Accuracy, allowed: float) -> None:
    """Raise ``CrossXError`` if the accuracy lost exceeds the tolerance."""
    (low, high) = accuracy.lost
    if not 100 * (accuracy.before - accuracy.after) <= 100 * allowed + ROUNDING:
        raise CrossXError(
            f"{output}: not written, int8 loses {accuracy.before - accuracy.after:.2%} of top-1 accuracy ({low:.2%} to "
            f"{high:.2%}, 95% interval) on {accuracy.images} images ({accuracy.before:.2%} before, "
            f"{accuracy.after:.2%} after), more than the tolerance, {allowed:.2%}. Try --max-drop, more --calibration "
            "images or --precision fp16, or allow it with --tolerance."
        )


def _require_kept(output: Path, control: ControlledAccuracy) -> None:
    """Raise ``CrossXError`` if the accuracy was not kept, or only by leaving every layer in float."""
    accuracy, reverted = control.accuracy, len(control.reverted)
    lost = 100 * (accuracy.before - accuracy.after)
    on = f"{accuracy.images} validation images"
    if lost > control.max_drop + ROUNDING:
        raise CrossXError(
            f"{output}: not written, int8 loses {lost:.2f} points of top-1 accuracy on {on} with {reverted} of "
            f"{counted(len(control.layers), 'layer')} in float, more than --max-drop {control.max_drop:g}. Allow more, "
            "try more --calibration images, or use --precision fp16."
        )
    if reverted == len(control.layers):
        raise CrossXError(
            f"{output}: not written, int8 keeps --max-drop {control.max_drop:g} on {on} only with every layer in "
            "float. Allow more, try more --calibration images, or use --precision fp16."
        )
