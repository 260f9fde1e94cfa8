"""Create a trunk by its timm name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg, load_model_config_from_hf
from torch.hub import get_dir

from crossx.backbones.state_dict import load_trunk_weights
from crossx.backbones.trunk import Backbone
from crossx.errors import CrossXError, UsageError, check_flag, first_line
from crossx.hub import announce, download
from crossx.suggestions import nearest

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files of timm's models on the Hub, of which one is needed."""


def create_backbone(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | None = None,
    args: Mapping[str, Any] | None = None,
    image_size: int | None = None,
) -> Backbone:
    """Create a trunk by its timm name.

    Args:
        name: A timm model, with or without a weight tag (``resnet50.tv_in1k``), ``hf-hub:USER/NAME`` or
            ``local-dir:FOLDER``.
        pretrained: Whether to load the pretrained weights of that name.
        weights: Path of a state dict (``.pth``, ``.pt``, ``.safetensors``) to load instead.
        args: Further arguments of ``timm.create_model``.
        image_size: Side of the input images in pixels; default: the model's own.

    Raises:
        UsageError: If timm has no such model, or the model does not accept ``args``.
        CrossXError: If the weights cannot be downloaded or read, or do not fit.
    """
    check_flag("pretrained", pretrained)
    if not isinstance(name, str):
        raise UsageError(f"a backbone is the name of a timm model, not {name!r}.")
    architecture, own_args = _resolve(name)
    merged = {**own_args, **(args or {})}
    downloads = pretrained and weights is None
    try:
        with _downloading(name, architecture) if downloads else nullcontext():
            trunk = timm.create_model(name, pretrained=downloads, num_classes=0, **dict(args or {}))
    except TypeError as error:
        raise UsageError(
            f"backbone {name!r} does not take backbone_args {dict(args or {})}: {error}."
        ) from error
    except Exception as error:
        if not downloads:
            raise UsageError(f"backbone {name!r} cannot be built: {first_line(error)}.") from error
        raise CrossXError(
            f"backbone {name!r}: its pretrained weights cannot be loaded ({first_line(error)}). Check the network, "
            "or use --model.backbone_weights FILE, --model.backbone local-dir:FOLDER or --model.pretrained false."
        ) from error
    if weights is not None:
        load_trunk_weights(trunk, Path(weights))
    return Backbone(name, architecture, merged, trunk, image_size)


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """Return the architecture of a name, and the model arguments that its config sets."""
    source, _, identifier = name.partition(":")
    if source == "local-dir" and identifier:
        path = Path(identifier) / "config.json"
        if path.with_name("model.json").is_file():
            raise UsageError(
                f"backbone {name!r}: {identifier} is a model of crossx: give it as --init, and its backbone as "
                "--model.backbone."
            )
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            architecture = config["architecture"]
            own_args = _own_arguments(config.get("pretrained_cfg") or config, config.get("model_args"))
        except FileNotFoundError as error:
            raise UsageError(
                f"backbone {name!r}: there is no {path}; the folder needs timm's config.json."
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"backbone {name!r}: {path} is not a timm config ({error}).") from error
    elif source == "hf-hub" and identifier:
        try:
            repository, _, revision = identifier.partition("@")
            with download(repository, ("config.json",), revision or None):
                pretrained_cfg, architecture, model_args = load_model_config_from_hf(identifier)
            own_args = _own_arguments(pretrained_cfg, model_args)
        except Exception as error:
            raise CrossXError(
                f"backbone {name!r} cannot be loaded from the Hugging Face Hub ({first_line(error)}). Check the name "
                "and the network, or use --model.backbone local-dir:FOLDER."
            ) from error
    else:
        architecture, own_args = name, {}
    base, _, tag = architecture.partition(".")
    if not timm.is_model(base):
        raise UsageError(
            f"unknown backbone {name!r}.{nearest(base, timm.list_models())} "
            "Use a name from timm.list_models(), local-dir:FOLDER or hf-hub:USER/NAME."
        )
    tagged = timm.list_models(f"{base}.*", pretrained=True)
    if tag and architecture not in tagged:
        raise UsageError(
            f"unknown weights {architecture!r}.{nearest(architecture, tagged)} "
            f"timm has for {base}: {', '.join(tagged) or 'none'}."
        )
    return architecture, dict(own_args or {})


@contextmanager
def _downloading(name: str, architecture: str) -> Iterator[None]:
    """Announce the download of the pretrained weights of a name, and fail at once without a connection."""
    source, _, identifier = name.partition(":")
    cfg = get_pretrained_cfg(architecture) if source != "local-dir" else None
    hub_name, file = (cfg.hf_hub_id, cfg.hf_hub_filename) if cfg else (None, None)
    if source == "hf-hub" or hub_name:
        repository, _, revision = (identifier if source == "hf-hub" else str(hub_name)).partition("@")
        with download(repository, (file,) if file else _WEIGHTS, revision or None):
            yield
        return
    if cfg and cfg.url and not Path(get_dir(), "checkpoints", cfg.url.rpartition("/")[2]).exists():
        announce(name, cfg.url)
    yield


def _own_arguments(pretrained_cfg: Mapping[str, Any], model_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the model arguments of a config, from which the architecture can be rebuilt without it.

    For models of a fixed input size, timm takes the size from ``pretrained_cfg``.
    """
    args: dict[str, Any] = {}
    if pretrained_cfg.get("fixed_input_size") and pretrained_cfg.get("input_size"):
        args["img_size"] = list(pretrained_cfg["input_size"][-2:])
    return {**args, **(model_args or {})}
