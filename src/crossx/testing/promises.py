"""The promises of the contract that one process can test: options, outputs, gradients, maps, files and exports."""

from __future__ import annotations

import inspect
import json
import math
import tempfile
import unittest
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.errors import UsageError, first_line
from crossx.methods import registry
from crossx.methods.base import Method, Objective
from crossx.methods.weights import describe, load_method, save_weights
from crossx.runs import Preprocessing, Run, write_json
from crossx.testing.subject import (
    CLASSES,
    RESERVED,
    TARGETS,
    Subject,
    check_logits,
    compare,
    fail,
    shape_of,
)


def check_options(subject: Subject) -> None:
    """Test that options are typed keywords with valid defaults, and that extreme values are accepted or refused."""
    parameters = list(inspect.signature(subject.cls.__init__).parameters.values())[1:]
    for parameter in parameters[2:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            fail(f"__init__ takes **{parameter.name}: name the options, so that they can be checked.")
        if parameter.kind is not parameter.KEYWORD_ONLY:
            fail(f"{parameter.name} is no option: write it after `*` in __init__.")
    for option, (hint, default) in registry.option_types(subject.name).items():
        if option in RESERVED:
            fail(f"an option cannot be called {option}, which means something else next to it.")
        if default is inspect.Parameter.empty:
            fail(f"option {option} has no default.")
        if hint is Any:
            fail(f"option {option} has no type hint, so that any value is accepted.")
        try:
            registry.check_options(subject.name, {option: default})
        except UsageError:
            fail(f"the default of option {option}, {default!r}, is not of its own type.")
        try:
            registry.check_options(subject.name, {option: object()})
        except UsageError:
            pass
        else:
            fail(f"option {option} accepts an object of any type: give it a type hint.")
        for value in _extremes(hint):
            _check_value(subject, option, value)


def _extremes(hint: Any) -> list[float]:
    kinds = {hint, *get_args(hint)}
    return [-1, 0, 2**40] if int in kinds else [-1.0, 0.0] if float in kinds else []


def _check_value(subject: Subject, option: str, value: float) -> None:
    try:
        with torch.device("meta"):
            subject.build(**{option: value})
    except UsageError:
        pass
    except Exception as error:
        fail(
            f"option {option} {value} is neither accepted nor refused with UsageError: "
            f"{type(error).__name__}: {first_line(error)}."
        )


def check_outputs(subject: Subject) -> None:
    """Test shapes, finiteness and agreement of logits, heads and embeddings in evaluation mode."""
    method = subject.build().eval()
    images, targets = subject.batch()
    method.check_image_size(subject.image_size)
    heads = method.head_logits(images)
    if not isinstance(heads, dict) or not heads:
        fail(f"head_logits returns {_kind(heads)}, not a dictionary with at least one head.")
    for name, value in heads.items():
        check_logits(f"head_logits[{name!r}]", value, len(images))
    logits = method(images)
    check_logits("forward", logits, len(images))
    compare("forward against combine_heads of head_logits", method.combine_heads(heads), logits)
    found = method.objective(images, targets)
    if not isinstance(found, Objective):
        fail(f"objective returns {_kind(found)}, not an Objective.")
    compare("the objective's logits against forward", found.logits, logits)
    again = method(images)
    if not torch.equal(again, logits):
        fail("forward differs between two calls in evaluation mode.")
    embeddings = method.embeddings(images)
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 2 or len(embeddings) != len(images):
        fail(f"embeddings returns {shape_of(embeddings)} for {len(images)} images, not (B, D).")
    if not embeddings.isfinite().all():
        fail("embeddings is not finite.")


def _kind(value: object) -> str:
    return "an empty dictionary" if value == {} else type(value).__name__


def check_terms(subject: Subject) -> None:
    """Test that the terms of the objective are finite scalars that add up to the loss."""
    images, targets = subject.batch()
    for training in (False, True):
        mode = "training" if training else "evaluation"
        found = subject.compute(subject.build().train(training), images, targets)
        if not isinstance(found, Objective):
            fail(f"part_objective returns {_kind(found)}, not an Objective.")
        values = {"loss": found.loss, **found.terms, **found.measures}
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.shape != ():
                fail(f"{name} is {shape_of(value)}, not a scalar tensor.")
            if not value.isfinite():
                fail(f"{name} is {value.item()} in {mode} mode.")
        if not found.terms:
            fail("the objective has no terms.")
        total = torch.stack([term.detach() for term in found.terms.values()]).sum()
        compare(
            f"the sum of the terms ({', '.join(found.terms)}) against the loss", total, found.loss.detach()
        )
        if clash := found.terms.keys() & {*found.measures, "loss"}:
            fail(f"{sorted(clash)[0]} names two things in the history.")
        for name, value in found.measures.items():
            if value.requires_grad:
                fail(f"the measure {name} is not detached.")


def check_gradients(subject: Subject) -> None:
    """Compare the gradient with central differences, in float64, along a random direction in each module."""
    method = subject.build().double().train()
    images, targets = subject.images().double(), torch.tensor(TARGETS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # a fresh network is not differentiable: its zero-initialised branches end at the kink of a ReLU
        for parameter in method.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * (0.01 + 0.1 * parameter.square().mean().sqrt()))
    buffers = {name: value.clone() for name, value in method.named_buffers()}

    def loss() -> Tensor:
        with torch.no_grad():
            for name, value in method.named_buffers():
                value.copy_(buffers[name])
        return subject.compute(method, images, targets).loss

    value = loss()
    if not value.requires_grad:
        fail("the loss depends on no parameter: is it detached?")
    value.backward()
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(name.partition(".")[0], []).append(parameter)
    if subject.cls.stops_gradients:
        return
    for name, parameters in groups.items():
        directions = [
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) for parameter in parameters
        ]
        length = math.sqrt(sum(direction.square().sum().item() for direction in directions))
        expected = sum(
            (parameter.grad * direction).sum().item() / length
            for parameter, direction in zip(parameters, directions, strict=True)
            if parameter.grad is not None
        )
        if not _close(expected, step := 1e-6, loss, parameters, directions, length) and not _close(
            expected, step / 100, loss, parameters, directions, length
        ):
            measured = _slope(step, loss, parameters, directions, length)
            fail(
                f"along a direction in the parameters of {name}, backward gives {expected:.6g} and finite differences "
                f"{measured:.6g}. If the objective stops gradients on purpose, set stops_gradients = True."
            )


def _close(expected: float, step: float, *arguments: Any) -> bool:
    measured = _slope(step, *arguments)
    return abs(measured - expected) <= 1e-4 * max(abs(measured), abs(expected)) + 1e-15 / step + 1e-8


@torch.no_grad()
def _slope(
    step: float,
    loss: Callable[[], Tensor],
    parameters: Sequence[nn.Parameter],
    directions: Sequence[Tensor],
    length: float,
) -> float:
    before = [parameter.clone() for parameter in parameters]
    values = []
    for sign in (1, -1):
        for parameter, start, direction in zip(parameters, before, directions, strict=True):
            parameter.copy_(start + sign * step / length * direction)
        values.append(loss().item())
    for parameter, start in zip(parameters, before, strict=True):
        parameter.copy_(start)
    return (values[0] - values[1]) / (2 * step)


@torch.no_grad()
def check_batch(subject: Subject) -> None:
    """Test that an image's outputs do not depend on the other images of its batch in evaluation mode."""
    method = subject.build().eval()
    images = subject.images()
    before = {name: value.clone() for name, value in method.state_dict().items()}

    def outputs(given: Tensor) -> dict[str, Tensor]:
        found = {"the logits": method(given), "the embeddings": method.embeddings(given)}
        found |= {f"the map {name!r}": maps for name, maps in method.activation_maps(given).items()}
        boxes = method.boxes(given)
        return found if boxes is None else {**found, "the boxes": boxes}

    whole = outputs(images)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    for given, rows in [(images[order], order), *((images[i : i + 1], torch.tensor([i])) for i in range(2))]:
        for name, values in outputs(given).items():
            compare(
                f"{name} of an image", values, whole[name][rows], rtol=1e-3, atol=1e-4,
                why=" with the other images of its batch, in evaluation mode",
            )  # fmt: skip
    for name, value in method.state_dict().items():
        if not torch.equal(value, before[name]):
            fail(f"predictions in evaluation mode change {name}.")


@torch.no_grad()
def check_files(subject: Subject) -> None:
    """Test that a saved and loaded network predicts the same."""
    method = subject.build().eval()
    mean = (0.5, 0.5, 0.5)
    with tempfile.TemporaryDirectory(prefix="crossx-") as folder:
        run = Run(Path(folder))
        preprocessing = Preprocessing(subject.image_size, None, "bilinear", mean, mean)
        spec = describe(method, classes=CLASSES, preprocessing=preprocessing, dataset="folder")
        write_json(run.spec, json.loads(json.dumps(spec.to_json())))
        save_weights(method, run.weights)
        loaded, _ = load_method(run.path)
    images = subject.images()
    changed = {
        name for name, value in method.options.items() if _listed(value) != _listed(loaded.options[name])
    }
    if changed:
        fail(f"option {sorted(changed)[0]} has another value after loading.")
    if not torch.equal(loaded(images), method(images)):
        fail(
            "a saved and loaded network predicts otherwise: keep everything that predictions need in options, "
            "parameters and persistent buffers."
        )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@torch.no_grad()
def check_maps(subject: Subject) -> None:
    """Test shapes and finiteness of activation maps and boxes."""
    method = subject.build().eval()
    images = subject.images()
    maps = method.activation_maps(images)
    if not isinstance(maps, dict) or not maps:
        fail(f"activation_maps returns {_kind(maps)}, not a dictionary with at least one stage.")
    for name, values in maps.items():
        if (
            not isinstance(values, Tensor)
            or values.dim() != 4
            or len(values) != len(images)
            or not values.numel()
        ):
            fail(
                f"activation_maps[{name!r}] is {shape_of(values)} for {len(images)} images, not (B, P, h, w)."
            )
        if not values.isfinite().all():
            fail(f"activation_maps[{name!r}] is not finite.")
    boxes = method.boxes(images)
    if boxes is None:
        return
    if boxes.dim() != 3 or len(boxes) != len(images) or boxes.shape[2] != 4:
        fail(f"boxes returns {shape_of(boxes)} for {len(images)} images, not (B, n, 4).")
    if not boxes.isfinite().all() or not (boxes[..., 2:] >= boxes[..., :2]).all():
        fail("boxes are not finite, or end before they begin: left, top, right, bottom.")


@torch.no_grad()
def check_class_maps(subject: Subject) -> None:
    """Test that class maps average to the logits without the bias, or are None."""
    method = subject.build().eval()
    images, (first, second) = subject.images(), (0, 1)
    maps = method.class_activation_maps(images, torch.full((len(images),), second))
    if maps is None:
        return
    heads = method.head_logits(images)
    if maps.keys() != heads.keys():
        fail(f"class_activation_maps has the heads {', '.join(maps)}, head_logits {', '.join(heads)}.")
    others = method.class_activation_maps(images, torch.full((len(images),), first))
    for which, given in ((second, maps), (first, others or {})):
        for head, logits in heads.items():
            values = given[head]
            if values.dim() != 4 or len(values) != len(images):
                fail(f"class_activation_maps[{head!r}] is {shape_of(values)}, not (B, P, h, w).")
            bias = logits[:, which] - values.sum(1).mean((1, 2))
            compare(
                f"head {head!r}: logits less the mean of the class maps", bias, bias[:1].expand(len(bias)),
                why=" between images, and should be the bias; return None if the maps are not exact",
            )  # fmt: skip


@torch.no_grad()
def check_linear_heads(subject: Subject) -> None:
    """Test that the linear heads turn their features into the logits of the heads."""
    method = subject.build().eval()
    layers = method.linear_heads()
    if not layers:
        return
    images, targets = subject.batch()
    heads, embeddings = method.head_logits(images), method.embeddings(images)
    widths = [layer.weight.shape[-1] for layer in layers.values()]
    sliced = type(method).head_features is Method.head_features
    if not layers.keys() <= heads.keys() or (sliced and sum(widths) != embeddings.shape[1]):
        fail(
            f"linear_heads has the heads {', '.join(layers)} on {sum(widths)} features; head_logits has "
            f"{', '.join(heads)}, embeddings {embeddings.shape[1]} features."
        )
    features = method.head_features(images)
    if features.keys() != layers.keys():
        fail(
            f"head_features has {', '.join(features) or 'nothing'}, linear_heads the heads {', '.join(layers)}."
        )
    logits = {name: layer(features[name]) for name, layer in layers.items()}
    for name, own in logits.items():
        mean = own.mean(1) if own.ndim == 3 else own  # (B, n, K) -> (B, K)
        compare(f"linear_heads[{name!r}] of its features against head_logits", mean, heads[name])
    if type(method).heads_and_features is not Method.heads_and_features:
        found, _ = method.heads_and_features(images)
        if found.keys() != heads.keys():
            fail(f"heads_and_features has the heads {', '.join(found)}, head_logits {', '.join(heads)}.")
        for name, own in found.items():
            compare(f"heads_and_features[{name!r}] against head_logits", own, heads[name])
    if not method.head_terms(logits, targets):
        fail("head_terms is empty: linear_heads has nothing to be fitted by.")


@torch.no_grad()
def check_soft_targets(subject: Subject) -> None:
    """Test that class probabilities work as targets, unless they are declared unsupported."""
    if not subject.cls.supports_soft_targets:
        return
    method = subject.build().eval()
    images, targets = subject.batch()
    hard = subject.compute(method, images, targets).loss
    one_hot = F.one_hot(targets, len(CLASSES)).float()
    remedy = "; set supports_soft_targets = False if the objective needs one class per image"
    try:
        soft = subject.compute(method, images, one_hot).loss
        mixed = subject.compute(method, images, (one_hot + one_hot.flip(0).roll(1, 0)) / 2).loss
    except Exception as error:
        fail(f"class probabilities as targets fail with {type(error).__name__}: {first_line(error)}{remedy}.")
    compare("the loss of targets as probabilities against that of the classes", soft, hard, why=remedy)
    if not mixed.isfinite():
        fail(f"the loss of mixed classes is {mixed.item()}{remedy}.")


def check_preparation(subject: Subject) -> None:
    """Test that ``prepare`` leaves modes and running statistics alone, and gives the same in both modes."""
    images, targets = subject.batch()
    batch = (images, targets, subject.parts(images)) if subject.cls.uses_parts else (images, targets)
    states = []
    for training in (True, False):
        method = subject.build().train(training)
        modes = [module.training for module in method.modules()]
        statistics = {
            name: value.clone()
            for name, value in method.named_buffers()
            if name.rpartition(".")[2] in _RUNNING
        }
        method.prepare(iter([batch, batch]))  # type: ignore[arg-type]
        if [module.training for module in method.modules()] != modes:
            fail("prepare changes the mode of a module: use crossx.layers.evaluation_mode.")
        for name, value in method.named_buffers():
            if name in statistics and not torch.equal(value, statistics[name]):
                fail(f"prepare changes the running statistics {name}: use crossx.layers.evaluation_mode.")
        states.append(method.state_dict())
    for name, value in states[0].items():
        compare(f"{name} after prepare", value, states[1][name], why=" between training and evaluation mode")


_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def check_export(subject: Subject) -> None:
    """Test that the program of torch.export predicts the same."""
    method, images = subject.build().eval(), subject.images()
    exported = torch.export.export(method, (images,)).module()
    compare("logits of the exported program", exported(images), method(images), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def check_onnx(subject: Subject) -> None:
    """Test that an ONNX file predicts the same for any number of images."""
    if find_spec("onnxscript") is None or find_spec("onnxruntime") is None:
        raise unittest.SkipTest("needs crossx[export].")
    import onnxruntime

    method = subject.build().eval()
    with tempfile.TemporaryDirectory(prefix="crossx-") as folder:
        path = Path(folder) / "method.onnx"
        program = torch.onnx.export(
            method,
            (subject.images(2),),
            dynamo=True,
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            verbose=False,
        )
        assert program is not None
        program.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for count in (1, 2, 5):
            images = subject.images(count)
            (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
            compare(
                f"logits of the ONNX file for a batch of {count}", torch.from_numpy(logits), method(images), rtol=1e-3,
                atol=1e-4,
            )  # fmt: skip
