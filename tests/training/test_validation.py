import pytest
import torch
from finished_runs import accuracy, rows

from crossx.errors import CrossXError
from crossx.methods.weights import load_method
from crossx.runs import Run
from crossx.training.checkpoints import read_checkpoint
from crossx.training.fit import fit
from crossx.training.history import History
from crossx.training.loop import Loop
from slow import slow_except


@pytest.mark.parametrize("ema_decay", slow_except([None, 0.5], 0.5))
def test_checkpoints_hold_the_weights_that_were_validated(make_config, ema_decay):
    run = fit(make_config(optim={"ema_decay": ema_decay, "lr": 0.002}, trainer={"max_epochs": 2}))
    history = rows(run)
    assert read_checkpoint(run.last)["epoch"] == 2
    for path, epoch in ((run.best, run.read_info()["selection"]["epoch"]), (run.last, 2)):
        method, _ = load_method(path)
        with torch.no_grad():
            assert accuracy(method, run, "val") == pytest.approx(float(history[epoch - 1]["val/top1"]))


def test_steps_end_within_an_epoch_that_is_then_not_validated(make_config):
    run = fit(make_config(trainer={"max_steps": 6}))
    assert [(row["epoch"], row["step"], bool(row["val/top1"])) for row in rows(run)] == [
        ("1", "4", True),
        ("2", "6", False),
    ]
    assert run.read_info()["selection"]["epoch"] == 1


@pytest.mark.parametrize("every", [1, 3])
def test_time_ends_within_an_epoch_that_is_then_validated(make_config, every):
    trainer = {"max_time": {"microseconds": 1}, "check_val_every_n_epoch": every}
    run = fit(make_config(trainer=trainer))
    assert [(row["step"], bool(row["val/top1"])) for row in rows(run)] == [("1", True)]
    assert (run.read_info()["status"], run.read_info()["selection"]["epoch"]) == ("finished", 1)
    assert read_checkpoint(run.best)["history"]["rows"][-1]["val/top1"] == float(rows(run)[0]["val/top1"])


def test_epochs_without_validation_have_no_value(make_config):
    run = fit(make_config(trainer={"check_val_every_n_epoch": 2}))
    assert [bool(row["val/top1"]) for row in rows(run)] == [False, True, False]
    assert run.read_info()["selection"]["epoch"] == 2


@pytest.mark.parametrize(
    ("complete", "epoch", "kept"),
    [
        (1, 2, "the last good checkpoint is {last} (epoch 1)"),
        # the newest checkpoint has the weights that were validated
        (2, 2, "the last good checkpoint is {previous} (epoch 1)"),
        (1, 1, "there is no checkpoint from before"),
    ],
)
def test_a_loss_that_is_not_finite_names_its_epoch(tmp_path, complete, epoch, kept):
    run = Run(tmp_path)
    run.checkpoints.mkdir()
    for path in (run.last, run.previous)[:complete]:
        path.touch()
    history = History(run)
    history.rows = [{"epoch": number + 1} for number in range(complete)]
    with pytest.raises(CrossXError) as caught:
        history.evaluated({"val/loss": float("nan"), "val/top1": 0.5}, epoch)
    assert f"not finite after epoch {epoch}: val/loss nan; " in str(caught.value)
    assert kept.format(last=run.last, previous=run.previous) in str(caught.value)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_the_validation_after_the_last_epoch(make_config, monkeypatch):
    clock = property(lambda self: 10.0 * len(self.rows) + 2.0 * self._batches)
    monkeypatch.setattr(History, "seconds", clock)
    evaluated = Loop._validate

    def diverge(self):
        if not self.batch:
            monkeypatch.setattr(
                "crossx.training.validation.F.cross_entropy", lambda *_: torch.tensor(torch.inf)
            )
        return evaluated(self)

    monkeypatch.setattr(Loop, "_validate", diverge)
    trainer = {"max_time": "30s", "max_epochs": 30, "check_val_every_n_epoch": 2}
    config = make_config(trainer=trainer)
    with pytest.raises(
        CrossXError, match=r"not finite after epoch 3: val/loss inf; .*previous.ckpt \(epoch 2\)"
    ):
        fit(config)
