"""int8 with control of the accuracy, on a network of which int8 ruins one layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crossx.evaluation.unknowns import similarity
from crossx.export.onnx_graph import export_onnx
from crossx.export.quantize import Control, Quantized, _accuracy, _Wiring, quantize_onnx, quantize_openvino
from crossx.methods import create_method
from crossx.methods.weights import describe
from crossx.predict.inference import Inference
from crossx.runs import Preprocessing

SIDE = 8
HUGE = 3e5


class Fragile(nn.Module):
    """Two classes, red and blue images, told apart by a map that is tiny next to another one.

    int8 rounds both maps in steps of the larger one, so that ``fragile``, which reads them, sees no difference.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sturdy = nn.Conv2d(3, 2, 1)
        self.fragile = nn.Conv2d(2, 1, 1)
        self.classifier = nn.Linear(1, 2)
        with torch.no_grad():
            # red less blue, and a lot of green
            self.sturdy.weight.copy_(torch.tensor([[1.0, 0.0, -1.0], [0.0, HUGE, 0.0]])[..., None, None])
            self.fragile.weight.copy_(torch.tensor([[1.0, 0.0]])[..., None, None])
            self.classifier.weight.copy_(torch.tensor([[1.0], [-1.0]]))
            for layer in (self.sturdy, self.fragile, self.classifier):
                assert layer.bias is not None
                layer.bias.zero_()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.fragile(self.sturdy(images.float() / 255))  # (B, 3, S, S) -> (B, 1, S, S)
        logits = self.classifier(maps.mean((2, 3)))
        return logits, logits.softmax(1)


def colored(count: int) -> tuple[Tensor, Tensor]:
    """Return red and blue images in turn with random green, uint8 (count, 3, S, S), and their classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    targets = torch.arange(count) % 2
    images[targets == 0, 0], images[targets == 0, 2] = 200, 20
    images[targets == 1, 0], images[targets == 1, 2] = 20, 200
    return images, targets


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], Any]]:
    """How to read the network of each format; NNCF may change what it is given."""
    for package in ("onnxscript", "onnxruntime", "openvino", "nncf"):
        pytest.importorskip(package)
    import onnx
    import openvino

    path = tmp_path_factory.mktemp("graphs") / "fragile.onnx"
    onnx.save(export_onnx(Fragile().eval(), colored(2)[0]), path)
    return {"onnx": lambda: onnx.load(path), "openvino": lambda: openvino.Core().read_model(path)}


QUANTIZE = {"onnx": quantize_onnx, "openvino": quantize_openvino}


def logits(format_: str, graph: Any, images: Tensor) -> np.ndarray[Any, Any]:
    """Return a graph's logits by the format's own runtime."""
    if format_ == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        found: np.ndarray[Any, Any] = session.run(["logits"], {"images": images.numpy()})[0]
        return found
    import openvino

    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(compiled(images.numpy())["logits"])


def accuracy(format_: str, graph: Any, images: Tensor, targets: Tensor) -> float:
    """Return top-1 of a graph by the format's own runtime."""
    return float((logits(format_, graph, images).argmax(1) == targets.numpy()).mean())


def quantized(format_: str, graphs: dict[str, Callable[[], Any]], max_drop: float | None) -> Quantized:
    images, targets = colored(64)
    control = None
    if max_drop is not None:
        control = Control(list(zip(images.split(16), targets.split(16), strict=True)), max_drop)
    return QUANTIZE[format_](graphs[format_](), [images], control)


@pytest.mark.slow
def test_all_kernels_of_crossx_become_int8_and_the_merge_pools_in_float() -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    method = create_method("crossx", backbone="resnet10t", num_classes=3)
    preprocessing = Preprocessing(64, None, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    network = Inference(
        method, describe(method, classes=["a", "b", "c"], preprocessing=preprocessing, dataset="drawn")
    )
    network.use_inference_form()
    graph = export_onnx(network, images)
    kernels = [node.name for node in graph.graph.node if node.op_type == "Conv"]
    whole = quantize_onnx(graph, [images])

    assert set(kernels) <= set(whole.layers)
    # two of the last stage, one for the logits
    assert sum(name.startswith("merge.") for name in kernels) == 3
    made_by = {name: node.op_type for node in whole.graph.graph.node for name in node.output}
    readers = {name: node.op_type for node in whole.graph.graph.node for name in node.input}
    # ONNX Runtime computes in int8 what is between the two
    assert [
        node.name
        for node in whole.graph.graph.node
        if node.name.startswith("merge/")
        and (made_by[node.input[0]], readers[node.output[0]]) == ("DequantizeLinear", "QuantizeLinear")
    ] == []
    exact, rounded = logits("onnx", graph, images), logits("onnx", whole.graph, images)
    assert np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.slow
@pytest.mark.parametrize("format_", QUANTIZE)
def test_the_layer_that_costs_accuracy_goes_back_to_float(
    format_: str, graphs: dict[str, Callable[[], Any]]
) -> None:
    images, targets = colored(64)
    assert accuracy(format_, graphs[format_](), images, targets) == 1
    plain, kept = (quantized(format_, graphs, max_drop) for max_drop in (None, 0.1))
    assert accuracy(format_, plain.graph, images, targets) < 0.9
    assert accuracy(format_, kept.graph, images, targets) >= 0.9
    assert len(plain.layers) == 3
    assert plain.reverted == ()
    assert kept.layers == plain.layers
    assert "fragile" in kept.reverted
    assert plain.layers[-1] not in kept.reverted  # the classifier


@pytest.mark.slow
@pytest.mark.parametrize("format_", QUANTIZE)
def test_no_layer_goes_back_if_the_loss_is_accepted(
    format_: str, graphs: dict[str, Callable[[], Any]]
) -> None:
    assert quantized(format_, graphs, 0.6).reverted == ()


@pytest.mark.slow
def test_the_faster_graph_is_kept_where_it_loses_no_more_than_accepted(
    graphs: dict[str, Callable[[], Any]],
) -> None:
    plain, accepted = (quantized("onnx", graphs, max_drop).graph for max_drop in (None, 0.6))
    assert accepted.SerializeToString(deterministic=True) == plain.SerializeToString(deterministic=True)


def test_the_controlled_accuracy_is_top_1_of_all_images() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(4), 50).astype(np.float32)
    targets = generator.integers(4, size=50)
    images = np.arange(50, dtype=np.uint8).reshape(-1, 1, 1, 1)
    batches = [
        (torch.from_numpy(images[i : i + 16]), torch.from_numpy(targets[i : i + 16]))
        for i in range(0, 50, 16)
    ]
    found, per_batch = _accuracy(lambda batch: probabilities[batch[:, 0, 0, 0]], batches)
    right = sum(
        max(range(4), key=list(row).__getitem__) == target
        for row, target in zip(probabilities, targets, strict=True)
    )
    assert found == pytest.approx(right / 50, abs=2e-6)
    assert len(per_batch) == 4
    # with as many right, the surer network is better
    surer = probabilities.copy()
    surer[np.arange(50), targets] += 1e-3
    same = surer.argmax(1) == probabilities.argmax(1)
    assert same.all()
    assert _accuracy(lambda batch: surer[batch[:, 0, 0, 0]], batches)[0] > found


@pytest.mark.parametrize("seed", range(5))
def test_what_only_one_output_needs_leads_to_no_other(seed: int) -> None:
    generator = np.random.default_rng(seed)
    names = [f"n{number}" for number in range(12)]
    inputs = {
        name: [other for other in names[:number] if generator.random() < 0.2]
        for number, name in enumerate(names)
    }
    outputs = {"logits": names[-1], "similarities": names[-2], "probabilities": names[-4]}

    def reached(name: str) -> set[str]:
        """Return the outputs on the ways from a node, by recursion."""
        further = [reached(other) for other, sources in inputs.items() if name in sources]
        return {output for output, node in outputs.items() if node == name}.union(*further)

    expected = [name for name in names if reached(name) == {"similarities"}]
    assert _Wiring(inputs, outputs).only_for("similarities") == sorted(expected)
    assert _Wiring(inputs, outputs).only_for("maps") == []


class WithSimilarities(nn.Module):
    """Two classes, and the cosine to the nearest of ten means."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 48, 3)
        self.classifier = nn.Linear(48, 2)
        self.register_buffer("means", nn.functional.normalize(torch.rand(10, 48)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.conv(images.float() / 255).relu().mean((2, 3))  # (B, 3, S, S) -> (B, 48)
        logits = self.classifier(features)
        return logits, logits.softmax(1), similarity(features, self.get_buffer("means"))


@pytest.mark.slow
@pytest.mark.parametrize("format_", QUANTIZE)
def test_similarities_are_not_rounded_to_levels_of_int8(format_: str, tmp_path: Path) -> None:
    for package in ("onnxscript", "onnxruntime", "openvino", "nncf"):
        pytest.importorskip(package)
    import onnx
    import openvino

    network = WithSimilarities().eval()
    images = torch.cat([colored(64)[0], torch.randint(256, (64, 3, SIDE, SIDE), dtype=torch.uint8)])
    path = tmp_path / "network.onnx"
    onnx.save(export_onnx(network, images[:2], ["logits", "probabilities", "similarities"]), path)

    def similarities() -> Tensor:
        graph = onnx.load(path) if format_ == "onnx" else openvino.Core().read_model(path)
        found = QUANTIZE[format_](graph, [images], None).graph
        if format_ == "onnx":
            onnx.save(found, tmp_path / "int8.onnx")
        else:
            openvino.save_model(found, tmp_path / "int8.xml", compress_to_fp16=False)
        suffix = "onnx" if format_ == "onnx" else "xml"
        compiled = openvino.Core().compile_model(
            tmp_path / f"int8.{suffix}", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        return torch.from_numpy(compiled(images.numpy())["similarities"].copy())

    expected = network(images)[2].detach()
    error = (similarities() - expected).square().mean().sqrt()
    with mock.patch.object(_Wiring, "only_for", return_value=[]):
        rounded = (similarities() - expected).square().mean().sqrt()
    assert 0 < error < rounded / 2
