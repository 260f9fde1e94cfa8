import json
import math

import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_same_run, crash, history, interrupt

from crossx.errors import UsageError
from crossx.training.config import OptimConfig
from crossx.training.fit import fit, resume
from crossx.training.history import History
from crossx.training.loop import Loop
from crossx.training.stopping import Patience, epochs_in_time


def rows(values):
    return [{"epoch": epoch} | ({} if v is None else {"val/top1": v}) for epoch, v in enumerate(values, 1)]


def patience(number, phases=None, **optim):
    optim = {"schedule": "constant", **optim}
    return Patience(OptimConfig(patience=number, **optim), phases or ["all"] * 30, steps_per_epoch=10)


@pytest.mark.parametrize(
    ("values", "waited"),
    [
        ([], 0),
        ([0.5], 0),
        ([0.5, 0.4], 1),
        ([0.5, 0.5, 0.5], 2),
        ([0.5, 0.6, 0.1], 1),
        # epochs without validation do not count
        ([None, 0.5, None, 0.4, None, 0.3], 2),
        ([None, None], 0),
    ],
)
def test_validations_since_the_first_best_one_count(values, waited):
    assert patience(2).waited(rows(values), "val/top1") == waited
    assert patience(2).is_exhausted(rows(values), "val/top1") == (waited >= 2)
    assert not patience(0).is_exhausted(rows(values), "val/top1")


@pytest.mark.parametrize(
    ("optim", "starts"),
    [
        ({}, [0]),
        ({"warmup_epochs": 2.5}, [3]),
        ({"warmup_steps": 41}, [5]),
        ({"freeze_backbone_epochs": 4, "warmup_epochs": 1}, [4]),
        ({"schedule": "one_cycle"}, [9]),
        ({"schedule": "one_cycle", "warmup_epochs": 2}, [2]),
        ({"schedule": "cosine"}, [0]),
        ({"schedule": "multistep", "milestones": [2, 20], "warmup_epochs": 3}, [3, 20]),
        ({"schedule": "step", "step_size": 15}, [0, 15]),
        ({"schedule": "step", "step_size": 12}, [0, 12, 24]),
        # drops that never leave time for the count do not start it over
        ({"schedule": "step", "step_size": 5}, [0]),
    ],
)
def test_the_count_starts_when_nothing_planned_is_still_to_come(optim, starts):
    assert patience(5, **optim).starts == starts


def test_the_count_starts_when_every_phase_has_begun_and_over_at_a_drop():
    curriculum = ["one"] * 4 + ["two"] * 4 + ["three"] * 4
    assert patience(2, curriculum).starts == [8]
    assert patience(2, ["a", "b"] * 6).starts == [1]
    falling = rows([0.9 - epoch / 100 for epoch in range(30)])
    counted = [patience(2, curriculum).waited(falling[:epochs], "val/top1") for epochs in (7, 8, 9, 10, 11)]
    assert counted == [0, 0, 0, 1, 2]
    drop = patience(4, schedule="multistep", milestones=[6])
    assert [drop.waited(falling[:epochs], "val/top1") for epochs in (4, 6, 7, 8)] == [3, 5, 0, 1]


@pytest.mark.parametrize(
    ("planned", "ends", "limit", "epochs"),
    [
        (30, [10], 100, 10),
        # the first epoch is slower, and counts only while it is the only one
        (10, [20, 30], 100, 9),
        (10, [20, 30, 40], 100, 9),
        # more fit, but not clearly more
        (9, [20, 29, 38], 100, 9),
        (9, [20, 25, 30], 100, 17),
        (30, [1, 2], 100, 30),
        (30, [50], 60, 1),
        (30, [70], 60, 1),
        # the last steps may be cut
        (30, [10, 20], 39.6, 4),
        (30, [10, 20], 39.4, 3),
        (30, [0.0], 60, 30),
    ],
)
def test_epochs_that_fit_into_a_time(planned, ends, limit, epochs):
    assert epochs_in_time(planned, 30, ends, limit) == epochs


def test_options_in_proportion_to_a_shorter_training():
    optim = OptimConfig(step_size=15, milestones=[15, 25], warmup_epochs=3, freeze_backbone_epochs=10)
    half = optim.in_proportion(15, 30)
    assert (half.step_size, half.milestones, half.warmup_epochs, half.freeze_backbone_epochs) == (
        8,
        [8, 12],
        1.5,
        5,
    )
    least = optim.in_proportion(1, 30)
    assert (least.step_size, least.milestones, least.freeze_backbone_epochs) == (1, [1], 0)


def validate_as(monkeypatch, values):
    """Replace the accuracies of validation, by epoch."""
    validate = Loop._validate

    def replaced(self):
        return validate(self) | {"val/top1": values[self.epoch]}

    monkeypatch.setattr(Loop, "_validate", replaced)


FALLS = [0.5, 0.6, 0.4, 0.6, 0.5, 0.9, 0.9, 0.9]
CONSTANT = {"schedule": "constant", "patience": 3}


def test_patience_ends_a_run_as_finished_with_its_best_model(make_config, monkeypatch, caplog):
    caplog.set_level("INFO", "crossx")
    validate_as(monkeypatch, FALLS)
    run = fit(make_config("early", optim=CONSTANT, trainer={"max_epochs": 8}))
    info = run.read_info()
    ended = {"by": "patience", "epoch": 5}
    assert (info["status"], info["ended"], info["selection"]["epoch"]) == ("finished", ended, 4)
    assert info["calibration"]["n"] == 3
    assert json.loads((run.path / "metrics.json").read_text())["ended"] == ended
    assert "no better val/top1 in 3 validations, so the training ends after epoch 5 of 8." in caplog.text
    with pytest.raises(
        UsageError, match=r"ended after 5 epochs by optim\.patience 3: .*give --optim\.patience"
    ):
        resume(run.path, max_epochs=9)
    with pytest.raises(UsageError, match="more, or 0"):
        resume(run.path, patience=3)


@pytest.mark.slow
def test_a_run_that_patience_ended_equals_a_shorter_one_and_can_be_extended(make_config, monkeypatch):
    validate_as(monkeypatch, FALLS)
    run = fit(make_config("early", optim=CONSTANT, trainer={"max_epochs": 8}))
    whole = fit(make_config("whole", optim={"schedule": "constant"}, trainer={"max_epochs": 5}))
    assert whole.read_info()["ended"] == {"by": "max_epochs", "epoch": 5}
    ours, theirs = load_file(run.weights), load_file(whole.weights)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    resume(run.path, patience=0)
    assert run.read_info()["ended"] == {"by": "max_epochs", "epoch": 8}
    assert (run.read_info()["selection"]["epoch"], len(history(run))) == (8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 19])
def test_a_killed_run_resumes_with_its_count(make_config, monkeypatch, step):
    sections = {"optim": CONSTANT, "trainer": {"max_epochs": 8, "checkpoint_every_n_steps": 2}}
    validate_as(monkeypatch, FALLS)
    whole = fit(make_config("whole", **sections))
    with monkeypatch.context() as patch:
        interrupt(patch, step, crash)
        config = make_config("killed", **sections)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(config)
    run = resume(config.run_path())
    assert run.read_info()["ended"] == {"by": "patience", "epoch": 5}
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"data": {"val_fraction": 0}}, "There are no validation images"),
        ({"data": {"train_on": "trainval"}}, "There are no validation images"),
        ({"trainer": {"limit_val_batches": 0}}, r"trainer\.limit_val_batches 0 switches validation off"),
        ({"trainer": {"check_val_every_n_epoch": 9}}, r"trainer\.check_val_every_n_epoch 9 is more"),
    ],
)
def test_patience_needs_validation(make_config, sections, reason):
    with pytest.raises(UsageError, match=rf"optim\.patience 2 needs validation after epochs\. {reason}"):
        fit(make_config(optim={"patience": 2}, **sections))


@pytest.mark.parametrize(
    ("optim", "note"),
    [
        ({"schedule": "cosine"}, "while the learning rate of cosine is still high"),
        ({"schedule": "step", "step_size": 10}, "before the learning rate first drops, after epoch 10"),
        ({"schedule": "constant"}, None),
    ],
)
def test_a_schedule_that_patience_may_cut_is_named(optim, note):
    notes = OptimConfig(patience=5, **optim).shortened_to(30)[1]
    assert [note in text for text in notes] == ([True] if note else [])


@pytest.mark.slow
def test_the_schedule_of_a_timed_run_is_that_of_the_epochs_that_fit(make_config, monkeypatch, caplog):
    """On a clock by which each epoch takes 10 seconds, 6 epochs fit into a minute."""
    caplog.set_level("INFO", "crossx")
    clock = property(lambda self: 10.0 * len(self.rows) + 2.0 * self._batches)
    monkeypatch.setattr(History, "seconds", clock)
    optim = {"schedule": "cosine", "lr": 0.02}
    run = fit(make_config("timed", optim=optim, trainer={"max_epochs": 30, "max_time": "1m"}))
    rates = [row["lr"] for row in history(run)]
    assert run.read_info()["ended"] == {"by": "max_time", "epoch": 6}
    # after the first epoch, of 8 seconds, 7 seem to fit
    planned = enumerate((30, 7, 6, 6, 6, 6))
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * epoch / n)) for epoch, n in planned])
    assert "has time for 6 of 30 epochs" in caplog.text
    with pytest.raises(UsageError, match=r"ended after 6 epochs by trainer\.max_time 1m, .*give more"):
        resume(run.path, max_epochs=40)
    run = resume(run.path, max_time="80s")
    assert run.read_info()["ended"] == {"by": "max_time", "epoch": 8}


@pytest.mark.slow
def test_the_epoch_that_the_time_makes_the_last_is_validated(make_config, monkeypatch):
    clock = property(lambda self: 10.0 * len(self.rows) + 2.0 * self._batches)
    monkeypatch.setattr(History, "seconds", clock)
    run = fit(
        make_config("timed", trainer={"max_time": "1m", "max_epochs": 30, "check_val_every_n_epoch": 4})
    )
    assert [row["epoch"] for row in history(run) if row.get("val/top1") is not None] == [4, 6]
    selection = run.read_info()["selection"]
    assert selection["value"] == max(row.get("val/top1") or 0 for row in history(run))


@pytest.mark.slow
def test_a_kill_before_the_last_validation_leaves_it_to_the_resumed_run(make_config, monkeypatch):
    clock = property(lambda self: 10.0 * len(self.rows) + 2.0 * self._batches)
    monkeypatch.setattr(History, "seconds", clock)
    trainer = {"max_time": "30s", "max_epochs": 30, "check_val_every_n_epoch": 2, "enable_progress_bar": True}
    whole = fit(make_config("whole", trainer=trainer))
    assert [row["epoch"] for row in history(whole) if row.get("val/top1") is not None] == [2, 3]
    config = make_config("killed", trainer=trainer)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_validate_last", lambda self: crash())
        with pytest.raises(RuntimeError, match="power cut"):
            fit(config)
    assert_same_run(resume(config.run_path()), whole)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["one_cycle", "step"])
def test_a_killed_timed_run_keeps_its_plan(make_config, monkeypatch, schedule):
    clock = property(lambda self: 10.0 * len(self.rows) + 2.0 * self._batches)
    monkeypatch.setattr(History, "seconds", clock)
    sections = {
        "optim": {"schedule": schedule, "step_size": 15},
        "trainer": {"max_epochs": 30, "max_time": "00:01:00", "checkpoint_every_n_steps": 3},
    }
    whole = fit(make_config("whole", **sections))
    if schedule == "step":
        # half of 30 epochs is half of 6
        assert [row["lr"] for row in history(whole)] == pytest.approx([0.01] * 3 + [0.001] * 3)
    with monkeypatch.context() as patch:
        interrupt(patch, 15, crash)
        config = make_config("killed", **sections)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(config)
    assert_same_run(resume(config.run_path()), whole)


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [{"warmup_epochs": 2}, {"warmup_steps": 60}])
def test_a_rise_that_does_not_fit_the_time_does_not_end_the_training(make_config, monkeypatch, warmup):
    monkeypatch.setattr(
        History, "seconds", property(lambda self: 10.0 * len(self.rows) + 2.0 * self._batches)
    )
    optim = {"schedule": "one_cycle", **warmup}
    run = fit(make_config("timed", optim=optim, trainer={"max_epochs": 30, "max_time": "25s"}))
    assert run.read_info()["ended"] == {"by": "max_time", "epoch": len(history(run))}
    assert 2 <= len(history(run)) <= 3
