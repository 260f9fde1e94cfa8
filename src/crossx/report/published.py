"""The accuracies that the Cross-X paper prints: Tables 2 to 7 of https://arxiv.org/abs/1909.04412.

``published.csv`` has one line per printed row. The backbone is the one that caption or text name, otherwise ResNet-50
(section 4.1, for everything not said otherwise); ``crops`` is ``multi`` for the first groups of the tables.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from crossx.recipes import RELEASED, Recipe, list_recipes, load_recipe

ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "AlexNet": ("alexnet",),
    "DenseNet-161": ("densenet161",),
    "ResNet-50": ("resnet50",),
    "SENet-50": ("legacy_seresnet50",),
    "VGGNet": ("vgg16", "vgg19"),
}
"""Name of a backbone in the tables -> timm's names."""


@dataclass(frozen=True)
class PublishedResult:
    """One row of one table.

    Attributes:
        table: Number of the table.
        row: Number of the row in it, from 1; in Table 2 the row of the dataset's column.
        dataset: Our name of the dataset: ``cub``, ``nabirds``, ``cars``, ``dogs`` or ``aircraft``.
        approach: The paper's name of the method.
        method: Our name of the network, that of a recipe: the method's, or the one it was published under.
        reference: Number in the paper's bibliography; empty for the paper's own.
        backbone: The network that it is based on.
        one_stage: ``yes`` or ``no``: trained end to end after initialisation; empty if unknown.
        separate_initialization: ``yes`` or ``no``.
        crops: ``single`` or ``multi``.
        accuracy: As a fraction; see ``metric``.
        note: What the text adds.
    """

    table: int
    row: int
    dataset: str
    approach: str
    method: str
    reference: str
    backbone: str
    one_stage: str
    separate_initialization: str
    crops: str
    accuracy: float
    note: str

    @property
    def metric(self) -> str:
        """``top-1``, or ``class mean`` (section 4.4 on Table 7)."""
        return "class mean" if self.table == 7 else "top-1"

    @property
    def origin(self) -> str:
        """Where it is printed: ``Table 4, row 8``."""
        return f"Table {self.table}, row {self.row}"


def read_published() -> list[PublishedResult]:
    """Return every row, in the order of the tables."""
    text = (resources.files("crossx.report") / "published.csv").read_text(encoding="utf-8")
    return [_read(line) for line in csv.DictReader(text.splitlines())]


def _read(line: dict[str, str]) -> PublishedResult:
    table, row, accuracy = int(line.pop("table")), int(line.pop("row")), float(line.pop("accuracy"))
    # 87.7 as a fraction is 0.877, not 0.8770000000000001
    return PublishedResult(table=table, row=row, accuracy=round(accuracy / 100, 4), **line)


def find_recipe(result: PublishedResult) -> Recipe | None:
    """Return the packaged recipe of a row, with its network, backbone and dataset; None if there is none."""
    for name in sorted(list_recipes(), key=len):
        recipe = load_recipe(name)
        network = recipe.published_as or recipe.get("model", "method")
        backbone = str(recipe.get("model", "backbone", default="")).partition(".")[0]
        if (
            not name.endswith(RELEASED)
            and (network, recipe.get("data", "dataset")) == (result.method, result.dataset)
            and backbone in ARCHITECTURES[result.backbone]
        ):
            return recipe
    return None


def is_network_of(recipe: Recipe, results: Mapping[str, Any], architecture: str) -> bool:
    """Return whether a tested network is the one that a recipe trains: dataset, method, options and image size.

    Args:
        recipe: The recipe.
        results: The results of ``crossx test``.
        architecture: timm's name of the tested backbone, with or without a weight tag.
    """
    model = recipe.to_dict()["model"]
    method, backbone = model.pop("method"), model.pop("backbone")
    options = {key: value for key, value in model.items() if key not in ("pretrained", "backbone_args")}
    size = (results.get("preprocessing") or {}).get("image_size")
    own = results.get("options") or {}
    return (
        (results.get("method"), results.get("dataset")) == (method, recipe.get("data", "dataset"))
        and architecture.partition(".")[0] == str(backbone).partition(".")[0]
        and size == recipe.get("data", "image_size")
        and all(own.get(key) == value for key, value in options.items())
    )


def mean_accuracy(result: PublishedResult, tested: Iterable[Mapping[str, Any]]) -> float:
    """Return the mean over the results of tested runs of the accuracy that a row states."""
    key = "class_mean" if result.metric == "class mean" else "top1"
    values: Sequence[float] = [results[key] for results in tested]
    return sum(values) / len(values)
