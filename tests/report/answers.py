"""A tested run made up of numbers: 30 classes, one of them with markup in its name."""

from __future__ import annotations

from typing import Any

import numpy as np

from crossx.report.examples import Pictures, choose_examples
from crossx.report.page import render
from crossx.report.results import RunResults
from crossx.runs import ModelSpec, Preprocessing

MARKUP = '<script>alert("x")</script> & co'


def make_tested(
    num_classes: int = 30, images_per_class: int = 12, *, seed: int = 0, **changes: Any
) -> RunResults:
    """Make up a tested run; class ``c`` is often taken for its neighbour ``c ^ 1``."""
    generator = np.random.default_rng(seed)
    targets = np.repeat(np.arange(num_classes), images_per_class)
    logits = generator.normal(size=(len(targets), num_classes)).astype(np.float32)
    logits[np.arange(len(targets)), targets] += 3
    logits[np.arange(len(targets)), np.minimum(targets ^ 1, num_classes - 1)] += 1.5
    names = (MARKUP, *(f"{label:03d}.Bird_of_kind_{label}" for label in range(1, num_classes)))
    top1 = float((logits.argmax(1) == targets).mean())
    history = [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "train/loss": 3 / epoch,
            "train/data": 2.5 / epoch,
            "train/c3s_last": 0.3 / epoch,
            "train/c3s_merged": 0.2 / epoch,
            "train/cross_layer_merged": 0.1 / epoch,
            "train/s_diagonal_last": 1 - 0.5 / epoch,
            "train/s_off_diagonal_last": 0.5 / epoch,
            "train/top1": 1 - 0.9 / epoch,
            "lr": 0.01 / epoch,
            "val/loss": 3.5 / epoch,
            "val/top1": 1 - 0.95 / epoch,
            "seconds": 7.5 * epoch,
        }
        for epoch in range(1, 9)
    ]
    environment = {
        "python": "3.11.7",
        "platform": "Linux",
        "versions": {"crossx": "0.1.0", "torch": "2.9.0"},
        "git": {"commit": "0123abcd", "dirty": True},
    }
    values: dict[str, Any] = {
        "spec": ModelSpec(
            method="crossx",
            options={"num_parts": 2},
            backbone="resnet50.tv_in1k",
            backbone_args={},
            classes=names,
            preprocessing=Preprocessing(64, 72, "bilinear", (0.5,) * 3, (0.25,) * 3),
            dataset="folder",
        ),
        "info": {
            "id": "abc",
            "status": "finished",
            "selection": {"how": "best", "split": "val", "metric": "top1", "epoch": 7, "value": 0.86},
            "images": {"train": 300, "test": len(targets)},
            "skipped": ["/data/bad.jpg: is empty (0 bytes)"],
            "environment": environment,
        },
        "results": {
            "method": "crossx",
            "backbone": "local-dir:/weights/resnet50",
            "options": {"num_parts": 2},
            "dataset": "folder",
            "data_root": "/data/birds",
            "split": "test",
            "weights": "model.safetensors",
            "selection": {"how": "best", "split": "val", "metric": "top1", "epoch": 7, "value": 0.86},
            "run_status": "finished",
            "seen_in_training": False,
            "n": len(targets),
            "num_classes": num_classes,
            "top1": top1,
            "top5": 0.95,
            "class_mean": top1,
            "heads": {"last": 0.61, "previous": 0.52, "merged": 0.63},
            "levels": {"family": 0.87},
            "ece": 0.04,
            "intervals": {"top1": [0.4, 0.9], "class_mean": [0.41, 0.89], "confidence": 0.95},
            "seed": 3,
            "skipped": [],
            "environment": environment,
        },
        "config": "model:\n  method: crossx\n  note: '</pre><script>'\n",
        "history": history,
        "parts": {},
        "logits": logits,
        "targets": targets,
        "paths": np.array([f"images/{names[label][:3]}/{i:04d}.jpg" for i, label in enumerate(targets)]),
    }
    return RunResults(**{**values, **changes})


def make_parts(stages: tuple[str, ...] = ("last", "merged"), excitations: int = 2) -> dict[str, Any]:
    """Make up what ``crossx test RUN --parts`` writes."""

    def with_chance(over_chance: float | None) -> dict[str, Any]:
        return {"value": 0.2, "chance": 0.1, "over_chance": over_chance, "interval": [0.1, 0.3]}

    excitation = {
        "share": {"beak": with_chance(2.0), "wing": with_chance(None)},
        "object": with_chance(1.5),
        "flip": {"value": 0.75, "interval": [0.7, 0.8]},
        "zoom": {"value": 0.5, "interval": [0.4, 0.6]},
    }
    several = excitations > 1
    measured = {
        "excitations": [excitation] * excitations,
        "consistency": {"nmi": 0.25, "interval": [0.2, 0.3], "chance": 0.01, "p_value": 0.001}
        if several
        else None,
        "diversity": {
            "overlap": {"value": 0.4, "interval": [0.3, 0.5], "chance": 0.11},
            "correlation": {"value": 0.6, "interval": [0.5, 0.7]},
        }
        if several
        else None,
    }
    return {
        "n": 240,
        "parts": {"beak": 200, "wing": 180},
        "stages": dict.fromkeys(stages, measured),
        "weights": "model.safetensors",
    }


def make_pictures(
    tested: RunResults, *, parts: int = 2, side: int = 64, noise: bool = False
) -> dict[int, Pictures]:
    """Make up pictures of every image that is chosen: three stages of ``parts`` parts."""
    generator = np.random.default_rng(0)

    def picture() -> np.ndarray:
        cells = side if noise else 4
        small = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        return small.repeat(side // cells, 0).repeat(side // cells, 1)

    stages = ("last", "previous", "merged")
    return {
        number: Pictures(picture(), {stage: [picture() for _ in range(parts)] for stage in stages})
        for number in choose_examples(tested).images
    }


def make_page(notices: tuple[str, ...] = (), **options: Any) -> str:
    """Render a made-up run; the options are those of ``make_tested``."""
    tested = make_tested(**options)
    return render(tested, choose_examples(tested), make_pictures(tested), notices)
