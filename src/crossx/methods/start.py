"""Start a network from the weights of another one: other classes, another method, another image size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossx.backbones import Backbone
from crossx.errors import CrossXError, UsageError, counted, first_few
from crossx.layers import OwnStatistics
from crossx.methods.base import Method
from crossx.methods.registry import method_class
from crossx.methods.weights import outline, read_checked, read_spec
from crossx.runs import EXPORTED, ModelSpec, Run, file_checksum, open_run

TRUNK = "backbone.trunk."
MISSING = "not there"
SHOWN = 4
"""Tensors that a message names."""
MAX_RECORDED = 50
"""Tensors that ``run.json`` names."""


@dataclass(frozen=True)
class Start:
    """A trained network to start from.

    Attributes:
        name: Absolute path of what was given, or the model's name on the Hub.
        hub: The model's name on the Hub, empty for a path.
        weights: The file of the weights.
        spec: Description of the network.
        info: ``run.json`` of its training, empty if there is none.
        state: Its tensors, by name in the state dict; those of the trunk have timm's names.
        run: Its folder.
    """

    name: str
    hub: str
    weights: Path
    spec: ModelSpec
    info: Mapping[str, Any]
    state: Mapping[str, Tensor]
    run: Run

    @classmethod
    def read(cls, source: str) -> Start:
        """Read a run (its selected weights), a checkpoint in one, or a shared model; nothing in it is executed.

        Args:
            source: See ``open_run``.

        Raises:
            UsageError: If it is a file that belongs to no run.
            CrossXError: If there is no such run or model, or its weights are damaged.
        """
        given = Path(source)
        if given.is_file() and given.suffix.lower() in EXPORTED:
            raise UsageError(
                f"{source}: an exported file cannot be trained: give the run that it was made from."
            )
        if given.is_file() and not any(
            (at / "model.json").is_file() for at in (given.parent, given.parent.parent)
        ):
            raise UsageError(
                f"{source}: belongs to no run (no model.json next to it or one folder up). Give the run; a backbone's "
                "weights as --model.backbone_weights; the authors' checkpoints after `crossx import-released`."
            )
        run, weights = open_run(source)
        spec = read_spec(run)
        # class means are those of other images
        outlined, state = read_checked(spec, run.spec, weights, class_means=False)
        broken = [
            key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()
        ]
        if broken:
            verb = "is" if len(broken) == 1 else "are"
            raise CrossXError(
                f"{weights}: {counted(len(broken), 'tensor')} {verb} not finite ({broken[0]}, ...)."
            )
        names = original_names(outlined)
        name = run.hub or str(given.absolute())
        tensors = {names[key]: state[key] for key in names}
        return cls(name, run.hub, weights, spec, run.read_info(), tensors, run)


@dataclass(frozen=True)
class _Part:
    """What of a tensor is taken: ``values``, at the given indices of some dimensions, else everywhere."""

    values: Tensor
    indices: Sequence[tuple[int, Tensor]] = ()


class Transfer:
    """The tensors that a network takes from another one, and those that remain as initialised.

    Layers of the backbone, with its gates, are matched by timm's names, all others by their own names if one method
    is a special case of the other. Rows of a head belong to classes and are matched by the classes' names: the result
    is the same for any order, and classes that the other network lacks keep their initialisation.

    Args:
        start: The trained network.
        method: The network to be trained.
        spec: Its description.

    Attributes:
        new: The tensors that are not taken, or only for some classes, each with the reason.
        left: Tensors of ``start`` that have no place in ``method``.
        taken: Names of the parameters that are taken as a whole.

    Raises:
        UsageError: If the backbones differ in their name or in most of their tensors.
    """

    def __init__(self, start: Start, method: Method, spec: ModelSpec) -> None:
        _check_backbone(start, method.backbone)
        self.start = start
        self.new: list[str] = []
        self._parts: dict[str, _Part] = {}
        self._labels = _common_labels(start.spec.classes, spec.classes)
        own = method.state_dict()
        rows = _rows_per_class(spec)
        state = self._adapted_state(method)
        names = original_names(method)
        whole: set[str] = set()
        for key, value in own.items():
            reason = self._take(key, value, state.get(names[key]), rows[key], spec)
            if not reason:
                whole.add(key)
            if reason == MISSING and names[key] in start.state:
                reason = f"of method {start.spec.method} there"
            if reason and not key.endswith("num_batches_tracked"):
                self.new.append(f"{key} {tuple(value.shape)}: {reason}")
        trunk = [key for key, value in own.items() if key.startswith(TRUNK) and value.ndim]
        fitting = sum(key in self._parts for key in trunk)
        if 2 * fitting < len(trunk):
            raise UsageError(
                f"init {start.name}: only {fitting} of the backbone's {len(trunk)} tensors fit: its backbone_args are "
                f"{dict(start.spec.backbone_args)}, and this run's are {dict(spec.backbone_args)}."
            )
        known = set(names.values())
        self.left = [
            f"{name} {tuple(value.shape)}" for name, value in start.state.items() if name not in known
        ]
        self.taken = frozenset(name for name, _ in method.named_parameters() if name in whole)
        self.total = len(own)
        self.count = len(self._parts)

    @property
    def is_complete(self) -> bool:
        """Whether nothing remains as initialised."""
        return not self.new

    @torch.no_grad()
    def copy(self, method: Method) -> None:
        """Copy the taken tensors into the network, on whatever device it is."""
        state = method.state_dict()
        for key, part in self._parts.items():
            own = state[key]
            indices = [(dim, index.to(own.device)) for dim, index in part.indices]
            own.copy_(_inserted(own, part.values.to(own), indices))

    def describe(self) -> str:
        """Say in one line what was taken and what was not."""
        text = f"{self.start.name}: {self.count} of {self.total} tensors are taken"
        common, classes = len(self._labels[0]), len(self.start.spec.classes)
        if any(part.indices for part in self._parts.values()):
            text += (
                f", those of the heads for the {common} classes that have the same names as there ({classes})"
            )
        if self.new:
            text += f"; new: {first_few(self.new, SHOWN)}"
        if self.left:
            text += f"; without a place: {first_few(self.left, SHOWN)}"
        return f"{text}."

    def record(self) -> dict[str, Any]:
        """Return the origin of the weights for ``run.json``."""
        start, info = self.start, self.start.info
        before = info.get("init") or {}
        own = info.get("backbone") if info.get("pretrained") and not info.get("backbone_weights") else None
        return {
            "run": start.name,
            "hub": start.hub or None,
            "id": info.get("id"),
            "weights": start.weights.name,
            "sha256": file_checksum(start.weights),
            "method": start.spec.method,
            "backbone": start.spec.backbone,
            "dataset": start.spec.dataset,
            "num_classes": len(start.spec.classes),
            "pretrained": before.get("pretrained") or own,
            "taken": self.count,
            "new": self.new[:MAX_RECORDED],
        }

    def _adapted_state(self, method: Method) -> dict[str, Tensor]:
        """Return the tensors that may be taken."""
        start = self.start
        theirs, ours = method_class(start.spec.method), type(method)
        related = issubclass(theirs, ours) or issubclass(ours, theirs)
        # heads that the method itself fits before the first step are not another method's
        related = theirs is ours or (related and ours.prepare is Method.prepare)
        state = {
            name: value for name, value in start.state.items() if related or name.startswith("backbone.")
        }
        for prefix, trunk in _trunks(method).items():
            names = trunk.timm_names()
            own_keys = {name: key for key, name in names.items()}
            # a clone that the other network lacks starts, as always, like the first trunk
            source = prefix if any(name.startswith(prefix) for name in state) else TRUNK
            taken = {
                own_keys[name.removeprefix(source)]: value
                for name, value in state.items()
                if name.startswith(source) and name.removeprefix(source) in own_keys
            }
            state |= {prefix + names[key]: value for key, value in trunk.resized(taken).items()}
        names = original_names(method)
        for name, module in method.named_modules():
            if isinstance(module, OwnStatistics):
                # statistics that the other network lacks start, as always, as copies of the trunk's
                copies = {
                    f"{name}.{own}": state.get(names[f"backbone.{buffer}"])
                    for own, buffer in module.names.items()
                }
                state = {key: value for key, value in copies.items() if value is not None} | state
        return state

    def _take(
        self, key: str, own: Tensor, source: Tensor | None, rows: Sequence[int], spec: ModelSpec
    ) -> str:
        """Note what is taken for a tensor; return why it is not taken as a whole."""
        if source is None:
            return MISSING
        ours, theirs = len(spec.classes), len(self.start.spec.classes)
        expected = [size + each * (theirs - ours) for size, each in zip(own.shape, rows, strict=True)]
        if list(source.shape) != expected:
            return f"there {tuple(source.shape)}"
        if not any(rows):
            self._parts[key] = _Part(source)
            return ""
        here, there = self._labels
        if not here:
            return "other classes"
        indices = []
        for dim, each in enumerate(rows):
            if each:
                source = source.index_select(dim, _rows(there, each))
                indices.append((dim, _rows(here, each)))
        self._parts[key] = _Part(source, indices)
        return "" if len(here) == ours else f"{len(here)} of {ours} classes taken"


def original_names(method: Method) -> dict[str, str]:
    """Return key of the state dict -> the same with timm's name for tensors of the trunk, whatever the method."""
    names = {
        prefix + key: prefix + name
        for prefix, trunk in _trunks(method).items()
        for key, name in trunk.timm_names().items()
    }
    return {key: names.get(key, key) for key in method.state_dict()}


def _trunks(method: Method) -> dict[str, Backbone]:
    """Return prefix of its tensors -> trunk; that of the first is ``TRUNK``."""
    return {
        f"{name}.trunk.": module for name, module in method.named_modules() if isinstance(module, Backbone)
    }


def _check_backbone(start: Start, backbone: Backbone) -> None:
    theirs, ours = start.spec.backbone, backbone.architecture
    if theirs.partition(".")[0] != ours.partition(".")[0]:
        raise UsageError(
            f"init {start.name}: its backbone is {theirs!r}, and this run's is {ours!r}. Give --model.backbone "
            f"{theirs}, or leave --init out."
        )


def _common_labels(theirs: Sequence[str], ours: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the labels, here and there, of the classes that both networks have."""
    labels = {name: label for label, name in enumerate(theirs)}
    here = [label for label, name in enumerate(ours) if name in labels]
    return here, [labels[ours[label]] for label in here]


def _rows_per_class(spec: ModelSpec) -> dict[str, list[int]]:
    """Return key of the state dict -> entries per class along each dimension, 0 where it is independent of the classes.

    Found by building the network with one more class. Entries of a class are adjacent, in the order of the classes.
    """
    here = outline(spec, Path("model.json")).state_dict()
    wider = outline(replace(spec, classes=(*spec.classes, "")), Path("model.json")).state_dict()
    return {
        key: [more - size for size, more in zip(value.shape, wider[key].shape, strict=True)]
        for key, value in here.items()
    }


def _rows(labels: Sequence[int], each: int) -> Tensor:
    """Return the indices of the entries of some classes."""
    # (n,) and (each,) -> (n * each,)
    return (torch.tensor(labels)[:, None] * each + torch.arange(each)).flatten()


def _inserted(own: Tensor, values: Tensor, indices: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Return ``own`` with ``values`` at the product of some indices."""
    if not indices:
        return values
    (dim, index), *others = indices
    return own.index_copy(dim, index, _inserted(own.index_select(dim, index), values, others))
