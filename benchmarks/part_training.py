"""Excitations that are parts, and no less accurate? Trained in two steps and compared with the paper's Cross-X.

    python benchmarks/part_training.py --seeds 0 1 2 --work out/parts -- --config crossx_mobilenetv2_160 \\
      --model.backbone local-dir:$CROSSX_DATA/weights/mobilenetv2_035 --data.dataset synthetic --data.root out/birds \\
      --data.seed 7 --data.images_per_class 90 --data.test_images_per_class 100 --data.image_size 128 \\
      --data.resize_size 144 --data.num_workers 0 --optim.optimizer adamw --optim.weight_decay 0.0001

For each seed: `default`, the paper's Cross-X, fine-tuned; `frozen`, spatial gates with an excitation of the whole
(docs/methods/crossx-parts.md), only gates and heads trained; `tuned`, the same fine-tuned from there, for as many
epochs in all as `default`. Then `crossx test` and, of each, `crossx test --parts`. What follows `--` is passed on to
`crossx fit`. Finished runs in `--work` are not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossx.cli.test import compare
from crossx.evaluation.intervals import student_interval
from harness import table, without_folder, write

RESULTS = Path(__file__).parent.parent / "results" / "parts"
GATES = [
    "--model.gates", "spatial", "--model.whole", "true", "--model.presence_weights", "[0,2]",
    "--model.concentration_weight", "10", "--model.border_weight", "1", "--model.part_weights", "[1,1,1]",
    "--model.assignment_start", "clusters",
]  # fmt: skip
NAMES = ("default", "frozen", "tuned")


def main() -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--frozen-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=16, help="epochs of fine-tuning (default: 16)")
    parser.add_argument("--frozen-lr", type=float, default=0.002)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "two_steps.json")
    parser.add_argument("fit_options", nargs="*", metavar="-- OPTION", help="options of crossx fit")
    options = parser.parse_args()
    runs: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        runs[str(seed)] = trained(options, seed)
        measures = {name: summarize(name, runs) for name in NAMES}
        write(
            options.output,
            {"options": recorded(options), "runs": runs, "summary": measures, "difference": difference(runs)},
        )
    print(shown(runs, measures))


def recorded(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options without what differs between machines."""
    own = {name: getattr(options, name) for name in ("frozen_epochs", "epochs", "frozen_lr", "lr")}
    return {**own, "fit": [without_folder(word) for word in options.fit_options], "gates": GATES}


def trained(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train and test the three networks of a seed."""
    folders = {name: options.work / f"{name}-{seed}" for name in NAMES}
    both = options.frozen_epochs + options.epochs
    steps = {
        "default": ["--optim.lr", options.lr, "--trainer.max_epochs", both],
        "frozen": [
            *GATES, "--optim.freeze_backbone", "true", "--optim.lr", options.frozen_lr, "--trainer.max_epochs",
            options.frozen_epochs,
        ],
        "tuned": [
            *GATES, "--model.detach_assignment", "true", "--init", folders["frozen"], "--optim.lr", options.lr,
            "--trainer.max_epochs", options.epochs,
        ],
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        if not folder.is_dir():
            words = [*options.fit_options, *map(str, steps[name]), "--seed", str(seed)]
            crossx("fit", *words, "--output", str(folder))
        elif json.loads((folder / "run.json").read_text())["status"] != "finished":
            crossx("fit", "--resume", str(folder))
        if not (folder / "test.json").is_file():
            crossx("test", str(folder))
        if not (folder / "test_parts.json").is_file():
            crossx("test", str(folder), "--parts")
        results = json.loads((folder / "test.json").read_text())
        found[name] = {
            "top1": results["top1"],
            "images": results["n"],
            "heads": results["heads"],
            "parts": measured(json.loads((folder / "test_parts.json").read_text())),
        }
    against, _ = compare(folders["tuned"], folders["default"], "test")
    found["difference"] = {"value": against["difference"], "interval": against["interval"]["difference"]}
    return found


def crossx(*words: str) -> None:
    """Run a crossx command."""
    print("crossx", *words, flush=True)
    if code := subprocess.run([sys.executable, "-m", "crossx", *words], check=False).returncode:
        sys.exit(f"crossx {words[0]} ended with {code}")


def measured(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the measures of each stage that docs/parts.md defines and the goal is stated in."""
    found = {"verdict": results["verdict"]}
    for stage, of in results["stages"].items():
        excitations = of["excitations"]
        one = {
            "correlation": of["diversity"]["correlation"]["value"],
            "follows": of["diversity"]["follows"]["value"],
            "flip": [excitation["flip"]["value"] for excitation in excitations],
        }
        if results.get("parts"):
            one |= {
                "peak_in_part": [excitation["any_part"]["value"] for excitation in excitations],
                "nmi_of_peaks_in_parts": of["consistency"]["inside"]["nmi"],
                "keypoint_nmi": of["keypoints"]["nmi"]["value"],
            }
        found[stage] = one
    return found


def summarize(name: str, runs: Mapping[str, Any]) -> dict[str, Any]:
    """Return means over the seeds; of what each excitation has, those of the lowest one of each seed."""
    mine = [run[name] for run in runs.values()]
    found: dict[str, Any] = {"top1": statistics.mean(run["top1"] for run in mine)}
    for stage in (stage for stage in mine[0]["parts"] if stage != "verdict"):
        values = [run["parts"][stage] for run in mine]
        found[stage] = {
            key: statistics.mean(
                min(value[key]) if isinstance(value[key], list) else value[key] for value in values
            )
            for key in values[0]
        }
    return found


def difference(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean difference of ``tuned`` to ``default``, and its 95% interval over the seeds."""
    values = [run["difference"]["value"] for run in runs.values()]
    return {"value": statistics.mean(values), "interval_over_seeds": student_interval(values)}


def shown(runs: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Return a table of accuracies, and one of the measures of parts."""
    accuracies = []
    for seed, run in runs.items():
        low, high = (100 * end for end in run["difference"]["interval"])
        gain = f"{100 * run['difference']['value']:+.2f} ({low:+.2f} to {high:+.2f})"
        accuracies.append([f"seed {seed}", *(f"{run[name]['top1']:.2%}" for name in NAMES), gain])
    stages = [stage for stage in summary["tuned"] if stage != "top1"]
    keys = list(summary["tuned"][stages[0]])
    measures = [
        [f"{name}, {stage}", *(f"{summary[name][stage][key]:.3f}" for key in keys)]
        for name in NAMES
        for stage in stages
    ]
    return "\n\n".join(
        (
            table(["", *NAMES, "tuned against default"], accuracies),
            table(["mean of the seeds", *keys], measures),
        )
    )


if __name__ == "__main__":
    main()
