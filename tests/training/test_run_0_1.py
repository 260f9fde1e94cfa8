"""A run that crossx 0.1 trained with Lightning's Trainer is still tested, predicted with and loaded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from crossx.errors import UsageError
from crossx.evaluation.predictions import Predictions, predictions_path
from crossx.evaluation.run import test_run as evaluate_run
from crossx.methods.weights import load_method
from crossx.predict.predictor import Predictor
from crossx.runs import Run
from crossx.training.fit import resume

ASSETS = Path(__file__).parents[1] / "assets"
EXPECTED = json.loads((ASSETS / "run_0_1_expected.json").read_text())
"""What 0.1 itself found."""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(shutil.copytree(ASSETS / "run_0_1", tmp_path / "run_0_1"))


@pytest.mark.slow
@pytest.mark.parametrize("weights", EXPECTED["test_top1"])
def test_every_file_of_weights_is_tested(run: Run, images: Path, tmp_path: Path, weights: str) -> None:
    results = evaluate_run(run.path / weights, root=images, output=tmp_path / "results")
    assert results["top1"] == EXPECTED["test_top1"][weights]


def test_logits_are_those_of_then(run: Run, images: Path) -> None:
    evaluate_run(run.path, root=images)
    tested = Predictions.load(predictions_path(run.path, "test"), run.path, "test")
    assert list(tested.paths) == EXPECTED["paths"]
    np.testing.assert_allclose(tested.logits, EXPECTED["logits"], rtol=1e-4, atol=1e-4)


def test_it_is_loaded_and_predicted_with(run: Run, images: Path) -> None:
    predictor = Predictor.load(run.path, "cpu")
    paths = [images / path for path in EXPECTED["paths"]]
    classes = run.read_spec().classes
    for prediction, logits in zip(predictor.predict(paths), EXPECTED["logits"], strict=True):
        assert prediction.label == classes[int(np.argmax(logits))]
    method, spec = load_method(run.last)
    assert len(spec.classes) == method.num_classes == 3


def test_where_it_was_stopped_it_is_not_continued(run: Run, images: Path) -> None:
    run.info.write_text(json.dumps({**run.read_info(), "status": "stopped"}))
    with pytest.raises(UsageError, match="written by another version of crossx, and cannot be resumed"):
        resume(run.path, root=images)
    assert run.read_info()["status"] == "stopped"
