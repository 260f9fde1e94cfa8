"""Time that a command needs before it does any work, and that a training needs before its first step.

    python benchmarks/startup.py

The training uses a small network and 64 synthetic images, in a separate process each time. Checking the images and the
first step itself take almost no time, so the rest is import and set-up. The verbs that use a trained network take one
of that size and three images (``report``: a run that was tested); their cost is the CPU time of their process, user and
system, compared with that of ``python -c "import torch, timm"`` in the same round.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Timing, interleave, parser, ratios, table, write

EMPTY = "python -c pass"
COMMANDS: dict[str, list[str]] = {
    EMPTY: ["-c", "pass"],
    "import crossx": ["-c", "import crossx"],
    "crossx --help": ["-m", "crossx", "--help"],
    "crossx --version": ["-m", "crossx", "--version"],
    "crossx predict --help": ["-m", "crossx", "predict", "--help"],
    "crossx fit --help": ["-m", "crossx", "fit", "--help"],
}

IMPORTS = "import torch, timm"
DATA = ["--data.num_classes", "4", "--data.images_per_class", "12", "--data.image_size", "64"]
FIT = [
    "fit", "--model.backbone", "resnet10t", "--model.pretrained", "false", "--data.dataset", "synthetic", "--data.root",
    "images", *DATA, "--data.batch_size", "8", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--output",
    "run",
]  # fmt: skip
WRONG = {
    "a wrong verb": ["predcit", "run"],
    "a wrong option": ["fit", "--optim.learning_rate", "1"],
    "images that are missing": ["predict", "run", "nowhere.jpg"],
    "a run that is missing": ["predict", "nowhere", "images"],
    "training images that are missing": ["fit", "--data.root", "nowhere"],
}


def command(arguments: list[str]) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)


def first_step(folder: Path) -> dict[str, float]:
    """Return the seconds of each stage up to the end of the first training step; must run in a new process."""
    clock = [time.perf_counter()]

    def stage() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    from crossx.data.config import DataConfig
    from crossx.errors import Stopped
    from crossx.training import fit
    from crossx.training.config import Config, ModelConfig
    from crossx.training.loop import Loop

    class Timed(Loop):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            seconds["data and network"] = stage()
            super().__init__(*args, **kwargs)
            seconds["loop"] = stage()

        def _step(self) -> None:
            super()._step()
            seconds["workers and first step"] = stage()
            raise KeyboardInterrupt

    seconds = {"import": stage()}
    config = Config(
        model=ModelConfig(method="plain", backbone="resnet10t", pretrained=False),
        data=DataConfig(
            dataset="synthetic",
            root=str(folder / "images"),
            num_classes=4,
            images_per_class=16,
            image_size=64,
            batch_size=8,
        ),
        trainer={"max_epochs": 1, "accelerator": "cpu"},
        output=str(folder / "run"),
    )
    fit.Loop = Timed
    with contextlib.suppress(Stopped):
        fit.fit(config)
    return seconds


def measure_first_step(runs: int) -> dict[str, dict[str, float]]:
    measured = []
    for _ in range(runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            answer = subprocess.run(
                [sys.executable, __file__, "--first-step", folder],
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
        measured.append(json.loads(answer.stdout.splitlines()[-1]))
    # the first has a cold disk cache
    return {
        name: {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}
        for name in measured[0]
        for times in [[seconds[name] for seconds in measured[1:]]]
    }


def cpu_seconds(arguments: list[str], folder: Path, until: str = "") -> float:
    """Return the CPU seconds, user and system, of a Python process; ``until`` it prints a line that starts so."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if until and line.startswith(until):
            process.send_signal(signal.SIGINT)
    usage = os.wait4(process.pid, 0)[2]
    process.stdout.close()
    process.returncode = 0
    return usage.ru_utime + usage.ru_stime


def measure_verbs(runs: int) -> dict[str, Timing]:
    """Measure the CPU seconds of each verb, and of a wrong command, in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for words in (FIT, ["test", "run", "--data.num_workers", "0"]):
            subprocess.run(
                [sys.executable, "-m", "crossx", *words], cwd=folder, stdout=subprocess.DEVNULL, check=True
            )
        images = sorted(str(path) for path in folder.glob("images/images/*/*.jpg"))[:3]
        verbs = {
            "predict": ["predict", "run", *images],
            "test": ["test", "run", "--data.num_workers", "0"],
            "report": ["report", "run"],
            "serve": ["serve", "run", "--port", "0"],
            "fit --help": ["fit", "--help"],
            **WRONG,
        }
        commands = {IMPORTS: ["-c", IMPORTS]} | {
            name: ["-m", "crossx", *words] for name, words in verbs.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for done in range(-1, runs):
            for name, arguments in commands.items():
                measured = cpu_seconds(arguments, folder, "crossx serve: " if name == "serve" else "")
                if done >= 0:
                    seconds[name].append(measured)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def main() -> None:
    if sys.argv[1:2] == ["--first-step"]:
        print(json.dumps(first_step(Path(sys.argv[2]))))
        return
    asked = parser(__doc__, "startup", runs=11).parse_args()
    timings = interleave({name: command(words) for name, words in COMMANDS.items()}, asked.runs)
    found = ratios(timings, EMPTY)
    base = timings[EMPTY].median
    rows = [
        [name, f"{timing.median:.3f}", f"{timing.median - base:.3f}", str(found[name])]
        for name, timing in timings.items()
    ]
    print(table(["command", "seconds", "more", f"over {EMPTY}"], rows))
    verbs = measure_verbs(asked.runs)
    compared = ratios(verbs, IMPORTS)
    print(
        table(
            ["verb", "CPU seconds", f"over {IMPORTS}"],
            [[name, f"{timing.median:.2f}", str(compared[name])] for name, timing in verbs.items()],
        )
    )
    stages = measure_first_step(asked.runs)
    print(
        table(
            ["before the first step", "seconds"],
            [[name, f"{t['median_s']:.2f}"] for name, t in stages.items()],
        )
    )
    write(
        asked.output,
        {
            "question": "What does a command cost before it does anything?",
            "commands": {
                name: {**timing.to_json(), "more_seconds": timing.median - base}
                for name, timing in timings.items()
            },
            "verbs": {
                name: {"cpu": timing.to_json(), f"over {IMPORTS}": vars(compared[name])}
                for name, timing in verbs.items()
            },
            "first_step": stages,
        },
    )


if __name__ == "__main__":
    main()
