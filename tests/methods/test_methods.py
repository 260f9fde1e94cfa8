"""What every registered method owes to the contract; a new method is tested here without new code."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm import create_model
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from crossx.errors import CrossXError, UsageError
from crossx.methods import Method, create_method, list_methods, method_class, method_options, register_method
from crossx.methods.weights import build_method, describe, load_method, load_weights, save_weights
from crossx.runs import Preprocessing, Run, write_json
from crossx.testing import checks
from refusals import refusal
from slow import slow_except

PREPROCESSING = Preprocessing(64, None, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLASSES = ("ani", "auklet", "bunting")

every_method = pytest.mark.parametrize("name", list_methods())
CHEAP = ("plain", "maxent", "crossx")
"""Methods whose tests take little time: the others, built the same way, are left to the slow ones."""
cheap_methods = pytest.mark.parametrize("name", slow_except(list_methods(), *CHEAP))


def build(name: str, **options: object) -> Method:
    torch.manual_seed(0)
    return create_method(
        name,
        backbone="resnet10t",
        num_classes=3,
        image_size=64,
        backbone_args={"channels": [16, 32, 64, 128]},
        **options,
    )


@torch.no_grad()
@every_method
def test_no_images_have_no_logits(name: str) -> None:
    assert build(name).eval()(torch.zeros(0, 3, 64, 64)).shape == (0, 3)


QUICK = ("outputs", "terms", "maps", "linear heads", "soft targets")
OTHER = ("options", "gradients", "batch independence", "files", "class maps", "preparation", "two ranks")
"""Checks of ``crossx.testing``; training, resuming and exporting have tests of their own."""


@pytest.mark.parametrize("promise", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER)])
@every_method
def test_contract(name: str, promise: str) -> None:
    if (name, promise) == ("pn_cnn", "gradients"):
        pytest.skip("places its regions in float32, too coarse for finite differences")
    settings = {"backbone": "resnet10t", "backbone_args": {"channels": [16, 32, 64, 128]}}
    (check,) = (check for check in checks(method_class(name), **settings) if str(check) == promise)
    check()


@every_method
def test_class_maps_are_the_heads_logits_but_for_the_bias(name: str) -> None:
    method = build(name).eval()
    images = torch.randn(3, 3, 64, 96)
    maps = method.class_activation_maps(images, torch.tensor([1, 1, 1]))
    if maps is None:
        pytest.skip(f"{name} has no exact class maps")
    for head, logits in method.head_logits(images).items():
        bias = logits[:, 1] - maps[head].sum(1).mean((1, 2))
        torch.testing.assert_close(bias, bias[:1].expand(3), rtol=1e-4, atol=1e-5)


@cheap_methods
def test_heads_and_features_are_those_of_two_passes(name: str) -> None:
    method = build(name).eval()
    layers = method.linear_heads()
    if not layers:
        pytest.skip(f"{name} has no linear heads")
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        heads, features = method.heads_and_features(images)
        torch.testing.assert_close(heads, method.head_logits(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            method.logits_and_features(images)[0], method(images), rtol=1e-4, atol=1e-5
        )
        inputs = method.head_features(images)
        alone = next((inputs[head] for head in ("last", "joined") if head in inputs), None)
        expected = torch.cat([*inputs.values()], 1) if alone is None else alone
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    method.expect_class_means(torch.zeros(1))
    assert method.class_means is not None
    assert method.class_means.shape == (3, features.shape[1])


@cheap_methods
def test_preparation_changes_parameters_alone_and_the_same_in_every_mode(name: str) -> None:
    batches = [(torch.randn(3, 3, 64, 64), torch.tensor([0, 1, 2]))]
    training, evaluating = build(name), build(name).eval()
    modes = [module.training for module in training.modules()]
    buffers = {key: value.clone() for key, value in training.named_buffers()}
    for method in (training, evaluating):
        method.prepare(iter(batches))
    assert [module.training for module in training.modules()] == modes
    assert all(torch.equal(value, buffers[key]) for key, value in training.named_buffers())
    torch.testing.assert_close(training.state_dict(), evaluating.state_dict(), rtol=0, atol=0)


@cheap_methods
@pytest.mark.slow
def test_learns_a_batch_by_heart(name: str) -> None:
    # the published concentration, for Adam, would leave all to the background in the first steps of SGD
    method = build(name, **({"concentration_weight": 1.0, "data_weight": 4.0} if name == "pdisconet" else {}))
    images, targets = torch.randn(6, 3, 64, 64), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        objective = method.objective(images, targets)
        objective.loss.backward()
        optimizer.step()
    # not more: maximum entropy keeps a method from certainty
    assert F.cross_entropy(objective.logits, targets) < math.log(3) / 2
    assert torch.equal(objective.logits.argmax(1), targets)


@cheap_methods
def test_recomputing_activations_is_the_same_training(name: str) -> None:
    images, targets = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    plain, saving = build(name), build(name)
    for trunk in saving.trunks():
        trunk.recompute_activations()
    for method in (plain, saving):
        torch.manual_seed(0)  # for dropout
        method.objective(images, targets).loss.backward()
    for (key, own), other in zip(saving.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=lambda text, key=key: f"{key}: {text}")
    torch.testing.assert_close(saving.state_dict(), plain.state_dict())


@cheap_methods
def test_parameters_are_pretrained_or_new(name: str) -> None:
    method = build(name)
    trunk = create_model("resnet10t", channels=(16, 32, 64, 128))
    # what timm's own model has is pretrained, where it is still there: gates and heads are new
    timm = {key for key, _ in trunk.named_parameters() if not key.startswith("fc.")}
    prefixes = [name for name, module in method.named_modules() if module in method.trunks()]
    own = {f"{prefix}.trunk.{key}" for prefix in prefixes for key in timm}
    new = {id(parameter) for parameter in method.new_parameters()}
    names = {key for key, parameter in method.named_parameters() if id(parameter) not in new}
    assert names == own & {key for key, _ in method.named_parameters()}
    assert len(names) == len(own)
    assert prefixes[0] == "backbone"
    for each in method.trunks():
        assert {id(parameter) for parameter in each.pretrained_parameters()}.isdisjoint(new)
        assert len(each.pretrained_parameters()) == len(timm)
        assert sum(len(group) for group in each.layer_groups()) == len(timm)


@cheap_methods
def test_computes_in_the_half_precision_of_its_weights(name: str) -> None:
    method = build(name).half().eval()
    with torch.no_grad():
        assert torch.isfinite(method(torch.randn(1, 3, 64, 64).half())).all()


@every_method
def test_published_methods_are_cited(name: str) -> None:
    citation = build(name).citation
    assert bool(citation) == (name != "plain")
    if citation:
        assert re.fullmatch(r"@inproceedings\{\w+,\n(  \w+ += \{[^=]+\},?\n)+\}", citation)
        assert citation.count("{") == citation.count("}")


@cheap_methods
def test_survives_its_files(name: str, tmp_path: object) -> None:
    method = build(name).eval()
    run = Run(tmp_path)  # type: ignore[arg-type]
    spec = describe(method, classes=CLASSES, preprocessing=PREPROCESSING, dataset="folder")
    write_json(run.spec, spec.to_json())
    save_weights(method, run.weights)
    loaded, spec_again = load_method(run.path)
    assert spec_again == spec
    assert not loaded.training
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), method(images))


@every_method
@pytest.mark.slow
def test_loads_a_training_checkpoint(name: str, tmp_path: object) -> None:
    method = build(name).eval()
    run = Run(tmp_path)  # type: ignore[arg-type]
    spec = describe(method, classes=CLASSES, preprocessing=PREPROCESSING, dataset="folder")
    write_json(run.spec, spec.to_json())
    write_json(run.info, {"status": "stopped"})  # a finished run has weights of its own
    run.checkpoints.mkdir()
    state = {f"method.{key}": value for key, value in method.state_dict().items()}
    torch.save({"state_dict": {**state, "metric.total": torch.zeros(1)}, "epoch": 3}, run.best)
    images = torch.randn(2, 3, 64, 64)
    for path in (run.path, run.best):
        assert torch.equal(load_method(path)[0](images), method(images))


@cheap_methods
def test_exports(name: str) -> None:
    method = build(name).eval()
    images = torch.randn(2, 3, 64, 64)
    exported = torch.export.export(method, (images,)).module()
    torch.testing.assert_close(exported(images), method(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "view_size"),
    [
        *((name, None) for name in list_methods()),
        *((name, 64) for name in list_methods() if "view_size" in method_options(name)),
    ],
)
@pytest.mark.slow
def test_onnx_is_the_same_for_every_number_of_images(
    name: str, view_size: int | None, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    options, size = ({}, 64) if view_size is None else ({"view_size": view_size}, 96)
    method, path = build(name, **options).eval(), tmp_path / "method.onnx"
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        torch.onnx.export(
            method,
            (torch.randn(2, 3, size, size),),
            dynamo=True,
            dynamic_shapes={"images": {0: batch}},
            verbose=False,
        ).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for number in (1, 2, 5):
        given = torch.randn(number, 3, size, size)
        (logits,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, method(given), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", slow_except(list_methods(), "plain"))
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.slow
def test_compiles_in_one_graph_for_every_number_of_images(name: str, training: bool) -> None:
    # three parts per image would cross the 16 of below
    options = {"num_parts": 2} if name == "fcan" else {}
    method, compiler = build(name, **options).train(training), CompileCounter()
    images, targets = torch.randn(6, 3, 64, 64), torch.tensor([0, 1, 2, 2, 0, 1])

    def compute(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return method.objective(images, targets).loss if training else method(images)

    torch.compiler.reset()
    compiled = torch.compile(compute, fullgraph=True, backend=compiler)

    def first(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = images[:count].clone(), targets[:count].clone()
        for tensor in batch:
            torch._dynamo.mark_dynamic(tensor, 0)
        return batch

    # not fewer than four: PyTorch's convolutions on a CPU make a second graph from 16 on, of images or of their crops
    compiled(*first(4))
    once = compiler.frame_count
    for count in (5, 6):
        batch = first(count)
        torch.manual_seed(0)  # for dropout
        loss = compiled(*batch)
        torch.manual_seed(0)
        torch.testing.assert_close(loss, compute(*batch))
    assert compiler.frame_count == once


def test_weights_of_another_network_are_refused(tmp_path: object) -> None:
    save_weights(build("plain"), tmp_path / "plain.safetensors")  # type: ignore[operator]
    with pytest.raises(CrossXError, match="do not fit the network"):
        load_weights(build("crossx"), tmp_path / "plain.safetensors")  # type: ignore[operator]
    state = load_file(tmp_path / "plain.safetensors")  # type: ignore[operator]
    save_file(state | {"more": torch.zeros(1)}, tmp_path / "more.safetensors")  # type: ignore[operator]
    with pytest.raises(CrossXError, match=r"model\.json: 1 tensor is not known \(more\)\. Was the file"):
        load_weights(build("plain"), tmp_path / "more.safetensors")  # type: ignore[operator]


def test_spec_rebuilds_without_the_local_folder(tmp_path: object) -> None:
    folder = tmp_path / "weights"  # type: ignore[operator]
    folder.mkdir()
    config = {
        "architecture": "resnet10t",
        "model_args": {"in_chans": 3},
        "pretrained_cfg": {"mean": [0.1] * 3},
    }
    write_json(folder / "config.json", config)
    method = create_method("plain", backbone=f"local-dir:{folder}", num_classes=3)
    assert tuple(method.backbone.data_config["mean"]) == (0.1, 0.1, 0.1)
    (folder / "config.json").unlink()
    spec = describe(method, classes=CLASSES, preprocessing=PREPROCESSING, dataset="folder")
    assert build_method(spec).state_dict().keys() == method.state_dict().keys()


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'crossx'"):
        method_class("cross-x")
    with pytest.raises(UsageError, match=r"method 'plain' has no option 'num_parts'.*It has: none"):
        create_method("plain", backbone="resnet10t", num_classes=3, num_parts=2)


@pytest.mark.parametrize("number", [0, -1, "3", 3.0, True, None])
def test_a_number_of_classes_that_is_none_is_refused(number: Any) -> None:
    message = refusal(create_method, "plain", backbone="test_resnet", num_classes=number)
    assert message == f"num_classes must be a whole number of at least 1, not {number!r}."


def test_options_are_kept_with_their_defaults() -> None:
    method = create_method("crossx", backbone="resnet10t", num_classes=3, num_parts=3)
    assert method.options == {**method_options("crossx"), "num_parts": 3}
    assert method.name == "crossx"


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        register_method("plain")(method_class("plain"))


@cheap_methods
def test_channels_last_changes_nothing(name: str) -> None:
    method = build(name).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = method(images)
    method.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        method(images.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5
    )
