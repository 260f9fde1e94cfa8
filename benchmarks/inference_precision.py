"""Accuracy of trained runs on each backend and precision of inference.py: the cost of bfloat16.

    python benchmarks/inference_precision.py RUN... --data-root $CROSSX_DATA/cub80

Each run's network classifies the test split of its dataset. The table shows top-1, the number of images whose predicted
class differs from eager float32, the largest difference of the logits divided by the largest logit, and McNemar's exact
p-value.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from backends import BACKENDS, Backend
from crossx.data.catalog import read_configured
from crossx.data.datamodule import DataModule
from crossx.evaluation.comparison import mcnemar_exact
from crossx.methods.weights import load_method
from crossx.runs import Run
from crossx.training.config import Config
from harness import parser, table, write
from parity import difference

BATCH = 32


def compare(folder: Path, data_root: Path, backends: list[Backend]) -> list[dict[str, Any]]:
    """Return one entry per backend, the reference first."""
    method, spec = load_method(folder)
    run = Run(folder)
    # no workers: a process forked next to OpenVINO's threads may crash at exit and end this one too
    config = replace(
        Config.from_yaml(run.config).data,
        root=str(data_root),
        batch_size=BATCH,
        eval_batch_size=BATCH,
        num_workers=0,
    )
    data = DataModule(read_configured(config), spec.preprocessing, config, run.read_info()["seed"])
    batches = [(data.normalize(images).contiguous(), labels) for images, labels in data.eval_loader("test")]
    targets = torch.cat([labels for _, labels in batches])
    reference = None
    found = []
    for backend in backends:
        predict = backend.prepare(method, batches[0][0])
        logits = torch.cat([predict(images) for images, _ in batches])
        reference = logits if reference is None else reference
        right, was_right = logits.argmax(1) == targets, reference.argmax(1) == targets
        found.append(
            {
                "run": folder.name,
                "backend": str(backend),
                "n": len(targets),
                "top1": right.float().mean().item(),
                "other_class": int((logits.argmax(1) != reference.argmax(1)).sum()),
                "difference": difference(logits, reference),
                "p": mcnemar_exact(int((right & ~was_right).sum()), int((~right & was_right).sum())),
            }
        )
    return found


def main() -> None:
    options = parser(__doc__, "inference_precision", runs=1)
    options.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="a run folder")
    options.add_argument("--data-root", required=True, type=Path, help="root folder of the dataset")
    arguments = options.parse_args()
    cpu = torch.device("cpu")
    backends = [b for b in BACKENDS if b.fits(cpu, BATCH) and b.name != "compile" and not b.missing()]
    found = [row for folder in arguments.folders for row in compare(folder, arguments.data_root, backends)]
    rows = [
        [
            row["run"], row["backend"], row["n"], f"{row['top1']:.2%}", row["other_class"],
            f"{row['difference']:.1e}", f"{row['p']:.2f}",
        ]
        for row in found
    ]  # fmt: skip
    print(table(["run", "backend", "images", "top-1", "other class", "difference", "p"], rows))
    write(arguments.output, {"batch_size": BATCH, "runs": found})


if __name__ == "__main__":
    main()
