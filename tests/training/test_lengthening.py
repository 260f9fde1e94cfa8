"""Train a run for another length."""

import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_resume import RANDOM, assert_same_run, crash, history, interrupt

from crossx.errors import CrossXError, UsageError
from crossx.evaluation.run import test_run as evaluate_run
from crossx.training.checkpoints import read_checkpoint
from crossx.training.config import Config
from crossx.training.fit import Stopped, fit, resume
from slow import slow_except


@pytest.mark.parametrize(
    "optim",
    [
        {"schedule": "constant", "warmup_steps": 3},
        {"schedule": "step", "step_size": 1, "ema_decay": 0.8, "selection": "last", "optimizer": "adamw"},
    ],
)
@pytest.mark.slow
def test_a_longer_run_of_a_schedule_without_an_end_is_the_uninterrupted_one(make_config, optim):
    """With the augmentation and mixing of RANDOM, from the end of an epoch and from within one."""
    sections = {**RANDOM, "optim": {"mixup": 0.4, "momentum": 0.9} | optim}
    whole = fit(make_config("whole", **sections))
    run = fit(make_config("short", **sections, trainer={"max_epochs": 1}))
    assert run.read_info()["status"] == "finished"
    longer = resume(run.path, max_epochs=3)
    assert_same_run(longer, whole)
    assert longer.read_info()["extended_after"] == [1]
    assert Config.from_yaml(longer.config).trainer.max_epochs == 3


@pytest.mark.parametrize("schedule", slow_except(["cosine", "one_cycle"], "one_cycle"))
def test_a_longer_run_continues_the_schedule_of_its_new_length(make_config, caplog, schedule):
    optim = {"schedule": schedule, "lr": 0.02, "momentum": 0.9}
    run = fit(make_config("short", optim=optim, trainer={"max_epochs": 2}))
    rates = [row["lr"] for row in history(run)]
    run = resume(run.path, max_epochs=4)
    rows = history(run)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows] == [4, 8, 12, 16]
    assert [row["lr"] for row in rows[:2]] == rates
    parameter = torch.nn.Parameter(torch.ones(1))
    reference = torch.optim.SGD([parameter], lr=0.02, momentum=0.9)
    scheduler = (
        torch.optim.lr_scheduler.CosineAnnealingLR(reference, 16)
        if schedule == "cosine"
        else torch.optim.lr_scheduler.OneCycleLR(reference, 0.02, 16)
    )
    for _ in range(8):
        reference.step()
        scheduler.step()
    assert rows[2]["lr"] == pytest.approx(scheduler.get_last_lr()[0])
    assert f"optim.schedule {schedule} is now that of 4 epochs: the learning rate" in caplog.text
    saved = read_checkpoint(run.last)["optimizer"]["param_groups"][0]
    for _ in range(8):
        reference.step()
        scheduler.step()
    assert saved["lr"] == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
    assert saved["momentum"] == pytest.approx(reference.param_groups[0]["momentum"])


@pytest.mark.slow
def test_a_stopped_run_is_given_another_length(make_config, monkeypatch, caplog):
    config = make_config("stopped", optim={"schedule": "constant"}, trainer={"max_epochs": 30})
    with monkeypatch.context() as patch:
        interrupt(patch, 10, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(config)
    with pytest.raises(
        UsageError, match=r"2 epochs \(8 steps\), and trainer\.max_epochs 1 leaves nothing to train"
    ):
        resume(config.run_path(), max_epochs=1)
    run = resume(config.run_path(), max_epochs=3)
    assert_same_run(run, fit(make_config("whole", optim={"schedule": "constant"})))
    assert "extended_after" not in run.read_info()
    # the length that it has trained: nothing but the end is left to do
    assert "learning rate" not in caplog.text


@pytest.mark.slow
def test_a_run_that_was_stopped_while_it_was_extended_keeps_its_model(make_config, monkeypatch):
    """The command may be repeated; until the run has finished, its model and results are those of before."""
    optim = {"schedule": "cosine", "selection": "last"}
    whole, run = (fit(make_config(name, optim=optim, trainer={"max_epochs": 2})) for name in ("whole", "cut"))
    evaluate_run(run.path)
    before, selection = load_file(run.weights), run.read_info()["selection"]
    longer = resume(whole.path, max_epochs=4)
    # before and after the first checkpoint of the longer run
    for at_step in (2, 6):
        with monkeypatch.context() as patch:
            interrupt(patch, at_step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(Stopped):
                resume(run.path, max_epochs=4)
        info = run.read_info()
        assert (info["status"], info["selection"]) == ("stopped", selection)
        assert all(torch.equal(value, before[name]) for name, value in load_file(run.weights).items())
        assert run.read_results(run.weights)["selection"] == selection
    run = resume(run.path, max_epochs=4)
    assert_same_run(run, longer)
    assert run.read_info()["extended_after"] == [2]
    assert run.read_results(run.weights) == {}
    os.utime(run.path / "test.json")
    assert run.read_results(run.weights) == {}
    with pytest.raises(
        CrossXError, match=r"test\.json was measured before the run was trained for longer: test it"
    ):
        run.require_results("test", ())
    evaluate_run(run.path)
    assert run.read_results(run.weights)["selection"]["epoch"] == 4


@pytest.mark.slow
def test_a_run_that_max_steps_ended_is_extended_by_more_of_them(make_config, caplog):
    """The epoch that was cut short counts as a whole one, also for the schedule."""
    optim = {"schedule": "step", "step_size": 2, "lr": 0.02}
    run = fit(make_config("short", optim=optim, trainer={"max_steps": 6}))
    assert [row["step"] for row in history(run)] == [4, 6]
    with pytest.raises(UsageError, match=r"trainer\.max_steps 6 leaves nothing to train: give more than 6\."):
        resume(run.path, max_epochs=9)
    run = resume(run.path, max_epochs=4, max_steps=100)
    rows = history(run)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 4), (2, 6), (3, 10), (4, 14)]
    assert [row["lr"] for row in rows] == pytest.approx([0.02, 0.02, 0.002, 0.002])


@pytest.mark.slow
def test_what_cannot_be_trained_for_longer(make_config, monkeypatch):
    run = fit(make_config("run", trainer={"max_epochs": 2}))
    for epochs in (1, 2):
        with pytest.raises(
            UsageError, match=rf"2 epochs .*max_epochs {epochs} leaves .*: give more than 2\."
        ):
            resume(run.path, max_epochs=epochs)
    with pytest.raises(UsageError, match=r"max_time must be above 0"):
        resume(run.path, max_epochs=3, max_time="00:00:00:00")
    with pytest.raises(UsageError, match=r"max_time .* leaves nothing to train: give more than \d+ seconds"):
        resume(run.path, max_epochs=3, max_time={"microseconds": 1})
    assert (run.read_info()["status"], Config.from_yaml(run.config).trainer.max_epochs) == ("finished", 2)
    with pytest.raises(
        UsageError, match=r"finished\. Train it for longer with --trainer\.max_epochs N, .*--init"
    ):
        resume(run.path)
    shutil.rmtree(run.checkpoints)
    with pytest.raises(UsageError, match=r"its checkpoints are gone.*--init"):
        resume(run.path, max_epochs=3)


@pytest.mark.slow
def test_tensorboard_of_a_longer_run_shows_each_step_once(make_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = {"logger": ["tensorboard"], "log_every_n_steps": 1}
    run = fit(make_config(trainer={**logged, "max_epochs": 1}))
    events = EventAccumulator(str(resume(run.path, max_epochs=2).path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss_step")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("val/top1")] == [4, 8]
