"""Trainings of ``probe``, whose head is fitted before the first step."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crossx.errors import CrossXError, UsageError
from crossx.methods.probe import Probe
from crossx.methods.weights import load_method
from crossx.predict.predictor import Predictor
from crossx.training.fit import fit, resume
from slow import slow_except


@pytest.mark.parametrize("head", slow_except(["logistic", "knn"], "logistic"))
def test_a_run_without_epochs_is_the_fitted_head(make_config, head, tmp_path):
    config = make_config(model={"method": "probe", "head": head}, trainer={"max_epochs": 0})
    run = fit(config)
    method, spec = load_method(run.path)
    assert isinstance(method, Probe)
    assert spec.options["head"] == head
    predictor = Predictor.load(run.path, "cpu")
    assert len(predictor.predict([next(iter(Path(config.data.root).rglob("*.jpg")))])) == 1
    if head == "logistic":
        before = load_file(run.weights)
        resume(run.path, max_epochs=1)
        after = load_file(run.weights)
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed == {"classifier.weight", "classifier.bias"}
        return
    shown = torch.randn(2, 3, 64, 64)
    exported = torch.export.export(method, (shown,)).module()
    torch.testing.assert_close(exported(shown), method(shown), rtol=1e-4, atol=1e-5)
    # as many images as were trained on
    assert method.features.shape == (27, 96)
    with pytest.raises(UsageError, match=r"nothing to train: give --trainer\.max_epochs 0"):
        resume(run.path, max_epochs=1)
    state = load_file(run.weights)
    for labels, message in (
        (state["labels"] + 1, "labels of its stored images are not from 0 to 2"),
        (state["labels"] - 1, "labels of its stored images are not from 0 to 2"),
        (state["labels"][1:], "do not fit the network"),
        (torch.tensor(1), "do not fit the network"),
        (state["labels"].float(), "labels of its stored images are not from 0 to 2"),
    ):
        save_file(state | {"labels": labels.contiguous()}, tmp_path / "other.safetensors")
        (tmp_path / "model.json").write_bytes(run.spec.read_bytes())
        with pytest.raises(CrossXError, match=message):
            load_method(tmp_path / "other.safetensors")


def test_heads_can_be_fitted_without_an_epoch(make_config):
    """The schedule one_cycle has no step to cycle over."""
    optim = {"fit_heads": 1, "schedule": "one_cycle", "warmup_epochs": 1}
    run = fit(make_config(optim=optim, trainer={"max_epochs": 0}))
    random = fit(make_config("random", optim={"lr": 1e-12}, trainer={"max_epochs": 1}))
    fitted, start = load_file(run.weights), load_file(random.weights)
    assert not torch.allclose(fitted["classifier.weight"], start["classifier.weight"])
    trunk = [key for key in start if key.startswith("backbone.") and key.endswith("weight")]
    torch.testing.assert_close({key: fitted[key] for key in trunk}, {key: start[key] for key in trunk})


def test_heads_are_fitted_once_or_else_an_epoch_is_needed(make_config, caplog):
    run = {"model": {"method": "probe", "penalty": 1.0}, "trainer": {"max_epochs": 0}}
    once = fit(make_config("once", **run))
    twice = fit(make_config("twice", **run, optim={"fit_heads": 1}))
    assert "optim.fit_heads has no effect: method 'probe' fits its head itself" in caplog.text
    assert once.weights.read_bytes() == twice.weights.read_bytes()
    config = make_config(
        model={"method": "pdisconet", "num_parts": 2},
        optim={"fit_heads": 1},
        trainer={"max_epochs": 0},
    )
    with pytest.raises(
        UsageError, match="method 'pdisconet' has no linear heads to fit, so nothing would be trained"
    ):
        fit(config)
