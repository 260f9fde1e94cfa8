import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import layouts
from crossx.errors import CrossXError, UsageError
from crossx.evaluation.run import test_run as evaluate_run
from crossx.methods import DFL
from crossx.runs import Run
from crossx.training import checkpoints
from crossx.training.checkpoints import read_checkpoint
from crossx.training.fit import Stopped, fit, resume
from crossx.training.task import Task

RANDOM = {
    "model": {"backbone_args": {"drop_path_rate": 0.3}},
    "data": {"augmentation": "trivial", "random_erasing": 0.5},
    "optim": {"mixup": 0.4, "cutmix": 1.0, "momentum": 0.9, "schedule": "cosine", "warmup_epochs": 1},
}
"""Everything that draws random numbers in training."""


def interrupt(monkeypatch, at_step, action):
    """Call ``action`` instead of training step ``at_step``, counted over the whole run, once."""
    forward, seen = Task.forward, []

    def counted(self, images, targets, *parts):
        seen.append(len(targets))
        if len(seen) == at_step:
            action()
        return forward(self, images, targets, *parts)

    monkeypatch.setattr(Task, "forward", counted)


def crash():
    raise RuntimeError("power cut")


def history(run):
    rows = json.loads((run.path / "metrics.json").read_text())["epochs"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def flatten(value, name=""):
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if items is None:
        return {name: value}
    return {key: leaf for k, v in items for key, leaf in flatten(v, f"{name}/{k}").items()}


def assert_same_run(run, reference):
    """Every weight, statistic, momentum and number is the same, bit for bit."""
    assert history(run) == history(reference)
    for key in ("selection", "calibration"):
        assert run.read_info()[key] == reference.read_info()[key]
    assert run.read_spec() == reference.read_spec()
    ours, theirs = load_file(run.weights), load_file(reference.weights)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert run.best.exists() == reference.best.exists()
    for path in ("last", "best") if run.best.exists() else ("last",):
        first, second = (flatten(read_checkpoint(getattr(r, path))) for r in (run, reference))
        different = [
            name
            for name, value in first.items()
            # copies of the run's files, which name the run's own options and the state of the working folder
            if not name.startswith("/files/")
            and not name.endswith("seconds")
            # the best epoch may be from before the run was given more of them
            and not (path == "best" and name.startswith("/plan/"))
            and not _equal(value, second.get(name))
        ]
        assert first.keys() == second.keys()
        assert not different


def _equal(first, second):
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.mark.slow
@pytest.mark.parametrize(("every", "kept"), [(None, 4), (3, 6)])
def test_a_killed_run_continues_bit_exactly(make_config, tmp_path, every, kept):
    """Killed in a process with its own loader process; the others here load in the training process itself."""
    sections = {**RANDOM, "data": {**RANDOM["data"], "num_workers": 1}}
    trainer = {"checkpoint_every_n_steps": every}
    killed, whole = (make_config(name, **sections, trainer=trainer) for name in ("killed", "whole"))
    (tmp_path / "killed.yaml").write_text(killed.to_yaml())
    script = Path(__file__).with_name("killed_fit.py")
    command = [sys.executable, str(script), str(tmp_path / "killed.yaml"), "8"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    run = Run(killed.run_path())
    assert run.read_info()["status"] == "running"
    assert read_checkpoint(run.last)["step"] == kept
    assert_same_run(resume(run.path), fit(whole))


@pytest.mark.parametrize(
    "optim",
    [
        {"ema_decay": 0.8, "schedule": "step", "step_size": 1, "freeze_backbone_epochs": 2},
        {"optimizer": "adamw", "schedule": "one_cycle", "layer_decay": 0.8},
        {"schedule": "multistep", "milestones": [1, 2], "selection": "best_on_test"},
    ],
)
@pytest.mark.slow
def test_every_optimizer_and_average_continues_bit_exactly(make_config, monkeypatch, optim):
    whole = fit(make_config("whole", **{**RANDOM, "optim": optim}))
    interrupt(monkeypatch, 10, crash)
    config = make_config("killed", **{**RANDOM, "optim": optim})
    with pytest.raises(RuntimeError, match="power cut"):
        fit(config)
    assert_same_run(resume(config.run_path()), whole)


@pytest.mark.parametrize(
    ("sections", "trainer", "at_batch", "step"),
    [
        (RANDOM, {"checkpoint_every_n_steps": 1}, 7, 6),
        pytest.param(RANDOM, {"checkpoint_every_n_minutes": 1e-9}, 3, 2, marks=pytest.mark.slow),
        pytest.param(
            {**RANDOM, "optim": {"ema_decay": 0.8, "freeze_backbone_epochs": 1, "optimizer": "adamw"}},
            {"checkpoint_every_n_steps": 3},
            8,
            6,
            marks=pytest.mark.slow,
        ),
        # two steps per epoch: a checkpoint falls between two steps, never between the batches of one
        pytest.param(
            RANDOM,
            {"checkpoint_every_n_steps": 1, "accumulate_grad_batches": 2, "precision": "bf16-mixed"},
            8,
            3,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"model": {"method": "mamc", "embedding_size": 8}},
            {"checkpoint_every_n_steps": 3},
            8,
            6,
            marks=pytest.mark.slow,
        ),
        # affine views, drawn in every step
        pytest.param(
            {**RANDOM, "model": {"method": "crossx", "gates": "competing", "equivariance_weights": [1, 1]}},
            {"checkpoint_every_n_steps": 1},
            7,
            6,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {**RANDOM, "data": {"sampling": "balanced"}},
            {"checkpoint_every_n_steps": 3, "limit_train_batches": 3},
            6,
            3,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_continues_within_an_epoch(make_config, monkeypatch, sections, trainer, at_batch, step):
    """At the step of the checkpoint: no batch is trained on twice, and checkpoints change no number."""
    whole = fit(make_config("whole", **sections, trainer=trainer))
    batches = record_batches(monkeypatch)
    config = make_config("killed", **sections, trainer=trainer)
    with monkeypatch.context() as patch:
        interrupt(patch, at_batch, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(config)
    saved = read_checkpoint(Run(config.run_path()).last)
    assert saved["step"] == step
    begun = len(batches)
    run = resume(config.run_path())
    assert_same_run(run, whole)
    total = 3 * trainer.get("limit_train_batches", 4)
    if sections.get("model", {}).get("method") != "mamc":
        done = saved["epoch"] * total // 3 + saved["batch"]
        assert (begun, len(batches) - begun) == (at_batch - 1, total - done)
    plain = {name: value for name, value in trainer.items() if not name.startswith("checkpoint")}
    without = fit(make_config("without", **sections, trainer=plain))
    assert history(without) == history(whole)


def record_batches(monkeypatch):
    """Return a list that grows by the targets of every batch that is trained on."""
    forward, seen = Task.forward, []

    def recorded(self, images, targets):
        answer = forward(self, images, targets)
        seen.append(targets.tolist())
        return answer

    monkeypatch.setattr(Task, "forward", recorded)
    return seen


@pytest.mark.slow
def test_damaged_checkpoints_give_way_to_the_newest_intact_one(make_config, monkeypatch, caplog):
    whole = fit(make_config("whole", **RANDOM))
    interrupt(monkeypatch, 11, crash)
    config = make_config("stopped", **RANDOM)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(config)
    stopped = Run(config.run_path())
    # the second epoch is the best: best.ckpt is a copy of last.ckpt, and previous.ckpt is of the first
    assert [read_checkpoint(path)["step"] for path in (stopped.last, stopped.best, stopped.previous)] == [
        8,
        8,
        4,
    ]
    for damaged, used in ((["last"], "best"), (["last", "best"], "previous")):
        run = Run(Path(shutil.copytree(stopped.path, stopped.path.with_name(used))))
        for name in damaged:
            path = run.checkpoints / f"{name}.ckpt"
            path.write_bytes(path.read_bytes()[:-100])
        assert_same_run(resume(run.path), whole)
        assert f"{run.last}: damaged" in caplog.text
        assert f"The run continues from the {used} checkpoint, {run.checkpoints / used}.ckpt." in caplog.text


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.slow
def test_killed_between_last_and_best(make_config, monkeypatch, nth):
    """The older best.ckpt remains, or none: it is copied from last.ckpt."""
    whole = fit(make_config("whole", **RANDOM))
    config = make_config("killed", **RANDOM)
    copy, seen = checkpoints._copy, []

    def killed(source, target):
        seen.append(target)
        return crash() if len(seen) == nth else copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_copy", killed)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(config)
    run = Run(config.run_path())
    assert run.last.exists()
    assert run.best.exists() == (nth == 2)
    assert_same_run(resume(run.path), whole)


@pytest.mark.slow
def test_a_resumed_run_is_not_prepared_again(make_config, monkeypatch):
    """What the preparation found is in the checkpoint, the average of the weights included."""
    sections = {**RANDOM, "model": {"method": "dfl"}, "optim": {**RANDOM["optim"], "ema_decay": 0.8}}
    whole = fit(make_config("whole", **sections))
    interrupt(monkeypatch, 10, crash)
    config = make_config("killed", **sections)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(config)
    monkeypatch.setattr(DFL, "prepare", lambda self, batches: crash())
    assert_same_run(resume(config.run_path()), whole)


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_starts_over(make_config, monkeypatch, tmp_path):
    whole = fit(make_config("whole", **RANDOM))
    interrupt(monkeypatch, 2, crash)
    config = make_config("killed", **RANDOM)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(config)
    with pytest.raises(CrossXError, match="typo: no such folder"):
        resume(config.run_path(), root=tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    assert_same_run(resume(config.run_path()), whole)


@pytest.mark.slow
def test_killed_after_the_last_epoch(make_config, monkeypatch):
    whole = fit(make_config("whole"))
    config = make_config("killed")
    with monkeypatch.context() as patch:
        patch.setattr("crossx.training.finish.save_weights", lambda method, path: crash())
        with pytest.raises(RuntimeError, match="power cut"):
            fit(config)
    (config.run_path() / "metrics.json").unlink()
    assert_same_run(resume(config.run_path()), whole)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_signals_leave_a_run_that_resumes_elsewhere(make_config, monkeypatch, tmp_path, request, sent):
    # A shell that starts the tests in the background has SIGINT ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    whole = fit(make_config("whole"))
    interrupt(monkeypatch, 6, lambda: os.kill(os.getpid(), sent))
    config = make_config("stopped")
    with pytest.raises(
        Stopped, match=r"after 1 complete epoch\. Continue with `crossx fit --resume .*stopped`"
    ):
        fit(config)
    assert Run(config.run_path()).read_info()["status"] == "stopped"
    moved = shutil.move(config.run_path(), tmp_path / "moved")
    assert_same_run(resume(moved), whole)


@pytest.mark.slow
def test_leftovers_of_a_killed_write_are_removed(make_config, monkeypatch):
    interrupt(monkeypatch, 6, crash)
    config = make_config()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(config)
    leftover = config.run_path() / "checkpoints" / ".last.ckpt.abc.tmp"
    leftover.write_bytes(b"half")
    resume(config.run_path())
    assert not leftover.exists()


@pytest.mark.slow
def test_full_disk_stops_with_the_last_good_checkpoint_and_resumes(make_config, monkeypatch):
    whole = fit(make_config("whole"))
    save, seen = torch.save, []

    def full(*args, **kwargs):
        seen.append(1)
        if len(seen) == 2:
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    config = make_config("full")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CrossXError, match="no space left on the disk"):
            fit(config)
    run = Run(config.run_path())
    assert read_checkpoint(run.last)["step"] == 4
    assert_same_run(resume(run.path), whole)


def test_a_run_in_training_cannot_be_resumed(make_config, monkeypatch):
    config = make_config()
    seen = []

    def resume_it():
        with pytest.raises(CrossXError, match="another process is training in it") as caught:
            resume(config.run_path())
        seen.append(caught)

    interrupt(monkeypatch, 6, resume_it)
    run = fit(config)
    assert seen
    assert run.read_info()["status"] == "finished"


def test_what_cannot_be_resumed(make_config, monkeypatch, tmp_path):
    finished = fit(make_config("finished", trainer={"max_epochs": 1}))
    with pytest.raises(UsageError, match="is finished"):
        resume(finished.path)
    with pytest.raises(UsageError, match="no run to resume"):
        resume(tmp_path / "nothing")
    images = layouts.write_folder(tmp_path / "images", classes=3, images_per_class=12)
    interrupt(monkeypatch, 6, crash)
    config = make_config("changed", data={"root": str(images)})
    with pytest.raises(RuntimeError, match="power cut"):
        fit(config)
    layouts.write_folder(tmp_path / "images", classes=3, images_per_class=14)
    with pytest.raises(CrossXError, match="Resume a run on the same data"):
        resume(config.run_path())


@pytest.mark.slow
def test_data_that_moved_are_found_by_what_comes_after(make_config, monkeypatch, tmp_path):
    images = layouts.write_folder(tmp_path / "images", classes=3, images_per_class=12)
    config = make_config(data={"root": str(images)})
    with monkeypatch.context() as patch:
        interrupt(patch, 6, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(config)
    moved = shutil.move(images, tmp_path / "moved")
    run = resume(config.run_path(), root=moved)
    assert run.read_info()["data_root"] == str(moved)
    assert evaluate_run(run.path)["n"] == 6


def test_no_intact_checkpoint_leaves_the_status(make_config, monkeypatch):
    interrupt(monkeypatch, 6, crash)
    config = make_config()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(config)
    run = Run(config.run_path())
    for path in (run.last, run.best):
        path.write_bytes(b"half")
    with pytest.raises(
        CrossXError, match=r"last\.ckpt: damaged.* `crossx fit --resume .*run --restart` starts over"
    ):
        resume(run.path)
    assert run.read_info()["status"] == "failed"


@pytest.mark.slow
def test_tensorboard_shows_each_step_once(make_config, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupt(monkeypatch, 7, crash)
    config = make_config(trainer={"logger": ["tensorboard"], "log_every_n_steps": 1})
    with pytest.raises(RuntimeError, match="power cut"):
        fit(config)
    events = EventAccumulator(str(resume(config.run_path()).path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss_step")] == list(range(1, 13))
    assert len(events.Scalars("train/loss")) == len(events.Scalars("val/top1")) == 3
