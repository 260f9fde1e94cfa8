"""All measurements on a GPU, in parts that can be stopped and continued, with their targets.

    python benchmarks/gpu.py --peer-root CrossX --data-root $CROSSX_DATA --minutes 10
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --part training-bf16
    python benchmarks/gpu.py --dry-run --output /tmp/gpu

Each part is one command, whose results are a JSON file in ``--output``; a part that has its file is not run again.
With ``--minutes`` the run ends after that time: a part that is running then is stopped. Give the same command again,
until it says that nothing is left. Trainings continue where they were stopped; the other parts take a few minutes each
and start over. Tables and targets are written to ``gpu.md`` next to the JSON files, for docs/performance.md.

CrossX is a clone of https://github.com/cswluo/CrossX. ``--data-root`` contains ``cub80`` and ``weights``
(docs/results.md); without it the parts that need images are left out. ``--dry-run`` runs every part with tiny sizes on
the CPU, with drawn images, to find mistakes before a GPU is there. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import RESULTS, table

HERE = Path(__file__).parent
SUITE = "methods"
SEEDS = ("0", "1", "2")
STOP_SECONDS = 30
"""For a stopped part to save what it has."""


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: Its name in ``--part``, and that of its JSON file.
        command: The command.
        result: The JSON file that it writes; moved to ``--output`` under the part's name when it is complete.
        without_gpu: Whether it must not see a GPU.
    """

    name: str
    command: tuple[str, ...]
    result: Path
    without_gpu: bool = False


def parts(arguments: argparse.Namespace) -> list[Part]:
    """Return all parts, in the order in which they are run."""
    dry, output = arguments.dry_run, arguments.output
    peers = [word for root in arguments.peer_root for word in ("--peer-root", str(root.absolute()))]
    tiny = ["--backbone", "resnet10t", "--size", "64", "--runs", "1"] if dry else []

    def script(name: str, *command: str) -> Part:
        partial_result = output / f"{name}.part.json"
        words = (sys.executable, str(HERE / command[0]), *command[1:], "--output", str(partial_result))
        return Part(name, words, partial_result, dry)

    found = []
    for precision in ("fp32", "tf32", "bf16"):
        chosen = ["--tf32"] if precision == "tf32" else []
        only = ["--precision", "bf16" if precision == "bf16" else "fp32", *chosen]
        for batch in ("1", "2") if dry else ("1", "64"):
            backends = ["--backends", "eager" if dry else "eager,compile", "--batches", batch]
            name = f"inference-{precision}-{batch}"
            found.append(script(name, "inference.py", *only, *backends, *tiny, *peers))
    for precision in ("fp32", "tf32", "bf16"):
        only = ["--precision", precision, *peers]
        few = ["--batch-size", "2", "--processes", "1"] if dry else []
        found.append(script(f"training-{precision}", "training_step.py", *only, *tiny, *few))
    if dry or arguments.data_root is not None:
        root = [] if arguments.data_root is None else ["--root", str(arguments.data_root / "cub80")]
        drawn = ["--dataset", "synthetic", "--batch-size", "4", "--steps", "1", "--workers", "0"]
        for cache in ("none", "ram"):
            feed = [*(drawn if dry else root), "--cache", cache, *tiny]
            found.append(script(f"fed-{cache}", "fed_training.py", *feed))
        found.append(trainings(arguments))
    return found


def trainings(arguments: argparse.Namespace) -> Part:
    """Return the part that trains every method of the suite."""
    folder = arguments.output / "methods"
    if arguments.dry_run:
        options = ["--data.dataset", "synthetic", "--data.num_classes", "3", "--data.images_per_class", "12"]
        options += ["--data.num_workers", "0", "--data.image_size", "64", "--data.batch_size", "6"]
        options += [
            "--model.backbone",
            "resnet10t",
            "--model.pretrained",
            "false",
            "--trainer.accelerator",
            "cpu",
        ]
        options += ["--trainer.max_epochs", "1", "--seeds", "0", "1"]
        suite = str(HERE / "gpu_dry_run.yaml")
    else:
        weights = arguments.data_root / "weights" / "mobilenetv2_035"
        options = ["--data.dataset", "cub", "--data.root", str(arguments.data_root / "cub80")]
        options += ["--data.image_size", "224", "--model.backbone", f"local-dir:{weights}"]
        options += ["--trainer.max_epochs", "10", "--trainer.precision", "bf16-mixed", "--data.cache", "ram"]
        options += ["--seeds", *SEEDS, "--jobs", str(arguments.jobs)]
        suite = SUITE
    command = (sys.executable, "-m", "crossx", "ablate", "--suite", suite, "--config", "finetune", *options)
    return Part("methods", (*command, "--output", str(folder)), folder / "results.json", arguments.dry_run)


def run(part: Part, seconds: float | None) -> bool:
    """Run a part; return whether it is complete. After ``seconds`` it is stopped, and saves what it has."""
    print(f"== {part.name}: {' '.join(part.command)}", flush=True)
    # a process group of its own, to stop the processes that it starts as well
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if part.without_gpu else {})
    process = subprocess.Popen(part.command, start_new_session=True, env=environment)
    try:
        code = process.wait(seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        _stop(process)
        if isinstance(error, KeyboardInterrupt):
            raise
        print(f"== {part.name}: stopped, the time is over", flush=True)
        return False
    if code:
        sys.exit(f"{part.name} failed with exit code {code}: {' '.join(part.command)}")
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            pass
        return


def run_all(todo: Sequence[Part], output: Path, minutes: float | None) -> list[str]:
    """Run parts until the time is over; return the names of those that are left."""
    end = None if minutes is None else time.monotonic() + 60 * minutes
    left = [part.name for part in todo]
    for part in todo:
        remaining = None if end is None else end - time.monotonic() - STOP_SECONDS
        if (remaining is not None and remaining <= 0) or not run(part, remaining):
            break
        os.replace(part.result, output / f"{part.name}.json")
        left.remove(part.name)
    return left


def report(output: Path, names: Sequence[str]) -> str:
    """Return the tables and targets of all parts that have results, in Markdown."""
    found = {name: json.loads((output / f"{name}.json").read_text()) for name in names}
    lines = [f"## {_machine(found)}"] if found else []
    for name, result in found.items():
        kind = name.split("-")[0]
        headers, rows = {"inference": _inference, "training": _training, "fed": _fed, "methods": _methods}[
            kind
        ](result)
        lines += ["", f"**{name}**", "", table(headers, rows)]
    rows = [
        [name, row["what"], _bound(row), f"{_value(row):.3g}", "yes" if row["reached"] else "no"]
        for name, result in found.items()
        for row in _targets(result)
    ]
    if rows:
        lines += ["", "**Targets**", "", table(["part", "what", "target", "measured", "reached"], rows)]
    return "\n".join(lines) + "\n"


def _machine(found: dict[str, Any]) -> str:
    machines = [result["machine"] for result in found.values() if "machine" in result]
    if not machines:
        return "GPU"
    machine = machines[0]
    return f"{machine['gpu'] or machine['cpu']}, torch {machine['versions']['torch']}"


def _inference(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for batch in result["batches"]:
        for name, own in batch["candidates"].items():
            memory = "" if own["peak_bytes"] is None else f"{own['peak_bytes'] / 2**20:.0f}"
            rows.append([name, f"{own['median_s'] * 1e3:.3g}", f"{own['images_per_second']:.0f}", memory])
    return ["network, backend", "ms", "images/s", "peak MiB"], rows


def _training(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, own in result["steps"].items():
        ratios = [
            f"{own[key]['median']:.3f}" if key in own else "" for key in ("over_plain", "over_released")
        ]
        memory = f"{own['peak_bytes']['median'] / 2**30:.2f}"
        rows.append(
            [name, f"{own['median_s'] * 1e3:.3g}", f"{own['images_per_second']:.0f}", *ratios, memory]
        )
    return ["step", "ms", "images/s", "over plain", "over released", "peak GiB"], rows


def _fed(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    return ["what", "images/s"], [[name, f"{rate:.0f}"] for name, rate in result["images_per_second"].items()]


def _methods(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            row["variant"],
            f"{100 * row['top1']:.2f}",
            " ".join(f"{100 * value:.2f}" for value in row["values"]),
        ]
        for row in result["rows"]
    ]
    return ["variant", "top-1 %", "of each seed"], rows


def _targets(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from result.get("reach", [])
    for batch in result.get("batches", []):
        yield from batch["reach"]


def _value(row: dict[str, Any]) -> float:
    return float(next(row[key] for key in ("median", "ratio", "value") if key in row))


def _bound(row: dict[str, Any]) -> str:
    return f"≥ {row['at_least']}" if "at_least" in row else f"≤ {row['reach']:.3g}"


def main(words: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--peer-root", type=Path, action="append", default=[], metavar="DIR", help="clone of CrossX"
    )
    options.add_argument("--data-root", type=Path, metavar="DIR", help="folder of cub80 and weights")
    options.add_argument("--output", type=Path, default=RESULTS / "gpu", help="default: %(default)s")
    options.add_argument("--part", action="append", metavar="NAME", help="only this part; may be repeated")
    options.add_argument("--minutes", type=float, help="stop after this time (default: run all parts)")
    options.add_argument(
        "--jobs", type=int, default=4, help="trainings at the same time (default: %(default)s)"
    )
    options.add_argument("--list", action="store_true", help="show the parts and whether they are done")
    options.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    arguments = options.parse_args(words)
    known = parts(arguments)
    if unknown := set(arguments.part or ()) - {part.name for part in known}:
        options.error(
            f"--part: no {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in known)}"
        )
    done = [part.name for part in known if (arguments.output / f"{part.name}.json").is_file()]
    if arguments.list:
        print(table(["part", "done"], [[part.name, "yes" if part.name in done else "no"] for part in known]))
        return
    if not arguments.dry_run and not torch.cuda.is_available():
        options.error("no GPU was found; --dry-run tries everything on the CPU")
    if arguments.dry_run and arguments.output == RESULTS / "gpu":
        options.error("--dry-run needs --output: its figures mean nothing")
    arguments.output.mkdir(parents=True, exist_ok=True)
    todo = [part for part in known if part.name not in done and part.name in (arguments.part or [part.name])]
    left = run_all(todo, arguments.output, arguments.minutes)
    finished = [part.name for part in known if (arguments.output / f"{part.name}.json").is_file()]
    text = report(arguments.output, finished)
    (arguments.output / "gpu.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"left: {', '.join(left)}; give the same command again" if left else "nothing is left")


if __name__ == "__main__":
    main()
