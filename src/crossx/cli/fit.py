"""``crossx fit``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from crossx.cli.fit_options import FitArguments, fit_parser, parse_fit, require_data
from crossx.cli.options import check_folder, next_command
from crossx.data.catalog import read_configured
from crossx.data.index import SPLITS
from crossx.errors import UsageError
from crossx.runs import Run, find_run, free_folder, open_run, read_json
from crossx.terminal import fold, step
from crossx.training.config import Config

LAUNCHED = "CROSSX_RUN"
"""Environment variable with the run's folder, for the processes that Lightning starts for further GPUs."""
parser = fit_parser


def run(words: Sequence[str]) -> int:
    """Train a network."""
    asked = parse_fit(words)
    if asked.print_config:
        print(asked.config.to_yaml(), end="")
        return 0
    if asked.resume:
        find_run(Path(asked.resume))
    else:
        _require_shared_folder(asked.config)
        require_data(asked.config)
        if asked.config.output is not None:
            check_folder(asked.config.output)
        # errors of the data come before torch is imported
        with step("Reading the lists of images"):
            images = _count_images(asked.config)

    with step("Loading PyTorch"):
        from crossx.distributed import is_leader
        from crossx.training import fit as training

    if asked.resume:
        done = training.resume(
            asked.resume, root=asked.config.data.root, restart=asked.restart, **asked.limits
        )
    else:
        from crossx.training.precision import resolve_precision

        config = asked.config
        config.trainer, reason = resolve_precision(config.trainer)
        config.output = config.output or str(_choose_folder(asked))
        if is_leader():
            _print_start(asked, images)
            if reason:
                print(fold(f"precision {config.trainer.precision} (auto: {reason})"), flush=True)
        done = training.fit(config)
    if is_leader():
        _print_outcome(done)
    return 0


def _require_shared_folder(config: Config) -> None:
    """Raise ``UsageError`` if each machine would choose a run folder of its own."""
    if config.output is None and config.trainer.num_nodes > 1:
        raise UsageError(
            f"trainer.num_nodes {config.trainer.num_nodes}: each machine would choose a run folder of its own. Give "
            "all of them the same --output."
        )


def _choose_folder(asked: FitArguments) -> Path:
    from crossx.distributed import is_leader

    if not is_leader() and LAUNCHED in os.environ:
        return Path(os.environ[LAUNCHED])
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UsageError("several processes were started for one run: give --output, so that they share it.")
    config = asked.config
    name = Path(asked.recipe).stem if asked.recipe else config.model.method
    folder = free_folder(f"{name}-{config.data.dataset}")
    os.environ[LAUNCHED] = str(folder)
    return folder


def _print_start(asked: FitArguments, images: str) -> None:
    config = asked.config
    for note in asked.notes:
        print(fold(f"note: {note}", hanging="  "))
    start = "pretrained" if config.model.pretrained else "random weights"
    start = f"from {config.init}" if config.init else start
    print(f"method    {config.model.method}")
    print(fold(f"backbone  {config.model.backbone} ({config.model.backbone_weights or start})"))
    print(fold(f"dataset   {config.data.dataset}: {images}"))
    print(f"run       {config.output}", flush=True)


def _count_images(config: Config) -> str:
    data = config.data
    index = read_configured(data).with_validation(data.val_fraction, data.split_seed)
    counts = Counter(record.split for record in index.records)
    if data.train_on == "trainval":
        counts["train"] += counts.pop("val", 0)
    images = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS)
    return f"{len(index.classes)} classes, images: {images}"


def _print_outcome(done: Run) -> None:
    _, weights = open_run(done.path)
    selection = done.read_info().get("selection") or {}
    if selection.get("value") is not None:
        accuracy = f"{selection['value']:.2%} top-1 on {selection['split']}"
        print(f"best epoch {selection['epoch']:.0f}: {accuracy}")
    else:
        epoch = selection.get("epoch")
        print(f"last epoch {epoch:.0f}" if epoch else "only the heads were fitted")
    if Config.from_yaml(done.config).trainer.profile:
        from crossx.training.stages import profile_table

        print("\n".join(["", *profile_table(read_json(done.profile)), ""]))
    print(f"weights: {weights}")
    print(f"next: {next_command(done)}")
