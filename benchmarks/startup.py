"""Time that a command needs before it does any work, and that a training needs before its first step.

    python benchmarks/startup.py

The training uses a small network and 64 synthetic images, in a separate process each time. Checking the images and the
first step itself take almost no time, so the rest is import and set-up.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import interleave, parser, ratios, table, write

EMPTY = "python -c pass"
COMMANDS: dict[str, list[str]] = {
    EMPTY: ["-c", "pass"],
    "import crossx": ["-c", "import crossx"],
    "crossx --help": ["-m", "crossx", "--help"],
    "crossx --version": ["-m", "crossx", "--version"],
    "crossx predict --help": ["-m", "crossx", "predict", "--help"],
    "crossx fit --help": ["-m", "crossx", "fit", "--help"],
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
            "first_step": stages,
        },
    )


if __name__ == "__main__":
    main()
