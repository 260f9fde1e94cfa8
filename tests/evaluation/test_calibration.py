import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from crossx.cli.main import main
from crossx.errors import CrossXError, UsageError
from crossx.evaluation.calibration import calibrate_run, fit_temperature
from crossx.evaluation.run import test_run
from crossx.predict.predictor import Predictor
from crossx.runs import Run, read_json, write_json
from layouts import write_folder, write_run


def sample(seed, scale, n=200, classes=5):
    """Logits whose softmax over ``scale`` is the true distribution of the targets, up to sampling."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return scale * logits, targets


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_is_the_best_of_a_grid_and_the_gradient_there_is_0(scale):
    logits, targets = sample(0, scale)
    found = fit_temperature(logits, targets)
    grid = np.geomspace(found / 20, found * 20, 4001)
    losses = [F.cross_entropy(logits.double() / t, targets).item() for t in grid]
    assert found == pytest.approx(grid[np.argmin(losses)], rel=2e-3)
    temperature = torch.tensor(found, dtype=torch.double, requires_grad=True)
    F.cross_entropy(logits.double() / temperature, targets).backward()
    assert temperature.grad.abs() * found < 1e-9


def test_the_temperature_undoes_a_scale():
    logits, targets = sample(1, 1.0, n=20000)
    assert fit_temperature(logits, targets) == pytest.approx(1, abs=0.03)
    assert fit_temperature(7 * logits, targets) == pytest.approx(7 * fit_temperature(logits, targets))


@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), n=st.integers(1, 20), classes=st.integers(1, 4))
def test_any_logits_give_a_temperature_that_is_no_worse_than_1(seed, scale, n, classes):
    logits, targets = sample(seed, scale, n, classes)
    found = fit_temperature(logits, targets)
    assert 0 < found < float("inf")
    before, after = (F.cross_entropy(logits.double() / t, targets) for t in (1, found))
    assert after <= before + 1e-9


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        ([[2.0, 1.0], [0.0, 3.0]], [0, 1]),  # all right: the smaller T the better
        ([[2.0, 1.0], [0.0, 3.0]], [1, 0]),  # worse than chance: the larger the better
        ([[1.0, 1.0]], [0]),
        ([[5.0]], [0]),
    ],
)
def test_where_no_temperature_is_best_it_is_1(logits, targets):
    assert fit_temperature(torch.tensor(logits), torch.tensor(targets)) == 1


@pytest.fixture
def run(tmp_path):
    """A run whose images all have a class at random, so that it is wrong on some."""
    root = write_folder(tmp_path / "birds", classes=3, images_per_class=16, split_folders=True)
    run = Run(write_run(tmp_path / "run"))
    classes = sorted(path.name for path in (root / "train").iterdir())
    write_json(run.spec, {**read_json(run.spec), "classes": classes})
    data = {"dataset": "folder", "root": str(root), "batch_size": 5, "num_workers": 0}
    write_json(run.info, {"status": "finished", "dataset": "folder", "data_root": str(root), "data": data})
    return run


def test_a_run_is_calibrated_on_its_validation_images(run, capsys):
    test_run(run.path, split="val", device="cpu")
    with np.load(run.path / "val" / "predictions.npz") as saved:
        logits, targets = torch.from_numpy(saved["logits"]), torch.from_numpy(saved["targets"])
    assert main(["calibrate", str(run.path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    spec = run.read_spec()
    assert spec.temperature == pytest.approx(fit_temperature(logits, targets), rel=1e-4)
    assert spec.temperature != 1
    assert said.startswith(f"temperature {spec.temperature:.4g}, fitted on 12 val images of folder\n")
    assert said.endswith(f"stored in {run.spec}\n")
    kept = run.read_info()["calibration"]
    assert (kept["split"], kept["n"], kept["temperature"]) == ("val", 12, spec.temperature)
    assert kept["nll_calibrated"] <= kept["nll"] == pytest.approx(F.cross_entropy(logits, targets).item())
    assert run.read_info()["status"] == "finished"

    results = test_run(run.path, split="val", device="cpu")
    assert results["temperature"] == spec.temperature
    assert results["calibration"] == kept
    assert results["ece"] == pytest.approx(kept["ece"], abs=1e-6)
    assert results["ece_calibrated"] == pytest.approx(kept["ece_calibrated"], abs=1e-4)


def test_calibrating_again_gives_the_same(run):
    first = calibrate_run(run.path, device="cpu")
    assert calibrate_run(run.path, device="cpu") == first


def test_probabilities_change_and_labels_stay(run):
    images = sorted((run.path.parent / "birds" / "test").rglob("*.jpg"))
    before = Predictor.load(run.path, "cpu").predict(images)
    calibrate_run(run.path, device="cpu")
    after = Predictor.load(run.path, "cpu").predict(images)
    assert [one.label for one in after] == [one.label for one in before]
    assert [one.probability for one in after] != [one.probability for one in before]


def test_what_cannot_be_calibrated_is_refused(run, tmp_path):
    with pytest.raises(UsageError, match="Give the run folder"):
        calibrate_run(run.weights)
    with pytest.raises(CrossXError, match="was trained on its train images"):
        calibrate_run(run.path, split="train")
    imported = Run(shutil.copytree(run.path, tmp_path / "imported"))
    imported.info.write_text(json.dumps({**run.read_info(), "status": "imported"}))
    with pytest.raises(CrossXError, match="was trained on its val images"):
        calibrate_run(imported.path)
    assert calibrate_run(imported.path, split="test", device="cpu").described["split"] == "test"
