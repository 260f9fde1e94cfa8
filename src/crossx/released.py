"""The authors' released checkpoints (https://github.com/cswluo/CrossX) as ordinary runs.

A checkpoint is a plain state dict without class names. Its classes are in the alphabetical order of the class folders
of the released preparation; the heads are permuted to the official label order if the dataset is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossx.backbones import read_state_dict
from crossx.data.catalog import DATASETS, read_dataset
from crossx.data.index import DatasetIndex
from crossx.errors import CrossXError, UsageError, unknown
from crossx.layers.pooling import Pooling
from crossx.methods import Method, create_method
from crossx.methods.weights import describe, save_weights
from crossx.runs import Preprocessing, Run, environment, write_json

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OSME_BLOCKS = ("layer3.5", "layer4.2")
HEADS = {"fc_ulti": "last", "fc_plty": "previous", "fc_cmbn": "merged"}
GATE_LAYERS = {"0": "squeeze", "2": "excite"}


@dataclass(frozen=True)
class ReleasedSetting:
    """The released code's settings for one dataset (its demo.py and initialization.py).

    Attributes:
        previous_pooling: Pooling of stage L-1.
        resize_size: Images are resized to a square of this side before the crop of 448.
        use_merged: Whether its evaluation uses the merged head.
        by_folder: Whether its class folders have the names of the archive's image folders (NABirds: the class id
            without leading zeros), instead of the class names without "/".
    """

    previous_pooling: Pooling
    resize_size: int
    use_merged: bool
    by_folder: bool


SETTINGS = {
    "cub": ReleasedSetting("max", 600, True, by_folder=True),
    "nabirds": ReleasedSetting("max", 600, True, by_folder=True),
    "cars": ReleasedSetting("avg", 448, True, by_folder=False),
    "dogs": ReleasedSetting("avg", 448, False, by_folder=True),
    "aircraft": ReleasedSetting("avg", 600, True, by_folder=False),
}


def import_released(
    file: str | Path,
    dataset: str,
    output: str | Path,
    *,
    previous_pooling: Pooling | None = None,
    data_root: str | Path | None = None,
) -> Run:
    """Make a run folder from a released checkpoint.

    Args:
        file: The checkpoint; keys with or without ``module.``.
        dataset: ``cub``, ``nabirds``, ``cars``, ``dogs`` or ``aircraft``: determines pooling, input and heads.
        output: The new run folder.
        previous_pooling: Pooling of stage L-1, instead of the dataset's.
        data_root: The dataset, for the class names; without it the classes are numbered in the released order.

    Raises:
        UsageError: For an unknown dataset.
        CrossXError: If the file is not a released checkpoint, or has another number of classes than the dataset.
    """
    if dataset not in SETTINGS:
        raise unknown("dataset", dataset, SETTINGS)
    setting = SETTINGS[dataset]
    run = Run(Path(output))
    if run.spec.exists():
        raise UsageError(f"{output}: there is a run already. Choose another --output.")
    state = read_state_dict(Path(file))
    method = build_released(
        state, previous_pooling or setting.previous_pooling, setting.use_merged, Path(file)
    )
    classes, levels = _released_classes(dataset, setting, method, data_root)
    preprocessing = Preprocessing(
        448, setting.resize_size, "bilinear", IMAGENET_MEAN, IMAGENET_STD, crop_bottom=0
    )
    spec = describe(method, classes=classes, preprocessing=preprocessing, dataset=dataset, levels=levels)
    info = {
        "status": "imported",
        "method": method.name,
        "backbone": method.backbone.name,
        "backbone_weights": str(file),
        "pretrained": False,
        "dataset": dataset,
        "data_root": None if data_root is None else str(data_root),
        "seed": None,
        "selection": {"how": "best_on_test", "split": "test", "epoch": None, "value": None},
        "class_names": "official" if data_root is not None else "numbered in the released order",
        "environment": environment(),
    }
    write_json(run.info, info)
    save_weights(method, run.weights)
    write_json(run.spec, spec.to_json())
    return run


def build_released(
    state: Mapping[str, Tensor], previous_pooling: Pooling, use_merged: bool, source: Path
) -> Method:
    """Build the Cross-X network of a released state dict and load it, with the classes in the released order.

    Args:
        state: The checkpoint without ``module.``.
        previous_pooling: Pooling of stage L-1, which the weights do not determine.
        use_merged: Whether to use the merged head.
        source: Named in errors.

    Raises:
        CrossXError: If it is not a released checkpoint.
    """
    gate = re.compile(r"layer4\.2\.(me|se)\.parts\.(\d+)\.0\.weight")
    gates = [match for key in state if (match := gate.fullmatch(key))]
    if not gates or "fc_ulti.weight" not in state:
        raise CrossXError(
            f"{source}: not a released Cross-X checkpoint (no layer4.2.me.parts or layer4.2.se.parts and fc_ulti)."
        )
    num_parts, senet = len(gates), gates[0].group(1) == "se"
    hidden = [state[f"{block}.{gates[0].group(1)}.parts.0.0.weight"].shape for block in reversed(OSME_BLOCKS)]
    method = create_method(
        "crossx",
        backbone="seresnet50_16units" if senet else "resnet50",
        num_classes=len(state["fc_ulti.weight"]),
        num_parts=num_parts,
        reduction=[channels // units for units, channels in hidden],
        use_merged=use_merged,
        previous_pooling=previous_pooling,
        interpolation="nearest",
        c3s_form="released",
    )
    converted = convert_released(state, num_parts)
    own = method.state_dict()
    needed = {key: value for key, value in converted.items() if key in own}
    missing = [key for key in own if key not in needed and not key.endswith("num_batches_tracked")]
    wrong = [key for key, value in needed.items() if own[key].shape != value.shape]
    if missing or wrong:
        raise CrossXError(
            f"{source}: not a released ResNet-50 or SENet-50 checkpoint: {len(missing)} tensors are missing and "
            f"{len(wrong)} have another shape ({(missing + wrong)[0]}, ...)."
        )
    method.load_state_dict({**own, **needed})
    return method.eval()


def convert_released(state: Mapping[str, Tensor], num_parts: int) -> dict[str, Tensor]:
    """Return a released state dict with the keys of ``CrossX``.

    The weights of the gates are stacked over parts, and the kernels of the merge are concatenated as groups of one
    convolution. Unused weights (the trunk's gate in the last block of SENet) keep their names.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        head, _, kind = key.rpartition(".")
        if head in HEADS:
            converted[f"heads.{HEADS[head]}.{kind}"] = value
        elif not re.search(r"\.parts\.|^(conv2|conv3|bn3)_\d", key):
            converted["backbone.trunk." + _trunk_key(key)] = (
                value[..., None, None] if _is_gate(key, value) else value
            )
    for block in OSME_BLOCKS:
        slot = "me" if f"{block}.me.parts.0.0.weight" in state else "se"
        for layer, name in GATE_LAYERS.items():
            for kind in ("weight", "bias"):
                parts = [state.get(f"{block}.{slot}.parts.{p}.{layer}.{kind}") for p in range(num_parts)]
                converted[f"backbone.trunk.{block}.se.osme.{name}_{kind}"] = _join(parts, torch.stack)
    sources = {"conv2_{}.weight": "reduce.weight", "conv3_{}.weight": "smooth.weight"}
    for kind in ("weight", "bias", "running_mean", "running_var"):
        sources[f"bn3_{{}}.{kind}"] = f"norm.{kind}"
    for released, ours in sources.items():
        parts = [state.get(released.format(p + 1)) for p in range(num_parts)]
        converted[f"merge.{ours}"] = _join(parts, torch.cat)
    return converted


def _trunk_key(key: str) -> str:
    """``layer1.0.se.fc.0`` and ``layer3.5.se.dresponse.0`` are linear; timm's SE gates are 1 x 1 convolutions."""
    key = re.sub(r"\.se\.fc\.([02])\.", lambda m: f".se.fc{1 + int(m[1]) // 2}.", key)
    return re.sub(r"\.se\.dresponse\.([02])\.", lambda m: f".se.own.fc{1 + int(m[1]) // 2}.", key)


def _is_gate(key: str, value: Tensor) -> bool:
    return re.search(r"\.se\.(fc|dresponse)\.", key) is not None and value.dim() == 2


def _join(parts: Sequence[Tensor | None], how: Callable[..., Tensor]) -> Tensor:
    present = [part for part in parts if part is not None]
    return how(present) if len(present) == len(parts) else torch.empty(0)


def _released_classes(
    dataset: str, setting: ReleasedSetting, method: Any, data_root: str | Path | None
) -> tuple[Sequence[str], Mapping[str, tuple[str, ...]]]:
    """Return class names and hierarchy, after permuting the heads to the official order if it is known."""
    if data_root is None:
        return [f"class {number:03d}" for number in range(method.num_classes)], {}
    index = read_dataset(dataset, Path(data_root))
    if len(index.classes) != method.num_classes:
        raise CrossXError(
            f"{data_root}: {len(index.classes)} classes, the checkpoint has {method.num_classes} "
            f"({DATASETS[dataset].title}): give the root of the whole dataset."
        )
    folders = released_folders(index, setting.by_folder)
    released_order = sorted(range(len(folders)), key=lambda label: folders[label])
    position = torch.empty(len(folders), dtype=torch.long)
    position[torch.tensor(released_order)] = torch.arange(len(folders))
    with torch.no_grad():
        for head in method.heads.values():
            head.weight.copy_(head.weight[position].clone())
            head.bias.copy_(head.bias[position].clone())
    return index.classes, index.levels


def released_folders(index: DatasetIndex, by_folder: bool) -> list[str]:
    """Return per class the name of the folder whose alphabetical rank is its released index.

    Raises:
        CrossXError: If a class has no image, so that its folder is unknown.
    """
    if not by_folder:
        return [name.replace("/", "") for name in index.classes]
    names = {record.label: record.path.parent.name for record in index.records}
    for label, name in enumerate(index.classes):
        if label not in names:
            raise CrossXError(
                f"class {name!r} has no image, so its position in the released order is unknown."
            )
    return [str(int(names[label])) if names[label].isdecimal() else names[label] for label in sorted(names)]
