"""Excitations that are parts, and no less accurate? Spatial gates, compared with the paper's Cross-X.

    python benchmarks/part_training.py --seeds 0 1 2 --epochs 15 --work out/parts -- --config finetune \\
      --model.backbone local-dir:$CROSSX_DATA/weights/mobilenetv2_035 --data.dataset synthetic --data.root out/birds \\
      --data.seed 8 --data.images_per_class 90 --data.test_images_per_class 100 --data.image_size 128 \\
      --data.num_workers 0

For each seed: `default`, the paper's Cross-X, fine-tuned; and for as many epochs in all, spatial gates with an
excitation of the whole (docs/methods/crossx-parts.md):

- `--way following`: `following`, whose refined prototypes follow the features, as in the recipe finetune_parts;
- `--way refined`: `refined`, whose prototypes are trained like the heads after the refinement;
- `--way two_steps`: `frozen`, of which only gates and heads are trained, from clusters and with the terms on position
  and on each part alone; and `tuned`, fine-tuned from there.

Then `crossx test` and, of each, `crossx test --parts`. What follows `--` is passed on to `crossx fit`. Finished runs in
`--work` are not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossx.cli.test import compare
from crossx.evaluation.intervals import student_interval
from harness import table, without_folder, write

RESULTS = Path(__file__).parent.parent / "results" / "parts"
SPATIAL = ["--model.gates", "spatial", "--model.whole", "true"]
CLUSTERS = [*SPATIAL, "--model.assignment_start", "clusters"]
REFINED = [*SPATIAL, "--model.assignment_start", "refined"]
DETACHED = ["--model.detach_assignment", "true"]
POSITION = [
    "--model.presence_weights", "[0,2]", "--model.concentration_weight", "10", "--model.border_weight", "1",
]  # fmt: skip
TERMS = [*POSITION, "--model.part_weights", "[1,1,1]"]
FOLLOWING = [*POSITION, "--model.detach_shares", "true", "--model.assignment_lr_factor", "20"]
NETWORKS = {
    "following": ("default", "following"),
    "refined": ("default", "refined"),
    "two_steps": ("default", "frozen", "tuned"),
}
"""Networks of each way; the last is compared with the first."""


def main() -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--way", choices=[*NETWORKS], default="following")
    parser.add_argument("--epochs", type=int, default=26, help="epochs in all (default: 26)")
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--frozen-epochs", type=int, default=10, help="of two steps (default: 10)")
    parser.add_argument("--frozen-lr", type=float, default=0.002, help="of two steps (default: 0.002)")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--output", type=Path, help="default: results/parts/WAY.json")
    parser.add_argument("fit_options", nargs="*", metavar="-- OPTION", help="options of crossx fit")
    options = parser.parse_args()
    output = options.output or RESULTS / f"{options.way}.json"
    names = NETWORKS[options.way]
    runs: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        runs[str(seed)] = trained(options, seed)
        measures = {name: summarize(name, runs) for name in names}
        write(
            output,
            {"options": recorded(options), "runs": runs, "summary": measures, "difference": difference(runs)},
        )
    print(shown(names, runs, measures))


def recorded(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options without what differs between machines."""
    names = ["way", "epochs", "lr", *(("frozen_epochs", "frozen_lr") if options.way == "two_steps" else ())]
    own = {name: getattr(options, name) for name in names}
    words = trainings(options, options.work / "frozen")
    return {
        **own,
        "fit": [without_folder(word) for word in options.fit_options],
        "networks": {name: [without_folder(word) for word in words[name]] for name in NETWORKS[options.way]},
    }


def trainings(options: argparse.Namespace, frozen: Path) -> dict[str, list[str]]:
    """Return network -> its options of `crossx fit`; ``frozen`` is the run from which ``tuned`` starts."""
    rate, first_rate = ["--optim.lr", f"{options.lr:g}"], ["--optim.lr", f"{options.frozen_lr:g}"]

    def epochs(count: int) -> list[str]:
        return ["--trainer.max_epochs", str(count)]

    later = epochs(options.epochs - options.frozen_epochs)
    return {
        "default": [*rate, *epochs(options.epochs)],
        "following": [*REFINED, *DETACHED, *FOLLOWING, *rate, *epochs(options.epochs)],
        "refined": [*REFINED, *DETACHED, *rate, *epochs(options.epochs)],
        "frozen": [
            *CLUSTERS, *TERMS, "--optim.freeze_backbone", "true", *first_rate, *epochs(options.frozen_epochs),
        ],
        "tuned": [*CLUSTERS, *TERMS, *DETACHED, "--init", str(frozen), *rate, *later],
    }  # fmt: skip


def trained(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train and test the networks of a seed."""
    names = NETWORKS[options.way]
    folders = {name: options.work / f"{name}-{seed}" for name in names}
    steps = trainings(options, options.work / f"frozen-{seed}")
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        if not folder.is_dir():
            words = [*options.fit_options, *steps[name], "--seed", str(seed)]
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
    against, _ = compare(folders[names[-1]], folders[names[0]], "test")
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
    top1 = statistics.mean(run["top1"] for run in mine)
    return {"top1": top1, **mean_of_lowest([run["parts"] for run in mine])}


def mean_of_lowest(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return stage -> means of the measures of several runs; of what each excitation has, those of the lowest one."""
    found = {}
    for stage in (stage for stage in parts[0] if stage != "verdict"):
        values = [of[stage] for of in parts]
        found[stage] = {
            key: statistics.mean(
                min(value[key]) if isinstance(value[key], list) else value[key] for value in values
            )
            for key in values[0]
        }
    return found


def difference(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean difference of the last network to the first, and its 95% interval over the seeds."""
    values = [run["difference"]["value"] for run in runs.values()]
    return {"value": statistics.mean(values), "interval_over_seeds": student_interval(values)}


def shown(names: Sequence[str], runs: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Return a table of accuracies, and one of the measures of parts."""
    accuracies = []
    for seed, run in runs.items():
        low, high = (100 * end for end in run["difference"]["interval"])
        gain = f"{100 * run['difference']['value']:+.2f} ({low:+.2f} to {high:+.2f})"
        accuracies.append([f"seed {seed}", *(f"{run[name]['top1']:.2%}" for name in names), gain])
    stages = [stage for stage in summary[names[0]] if stage != "top1"]
    keys = list(summary[names[0]][stages[0]])
    measures = [
        [f"{name}, {stage}", *(f"{summary[name][stage][key]:.3f}" for key in keys)]
        for name in names
        for stage in stages
    ]
    return "\n\n".join(
        (
            table(["", *names, f"{names[-1]} against {names[0]}"], accuracies),
            table(["mean of the seeds", *keys], measures),
        )
    )


if __name__ == "__main__":
    main()
