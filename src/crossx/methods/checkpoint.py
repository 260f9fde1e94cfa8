"""From a trained method to files and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from crossx.backbones import read_state_dict
from crossx.errors import CrossXError
from crossx.methods.base import Method, create_method
from crossx.runs import ModelSpec, Preprocessing, atomic_path, open_run

PREFIX = "method."
"""What stands before a method's keys in a training checkpoint."""


def describe(
    method: Method,
    *,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    dataset: str,
    levels: Mapping[str, tuple[str, ...]] | None = None,
) -> ModelSpec:
    """Return the description from which ``build_method`` rebuilds a method made by ``create_method``.

    The backbone is named by its architecture and arguments, so that neither a ``local-dir:`` folder nor a network
    is needed to rebuild it.
    """
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
    """Build the network that ``spec`` describes, with random weights."""
    return create_method(
        spec.method,
        backbone=spec.backbone,
        num_classes=len(spec.classes),
        backbone_args=spec.backbone_args,
        image_size=spec.preprocessing.image_size,
        **spec.options,
    )


def load_method(path: str | Path) -> tuple[Method, ModelSpec]:
    """Load a trained network, in evaluation mode on the CPU.

    Args:
        path: A run folder (its selected weights) or a checkpoint or ``.safetensors`` file within one.

    Raises:
        CrossXError: If there is no run, it has no weights, or they do not fit its ``model.json``.
    """
    run, weights = open_run(path)
    spec = run.read_spec()
    method = build_method(spec)
    load_weights(method, weights)
    return method.eval(), spec


def load_weights(method: Method, path: Path) -> None:
    """Load weights written by ``save_weights`` or a training checkpoint, every key of which must fit.

    Raises:
        CrossXError: If the file cannot be read or does not fit the method.
    """
    state = read_state_dict(path)
    if any(key.startswith(PREFIX) for key in state):
        state = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    own = method.state_dict()
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    surplus = [key for key in state if key not in own]
    if wrong or surplus:
        raise CrossXError(
            f"{path}: its weights do not fit the network of model.json: {_mismatch(own, state, wrong, surplus)}. "
            "Was the file copied from another run?"
        )
    method.load_state_dict(state)


def save_weights(method: Method, path: Path) -> None:
    """Write a method's weights as safetensors, atomically."""
    state = {key: value.detach().cpu().contiguous() for key, value in method.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary)


def _mismatch(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], wrong: list[str], surplus: list[str]
) -> str:
    if not wrong:
        return f"{len(surplus)} keys are not known ({surplus[0]}, ...)"
    key = wrong[0]
    here = f"has shape {tuple(state[key].shape)}" if key in state else "is missing"
    return f"{len(wrong)} of {len(own)} tensors differ ({key} {here}, expected {tuple(own[key].shape)})"
