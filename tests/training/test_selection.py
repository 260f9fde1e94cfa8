import pytest
import torch
from finished_runs import accuracy, assert_same, method_weights, rows
from safetensors.torch import load_file

from crossx.methods.weights import load_method
from crossx.training.fit import fit


def test_last_epoch_is_kept_where_asked_or_nothing_is_held_out(make_config, caplog):
    asked = fit(make_config("a", optim={"selection": "last"}))
    no_val = fit(make_config("b", data={"train_on": "trainval"}))
    assert "no validation images" in caplog.text
    assert "the probabilities are not calibrated" in caplog.text
    for run in (asked, no_val):
        assert run.read_info()["selection"] == {"how": "last", "split": None, "epoch": 3, "value": None}
        assert not run.best.exists()
        assert_same(load_file(run.weights), method_weights(run.last))
    assert "val/top1" in rows(asked)[0]
    assert "val/top1" not in rows(no_val)[0]


def test_selection_on_test_is_named(make_config):
    run = fit(make_config(optim={"selection": "best_on_test"}))
    selection = run.read_info()["selection"]
    assert (selection["how"], selection["split"]) == ("best_on_test", "test")
    assert selection["value"] == max(float(row["test/top1"]) for row in rows(run))
    method, _ = load_method(run.path)
    with torch.no_grad():
        assert accuracy(method, run, "test") == pytest.approx(selection["value"])


@pytest.mark.parametrize("option", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 5}])
def test_selection_without_validated_epochs_is_said(make_config, caplog, option):
    run = fit(make_config(trainer={"max_epochs": 1, **option}))
    assert "the last epoch's weights become the model" in caplog.text
    assert run.read_info()["selection"]["how"] == "last"
