"""Collect the test results of runs in one JSON file, for docs/results.md.

    python benchmarks/collect_results.py RUN... --output results/NAME.json

Of local paths (`local-dir:` backbones and dataset roots), only the last component is kept.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crossx.runs import Run, read_json
from crossx.training.config import Config

KEYS = (
    "method",
    "options",
    "seed",
    "dataset",
    "split",
    "n",
    "num_classes",
    "selection",
    "top1",
    "top5",
    "class_mean",
)


def collect(folder: Path, split: str) -> dict[str, Any]:
    tested = read_json(folder / f"{split}.json")
    history = read_json(folder / "metrics.json")["epochs"]
    backbone = tested["backbone"]
    source, colon, path = backbone.partition(":")
    config = Config.from_yaml(Run(folder).config)
    return {
        "run": folder.name,
        **{key: tested[key] for key in KEYS},
        "top1_interval": tested["intervals"]["top1"],
        "heads": tested["heads"],
        "ece": tested["ece"],
        "backbone": f"{source}:{Path(path).name}" if colon else backbone,
        "pretrained": tested["pretrained"],
        "data_root": Path(tested["data_root"]).name,
        "preprocessing": tested["preprocessing"],
        "optim": asdict(config.optim),
        "epochs": len(history),
        "val_top1": [epoch.get("val/top1") for epoch in history],
        "versions": Run(folder).read_info()["environment"]["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    results = [collect(folder, arguments.split) for folder in arguments.runs]
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for result in results:
        heads = ", ".join(f"{name} {value:.2%}" for name, value in result["heads"].items())
        low, high = result["top1_interval"]
        print(
            f"{result['method']:<8} seed {result['seed']}  {result['top1']:.2%} ({low:.2%} to {high:.2%})  {heads}"
        )


if __name__ == "__main__":
    main()
