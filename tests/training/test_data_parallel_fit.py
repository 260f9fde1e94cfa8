"""Whole trainings on two ranks against one process."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import RANDOM, assert_same_run
from torch.nn import functional as F

import layouts
from crossx.data.catalog import read_configured
from crossx.data.datamodule import DataModule
from crossx.errors import UsageError
from crossx.methods import list_methods, method_class
from crossx.methods.weights import load_method
from crossx.runs import Run
from crossx.training.config import Config
from crossx.training.fit import fit

OPTIONS = {
    "crossx": {"use_merged": False},
    # positions that are drawn within a pixel, without effect on the policy
    "dt_ram": {"location_std": 1e-6, "locator_weight": 0.0},
    # parts that are the image wherever they are drawn, without effect on the attention
    "fcan": {"crop_share": 1.0, "attention_weight": 1e-9},
    "kernel_pooling": {"sketch_size": 32},
    "mamc": {"embedding_size": 8},
    "ma_cnn": {"dropout": 0.0},
    "nts": {"dropout": 0.0},
    # views that are the image itself
    "pdisconet": {"part_dropout": 0.0, "view_rotation": 0.0, "view_scales": [1.0, 1.0], "view_shift": 0.0},
}
"""Nothing drawn for a rank, no statistics of a rank, small layers."""


def alike(method: str, parts: Mapping[str, Any], processes: int = 1) -> dict[str, dict[str, Any]]:
    """Return the options of a training that differs by rounding alone between one process and two.

    ``parts`` are options of a dataset with parts.
    """
    # of 27 images, or 15 pairs, the last batch has fewer on the second of two ranks
    batch = 8 if method_class(method).sampling == "pairs" else 10
    return {
        "model": {"method": method, **OPTIONS.get(method, {})},
        "data": {"batch_size": batch // processes, **(parts if method_class(method).uses_parts else {})},
        "optim": {
            "freeze_batch_norm": True,
            "freeze_backbone_epochs": 1,
            "class_weights": "balanced",
            "label_smoothing": 0.1,
            "lr": 0.003,
        },
        "trainer": {"max_epochs": 2, "devices": processes},
    }


def rows(run: Run) -> list[dict[str, Any]]:
    with (run.path / "metrics.csv").open(newline="") as file:
        # a phase may lack the terms of another
        return [
            {name: value if name == "phase" else float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def evaluate(run: Run, weights: Path) -> dict[str, float]:
    """Take the validation images one at a time through the weights."""
    method, spec = load_method(weights)
    config = Config.from_yaml(run.config).data
    data = DataModule(read_configured(config), spec.preprocessing, config, seed=0)
    data.config.eval_batch_size = 1
    batches = list(data.eval_loader("val"))
    with torch.inference_mode():
        logits = torch.cat([method(data.normalize(images)) for images, _ in batches])
    targets = torch.cat([targets for _, targets in batches])
    hits = (logits.argmax(1) == targets).float()
    return {"val/loss": F.cross_entropy(logits, targets).item(), "val/top1": hits.mean().item()}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images to train on and one for validation: fewer than ranks."""
    root = layouts.write_folder(tmp_path_factory.mktemp("few") / "train", images_per_class=8).parent
    label = sorted((root / "train").iterdir())[1].name
    shutil.copytree(root / "train" / label, root / "val" / label)
    for path in sorted((root / "val" / label).iterdir())[1:]:
        path.unlink()
    return root


def run_on_two_ranks(configs: dict[str, Config], tmp_path: Path, *modules: str) -> dict[str, Run]:
    """Train them one after the other, started by torchrun once; ``modules`` register further methods."""
    for name, config in configs.items():
        config.data.batch_size = min(config.data.batch_size, 5)
        (tmp_path / f"{name}.yaml").write_text(config.to_yaml())
    script = Path(__file__).with_name("fit_on_ranks.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, *launcher, str(script), str(tmp_path), *modules]
    subprocess.run(words, check=True, timeout=1800, env=environment)
    return {name: Run(config.run_path()) for name, config in configs.items()}


def assert_same_as_alone(
    method: str, run: Run, make_config: Callable[..., Config], parts: Mapping[str, Any]
) -> None:
    # one process that takes the batches of both
    alone = fit(make_config(f"{method}-alone", **alike(method, parts)))
    for ours, theirs in zip(rows(run), rows(alone), strict=True):
        assert ours.pop("phase", None) == theirs.pop("phase", None)
        del ours["seconds"], theirs["seconds"]
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), method
    assert run.read_info()["calibration"]["n"] == 3


@pytest.mark.slow
def test_runs_on_two_ranks(make_config, few, birds, tmp_path):
    configs = {
        "crossx": make_config("crossx", **alike("crossx", birds, 2)),
        "few": make_config("few", data={"root": str(few)}, trainer={"devices": 2, "max_epochs": 2}),
        "stopped": make_config("stopped", **RANDOM, trainer={"devices": 2}),
        "within": make_config("within", **RANDOM, trainer={"devices": 2, "checkpoint_every_n_steps": 1}),
        "whole": make_config("whole", **RANDOM, trainer={"devices": 2, "checkpoint_every_n_minutes": 1000}),
    }
    runs = run_on_two_ranks(configs, tmp_path)
    for name in ("stopped", "within"):
        assert_same_run(runs[name], runs["whole"])
    assert_same_as_alone("crossx", runs["crossx"], make_config, birds)
    # three images for validation, and one: as many as are counted
    for name in ("crossx", "whole", "few"):
        last = rows(runs[name])[-1]
        expected = evaluate(runs[name], runs[name].last)
        assert {key: last[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_every_other_method_on_two_ranks(make_config, birds, tmp_path):
    methods = [method for method in list_methods() if method != "crossx"]
    runs = run_on_two_ranks(
        {method: make_config(method, **alike(method, birds, 2)) for method in methods}, tmp_path
    )
    for method in methods:
        assert_same_as_alone(method, runs[method], make_config, birds)


@pytest.mark.slow
def test_both_ranks_end_at_the_same_epoch(make_config, tmp_path):
    """Patience on an accuracy that does not change, and a time that some epochs take; only the last is validated."""
    patient = {"optim": {"lr": 1e-12, "patience": 2, "schedule": "constant"}}
    timed = {"max_epochs": 10_000, "max_time": "4s", "check_val_every_n_epoch": 9_000}
    configs = {
        "patient": make_config("patient", **patient, trainer={"devices": 2, "max_epochs": 9}),
        "timed": make_config("timed", trainer={"devices": 2, **timed}),
    }
    runs = run_on_two_ranks(configs, tmp_path)
    ended = {name: run.read_info()["ended"] for name, run in runs.items()}
    assert ended["patient"] == {"by": "patience", "epoch": 3}
    assert ended["timed"] == {"by": "max_time", "epoch": len(rows(runs["timed"]))}
    assert all(run.read_info()["status"] == "finished" for run in runs.values())
    *others, last = rows(runs["timed"])
    assert not any("val/top1" in row for row in others)
    assert {name: last[name] for name in ("val/loss", "val/top1")} == pytest.approx(
        evaluate(runs["timed"], runs["timed"].last), rel=1e-5
    )
    assert runs["timed"].read_info()["selection"]["value"] == last["val/top1"]


@pytest.mark.slow
def test_the_command_starts_its_own_second_process(make_config, tmp_path):
    config = make_config(trainer={"devices": 2, "max_epochs": 1})
    config.output = None
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    words = [sys.executable, "-m", "crossx", "fit", "--config", "config.yaml"]
    done = subprocess.run(words, check=True, timeout=1800, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("next: crossx test runs/config-folder-1") == 1
    assert done.stderr.count("never drops the learning rate") == 1
    run = Run(tmp_path / "runs" / "config-folder-1")
    assert run.read_info()["status"] == "finished"
    assert [path.name for path in run.path.parent.iterdir()] == ["config-folder-1"]
    last = rows(run)[-1]
    expected = evaluate(run, run.weights)
    assert {key: last[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["RANK", "NODE_RANK", "SLURM_PROCID"])
def test_a_training_of_one_process_is_not_lost_as_that_of_a_later_rank(make_config, monkeypatch, name):
    """Only the first process writes the model."""
    config = make_config(trainer={"devices": 1})
    monkeypatch.setenv(name, "1")
    with pytest.raises(UsageError, match=rf"{name} is 1, .* or unset {name}"):
        fit(config)
    assert not config.run_path().exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_says_what_it_does(make_config, monkeypatch, caplog, rank):
    """The last check of the set-up fails: everything before it has been said."""
    caplog.set_level("INFO", "crossx")
    monkeypatch.setenv("RANK", rank)
    config = make_config(data={"train_on": "trainval"}, trainer={"devices": 9999})
    with pytest.raises(UsageError, match=r"trainer\.devices 9999"):
        fit(config)
    assert bool(caplog.messages) == (rank == "0")
    assert ("There are no validation images" in caplog.text) == (rank == "0")
