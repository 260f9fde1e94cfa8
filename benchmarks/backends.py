"""The inference backends that inference.py compares.

Each takes a network in evaluation mode and a batch of images, and returns a function from such batches (float32,
contiguous) to logits (float32). All use ``torch.get_num_threads()`` threads.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from crossx.export.onnx_graph import export_onnx

Run: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to run a network.

    Attributes:
        name: Its name in ``--backends``.
        precision: ``fp32`` or ``bf16``.
        variant: Distinguishes backends of the same name and precision.
        prepare: Builds the timed function from a network and an example batch.
        device: The only device type that it supports; None for any.
        needs: Required packages.
        max_batch: The largest supported batch size; None for any.
    """

    name: str
    precision: str
    variant: str
    prepare: Callable[[nn.Module, Tensor], Run]
    device: str | None = None
    needs: tuple[str, ...] = ()
    max_batch: int | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.precision, self.variant)))

    def fits(self, device: torch.device, batch: int) -> bool:
        return self.device in (None, device.type) and batch <= (self.max_batch or batch)

    def missing(self) -> list[str]:
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


def run_torch(
    network: nn.Module,
    example: Tensor,
    layout: torch.memory_format = torch.channels_last,
    bf16: bool = False,
    compile_options: dict[str, Any] | None = None,
) -> Run:
    own: Callable[[Tensor], Any] = copy.deepcopy(network).to(memory_format=layout)  # type: ignore[call-overload]
    if compile_options is not None:
        own = torch.compile(own, fullgraph=True, dynamic=False, **compile_options)

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            return prediction(own(images.to(memory_format=layout))).float()

    return run


def run_onnxruntime(network: nn.Module, example: Tensor) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        return open_onnxruntime(save_onnx(network, example, Path(folder)))


def run_openvino(network: nn.Module, example: Tensor, precision: str) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        return open_openvino(save_onnx(network, example, Path(folder)), precision)


def save_onnx(network: nn.Module, example: Tensor, folder: Path) -> Path:
    import onnx

    path = folder / "network.onnx"
    onnx.save(export_onnx(network, example, ["logits"]), path)
    return path


def open_onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def open_openvino(path: Path, precision: str) -> Run:
    """Open an ONNX or OpenVINO file with precision ``f32`` or ``bf16``."""
    import openvino

    # by default, OpenVINO computes in bfloat16 on processors that support it
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda images: torch.from_numpy(compiled(images.numpy())["logits"].copy())


def prediction(answer: Any) -> Tensor:
    """Sum the logits of the three heads, which other implementations return before the features."""
    return answer if isinstance(answer, Tensor) else sum(answer[:3])


ONNX = ("onnx", "onnxscript")
FREEZING = {"options": {"freezing": True}}
GRAPHS = {"mode": "reduce-overhead"}

BACKENDS = (
    Backend("eager", "fp32", "contiguous", partial(run_torch, layout=torch.contiguous_format)),
    Backend("eager", "fp32", "channels_last", run_torch),
    Backend("eager", "bf16", "channels_last", partial(run_torch, bf16=True)),
    Backend("compile", "fp32", "", partial(run_torch, compile_options=FREEZING), "cpu"),
    Backend("compile", "bf16", "", partial(run_torch, bf16=True, compile_options=FREEZING), "cpu"),
    Backend("compile", "fp32", "", partial(run_torch, compile_options={}), "cuda"),
    Backend("compile", "bf16", "", partial(run_torch, bf16=True, compile_options={}), "cuda"),
    Backend("compile", "fp32", "graphs", partial(run_torch, compile_options=GRAPHS), "cuda", max_batch=8),
    Backend(
        "compile",
        "bf16",
        "graphs",
        partial(run_torch, bf16=True, compile_options=GRAPHS),
        "cuda",
        max_batch=8,
    ),
    Backend("onnxruntime", "fp32", "", run_onnxruntime, "cpu", (*ONNX, "onnxruntime")),
    Backend("openvino", "fp32", "", partial(run_openvino, precision="f32"), "cpu", (*ONNX, "openvino")),
    Backend("openvino", "bf16", "", partial(run_openvino, precision="bf16"), "cpu", (*ONNX, "openvino")),
)
