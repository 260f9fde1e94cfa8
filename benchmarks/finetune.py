"""`finetune` compared with logistic regression on frozen features of the same backbone, with few images per class.

    python benchmarks/finetune.py --root $CROSSX_DATA/cub80 --backbone $CROSSX_DATA/weights/mobilenetv2_035
    python benchmarks/finetune.py --root $CROSSX_DATA/cub80 --backbone $CROSSX_DATA/weights/mobilenetv2_035 \\
      --method plain --epochs 10

The script selects 5, 15 and 30 training images per class (always the same ones) and all test images. It trains the
recipe with changes only to backbone, image size, number of epochs and, if asked for, method. The probe is logistic
regression (scikit-learn) on the backbone's own pooled features of all training images; its C is the best of three
on the test images, which favours the probe. Results that are already in the JSON file are not measured again. Needs
`pip install -e ".[bench]"`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from crossx import create_method, fit
from crossx.cli.memory import keep_freed_memory
from crossx.data.catalog import read_configured, read_dataset
from crossx.data.datamodule import DataModule
from crossx.data.transforms import preprocessing_for
from crossx.evaluation.intervals import difference_interval
from crossx.evaluation.run import evaluate
from crossx.methods.base import Method
from crossx.methods.weights import load_method
from crossx.training.config import Config
from harness import RESULTS, write

PENALTIES = (0.1, 1.0, 10.0)
"""C of the probe, which hardly affects its accuracy in this range."""


@dataclass(frozen=True)
class Cell:
    """One training run: model, images per class and number of epochs."""

    backbone: str
    images: int
    epochs: int
    seed: int
    method: str

    @property
    def key(self) -> str:
        own = "" if self.method == "crossx" else f"/{self.method}"
        return f"{Path(self.backbone).name}/{self.images}/{self.epochs}/{self.seed}{own}"


def write_subset(root: Path, images: int, folder: Path) -> Path:
    """Link the selected training images and all test images into one folder per split and class."""
    index = read_dataset("cub", str(root))
    by_class: dict[tuple[str, int], list[Path]] = defaultdict(list)
    for record in index.records:
        by_class[record.split, record.label].append(record.path)
    for (split, label), paths in by_class.items():
        if split == "train":
            paths = sorted(paths, key=lambda path: path.name)
            random.Random(f"0/{label}").shuffle(paths)
            paths = paths[:images]
        target = folder / split / index.classes[label]
        target.mkdir(parents=True)
        for path in paths:
            (target / path.name).symlink_to(path.resolve())
    return folder


@torch.inference_mode()
def features(
    method: Method, data: DataModule, split: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    method.eval()
    batches = [(method.embeddings(data.normalize(x)), y) for x, y in data.eval_loader(split)]
    embedded, targets = zip(*batches, strict=True)
    return torch.cat(embedded).numpy(), torch.cat(targets).numpy()


def probe(config: Config) -> dict[str, Any]:
    """Fit logistic regression on the frozen features of all training images, and evaluate it."""
    data_config = replace(config.data, val_fraction=0.0)
    index = read_configured(data_config)
    plain = create_method(
        "plain", backbone=config.model.backbone, num_classes=len(index.classes), pretrained=True
    )
    preprocessing = preprocessing_for(data_config, plain.backbone.data_config)
    data = DataModule(index, preprocessing, data_config, seed=0)
    train, test = features(plain, data, "train"), features(plain, data, "test")
    found = {}
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty, max_iter=1000).fit(*train)
        found[penalty] = model.predict(test[0]) == test[1]
    best = max(found, key=lambda penalty: found[penalty].mean())
    return {
        "top1": float(found[best].mean()),
        "C": best,
        "all": {str(penalty): float(right.mean()) for penalty, right in found.items()},
        "correct": "".join("01"[int(right)] for right in found[best]),
    }


def train_and_test(config: Config) -> dict[str, Any]:
    start = time.perf_counter()
    run = fit(config)
    seconds = time.perf_counter() - start
    method, spec = load_method(run.path)
    data = DataModule(read_configured(config.data), spec.preprocessing, config.data, seed=0)
    outputs = evaluate(method, data.eval_loader("test"), "cpu", normalize=data.normalize)
    right = (outputs.logits.argmax(1) == outputs.targets).numpy()
    return {
        "top1": float(right.mean()),
        "seconds": round(seconds),
        "correct": "".join("01"[int(value)] for value in right),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="dataset in the layout of CUB-200-2011")
    parser.add_argument(
        "--backbone", action="append", required=True, help="folder of a timm model; can be repeated"
    )
    parser.add_argument(
        "--images", type=int, nargs="+", default=[5, 15, 30], help="training images per class"
    )
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 5, 10, 50])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--method", default="crossx", help="another method than the recipe's")
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--output", type=Path, default=RESULTS / "finetune.json")
    options = parser.parse_args()
    keep_freed_memory()
    results = (
        json.loads(options.output.read_text()) if options.output.is_file() else {"probes": {}, "cells": {}}
    )
    results.pop("machine", None)
    cells = [
        Cell(backbone, images, epochs, seed, options.method)
        for epochs in sorted(options.epochs)
        for images in sorted(options.images)
        for backbone in options.backbone
        for seed in options.seeds
    ]
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells:
            subset = Path(folder) / str(cell.images)
            if not subset.is_dir():
                write_subset(options.root, cell.images, subset)
            config = Config.from_recipe(
                "finetune",
                model={"method": cell.method, "backbone": f"local-dir:{Path(cell.backbone).resolve()}"},
                data={"root": str(subset), "image_size": options.image_size},
                trainer={"max_epochs": cell.epochs, "logger": False},
                seed=cell.seed,
                output=str(Path(folder) / cell.key.replace("/", "-")),
            )
            name = f"{Path(cell.backbone).name}/{cell.images}"
            if name not in results["probes"]:
                results["probes"][name] = probe(config)
            if cell.key not in results["cells"]:
                results["cells"][cell.key] = train_and_test(config)
            own, reference = (
                np.array([digit == "1" for digit in entry["correct"]])
                for entry in (results["cells"][cell.key], results["probes"][name])
            )
            interval = difference_interval(own, reference)
            results["cells"][cell.key]["difference"] = [
                float(own.mean() - reference.mean()), interval.low, interval.high
            ]  # fmt: skip
            print(
                f"{cell.key}: {own.mean():.2%}, probe {reference.mean():.2%}, difference "
                f"{own.mean() - reference.mean():+.2%} ({interval.low:+.2%} to {interval.high:+.2%})",
                flush=True,
            )
            write(options.output, {**results, "image_size": options.image_size})


if __name__ == "__main__":
    main()
