"""How many planted label errors and near-duplicates `crossx datasets audit` finds.

    python benchmarks/audit.py --root $CROSSX_DATA/cub80 --backbone $CROSSX_DATA/weights/mobilenetv2_035
    python benchmarks/audit.py --root $CROSSX_DATA/cub80 --backbone $CROSSX_DATA/weights/tf_efficientnet_lite0 \\
      --classes 20
    python benchmarks/audit.py --dataset folder --root $FLOWERS --title flowers \\
      --backbone $CROSSX_DATA/weights/tf_efficientnet_lite0

The images are audited as they are; duplicates that are found then may be real, and are not counted later. Then 5% of
the labels are replaced by another class drawn at random, and copies of 2% of the images are added, each changed in one
of five ways and put into a split drawn at random. A duplicate is found if copy and original are in one group, a label
error if the image is listed. Needs `pip install -e ".[bench,audit]"`.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageEnhance

from crossx.audit.result import Audit
from crossx.audit.run import audit_dataset
from crossx.cli.memory import keep_freed_memory
from crossx.data.catalog import read_dataset
from harness import RESULTS, write

CHANGES = ("recompressed", "resized", "cropped", "mirrored", "brightness")
FLIPPED, COPIED = 0.05, 0.02


@dataclass(frozen=True)
class Row:
    """An image of the table that is audited; ``original`` is the path of what it is a copy of."""

    path: str
    label: str
    split: str
    original: str = ""
    change: str = ""


def plant(rows: list[Row], folder: Path, seed: int) -> tuple[list[Row], set[str]]:
    """Replace labels and add changed copies; return the rows and the paths with a wrong label."""
    generator = random.Random(seed)
    names = sorted({row.label for row in rows})
    wrong = set(generator.sample([row.path for row in rows], round(FLIPPED * len(rows))))
    flipped = [
        Row(row.path, generator.choice([name for name in names if name != row.label]), row.split)
        if row.path in wrong
        else row
        for row in rows
    ]
    copies = []
    for number, row in enumerate(generator.sample(flipped, round(COPIED * len(rows)))):
        change = CHANGES[number % len(CHANGES)]
        path = folder / f"copy-{number:04d}.jpg"
        write_copy(Path(row.path), path, change, generator)
        split = generator.choice(sorted({row.split for row in rows}))
        copies.append(Row(str(path), row.label, split, row.path, change))
        if row.path in wrong:
            wrong.add(str(path))
    return flipped + copies, wrong


def write_copy(source: Path, target: Path, change: str, generator: random.Random) -> None:
    image, quality = Image.open(source).convert("RGB"), 90
    width, height = image.size
    if change == "recompressed":
        quality = generator.randint(30, 60)
    elif change == "resized":
        factor = generator.uniform(0.5, 0.8)
        image = image.resize((round(factor * width), round(factor * height)), Image.Resampling.BICUBIC)
    elif change == "cropped":
        size = [round(side * generator.uniform(0.85, 0.95)) for side in (width, height)]
        left, top = generator.randint(0, width - size[0]), generator.randint(0, height - size[1])
        image = image.crop((left, top, left + size[0], top + size[1]))
    elif change == "mirrored":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    else:
        factor = generator.choice([generator.uniform(0.6, 0.8), generator.uniform(1.2, 1.4)])
        image = ImageEnhance.Brightness(image).enhance(factor)
    image.save(target, "JPEG", quality=quality)


def audit(rows: list[Row], folder: Path, output: Path, backbone: str) -> Audit:
    table = folder / "table.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        writer.writerows([row.path, row.label, row.split] for row in rows)
    return audit_dataset(
        "table",
        table,
        output=output,
        backbone=f"local-dir:{backbone}",
        checks=("duplicates", "labels", "outliers"),
    )


def describe(found: Audit) -> dict[str, Any]:
    return {
        "images": len(found.records),
        "accuracy": found.accuracy,
        "label_issues": len(found.labels),
        "groups": len(found.groups),
        "copies": found.copies,
        "groups_across_splits": len(found.leaks),
        "threshold": found.duplicates.threshold,
        "outliers": len(found.outliers),
    }


def score(found: set[Any], planted: set[Any]) -> dict[str, Any]:
    right = len(found & planted)
    return {
        "planted": len(planted),
        "found": len(found),
        "right": right,
        "precision": round(right / len(found), 4) if found else None,
        "recall": round(right / len(planted), 4) if planted else None,
    }


def groups_of(found: Audit) -> list[frozenset[str]]:
    return [frozenset(str(found.records[number].path) for number in group.images) for group in found.groups]


def measure(
    dataset: str, root: Path, backbone: str, classes: int | None, seed: int, cache: Path | None
) -> dict[str, Any]:
    index = read_dataset(dataset, str(root))
    rows = [
        Row(str(record.path.absolute()), index.classes[record.label], record.split)
        for record in index.records
        if classes is None or record.label < classes
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "copies").mkdir()
        output = cache or folder / "output"
        start = time.perf_counter()
        before = audit(rows, folder, output, backbone)
        seconds = time.perf_counter() - start
        planted, wrong = plant(rows, folder / "copies", seed)
        after = audit(planted, folder, output, backbone)
        labels = score({str(after.records[issue.image].path) for issue in after.labels}, wrong)
        real = {pair for group in groups_of(before) for pair in pairs_of(group)}
        original = {row.path: row.original for row in planted if row.original}
        true = {pair(copy, source) for copy, source in original.items()}
        in_groups = {pair for group in groups_of(after) for pair in pairs_of(group)}
        # neither planted nor known before
        extra = {
            one for one in in_groups - true if pair(*(original.get(path, path) for path in one)) not in real
        }
        duplicates = score((in_groups & true) | extra, true)
        recalled = {
            change: score({one for one in in_groups if one in of}, of)["recall"]
            for change in CHANGES
            if (
                of := {
                    pair(row.path, row.original) for row in planted if row.original and row.change == change
                }
            )
        }
    return {
        "backbone": Path(backbone).name,
        "classes": len({row.label for row in rows}),
        "seed": seed,
        "seconds": round(seconds, 1),
        "as_it_is": describe(before)
        | {
            "duplicates": sorted(
                sorted(str(Path(path).relative_to(root.absolute())) for path in group)
                for group in groups_of(before)
            )
        },
        "planted": describe(after),
        "labels": labels,
        "duplicates": duplicates | {"recall_by_change": recalled},
    }


def pair(a: str, b: str) -> frozenset[str]:
    return frozenset((a, b))


def pairs_of(group: frozenset[str]) -> set[frozenset[str]]:
    return {pair(a, b) for a in group for b in group if a < b}


def main() -> None:
    keep_freed_memory()
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--root", type=Path, required=True, help="folder of the dataset")
    options.add_argument("--dataset", default="cub", help="name of its reader (default: cub)")
    options.add_argument("--title", help="name of the dataset in the results, unless it is CUB-200-2011")
    options.add_argument("--backbone", required=True, help="folder of a pretrained timm model")
    options.add_argument("--classes", type=int, help="audit the first classes only")
    options.add_argument("--seeds", type=int, nargs="+", default=[0], help="of what is planted")
    options.add_argument("--cache", type=Path, help="folder in which embeddings are kept")
    options.add_argument("--output", type=Path, default=RESULTS / "audit.json")
    arguments = options.parse_args()
    results = json.loads(arguments.output.read_text())["runs"] if arguments.output.is_file() else {}
    for seed in arguments.seeds:
        found = measure(
            arguments.dataset, arguments.root, arguments.backbone, arguments.classes, seed, arguments.cache
        )
        start = f"{arguments.title}/" if arguments.title else ""
        results[f"{start}{found['backbone']}/{found['classes']}/{seed}"] = found
        for what in ("labels", "duplicates"):
            print(
                f"{found['backbone']}, {found['classes']} classes, seed {seed}: {what} {found[what]}",
                flush=True,
            )
        write(arguments.output, {"runs": results})


if __name__ == "__main__":
    main()
