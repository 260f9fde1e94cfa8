"""Tests of a method against the contract, for methods in packages of their own.

::

    from crossx.testing import check_method, checks

    def test_method():
        check_method(MyMethod, channels=8)

    @pytest.mark.parametrize("check", checks(MyMethod, channels=8), ids=str)
    def test_each_promise(check):
        check()

Needs no pytest. The networks and images are tiny; all checks together take well under a minute on one core.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import operator
import os
import pickle
import random
import subprocess
import sys
import tempfile
import unittest
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, get_args

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from crossx import plugins
from crossx.errors import Stopped, UsageError, first_few, first_line
from crossx.losses import ClassificationLoss
from crossx.methods import base
from crossx.methods.base import Method, Objective, create_method
from crossx.methods.weights import describe, load_method, save_weights
from crossx.runs import Preprocessing, Run, write_json
from crossx.training.config import Config, ModelConfig

__all__ = ["Check", "check_method", "checks"]

CLASSES = ("ani", "auklet", "bunting")
TARGETS = (0, 1, 2, 2, 1, 0)
"""Two images of every class, in an order in which the first four have both of one class only."""
NUM_PARTS = 11
RESERVED = {"name", "num_classes", "image_size", *vars(ModelConfig())}
"""Arguments of ``create_method`` and keys next to the options in a configuration."""
STOPPED = 4
"""Step at which the tiny training is stopped, the last of two epochs of two steps each."""
RANKS = 2
TIMEOUT = 600


class _BrokenError(AssertionError):
    """A broken promise, in one line."""


@dataclass(frozen=True)
class Check:
    """One promise of the contract; calling it tests the promise.

    Raises, when called:
        AssertionError: If the method breaks it: one line that says how.
        unittest.SkipTest: If a library that it needs is not installed; pytest shows it as skipped.
    """

    name: str
    subject: _Subject = field(repr=False)
    function: Callable[[_Subject], None] = field(repr=False)

    def __str__(self) -> str:
        return self.name

    def __call__(self) -> None:
        """Test the promise."""
        about = f"{self.subject.cls.__name__}: {self.name}:"
        with _random_state_kept(), _known(self.subject), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.function(self.subject)
            except unittest.SkipTest:
                raise
            except _BrokenError as failure:
                raise AssertionError(f"{about} {failure}") from None
            except Exception as error:
                reason = plugins.failure(error, self.subject.file)
                raise AssertionError(f"{about} fails with {reason}.") from error


def checks(
    cls: type[Method],
    *,
    backbone: str = "test_resnet",
    backbone_args: Mapping[str, Any] | None = None,
    image_size: int = 64,
    **options: Any,
) -> list[Check]:
    """Return the checks of a method, to run them one by one, such as by ``pytest.mark.parametrize``.

    Args:
        cls: The method's class, at the top level of a module. It need not be registered.
        backbone: A timm model, as small as the method takes it.
        backbone_args: Further arguments of ``timm.create_model``.
        image_size: Side of the images in pixels.
        **options: Options of the method; best those that make its own layers small.
    """
    subject = _Subject(cls, backbone, dict(backbone_args or {}), image_size, options)
    return [Check(name, subject, function) for name, function in _CHECKS.items()]


def check_method(cls: type[Method], **settings: Any) -> None:
    """Test everything that a method owes to the contract.

    Args:
        cls: The method's class, at the top level of a module. It need not be registered.
        **settings: The arguments of ``checks``, options of the method among them.

    Raises:
        AssertionError: If it breaks a promise: one line for each.
    """
    broken = []
    for check in checks(cls, **settings):
        try:
            check()
        except unittest.SkipTest as skipped:
            warnings.warn(f"{check} was not checked: {skipped}", stacklevel=2)
        except AssertionError as error:
            broken.append(str(error))
    if broken:
        raise AssertionError("\n".join(broken))


@dataclass(frozen=True)
class _Subject:
    """A class under test, with what it is built of."""

    cls: type[Method]
    backbone: str
    backbone_args: dict[str, Any]
    image_size: int
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The name that it is registered under during a check."""
        own = self.cls.__dict__.get("name", "")
        return own if base._REGISTRY.get(own) is self.cls else f"checked_{self.cls.__name__.lower()}"

    @cached_property
    def file(self) -> Path | None:
        try:
            return Path(inspect.getfile(self.cls))
        except (OSError, TypeError):
            return None

    def build(self, **options: Any) -> Method:
        """Build it with the same random weights on each call."""
        torch.manual_seed(0)
        return create_method(
            self.name,
            backbone=self.backbone,
            num_classes=len(CLASSES),
            image_size=self.image_size,
            backbone_args=self.backbone_args,
            **{**self.options, **options},
        )

    def images(self, count: int = len(TARGETS), seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, self.image_size, self.image_size, generator=generator)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.images(), torch.tensor(TARGETS)

    def parts(self, images: Tensor) -> Tensor:
        """Return parts (B, N, 3) that depend on each image's own pixels."""
        count = len(self.options.get("part_names") or range(NUM_PARTS))
        numbers = images.flatten(1)[:, : 3 * count].unflatten(1, (count, 3)).abs().float()
        points = (20 * numbers[..., :2]).clamp(max=self.image_size - 1)
        return torch.cat([points, (numbers[..., 2:] > 0.5).float()], 2).to(images.dtype)

    def compute(self, method: Method, images: Tensor, targets: Tensor) -> Objective:
        """Return the objective that is trained, with the same random numbers on each call."""
        torch.manual_seed(2)
        if method.uses_parts:
            return method.part_objective(images, targets, self.parts(images))
        return method.objective(images, targets)


@contextmanager
def _known(subject: _Subject) -> Iterator[None]:
    """Register the class during a check, if it is not."""
    cls = subject.cls
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise AssertionError(f"{getattr(cls, '__name__', cls)}: is no subclass of crossx.methods.Method.")
    if base._REGISTRY.get(subject.name) is cls:
        yield
        return
    name, own = subject.name, cls.__dict__.get("name")
    base.register_method(name)(cls)
    try:
        yield
    finally:
        del base._REGISTRY[name]
        if own is None:
            del cls.name
        else:
            cls.name = own


@contextmanager
def _random_state_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    seeds = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for name, value in seeds.items():
                if value is None:
                    os.environ.pop(name, None)


def _fail(text: str) -> NoReturn:
    raise _BrokenError(text)


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _compare(
    what: str, actual: Tensor, expected: Tensor, *, rtol: float = 1e-4, atol: float = 1e-5, why: str = ""
) -> None:
    if actual.shape != expected.shape:
        _fail(f"{what}: {_shape(actual)} instead of {_shape(expected)}{why}.")
    if not torch.allclose(actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=False):
        difference = (actual.double() - expected.double()).abs().max().item()
        _fail(f"{what}: differs by up to {difference:.3g}{why}.")


def _logits(what: str, value: object, count: int) -> None:
    if not isinstance(value, Tensor) or value.shape != (count, len(CLASSES)):
        _fail(f"{what} returns {_shape(value)} for {count} images of {len(CLASSES)} classes, not (B, K).")
    if not value.isfinite().all():
        _fail(f"{what} is not finite.")


def _check_options(subject: _Subject) -> None:
    parameters = list(inspect.signature(subject.cls.__init__).parameters.values())[1:]
    for parameter in parameters[2:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            _fail(f"__init__ takes **{parameter.name}: name the options, so that they can be checked.")
        if parameter.kind is not parameter.KEYWORD_ONLY:
            _fail(f"{parameter.name} is no option: write it after `*` in __init__.")
    for option, (hint, default) in base.option_types(subject.name).items():
        if option in RESERVED:
            _fail(f"an option cannot be called {option}, which means something else next to it.")
        if default is inspect.Parameter.empty:
            _fail(f"option {option} has no default.")
        if hint is Any:
            _fail(f"option {option} has no type hint, so that any value is accepted.")
        try:
            base.check_options(subject.name, {option: default})
        except UsageError:
            _fail(f"the default of option {option}, {default!r}, is not of its own type.")
        try:
            base.check_options(subject.name, {option: object()})
        except UsageError:
            pass
        else:
            _fail(f"option {option} accepts an object of any type: give it a type hint.")
        for value in _extremes(hint):
            _check_value(subject, option, value)


def _extremes(hint: Any) -> list[float]:
    kinds = {hint, *get_args(hint)}
    return [-1, 0, 2**40] if int in kinds else [-1.0, 0.0] if float in kinds else []


def _check_value(subject: _Subject, option: str, value: float) -> None:
    try:
        with torch.device("meta"):
            subject.build(**{option: value})
    except UsageError:
        pass
    except Exception as error:
        _fail(
            f"option {option} {value} is neither accepted nor refused with UsageError: "
            f"{type(error).__name__}: {first_line(error)}."
        )


def _check_outputs(subject: _Subject) -> None:
    method = subject.build().eval()
    images, targets = subject.batch()
    method.check_image_size(subject.image_size)
    heads = method.head_logits(images)
    if not isinstance(heads, dict) or not heads:
        _fail(f"head_logits returns {type(heads).__name__}, not a dictionary with at least one head.")
    for name, value in heads.items():
        _logits(f"head_logits[{name!r}]", value, len(images))
    logits = method(images)
    _logits("forward", logits, len(images))
    _compare("forward against combine_heads of head_logits", method.combine_heads(heads), logits)
    _compare("the objective's logits against forward", method.objective(images, targets).logits, logits)
    again = method(images)
    if not torch.equal(again, logits):
        _fail("forward differs between two calls in evaluation mode.")
    embeddings = method.embeddings(images)
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 2 or len(embeddings) != len(images):
        _fail(f"embeddings returns {_shape(embeddings)} for {len(images)} images, not (B, D).")
    if not embeddings.isfinite().all():
        _fail("embeddings is not finite.")


def _check_terms(subject: _Subject) -> None:
    images, targets = subject.batch()
    for training in (False, True):
        mode = "training" if training else "evaluation"
        found = subject.compute(subject.build().train(training), images, targets)
        if not isinstance(found, Objective):
            _fail(f"objective returns {type(found).__name__}, not an Objective.")
        values = {"loss": found.loss, **found.terms, **found.measures}
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.shape != ():
                _fail(f"{name} is {_shape(value)}, not a scalar tensor.")
            if not value.isfinite():
                _fail(f"{name} is {value.item()} in {mode} mode.")
        if not found.terms:
            _fail("the objective has no terms.")
        total = torch.stack([term.detach() for term in found.terms.values()]).sum()
        _compare(
            f"the sum of the terms ({', '.join(found.terms)}) against the loss", total, found.loss.detach()
        )
        if clash := found.terms.keys() & {*found.measures, "loss"}:
            _fail(f"{sorted(clash)[0]} names two things in the history.")
        for name, value in found.measures.items():
            if value.requires_grad:
                _fail(f"the measure {name} is not detached.")


def _check_gradients(subject: _Subject) -> None:
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
        _fail("the loss depends on no parameter: is it detached?")
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
            _fail(
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
def _check_batch(subject: _Subject) -> None:
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
            _compare(
                f"{name} of an image", values, whole[name][rows], rtol=1e-3, atol=1e-4,
                why=" with the other images of its batch, in evaluation mode",
            )  # fmt: skip
    for name, value in method.state_dict().items():
        if not torch.equal(value, before[name]):
            _fail(f"predictions in evaluation mode change {name}.")


@torch.no_grad()
def _check_files(subject: _Subject) -> None:
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
        name
        for name, value in method.options.items()
        if (list(value) if isinstance(value, tuple) else value) != _listed(loaded.options[name])
    }
    if changed:
        _fail(f"option {sorted(changed)[0]} has another value after loading.")
    if not torch.equal(loaded(images), method(images)):
        _fail(
            "a saved and loaded network predicts otherwise: keep everything that predictions need in options, "
            "parameters and persistent buffers."
        )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@torch.no_grad()
def _check_maps(subject: _Subject) -> None:
    method = subject.build().eval()
    images = subject.images()
    maps = method.activation_maps(images)
    if not isinstance(maps, dict) or not maps:
        _fail(f"activation_maps returns {type(maps).__name__}, not a dictionary with at least one stage.")
    for name, values in maps.items():
        if (
            not isinstance(values, Tensor)
            or values.dim() != 4
            or len(values) != len(images)
            or not values.numel()
        ):
            _fail(
                f"activation_maps[{name!r}] is {_shape(values)} for {len(images)} images, not (B, P, h, w)."
            )
        if not values.isfinite().all():
            _fail(f"activation_maps[{name!r}] is not finite.")
    boxes = method.boxes(images)
    if boxes is None:
        return
    if boxes.dim() != 3 or len(boxes) != len(images) or boxes.shape[2] != 4:
        _fail(f"boxes returns {_shape(boxes)} for {len(images)} images, not (B, n, 4).")
    if not boxes.isfinite().all() or not (boxes[..., 2:] >= boxes[..., :2]).all():
        _fail("boxes are not finite, or end before they begin: left, top, right, bottom.")


@torch.no_grad()
def _check_class_maps(subject: _Subject) -> None:
    method = subject.build().eval()
    images, (first, second) = subject.images(), (0, 1)
    maps = method.class_activation_maps(images, torch.full((len(images),), second))
    if maps is None:
        return
    heads = method.head_logits(images)
    if maps.keys() != heads.keys():
        _fail(f"class_activation_maps has the heads {', '.join(maps)}, head_logits {', '.join(heads)}.")
    others = method.class_activation_maps(images, torch.full((len(images),), first))
    for which, given in ((second, maps), (first, others or {})):
        for head, logits in heads.items():
            values = given[head]
            if values.dim() != 4 or len(values) != len(images):
                _fail(f"class_activation_maps[{head!r}] is {_shape(values)}, not (B, P, h, w).")
            bias = logits[:, which] - values.sum(1).mean((1, 2))
            _compare(
                f"head {head!r}: logits less the mean of the class maps", bias, bias[:1].expand(len(bias)),
                why=" between images, and should be the bias; return None if the maps are not exact",
            )  # fmt: skip


@torch.no_grad()
def _check_linear_heads(subject: _Subject) -> None:
    method = subject.build().eval()
    layers = method.linear_heads()
    if not layers:
        return
    images = subject.images()
    heads, embeddings = method.head_logits(images), method.embeddings(images)
    widths = [layer.in_features for layer in layers.values()]
    if not layers.keys() <= heads.keys() or sum(widths) != embeddings.shape[1]:
        _fail(
            f"linear_heads has the heads {', '.join(layers)} on {sum(widths)} features; head_logits has "
            f"{', '.join(heads)}, embeddings {embeddings.shape[1]} features."
        )
    for (name, layer), features in zip(layers.items(), embeddings.split(widths, 1), strict=True):
        _compare(
            f"linear_heads[{name!r}] of its embeddings against head_logits", layer(features), heads[name]
        )


@torch.no_grad()
def _check_soft_targets(subject: _Subject) -> None:
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
        _fail(
            f"class probabilities as targets fail with {type(error).__name__}: {first_line(error)}{remedy}."
        )
    _compare("the loss of targets as probabilities against that of the classes", soft, hard, why=remedy)
    if not mixed.isfinite():
        _fail(f"the loss of mixed classes is {mixed.item()}{remedy}.")


def _check_preparation(subject: _Subject) -> None:
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
            _fail("prepare changes the mode of a module: use crossx.layers.evaluation_mode.")
        for name, value in method.named_buffers():
            if name in statistics and not torch.equal(value, statistics[name]):
                _fail(f"prepare changes the running statistics {name}: use crossx.layers.evaluation_mode.")
        states.append(method.state_dict())
    for name, value in states[0].items():
        _compare(f"{name} after prepare", value, states[1][name], why=" between training and evaluation mode")


_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def _check_export(subject: _Subject) -> None:
    method, images = subject.build().eval(), subject.images()
    exported = torch.export.export(method, (images,)).module()
    _compare("logits of the exported program", exported(images), method(images), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def _check_onnx(subject: _Subject) -> None:
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
            _compare(
                f"logits of the ONNX file for a batch of {count}", torch.from_numpy(logits), method(images), rtol=1e-3,
                atol=1e-4,
            )  # fmt: skip


def _check_resume(subject: _Subject) -> None:
    """Compare a training that was stopped and resumed with one that was not, bit for bit."""
    from crossx.training.fit import fit, resume

    with tempfile.TemporaryDirectory(prefix="crossx-") as folder:
        whole = fit(_tiny_config(subject, Path(folder), "whole"))
        config = _tiny_config(subject, Path(folder), "stopped")
        with _stopped_at(subject.cls, STOPPED):
            try:
                fit(config)
            except Stopped:
                pass
            else:
                _fail(f"training computes the objective fewer than {STOPPED} times.")
        resumed = resume(config.run_path())
        expected, found = load_file(whole.weights), load_file(resumed.weights)
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    if different:
        _fail(
            f"{first_few(different, 2)} of a training that is stopped and resumed are not those of one that is not: "
            "keep what training needs in parameters and buffers, not in other attributes, and draw random numbers from "
            "torch's generators."
        )
    start = subject.build().state_dict()
    if all(name in expected and torch.equal(expected[name], value) for name, value in start.items()):
        _fail("training changes no parameter.")


@contextmanager
def _stopped_at(cls: type[Method], step: int) -> Iterator[None]:
    """Stop a training as Ctrl-C does, when it computes the objective for the given time."""
    name = "part_objective" if cls.uses_parts else "objective"
    own, original = cls.__dict__.get(name), getattr(cls, name)
    calls = 0

    def interrupted(self: Method, *arguments: Tensor) -> Objective:
        nonlocal calls
        calls += 1
        if calls == step:
            raise KeyboardInterrupt
        found: Objective = original(self, *arguments)
        return found

    setattr(cls, name, interrupted)
    try:
        yield
    finally:
        if own is None:
            delattr(cls, name)
        else:
            setattr(cls, name, own)


def _tiny_config(subject: _Subject, folder: Path, name: str) -> Config:
    sizes = {"num_classes": len(CLASSES), "images_per_class": 12}
    return Config.from_dict(
        {
            "model": {
                "method": subject.name,
                "backbone": subject.backbone,
                "backbone_args": subject.backbone_args,
                "pretrained": False,
                **subject.options,
            },
            "data": {
                "dataset": "synthetic",
                "root": str(folder / "birds"),
                **sizes,
                "image_size": subject.image_size,
                "batch_size": 8,
                "num_workers": 0,
            },
            "optim": {"selection": "last", "schedule": "constant", "lr": 0.003},
            "trainer": {
                "max_epochs": 2,
                "limit_train_batches": 2,
                "checkpoint_every_n_steps": 1,
                "accelerator": "cpu",
                "devices": 1,
                "logger": False,
                "enable_progress_bar": False,
            },
            "output": str(folder / name),
        }
    )


class _Trained(nn.Module):
    """DDP hooks into ``forward`` only."""

    def __init__(self, subject: _Subject) -> None:
        super().__init__()
        self.subject = subject
        # batch statistics are a rank's own
        self.method = subject.build().eval()
        self.method.criterion = ClassificationLoss(torch.tensor([0.5, 1.0, 3.0]), 0.1)

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        found = self.subject.compute(self.method, images, targets)
        return {"loss": found.loss, **found.terms, **found.measures}

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.method.named_parameters()}


def _check_two_ranks(subject: _Subject) -> None:
    cls = subject.cls
    if "<" in cls.__qualname__ or subject.file is None:
        _fail(f"define {cls.__name__} at the top level of a file, so that other processes can import it.")
    one = _Trained(subject)
    values = one(*subject.batch())
    values["loss"].backward()
    unused = [
        name
        for name, parameter in one.method.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    if unused:
        _fail(
            f"{first_few(unused, 2)} get no gradient, for which the ranks would wait: use them in the objective, or "
            "set requires_grad to False."
        )
    ranks = _run_ranks(subject)
    for name, value in values.items():
        mean = torch.stack([rank[0][name] for rank in ranks]).mean()
        _compare(
            f"the mean of {name} over two ranks", mean, value.detach(), atol=1e-6,
            why=" from that of one process on the whole batch: see self.criterion and crossx.distributed.batch_mean",
        )  # fmt: skip
    for name, gradient in one.gradients().items():
        for rank in ranks:
            if gradient is not None:
                _compare(
                    f"the gradient of {name} on two ranks", rank[1][name], gradient, atol=1e-5,
                    why=" from that of one process on the whole batch",
                )  # fmt: skip


def _run_ranks(subject: _Subject) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Compute the objective in two fresh processes, each on its part of the batch."""
    cls = subject.cls
    where = (cls.__module__, str(subject.file), cls.__qualname__, base.imported_methods())
    settings = (subject.backbone, subject.backbone_args, subject.image_size, subject.options)
    with tempfile.TemporaryDirectory(prefix="crossx-") as folder:
        (Path(folder) / "subject").write_bytes(pickle.dumps((where, settings)))
        code = "import sys; from crossx.testing import _rank; _rank(sys.argv[1], int(sys.argv[2]))"
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", code, folder, str(rank)],
                env={**os.environ, **variables},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        try:
            said = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
        except subprocess.TimeoutExpired:
            _fail("two ranks wait for each other: do they exchange the same tensors in the same order?")
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
        for process, text in zip(processes, said, strict=True):
            if process.returncode:
                last = text.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
                _fail(f"a rank fails with {last[0]}.")
        return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def _rank(folder: str, rank: int) -> None:
    """Compute one rank's part, in a process of its own."""
    torch.set_num_threads(1)
    (module, file, qualname, imports), settings = pickle.loads((Path(folder) / "subject").read_bytes())
    base.import_methods(imports)
    subject = _Subject(_find_class(module, file, qualname), *settings)
    meeting = f"file://{Path(folder).resolve() / 'ranks'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    with _known(subject):
        trained = _Trained(subject)
        parallel = DistributedDataParallel(trained)
        images, targets = subject.batch()
        own = slice(4) if rank == 0 else slice(4, None)
        values = parallel(images[own], targets[own])
        values["loss"].backward()
    gradients = {name: value for name, value in trained.gradients().items() if value is not None}
    torch.save(
        ({name: value.detach() for name, value in values.items()}, gradients), f"{folder}/rank{rank}.pt"
    )
    distributed.destroy_process_group()


def _find_class(module: str, file: str, qualname: str) -> type[Method]:
    """Import a class by its module, or by its file if another process does not find the module."""
    found: Any = sys.modules.get(module) if module != "__main__" else None
    if found is None:
        try:
            found = importlib.import_module(module) if module != "__main__" else None
        except ImportError:
            found = None
    if found is None or getattr(found, "__file__", None) != file:
        path = Path(file)
        found = plugins.Source("", path, plugins.digest(path)).execute()
    cls: type[Method] = operator.attrgetter(qualname)(found)
    return cls


_CHECKS: Mapping[str, Callable[[_Subject], None]] = {
    "options": _check_options,
    "outputs": _check_outputs,
    "terms": _check_terms,
    "gradients": _check_gradients,
    "batch independence": _check_batch,
    "files": _check_files,
    "maps": _check_maps,
    "class maps": _check_class_maps,
    "linear heads": _check_linear_heads,
    "soft targets": _check_soft_targets,
    "preparation": _check_preparation,
    "torch.export": _check_export,
    "ONNX": _check_onnx,
    "resume": _check_resume,
    "two ranks": _check_two_ranks,
}
