"""Exported networks: their description, and running them for prediction."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crossx.data.geometry import MAX_ASPECT, resized_side
from crossx.errors import CrossXError, UsageError, check_flag, counted, first_line
from crossx.explain.maps import Explanation, Kind
from crossx.methods.base import Method
from crossx.methods.weights import load_network
from crossx.predict.checksums import CHECKSUMS, check_checksums, damaged
from crossx.predict.inference import OUTPUTS, SIMILARITIES, Inference
from crossx.runs import EXPORT_SUFFIXES, EXPORTED, PREDICTS_ALONE, ModelSpec, is_intact, parse_json

if TYPE_CHECKING:
    import onnxruntime
    import openvino

Compute: TypeAlias = Callable[[Tensor], Sequence[Tensor]]
"""Images, uint8 (B, 3, S, S), to the outputs of ``Inference``."""

KEY = "crossx"
"""Key of the description in a file's metadata."""
EXTRA_FILE = f"{KEY}.json"
"""The same for files of torch.export."""


_OUTPUTS = {
    "logits": "float32 (batch, classes)",
    "probabilities": "softmax(logits / temperature)",
    SIMILARITIES: "float32 (batch,), cosine of the features to the nearest class mean",
}


def without_telemetry() -> None:
    """Keep OpenVINO and NNCF, which are imported next, from sending usage data over the network.

    They do so unless a file in the home forbids it, and from a process that they fork, which can hang. Without the
    package for it they go on. If the program has imported that itself, nothing changes.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def describe_export(
    spec: ModelSpec, format_: str, precision: str, opset: int | None, outputs: Sequence[str] = OUTPUTS
) -> dict[str, Any]:
    """Return the JSON description of an exported file.

    It contains ``model.json`` and the preprocessing of images, for users without crossx.

    Args:
        spec: The run's description.
        format_: One of ``EXPORT_SUFFIXES``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        opset: Version of ONNX's operators; None for other formats.
        outputs: See ``Inference.outputs``.
    """
    prep = spec.preprocessing
    side = resized_side(prep)
    return {
        **spec.to_json(),
        "crossx_version": version("crossx"),
        "format": format_,
        "precision": precision,
        "opset": opset,
        "input": {
            "name": "images",
            "type": "uint8",
            "layout": "NCHW",
            "colors": "RGB",
            "size": prep.image_size,
            "crop_bottom": prep.crop_bottom,
            "max_aspect": MAX_ASPECT,
            "resize": {"shorter_side": side} if prep.resize_size is None else {"width": side, "height": side},
            "interpolation": prep.interpolation,
            "antialias": True,
            "crop": "center",
        },
        "outputs": {name: _OUTPUTS[name] for name in outputs},
    }


class ExportedModel:
    """An exported file as a ``Network`` that only predicts, on the CPU.

    Args:
        description: See ``describe_export``.
        compute: Runs the network.
        source: The file, for messages.

    Attributes:
        spec: ``model.json`` of the exported run.
        source: The file.
    """

    device = torch.device("cpu")
    precision = torch.float32
    explains = False

    def __init__(self, description: Mapping[str, Any], compute: Compute, source: Path) -> None:
        self.description = dict(description)
        self.spec = ModelSpec.from_json(description, source)
        self._compute, self.source = compute, source

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        precision: str = "auto",
        *,
        trust: bool = False,
    ) -> ExportedModel:
        """Open a file of ``export_run`` in any format; OpenVINO computes in float32 even if bfloat16 is faster.

        Args:
            path: The file.
            device: ``auto`` or ``cpu``.
            precision: ``auto``, since the file has its own.
            trust: Whether to load a ``.pt2`` file, which can run any code; only for files that you made.

        Raises:
            UsageError: For another device, precision or format, a missing package, or ``.pt2`` without ``trust``.
            CrossXError: If there is no such file, it is damaged, or it was not exported by crossx.
        """
        if str(device) not in ("auto", "cpu"):
            raise UsageError(f"{path}: an exported file runs only on the CPU, not on {str(device)!r}.")
        if precision != "auto":
            raise UsageError(
                f"{path}: an exported file has the precision that `crossx export --precision` gave it: leave out "
                f"precision {precision!r}."
            )
        file = Path(path)
        reader = {
            ".onnx": _read_onnx,
            ".xml": _read_openvino,
            ".pt2": _read_torch_export,
            ".safetensors": _read_safetensors,
        }.get(file.suffix.lower())
        if reader is None:
            raise UsageError(f"{file}: exported files end in {', '.join(EXPORT_SUFFIXES.values())}.")
        if not file.is_file():
            raise CrossXError(f"{file}: no such file.")
        require_trust(file, trust)
        try:
            text, compute = reader(file)
        except (ImportError, CrossXError):
            raise
        except Exception as error:  # each runtime has its own errors for a damaged file
            raise CrossXError(f"{file}: cannot be read as an exported network ({_reason(error)}).") from error
        description = parse_json(text, file)
        check_checksums(file, description.get(CHECKSUMS))
        return cls(description, compute, file)

    @property
    def classes(self) -> tuple[str, ...]:
        """The K class names in label order."""
        return self.spec.classes

    def logits(self, images: Tensor) -> Tensor:
        """Return logits, float32 (B, K), of uint8 RGB images (B, 3, S, S), decoded, resized and cropped."""
        return self._answer(images)[0]

    @property
    def has_similarities(self) -> bool:
        """See ``Network``."""
        outputs = self.description.get("outputs")
        return isinstance(outputs, Mapping) and SIMILARITIES in outputs

    def logits_and_similarities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and similarities, see ``Network``."""
        logits, _, similarities = self._answer(images)
        return logits, similarities

    def classify(self, images: Tensor) -> Tensor:
        """Return probabilities, float32 (B, K); arguments as in ``logits``."""
        return self._answer(images)[1]

    def _answer(self, images: Tensor) -> Sequence[Tensor]:
        try:
            answers = self._compute(images)
            shapes = [tuple(answer.shape) for answer in answers]
        except Exception as error:  # each runtime has its own errors for a wrong input
            raise CrossXError(
                f"{self.source}: cannot classify images of the size in its description ({_reason(error)})."
            ) from error
        expected = [(len(images), len(self.classes))] * 2 + [(len(images),)] * self.has_similarities
        if shapes != expected:
            returned = ", ".join(map(str, shapes)) or "nothing"
            described = counted(len(self.classes), "class") + " and similarities" * self.has_similarities
            raise CrossXError(
                f"{self.source}: returns {returned}, but describes {described}: the file is damaged."
            )
        return answers

    @property
    def method(self) -> Method:
        """Always raises, see ``Network.method``."""
        raise self._predicts_only()

    def embeddings(self, images: Tensor) -> Tensor:
        """Always raise, see ``Network.embeddings``."""
        raise self._predicts_only()

    def maps(
        self, images: Tensor, kind: Kind, classes: int | None, probabilities: Tensor
    ) -> list[Explanation]:
        """Always raise, see ``Network.maps``."""
        raise self._predicts_only()

    def _predicts_only(self) -> UsageError:
        return UsageError(f"{self.source}: {PREDICTS_ALONE}")


def is_exported(path: str | Path) -> bool:
    """Whether a path is an exported file, by its suffix and, for safetensors, its metadata."""
    file = Path(path)
    if file.suffix.lower() != EXPORT_SUFFIXES["safetensors"]:
        return file.suffix.lower() in EXPORTED and not file.is_dir()
    try:
        with safe_open(file, "pt") as opened:
            return KEY in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return False


def require_trust(path: str | Path, trust: bool) -> None:
    """Raise ``UsageError`` for a ``.pt2`` file without ``trust``: loading it unpickles and runs its content."""
    check_flag("trust", trust)
    if not trust and Path(path).suffix.lower() == EXPORT_SUFFIXES["torch-export"]:
        raise UsageError(
            f"{path}: loading a .pt2 file can run any code that is in it. Exchange models as ONNX, OpenVINO or "
            "safetensors; give --trust (Python: trust=True) for a file that you made yourself."
        )


def open_session(network: Path | bytes) -> onnxruntime.InferenceSession:
    """Open an ONNX file, or its content, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])


def _read_onnx(file: Path) -> tuple[str, Compute]:
    session = open_session(file)
    text = session.get_modelmeta().custom_metadata_map.get(KEY)

    present = {output.name for output in session.get_outputs()}
    names = [name for name in _OUTPUTS if name in present or name in OUTPUTS]

    def run(images: Tensor) -> Sequence[Tensor]:
        return [
            torch.from_numpy(answer) for answer in session.run(names, {"images": images.contiguous().numpy()})
        ]

    return _required(text, file), run


@cache
def openvino_core() -> openvino.Core:
    """Return OpenVINO, started once per process and never ended.

    Its processor plugin gives the thread that first compiles a network a stack for signals, and takes it back when
    the last core ends. If that is in another thread, the next signal ends the process, such as that of a child's end.
    """
    without_telemetry()
    import openvino

    return openvino.Core()


def _read_openvino(file: Path) -> tuple[str, Compute]:
    with file.open("rb") as opened:
        # OpenVINO goes by the content: ONNX under this name could name weights in other folders
        if not opened.read(64).lstrip().startswith(b"<"):
            raise CrossXError(f"{file}: is not an OpenVINO file (it is not XML).")
    weights = file.with_suffix(".bin")
    if not weights.is_file():
        raise CrossXError(f"{file}: its weights are missing: copy {weights.name} to the same folder.")
    core = openvino_core()
    model = core.read_model(file)
    text = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else None
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(model, "CPU", settings)
    present = {name for output in compiled.outputs for name in output.names}
    names = [name for name in _OUTPUTS if name in present or name in OUTPUTS]

    def run(images: Tensor) -> Sequence[Tensor]:
        answers = compiled(images.contiguous().numpy())
        # the runtime reuses this memory for its next result
        return [torch.from_numpy(answers[name].copy()) for name in names]

    return _required(text, file), run


def _read_torch_export(file: Path) -> tuple[str, Compute]:
    if not is_intact(file):  # torch does not look at these checksums
        raise damaged(file)
    extra = {EXTRA_FILE: ""}
    module = torch.export.load(file, extra_files=extra).module()
    return _required(extra[EXTRA_FILE], file), torch.inference_mode()(module)


def _read_safetensors(file: Path) -> tuple[str, Compute]:
    with safe_open(file, "pt") as opened:
        text = _required((opened.metadata() or {}).get(KEY), file)
    spec = ModelSpec.from_json(parse_json(text, file), file)
    method = load_network(spec, file, file)
    return text, torch.inference_mode()(Inference(method, spec))


def _reason(error: Exception) -> str:
    """Return the line of a runtime's error that says why; OpenVINO's is the last one, after places in its source."""
    lines = str(error).strip().splitlines()
    return first_line(RuntimeError(lines[-1]) if str(error).startswith("Exception from ") else error)


def _required(text: str | None, file: Path) -> str:
    if not text:
        raise CrossXError(f"{file}: was not exported by crossx: it has no class names.")
    return text
