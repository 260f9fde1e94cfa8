"""Post-training quantisation to int8, calibrated on real images and, on request, with control of the accuracy."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from crossx.export.biases import correct_biases
from crossx.layers import MergedLogits
from crossx.predict.exported import open_session, openvino_core, without_telemetry
from crossx.predict.inference import SIMILARITIES

if TYPE_CHECKING:
    import onnx
    import openvino

Classify: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Images, (B, 3, S, S), to probabilities, (B, K)."""

TIE = 1e-6
"""Weight of the true class's probability in the controlled accuracy; far less than one image counts."""
RANKED_BATCHES = 20
"""Batches to rank the layers on by their effect on the accuracy."""


@dataclass(frozen=True)
class Control:
    """The accuracy that int8 must keep.

    Attributes:
        batches: Images, uint8 (B, 3, S, S), and their class indices, (B,); read many times.
        max_drop: The accepted loss of top-1 accuracy on them, such as 0.002.
    """

    batches: Iterable[tuple[Tensor, Tensor]]
    max_drop: float


@dataclass(frozen=True)
class Quantized:
    """A quantised graph.

    Attributes:
        graph: The graph.
        layers: Names of the layers with int8 weights before layers were reverted.
        reverted: Names of those that are in float again, to keep the accuracy.
    """

    graph: Any
    layers: tuple[str, ...]
    reverted: tuple[str, ...] = ()


def quantize_onnx(
    graph: onnx.ModelProto, batches: Sequence[Tensor], control: Control | None = None
) -> Quantized:
    """Quantise a graph to int8 weights and activations in ONNX's QDQ format.

    By ONNX Runtime and, if that costs more accuracy than ``control`` accepts, by NNCF, whose graphs are slower. Weights
    use 7 bits: processors without VNNI or AMX add two products in 16 bits, which could overflow otherwise
    (``reduce_range``, https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html; NNCF's
    ``OverflowFix``). The biases make up for most of what the rounding costs, see ``correct_biases``; NNCF does so, too.

    What stays in float: the layers that only the similarities need, since rejection depends on them and they take next
    to no time, and the pooling of Cross-X's merge, which takes longer in int8 (docs/export.md compares both).

    Args:
        graph: A graph of ``export_onnx``.
        batches: Images to calibrate on, uint8 (B, 3, S, S).
        control: The accuracy to keep; layers that cost too much of it stay in float.
    """
    quantized = _quantize_with_onnx_runtime(graph, batches)
    if control is None:
        return quantized
    before, after = (
        _accuracy(_classify_onnx(network), control.batches)[0] for network in (graph, quantized.graph)
    )
    if before - after <= _max_drop(control):
        return quantized
    return _quantize_with_nncf(graph, batches, control, _onnx_runtime)


def _quantize_with_onnx_runtime(graph: onnx.ModelProto, batches: Sequence[Tensor]) -> Quantized:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.inputs: Iterator[Tensor] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            images = next(self.inputs, None)
            return None if images is None else {"images": images.contiguous().numpy()}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        whole, path = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        # from a file, since quantize_static modifies a graph in memory
        onnx.save(graph, whole)
        quantize_static(
            whole,
            path,
            Reader(),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[*_onnx_in_float(graph), *_onnx_wiring(graph).only_for(SIMILARITIES)],
        )
        quantized = onnx.load(path)
    correct_biases(graph, quantized, batches)
    return Quantized(quantized, _onnx_layers(quantized))


def quantize_openvino(
    graph: openvino.Model, batches: Sequence[Tensor], control: Control | None = None
) -> Quantized:
    """Quantise a graph to int8 weights and activations with NNCF; arguments as in ``quantize_onnx``."""
    return _quantize_with_nncf(graph, batches, control, _openvino_runtime)


@dataclass(frozen=True)
class _Runtime:
    """How NNCF handles the graphs of a format.

    Attributes:
        item: Turns images into what NNCF passes to the network.
        classify: Turns what NNCF passes to the validation function into a function of images.
        layers: Names the layers with int8 weights.
        wiring: Returns which nodes read which.
        in_float: Names nodes that stay in float, with those that only the similarities need.
        read: Reads the fully quantised network, which NNCF writes.
        suffix: Suffix of its file.
        parameters: NNCF's advanced parameters of the quantisation.
    """

    item: Callable[[NDArray[np.uint8]], Any]
    classify: Callable[[Any], Classify]
    layers: Callable[[Any], tuple[str, ...]]
    wiring: Callable[[Any], _Wiring]
    in_float: Callable[[Any], list[str]]
    read: Callable[[Path], Any]
    suffix: str
    parameters: Any = None


def _quantize_with_nncf(
    graph: Any, batches: Sequence[Tensor], control: Control | None, runtime: Callable[[], _Runtime]
) -> Quantized:
    without_telemetry()
    import nncf

    api = runtime()
    images = [api.item(image[None].contiguous().numpy()) for batch in batches for image in batch]
    # constants and outputs are not among the nodes that NNCF can ignore
    names = [*api.wiring(graph).only_for(SIMILARITIES), *api.in_float(graph)]
    ignored = nncf.IgnoredScope(names=names, validate=False)
    options = {
        "preset": nncf.QuantizationPreset.MIXED, "subset_size": len(images), "ignored_scope": ignored
    }  # fmt: skip
    nncf.set_log_level(logging.ERROR)
    if control is None:
        with _quiet():
            quantized = nncf.quantize(
                graph, nncf.Dataset(images), advanced_parameters=api.parameters, **options
            )
        return Quantized(quantized, api.layers(quantized))

    with tempfile.TemporaryDirectory() as folder, _quiet():
        quantized = nncf.quantize_with_accuracy_control(
            graph,
            nncf.Dataset(images),
            nncf.Dataset(control.batches),
            lambda model, items: _accuracy(api.classify(model), items),
            max_drop=_max_drop(control),
            drop_type=nncf.DropType.ABSOLUTE,
            advanced_quantization_parameters=api.parameters,
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=RANKED_BATCHES, intermediate_model_dir=folder
            ),
            **options,
        )
        first = api.layers(api.read(Path(folder) / f"intermediate_model{api.suffix}"))
    left = set(api.layers(quantized))
    return Quantized(quantized, first, tuple(name for name in first if name not in left))


def _max_drop(control: Control) -> float:
    """Return the accepted loss of ``_accuracy``."""
    # rounding, and the share of the probabilities
    return control.max_drop + 2 * TIE


def _accuracy(classify: Classify, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, list[float]]:
    """Return the top-1 accuracy, with ties broken by the mean probability of the true class, and that per batch."""
    per_batch, sizes = [], []
    for images, targets in batches:
        probabilities, labels = classify(images.contiguous().numpy()), targets.numpy()
        right = probabilities.argmax(1) == labels
        # the ties are below the precision of float32
        true_class = probabilities[np.arange(len(labels)), labels].astype(np.float64)
        per_batch.append(float((right + TIE * true_class).mean()))
        sizes.append(len(labels))
    return float(np.average(per_batch, weights=sizes)), per_batch


def _openvino_runtime() -> _Runtime:
    def classify(compiled: Any) -> Classify:
        return lambda images: compiled(images)["probabilities"]

    return _Runtime(
        lambda images: images, classify, _openvino_layers, _openvino_wiring, lambda graph: [],
        openvino_core().read_model, ".xml",
    )  # fmt: skip


def _onnx_runtime() -> _Runtime:
    import nncf
    import onnx
    from nncf.quantization.advanced_parameters import QuantizationParameters, QuantizerPropagationRule

    # with scales per channel, or without int8 sums, ONNX Runtime computes convolutions next to them in float
    parameters = nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.ENABLE,
        activations_quantization_params=QuantizationParameters(per_channel=False),
        quantizer_propagation_rule=QuantizerPropagationRule.DO_NOT_MERGE_BRANCHES,
    )
    return _Runtime(
        lambda images: {"images": images}, _classify_onnx, _onnx_layers, _onnx_wiring, _onnx_in_float,
        onnx.load, ".onnx", parameters,
    )  # fmt: skip


def _classify_onnx(graph: onnx.ModelProto) -> Classify:
    session = open_session(graph.SerializeToString())
    return lambda images: session.run(["probabilities"], {"images": images})[0]


def _openvino_layers(graph: openvino.Model) -> tuple[str, ...]:
    """Name the layers with int8 weights."""
    return tuple(
        op.get_friendly_name().removesuffix("/WithoutBiases")
        for op in graph.get_ordered_ops()
        if op.get_type_name() in ("Convolution", "GroupConvolution", "MatMul") and _has_int8_weights(op)
    )


def _has_int8_weights(op: Any) -> bool:
    node, quantized = op.input_value(1).get_node(), False
    while node.get_type_name() in ("Convert", "FakeQuantize", "Multiply", "Reshape", "Subtract", "Transpose"):
        quantized |= node.get_type_name() == "FakeQuantize"
        node = node.input_value(0).get_node()
    # stored as int8, or as float that is rounded to int8 values
    return node.get_type_name() == "Constant" and (
        quantized or node.get_element_type().to_string() in ("i8", "u8")
    )


def _onnx_layers(graph: onnx.ModelProto) -> tuple[str, ...]:
    dequantized = {
        output for node in graph.graph.node if node.op_type == "DequantizeLinear" for output in node.output
    }
    return tuple(
        node.name
        for node in graph.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in dequantized
    )


@dataclass(frozen=True)
class _Wiring:
    """Which nodes of a graph read which.

    Attributes:
        inputs: Node -> nodes that it reads.
        outputs: Output of the graph -> the node that it is of.
    """

    inputs: Mapping[str, Sequence[str]]
    outputs: Mapping[str, str]

    def only_for(self, output: str) -> list[str]:
        """Return the nodes on which no other output depends; none if there is no such output."""
        others = [node for name, node in self.outputs.items() if name != output]
        own = [node for name, node in self.outputs.items() if name == output]
        return sorted(self._needed(own) - self._needed(others))

    def _needed(self, nodes: Iterable[str]) -> set[str]:
        found: set[str] = set()
        left = [*nodes]
        while left:
            node = left.pop()
            if node not in found:
                found.add(node)
                left += self.inputs[node]
        return found


def _onnx_wiring(graph: onnx.ModelProto) -> _Wiring:
    made_by = {output: node.name for node in graph.graph.node for output in node.output}
    inputs = {
        node.name: [made_by[name] for name in node.input if name in made_by] for node in graph.graph.node
    }
    return _Wiring(inputs, {output.name: made_by[output.name] for output in graph.graph.output})


def _openvino_wiring(graph: openvino.Model) -> _Wiring:
    inputs = {
        op.get_friendly_name(): [value.get_node().get_friendly_name() for value in op.input_values()]
        for op in graph.get_ordered_ops()
    }
    ends = {name: port.get_node().get_friendly_name() for port in graph.outputs for name in port.get_names()}
    return _Wiring(inputs, ends)


def _onnx_in_float(graph: onnx.ModelProto) -> list[str]:
    return [node.name for node in graph.graph.node if _stays_in_float(node)]


def _stays_in_float(node: onnx.NodeProto) -> bool:
    # quantised probabilities, in steps of 1/255, would not equal softmax(logits / T)
    if node.op_type == "Softmax":
        return True
    modules = next(
        (entry.value for entry in node.metadata_props if entry.key.endswith("class_hierarchy")), ""
    )
    # its kernels become int8; ONNX Runtime is slow at pooling windows in int8
    return MergedLogits.__name__ in modules and node.op_type != "Conv"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' progress bars and hints."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(level)
