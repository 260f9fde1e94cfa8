import pytest
import torch
from finished_runs import assert_same, method_weights, rows
from safetensors.torch import load_file

from crossx.methods import create_method
from crossx.training.fit import fit
from crossx.training.loop import Loop


def test_average_follows_its_definition(make_config, monkeypatch):
    seen = []
    step = Loop._step
    monkeypatch.setattr(
        Loop,
        "_step",
        lambda self: (step(self), seen.append(self.method.classifier.weight.detach().clone())),
    )
    run = fit(make_config(optim={"ema_decay": 0.3}, trainer={"max_epochs": 1}))
    average = seen[0]
    # 2/11, 3/12, then 4/13 is above the decay
    for decay, weight in zip((2 / 11, 3 / 12, 0.3), seen[1:], strict=True):
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(load_file(run.weights)["classifier.weight"], average)
    assert not torch.equal(average, seen[-1])


def test_average_of_a_short_training_is_close_to_its_weights(make_config, caplog):
    """With a constant decay the initial weights would count 0.999 ** 12, that is 99%."""
    optim = {"ema_decay": 0.999, "lr": 0.05}
    with_average = fit(make_config("average", optim=optim))
    assert float(rows(with_average)[-1]["val/top1"]) == 1
    assert "ema_decay" not in caplog.text


@pytest.mark.slow
def test_an_average_that_lags_behind_is_warned_of(make_config, monkeypatch, caplog):
    monkeypatch.setattr("crossx.training.average.warmed_up_decay", lambda decay, updates: decay)
    run = fit(make_config(optim={"ema_decay": 0.999, "lr": 0.05, "selection": "last"}))
    last = rows(run)[-1]
    assert float(last["train/top1"]) > 0.9
    assert f"{100 * float(last['val/top1']):.1f}% on validation, the weights themselves 100.0%" in caplog.text
    # the model is still the average
    assert_same(load_file(run.weights), method_weights(run.last))


def test_average_leaves_whole_numbers_as_they_are(make_config):
    options = {"method": "kernel_pooling", "order": 2, "sketch_size": 4096, "gamma": 1.0}
    run = fit(make_config(model=options, optim={"ema_decay": 0.9}, trainer={"max_epochs": 1}))
    # averaged as numbers, a quarter of the hashes came out one too small
    drawn = create_method("kernel_pooling", backbone="test_resnet", num_classes=3, order=2).pool.sketch
    assert torch.equal(load_file(run.weights)["pool.sketch.hashes"], drawn.hashes)
