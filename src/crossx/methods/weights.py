"""Save and load methods."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from crossx.backbones import WeightsFileError, read_state_dict
from crossx.errors import CrossXError, UsageError, first_line
from crossx.methods.base import CLASS_MEANS, Method
from crossx.methods.registry import (
    ELSEWHERE,
    check_options,
    create_method,
    list_methods,
    method_class,
    recall_method,
)
from crossx.runs import ModelSpec, Preprocessing, Run, atomic_path, is_intact, open_run
from crossx.schema.model import check_backbone_args
from crossx.suggestions import nearest

PREFIX = "method."
"""Prefix of a method's keys in a training checkpoint."""
MAX_DERIVED = 2**30
"""Limit in bytes of the buffers that a network computes when it is built instead of storing them."""
CHECKSUM = "sha256"
"""Key of the metadata of ``model.safetensors`` with the checksum of its tensors."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def describe(
    method: Method,
    *,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    dataset: str,
    levels: Mapping[str, tuple[str, ...]] | None = None,
) -> ModelSpec:
    """Describe a method made by ``create_method`` so that ``build_method`` can rebuild it.

    The backbone is described by its architecture and arguments: rebuilding it needs neither a ``local-dir:`` folder
    nor network access.

    Raises:
        UsageError: If the backbone has arguments that ``model.json`` cannot store.
    """
    check_backbone_args(method.backbone.args)
    return ModelSpec(
        method=method.name,
        options={name: list(v) if isinstance(v, tuple) else v for name, v in method.options.items()},
        backbone=method.backbone.architecture,
        backbone_args=dict(method.backbone.args),
        classes=tuple(classes),
        preprocessing=preprocessing,
        dataset=dataset,
        levels=dict(levels or {}),
    )


def build_method(spec: ModelSpec) -> Method:
    """Build the network that ``spec`` describes with random weights, without downloads or opening files.

    Raises:
        UsageError: For an unknown method, backbone or option, or an invalid value.
    """
    check_backbone_args(spec.backbone_args)
    # first, so that no option of a stranger's file becomes another argument, such as pretrained
    check_options(spec.method, spec.options)
    return create_method(
        spec.method,
        backbone=spec.backbone,
        num_classes=len(spec.classes),
        pretrained=False,
        backbone_args=spec.backbone_args,
        image_size=spec.preprocessing.image_size,
        **spec.options,
    )


def load_method(path: str | Path) -> tuple[Method, ModelSpec]:
    """Load a trained network in evaluation mode on the CPU.

    Args:
        path: A run folder (its selected weights), or a checkpoint or ``.safetensors`` file in one.

    Raises:
        CrossXError: If there is no run or no weights, or the weights do not match its ``model.json``.
    """
    run, weights = open_run(path)
    spec = read_spec(run)
    try:
        return load_network(spec, run.spec, weights), spec
    except WeightsFileError as error:
        raise CrossXError(f"{error}{run.remedy if weights == run.weights else ''}") from error


def read_spec(run: Run) -> ModelSpec:
    """Read the description of a run's network, and import its method if that is the user's own code.

    Raises:
        CrossXError: If it is damaged, or its method is not known here (see ``recall_method``).
    """
    spec = run.read_spec()
    recall_method(spec.method, run)
    return spec


def load_network(spec: ModelSpec, source: Path, weights: Path) -> Method:
    """Build the network that ``spec`` describes and load its weights, in evaluation mode on the CPU.

    Neither file needs to be trusted: no memory is allocated for the network until the weights are known to match.

    Args:
        spec: The description.
        source: The file that contains ``spec``, for error messages.
        weights: The weights, see ``load_weights``.

    Raises:
        CrossXError: If the network cannot be built or the weights do not match it.
    """
    state = read_checked(spec, source, weights)[1]
    method = build_method(spec)
    method.load_state_dict(state)
    return method.eval()


def read_checked(
    spec: ModelSpec, source: Path, weights: Path, *, class_means: bool = True
) -> tuple[Method, dict[str, Tensor]]:
    """Read the weights of the network that ``spec`` describes, and check that they match.

    Args:
        spec: The description.
        source: The file that contains ``spec``, for error messages.
        weights: The weights, see ``load_weights``.
        class_means: Whether to read class means, if the file has them.

    Returns:
        The network on the meta device, and its state dict.

    Raises:
        CrossXError: If the network cannot be built or the weights do not match it.
    """
    state = _read_weights(weights)
    if not class_means:
        state.pop(CLASS_MEANS, None)
    outlined = outline(spec, source)
    _check_fit(outlined, state, weights)
    return outlined, state


def outline(spec: ModelSpec, source: Path) -> Method:
    """Build the network that ``spec`` describes on the meta device, where tensors take no memory.

    Raises:
        CrossXError: If it cannot be built.
    """
    try:
        method_class(spec.method)
    except UsageError as error:
        near = nearest(spec.method, list_methods())
        raise CrossXError(f"{source}: unknown method {spec.method!r}.{near} {ELSEWHERE}.") from error
    try:
        with torch.device("meta"):
            method = build_method(spec)
            method.check_image_size(spec.preprocessing.image_size)
    except Exception as error:  # timm and PyTorch raise many kinds of errors here
        reason = str(error) if isinstance(error, CrossXError) else first_line(error)
        raise CrossXError(
            f"{source}: describes a network that cannot be built ({' '.join(reason.split()).rstrip('.')})."
        ) from error
    stored = method.state_dict().keys()
    derived = sum(buffer.nbytes for name, buffer in method.named_buffers() if name not in stored)
    if derived > MAX_DERIVED:
        raise CrossXError(
            f"{source}: describes a network with {derived / 1e9:.1f} GB of tables in addition to its weights."
        )
    return method


def load_weights(method: Method, path: Path) -> None:
    """Load weights from a file of ``save_weights`` or a training checkpoint; every key must match.

    Raises:
        CrossXError: If the file cannot be read or does not match the method.
    """
    state = _read_weights(path)
    _check_fit(method, state, path)
    method.load_state_dict(state)


def check_weights(path: Path) -> None:
    """Check that weights can be read and are what was written.

    Raises:
        CrossXError: If they are not.
    """
    _read_weights(path)


def _read_weights(path: Path) -> dict[str, Tensor]:
    state = read_state_dict(path)
    if path.suffix.lower() == ".safetensors":
        _check_checksum(state, path)
    # torch.load reads damaged tensors without a word
    if path.suffix == ".ckpt" and zipfile.is_zipfile(path) and not is_intact(path):
        raise CrossXError(
            f"{path}: damaged: its content has other checksums. Take another checkpoint of the run."
        )
    if any(key.startswith(PREFIX) for key in state):
        state = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    # a view can be larger than its storage; no method shares weights between layers
    if sum(value.nbytes for value in state.values()) > path.stat().st_size:
        raise CrossXError(f"{path}: its tensors are larger than the file, which was not written by crossx.")
    return state


def _check_fit(method: Method, state: Mapping[str, Tensor], path: Path) -> None:
    method.expect_class_means(state.get(CLASS_MEANS))
    try:
        method.adapt_to(state)
    except CrossXError as error:
        raise CrossXError(f"{path}: {error}") from error
    own = method.state_dict()
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    surplus = [key for key in state if key not in own]
    if wrong or surplus:
        raise CrossXError(
            f"{path}: its weights do not fit the network of model.json: {_mismatch(own, state, wrong, surplus)}. "
            "Was the file copied from another run?"
        )
    for key, value in own.items():
        kinds = FLOATS if value.is_floating_point() else INTEGERS
        if state[key].dtype not in kinds:
            raise CrossXError(
                f"{path}: its weights do not fit the network of model.json: {key} holds {state[key].dtype}, expected "
                f"{value.dtype}."
            )


def save_weights(method: Method, path: Path) -> None:
    """Write a method's weights as safetensors with their checksum, atomically."""
    state = {key: value.detach().cpu().contiguous() for key, value in method.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, {CHECKSUM: _checksum(state)})


def _checksum(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors, with their names, types and shapes, in hexadecimal."""
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _check_checksum(state: Mapping[str, Tensor], path: Path) -> None:
    """Check the checksum of a file of ``save_weights``; those of earlier versions and of other programs have none."""
    with safe_open(path, "pt") as opened:
        stored = (opened.metadata() or {}).get(CHECKSUM)
    if stored is not None and stored != _checksum(state):
        raise WeightsFileError(
            f"{path}: damaged, its checksum is not that of what was written: copy it again."
        )


def _mismatch(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], wrong: list[str], surplus: list[str]
) -> str:
    if not wrong:
        unknown = "1 tensor is" if len(surplus) == 1 else f"{len(surplus)} tensors are"
        return f"{unknown} not known ({surplus[0]}{', ...' if len(surplus) > 1 else ''})"
    key = wrong[0]
    here = f"has shape {tuple(state[key].shape)}" if key in state else "is missing"
    return f"{len(wrong)} of {len(own)} tensors differ ({key} {here}, expected {tuple(own[key].shape)})"
