"""Which options of Cross-X make its excitations parts? The parts of an ablation's runs, on validation images.

    crossx ablate --suite results/parts/options.yaml --config quickstart --data.root out/birds --data.num_workers 0 \\
      --seeds 0 1 2 --output out/part_options
    python benchmarks/part_options.py out/part_options

Measures the parts of every run (`crossx test RUN --parts --split val`), those of a search that validation accuracy did
not choose included, and copies accuracies and differences from the ablation. Runs that are measured are not measured
again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossx.ablation.tuning import describe_changes
from harness import table, write
from part_training import RESULTS, crossx, mean_of_lowest, measured

SPLIT = "val"
KEYS = ("correlation", "follows", "flip", "peak_in_part", "nmi_of_peaks_in_parts", "keypoint_nmi")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the folder of crossx ablate")
    parser.add_argument("--output", type=Path, default=RESULTS / "options.json")
    options = parser.parse_args()
    ablation = json.loads((options.folder / "results.json").read_text())
    searched = {(row["variant"], row["alternative"], row["seed"]): row for row in ablation["tuning"]}
    repeated = {(run["variant"], run["alternative"], run["seed"]): run for run in ablation["runs"]}
    runs = []
    for variant, alternative, seed in sorted(searched | repeated, key=ordered(ablation["variants"])):
        key = (variant, alternative, seed)
        folder = options.folder / variant / (f"tune-{alternative}" if alternative else "") / f"seed-{seed}"
        results = folder / f"{SPLIT}_parts.json"
        if not results.is_file():
            crossx("test", str(folder), "--parts", "--split", SPLIT)
        found = json.loads(results.read_text())
        runs.append(
            {"variant": variant, "alternative": alternative, "seed": seed, "images": found["n"]}
            | ({"searched": searched[key]["val_top1"]} if key in searched else {})
            | ({"top1": repeated[key]["top1"]} if key in repeated else {})
            | {"parts": measured(found)}
        )
    unchanged = {(run["variant"], run["alternative"]): {} for run in runs}
    changes = unchanged | {(row["variant"], row["alternative"]): row["changes"] for row in ablation["tuning"]}
    rows = [
        summarize(variant, alternative, changed, runs, ablation["rows"])
        for (variant, alternative), changed in changes.items()
    ]
    content = {name: ablation[name] for name in ("suite", "base", "variants")}
    write(options.output, {**content, "rows": rows, "runs": runs})
    print(shown(rows))


def ordered(variants: Mapping[str, Any]) -> Any:
    """Return a sorting key: the order of the suite, then the alternative, then the seed."""
    places = {name: place for place, name in enumerate(variants)}
    return lambda key: (places[key[0]], *key[1:])


def summarize(
    variant: str,
    alternative: int,
    changes: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    accuracies: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return means over the seeds of a variant's alternative; with its accuracy on test if it was chosen."""
    mine = [run for run in runs if (run["variant"], run["alternative"]) == (variant, alternative)]
    tested = next(row for row in accuracies if row["variant"] == variant)
    chosen = all("top1" in run for run in mine)
    return {
        "variant": variant,
        "alternative": alternative,
        "changes": describe_changes(changes),
        "seeds": [run["seed"] for run in mine],
        "chosen": chosen,
        "val_top1": tested["val_top1"] if chosen else statistics.mean(run["searched"] for run in mine),
        **({name: tested[name] for name in ("top1", "against")} if chosen else {}),
        **mean_of_lowest([run["parts"] for run in mine]),
    }


def shown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of accuracies, and one of measures for each stage."""
    names = [f"{row['variant']}{', ' + row['changes'] if row['changes'] else ''}" for row in rows]
    accuracies = []
    for name, row in zip(names, rows, strict=True):
        words = [f"{row['val_top1']:.2%}", "", ""]
        if row["chosen"]:
            words[1] = f"{row['top1']:.2%}"
        if row.get("against"):
            over = "seeds" if len(row["seeds"]) > 1 else "images"
            low, high = (100 * end for end in row["against"]["intervals"][over])
            words[2] = f"{100 * row['against']['difference']:+.2f} ({low:+.2f} to {high:+.2f} over {over})"
        accuracies.append([name, len(row["seeds"]), *words])
    tables = [table(["variant", "seeds", "validation", "test", "against the first"], accuracies)]
    for stage in (key for key, value in rows[0].items() if isinstance(value, Mapping) and KEYS[0] in value):
        body = [
            [name, *(f"{row[stage][key]:.3f}" for key in KEYS)] for name, row in zip(names, rows, strict=True)
        ]
        tables.append(table([stage, *KEYS], body))
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
