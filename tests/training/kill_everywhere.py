"""Kill trainings at their file operations, and resume them: a script, run with the library of ``kill_at.c`` preloaded.

Everything is imported and warmed up once; each training then runs in a forked process.

Usage: kill_everywhere.py SCENARIO IMAGES WORK EVERY EVERY_WRITE. Every n-th boundary is tried, and every n-th of those
of writes. Prints one line of JSON: the number of operations, boundaries and kills, and the differences from a training
that is not killed.
"""

import csv
import ctypes
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crossx.data.config import DataConfig
from crossx.errors import CrossXError, UsageError
from crossx.runs import Run
from crossx.training.config import Config, ModelConfig, OptimConfig
from crossx.training.fit import fit, resume

BEFORE, WITHIN, AFTER = range(3)
LIBRARY = ctypes.CDLL(os.environ["LD_PRELOAD"])


def configure(images: Path, output: Path) -> Config:
    return Config(
        model=ModelConfig("plain", backbone="test_resnet", pretrained=False),
        data=DataConfig(dataset="folder", root=str(images), image_size=64, batch_size=4, num_workers=0),
        optim=OptimConfig(momentum=0.9),
        trainer={
            "max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "limit_train_batches": 2,
            "checkpoint_every_n_steps": 1, "log_every_n_steps": 1, "logger": ["tensorboard"],
        },
        seed=3,
        output=str(output),
    )  # fmt: skip


def forked(work: Callable[[], object]) -> tuple[int, str]:
    """Run in a forked process; return its signal, and the traceback of its exception."""
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        return os.waitpid(child, 0)[1] & 0x7F, text
    try:
        work()
    except BaseException:
        os.write(writer, traceback.format_exc().encode())
    os._exit(0)


def contents(run: Run) -> dict[str, object]:
    """Everything in a run folder, without times, ids and its own path."""
    found: dict[str, object] = {}
    for path in sorted(run.path.rglob("*")):
        name = str(path.relative_to(run.path))
        if path.is_dir() or name.startswith("tensorboard/"):
            continue
        if path.suffix == ".ckpt":
            found |= {
                f"{name}/{key}": value for key, value in flatten(torch.load(path, weights_only=True)).items()
            }
        elif name == "metrics.csv":
            with path.open() as file:
                found[name] = [{**row, "seconds": 0} for row in csv.DictReader(file)]
        elif name in ("metrics.json", "run.json"):
            found |= {f"{name}/{key}": value for key, value in flatten(json.loads(path.read_text())).items()}
        elif path.name == "SHA256SUMS":
            lines = [line.split() for line in path.read_text().splitlines()]
            found[name] = [
                (of, hashlib.sha256((path.parent / of).read_bytes()).hexdigest() == value)
                for value, of in lines
            ]
        else:
            found[name] = path.read_bytes().replace(str(run.path).encode(), b"RUN")
    inodes = [path.stat().st_ino for path in run.checkpoints.glob("*.ckpt")]
    found["separate checkpoints"] = len(inodes) == len(set(inodes))
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        if tag != "seconds":
            found[f"tensorboard/{tag}"] = [(event.step, event.value) for event in events.Scalars(tag)]
    return {name: value for name, value in found.items() if name.rpartition("/")[2] not in ("seconds", "id")}


def flatten(value: object, name: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}
    return {key: leaf for k, v in items for key, leaf in flatten(v, f"{name}/{k}").items()}


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    return [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]


def killed_at_step(run: Run, images: Path, step: int) -> None:
    """A training that was killed in the middle."""
    from crossx.training.task import Task

    forward, seen = Task.forward, []

    def counted(self, *batch):
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, *batch)

    Task.forward = counted
    fit(configure(images, run.path))


def recover(run: Run, images: Path) -> None:
    """Do what the messages of a killed training say, until it is finished."""
    try:
        resume(run.path)
    except UsageError as error:
        if "is finished" in str(error):
            return
        if "no run to resume" not in str(error):
            raise
        fit(configure(images, run.path))
    except CrossXError as error:
        if "--restart" not in str(error):
            raise
        resume(run.path, restart=True)


def main(scenario: str, images: Path, work: Path, every: int, every_write: int) -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    whole, run, template = Run(work / "whole"), Run(work / "run"), work / "template"
    fit(configure(images, whole.path))
    expected = contents(whole)
    if scenario != "fit":
        assert forked(lambda: killed_at_step(run, images, 4))[0] == signal.SIGKILL
        damaged = [run.last] if scenario == "resume" else [run.last, run.previous, run.best]
        for path in damaged:
            path.write_bytes(path.read_bytes()[:-100])
        run.path.rename(template)

    def train() -> None:
        if scenario == "fit":
            fit(configure(images, run.path))
        else:
            resume(run.path, restart=scenario == "restart")

    def attempt(number: int, moment: int, log: int = -1) -> tuple[int, str]:
        def armed() -> None:
            LIBRARY.kill_at(os.fsencode(run.path), ctypes.c_long(number), moment, log)
            train()

        shutil.rmtree(run.path, ignore_errors=True)
        if scenario != "fit":
            shutil.copytree(template, run.path)
        return forked(armed)

    with (work / "operations").open("w+b") as log:
        ended, text = attempt(0, AFTER, log.fileno())
        assert (ended, text) == (0, ""), text
        assert not differences(contents(run), expected), differences(contents(run), expected)
        log.seek(0)
        operations = log.read().decode().splitlines()
    names = [operation.split()[0] for operation in operations]
    writes, others = (
        [(n, when) for n, name in enumerate(names, 1) if (name == "write") == writing for when in moments]
        for writing, moments in ((True, (BEFORE, WITHIN, AFTER)), (False, (BEFORE, AFTER)))
    )
    kills, found = 0, {}
    for number, moment in others[::every] + writes[::every_write]:
        ended, text = attempt(number, moment)
        # TensorBoard writes in a thread: now and then there are fewer operations, and no kill
        kills += ended == signal.SIGKILL
        failed = text or (forked(lambda: recover(run, images))[1] if ended else "")
        wrong = [failed.splitlines()[-1]] if failed else differences(contents(run), expected)
        if wrong:
            where = f"{('before', 'within', 'after')[moment]} {number}: {operations[number - 1]}"
            found[where] = sorted(wrong)[:5]
            print(where, found[where], file=sys.stderr, flush=True)
    counts = {name: names.count(name) for name in sorted(set(names))}
    boundaries = len(writes) + len(others)
    print(json.dumps({"operations": counts, "boundaries": boundaries, "kills": kills, "differences": found}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
