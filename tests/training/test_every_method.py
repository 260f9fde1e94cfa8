"""What every registered method can do as a run; a new method is tested here without new code."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_same_run, crash, interrupt

from crossx.evaluation.predictions import Predictions, predictions_path
from crossx.evaluation.run import test_run as evaluate_run
from crossx.methods import list_methods, method_class
from crossx.predict.predictor import Predictor
from crossx.training.fit import fit, resume
from slow import slow_except

SMALL = {"kernel_pooling": {"sketch_size": 32}, "mamc": {"embedding_size": 8}}
"""Options that make a method's own layers as small as the test's backbone."""


@pytest.fixture
def data(name, request):
    """Options of images that the method can learn from."""
    return request.getfixturevalue("birds") if method_class(name).uses_parts else {}


@pytest.mark.parametrize("name", slow_except(list_methods(), "crossx"))
def test_trains_in_mixed_precision(make_config, data, name):
    trainer = {"max_epochs": 1, "limit_train_batches": 2, "precision": "bf16-mixed"}
    run = fit(make_config(model={"method": name, **SMALL.get(name, {})}, data=data, trainer=trainer))
    assert all(value.dtype != torch.bfloat16 for value in load_file(run.weights).values())
    assert 0 <= evaluate_run(run.path)["top1"] <= 1


@pytest.mark.parametrize("name", slow_except(list_methods(), "crossx"))
def test_trains_resumes_tests_predicts_and_explains(make_config, monkeypatch, images, data, name):
    sections = {
        "model": {"method": name, **SMALL.get(name, {})},
        "data": {**data, "augmentation": "trivial"},
        "optim": {"freeze_backbone_epochs": 1, "ema_decay": 0.8, "lr": 0.003},
        "trainer": {"max_epochs": 2},
    }
    whole = fit(make_config("whole", **sections))
    interrupt(monkeypatch, 6, crash)
    config = make_config("stopped", **sections)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(config)
    run = resume(config.run_path())
    assert_same_run(run, whole)

    results = evaluate_run(run.path)
    tested = Predictions.load(predictions_path(run.path, "test"), run.path, "test")
    assert results["top1"] == pytest.approx(tested.correct.mean())

    predictor = Predictor.load(run.path, "cpu")
    paths = [Path(data.get("root", images)) / path for path in tested.paths]
    scaled = tested.logits / predictor.spec.temperature
    probabilities = np.exp(scaled - scaled.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    for prediction, expected in zip(predictor.predict(paths), probabilities, strict=True):
        assert prediction.label == tested.classes[expected.argmax()]
        assert prediction.probability == pytest.approx(expected.max(), abs=1e-4)

    maps = "both" if find_spec("captum") else "activation"
    for explained, expected in zip(predictor.iter_explain(paths, maps=maps), probabilities, strict=True):
        np.testing.assert_allclose(explained.explanation.probabilities, expected, atol=1e-4)
        kinds = {"CAM " in map_ for map_ in explained.explanation.maps}
        assert kinds == ({False, True} if maps == "both" else {False})
