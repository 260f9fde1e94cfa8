"""How long trainings wait for their images, by ``trainer.profile``: small images and photographs of 12 megapixels.

    CROSSX_DATA=DIR python benchmarks/waiting.py

A pretrained MobileNetV2 0.35 with the method ``plain`` at 160 px, on the CPU with two workers that load the images: on
cub80 in batches of 32, and on photographs of 4000 x 3000 pixels, mosaics of cub80 in one folder per class, in batches
of 8. Each with and without ``data.cache``; the first epoch of a training fills its cache. The trainings take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import parser, table, write
from input_pipeline import LARGE, find_photographs, write_mosaics

STEPS = (
    "waiting for images",
    "copying and normalising",
    "forward pass and loss",
    "backward pass",
    "optimiser step",
)


def main() -> None:
    """Train, print and write."""
    options = parser(__doc__, "waiting", runs=1)
    options.add_argument("--epochs", type=int, default=3, help="per training (default: %(default)s)")
    options.add_argument("--batches", type=int, default=34, help="per epoch (default: %(default)s)")
    options.add_argument("--photographs", type=int, default=32, help="per class, of 4 (default: %(default)s)")
    arguments = options.parse_args()
    root = Path(os.environ["CROSSX_DATA"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, _ = find_photographs(folder)
        (folder / "photographs").mkdir()
        for label in range(4):
            images = small[label * len(small) // 4 : (label + 1) * len(small) // 4]
            write_mosaics(images, folder / "photographs" / f"class{label}", arguments.photographs, 90, LARGE)
        data = {
            "cub80": ("cub", root / "cub80", 32),
            "photographs": ("folder", folder / "photographs", 8),
        }
        rounds: list[dict[str, Any]] = []
        for number in range(arguments.runs):
            found = {}
            for images, (dataset, place, batch_size) in data.items():
                for cache in ("none", "ram"):
                    run = folder / f"{images}-{cache}-{number}"
                    _fit(run, root, dataset, place, batch_size, cache, arguments)
                    found[f"{images}, cache {cache}"] = json.loads((run / "profile.json").read_text())
            rounds.append(found)
    print(
        table(
            ["training", "steps, s", "waiting, s", "share", "first images, s"],
            [_row(*one) for one in rounds[-1].items()],
        )
    )
    for name, profile in rounds[-1].items():
        rows = [[row["stage"], f"{row['seconds']:.2f}", row["times"]] for row in profile["stages"]]
        print(f"\n{name}\n\n" + table(["stage", "seconds", "times"], rows))
    settings = {name: getattr(arguments, name) for name in ("epochs", "batches", "photographs")}
    write(arguments.output, {**settings, "load": os.getloadavg()[0], "rounds": rounds})


def _fit(
    run: Path, root: Path, dataset: str, place: Path, batch_size: int, cache: str, arguments: Any
) -> None:
    words = f"""
        --model.method plain --model.backbone local-dir:{root}/weights/mobilenetv2_035 --data.dataset {dataset}
        --data.root {place} --data.image_size 160 --data.batch_size {batch_size} --data.num_workers 2
        --data.cache {cache} --optim.lr 0.01 --trainer.accelerator cpu --trainer.profile true
        --trainer.max_epochs {arguments.epochs} --trainer.limit_train_batches {arguments.batches}
        --trainer.limit_val_batches 2 --output {run}
    """.split()
    subprocess.run([sys.executable, "-m", "crossx", "fit", *words], check=True, stdout=subprocess.DEVNULL)


def _row(name: str, profile: dict[str, Any]) -> list[str]:
    seconds = {row["stage"]: row["seconds"] for row in profile["stages"]}
    steps, waiting = sum(seconds.get(stage, 0.0) for stage in STEPS), seconds.get(STEPS[0], 0.0)
    first = seconds.get("waiting for the first images of an epoch", 0.0)
    return [name, f"{steps:.1f}", f"{waiting:.2f}", f"{waiting / steps:.1%}", f"{first:.2f}"]


if __name__ == "__main__":
    main()
