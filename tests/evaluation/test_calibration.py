import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from crossx.cli.main import main
from crossx.data.fingerprints import fingerprints
from crossx.errors import CrossXError, UsageError
from crossx.evaluation import calibration
from crossx.evaluation.calibration import (
    ViewOutputs,
    calibrate_outputs,
    calibrate_run,
    choose_temperature,
    fit_temperature,
)
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


@pytest.mark.parametrize("n", [10, 200])
def test_calibrated_logits_keep_temperature_1(n):
    """Where 1 is right, about one of 20 samples changes it, however few images there are."""
    changed = [choose_temperature(*sample(seed, 1.0, n)).value != 1 for seed in range(200)]
    # 99.9% of the binomial distribution
    assert 1 <= sum(changed) <= 21


@pytest.mark.parametrize(("scale", "n"), [(1.0, 10), (1.3, 10), (3.0, 40)])
def test_the_chosen_temperature_does_little_harm_on_new_images(scale, n):
    """Few images of a network that is nearly calibrated leave it alone; a large gain is kept."""
    new, targets = sample(10_000, scale, 2000)

    def gain(temperature):
        return float(F.cross_entropy(new, targets) - F.cross_entropy(new / temperature, targets))

    samples = [sample(seed, scale, n) for seed in range(40)]
    chosen = [gain(choose_temperature(*few).value) for few in samples]
    fitted = [gain(fit_temperature(*few)) for few in samples]
    if scale < 3:
        assert np.mean(fitted) < -0.03  # a temperature that is always fitted makes matters worse
        assert np.mean(chosen) > np.mean(fitted) / 2
    else:
        assert np.mean(chosen) >= 0.95 * np.mean(fitted) > 0.3


def test_the_reason_for_temperature_1_names_the_best_one():
    logits, targets = sample(3, 1.2, 10)
    best = fit_temperature(logits, targets)
    value, reason = choose_temperature(logits, targets)
    assert value == 1
    assert best != 1
    assert f"10 images cannot tell {best:.3g}, the best for them, from 1 (p = " in reason
    # twice the log-likelihood gained is far beyond what chance gives
    assert choose_temperature(*sample(3, 4.0, 100)) == (fit_temperature(*sample(3, 4.0, 100)), None)
    assert choose_temperature(torch.tensor([[2.0, 1.0]]), torch.tensor([0])) == (
        1,
        "no temperature is best for 1 image classified correctly",
    )
    assert choose_temperature(torch.tensor([[1.0, 2.0]]), torch.tensor([0])) == (
        1,
        "no temperature is best for 1 image classified no better than by chance",
    )


@pytest.fixture
def run(tmp_path):
    """A run whose images all have a class at random, so that it is wrong on some."""
    root = write_folder(tmp_path / "birds", classes=3, images_per_class=16, split_folders=True)
    run = Run(write_run(tmp_path / "run"))
    # so wrong that 12 images say so
    weights = load_file(run.weights)
    save_file({k: 40 * v if k.startswith("heads.") else v for k, v in weights.items()}, run.weights)
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


def test_the_folder_of_the_images_is_found_from_other_folders(run, monkeypatch):
    monkeypatch.chdir(run.path.parent)
    calibrate_run(run.path, device="cpu", root="birds")
    assert run.read_info()["calibration"]["data_root"] == str(run.path.parent / "birds")


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


def test_images_of_which_some_were_trained_on(run, caplog):
    images = sorted((run.path.parent / "birds" / "val").rglob("*.*"))
    few, most = len(images) // 2, len(images) // 2 + 1
    np.save(run.images, np.unique(fingerprints(images[:most])))
    with pytest.raises(
        CrossXError, match=f"was trained on {most} of these {len(images)} val images, on which"
    ):
        calibrate_run(run.path, device="cpu")
    np.save(run.images, np.unique(fingerprints(images[:few])))
    calibrate_run(run.path, device="cpu")
    assert (
        f"{few} of the {len(images)} images were trained on: the run is overconfident on these" in caplog.text
    )


@pytest.mark.slow
def test_every_view_has_its_own_thresholds(run, monkeypatch):
    """Thresholds are order statistics of the scores and probabilities that the predictor gives with these views."""
    root = write_folder(run.path.parent / "more", classes=3, images_per_class=40, split_folders=True)
    found = calibrate_run(run.path, device="cpu", root=root, keep=0.9, score="energy")
    spec = run.read_spec()
    assert (spec.rejection, spec.sets) == (found.rejection, found.sets)
    assert read_json(run.spec)["schema"] == 2
    assert (spec.rejection.score, spec.rejection.keep, spec.rejection.images) == ("energy", 0.9, 30)
    images = sorted((root / "val").rglob("*.jpg"))
    for key, options in {
        "1": {}, "1+flip": {"flip": True}, "5": {"crops": 5}, "5+flip": {"flip": True, "crops": 5},
    }.items():  # fmt: skip
        predictions = Predictor.load(run.path, "cpu", **options, coverage=0.9).predict(images, top=3)
        scores = sorted(one.score for one in predictions)
        # 31 x 0.1 = 3.1: the third smallest is kept
        assert spec.rejection.thresholds[key] == pytest.approx(scores[2], rel=1e-5)
        own = sorted((dict(one.top)[one.path.parent.name] for one in predictions), reverse=True)
        # 31 x 0.9 = 27.9: 28 of them are covered
        assert spec.sets.least_probability[key][40] == pytest.approx(own[27], rel=1e-5)
        assert 26 <= sum(one.path.parent.name in one.candidates for one in predictions) <= 30
        assert sum(one.rejected for one in predictions) in (2, 3)
    assert (
        set(spec.rejection.thresholds) == set(spec.sets.least_probability) == {"1", "1+flip", "5", "5+flip"}
    )

    # on a part of many images
    monkeypatch.setattr(calibration, "MAX_VALUES", 3 * 10 * 10)
    part = calibrate_run(run.path, device="cpu", root=root)
    assert (part.sets.images, part.temperature) == (10, found.temperature)
    assert part.rejection is None  # too few to keep 95%
    assert read_json(run.spec)["schema"] == 1


@pytest.mark.slow
def test_few_images_have_no_threshold_and_say_so(run, capsys):
    """Of 12 images, none can be below a threshold that keeps 95%; 92% is the most that sets can cover."""
    assert main(["calibrate", str(run.path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "rejection  none: every image gets a class, since to keep 0.95 needs 19 images or more\n" in said
    assert "prediction sets  for a coverage of up to 0.92; for 0.9, it will be between " in said
    assert run.read_spec().rejection is None
    images = str(run.path.parent / "birds" / "test")
    assert main(["predict", str(run.path), images, "--coverage", "0.95"]) == 2
    assert "needs 19 calibration images, and" in capsys.readouterr().err
    assert main(["calibrate", str(run.path), "--device", "cpu", "--keep", "0.9"]) == 0
    assert "below" in capsys.readouterr().out
    assert run.read_spec().rejection.images == 12
    assert main(["calibrate", str(run.path), "--device", "cpu", "--keep", "1"]) == 0
    assert "rejection  none: every image gets a class\n" in capsys.readouterr().out
    assert run.read_spec().rejection is None


@pytest.mark.slow
def test_the_test_says_what_is_kept_covered_and_told_apart(run, tmp_path, capsys):
    calibrate_run(run.path, device="cpu", keep=0.5, score="max_probability")
    others = write_folder(tmp_path / "others", classes=1, images_per_class=5)
    (others / "broken.jpg").touch()
    words = ["test", str(run.path), "--device", "cpu", "--coverage", "0.9", "--unknown", str(others)]
    assert main(words) == 0
    said = capsys.readouterr().out
    results = read_json(run.path / "test.json")
    with np.load(run.path / "test" / "predictions.npz") as saved:
        logits, targets = saved["logits"].astype(float), saved["targets"]
    spec = run.read_spec()
    shares = np.exp(logits / spec.temperature)
    shares /= shares.sum(1, keepdims=True)
    largest = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).max(1)
    kept = largest >= spec.rejection.thresholds["1"]
    assert results["rejection"]["kept"] == pytest.approx(kept.mean())
    if kept.any():
        assert results["rejection"]["top1_kept"] == pytest.approx((logits.argmax(1) == targets)[kept].mean())
    least = spec.sets.least_probability["1"][40]
    own = shares[np.arange(len(targets)), targets]
    assert results["sets"]["covered"] == pytest.approx(((own >= least) | (own == shares.max(1))).mean())
    assert sum(results["sets"]["sizes"].values()) == len(targets)
    low, high = results["sets"]["interval"]
    assert low <= results["sets"]["covered"] <= high
    assert (results["unknown"]["n"], results["unknown"]["skipped"]) == (5, 1)
    unknown = [one.score for one in Predictor.load(run.path, "cpu").predict(others) if one.error is None]
    wins = np.mean([[(k > u) + (k == u) / 2 for u in unknown] for k in largest])
    assert results["unknown"]["scores"]["max_probability"]["auroc"] == pytest.approx(wins, abs=0.05)
    for words in ("kept", "coverage 0.9", "classes per set", "5 images of", "1 left out", "AUROC", "OSCR"):
        assert words in said
    for keep in (0.98, 0.95, 0.9, 0.8):
        threshold = max(t for t in largest if np.mean(largest >= t) >= keep - 1e-9)
        share = results["unknown"]["scores"]["max_probability"]["rejected"][f"{keep:g}"]
        assert share == pytest.approx(np.mean(np.array(unknown) < threshold), abs=0.2)  # one of five at a tie
        assert f"keep {keep:g} " in said
    assert "% rejected by max_probability\n" in said


@pytest.mark.slow
def test_results_on_the_images_of_the_calibration_say_so(run, tmp_path, capsys):
    other = shutil.copytree(run.path.parent / "birds", tmp_path / "other")
    words = ["test", str(run.path), "--device", "cpu"]
    for split, root, said in (("test", None, True), ("val", None, False), ("test", other, False)):
        calibrate_run(run.path, split=split, device="cpu", **({} if root is None else {"root": root}))
        assert main(words) == 0
        assert ("These images were calibrated on" in capsys.readouterr().out) == said


@pytest.mark.parametrize("value", ["0", "1", "1.5", "nan", "-0.1", "much"])
@pytest.mark.parametrize("verb", ["predict", "test"])
def test_coverages_that_cannot_be_are_refused(run, capsys, verb, value):
    words = [verb, str(run.path), *(["x.jpg"] if verb == "predict" else []), f"--coverage={value}"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "--coverage" in said
    assert "from 0.5 to 0.99" in said


def test_a_run_of_before_has_no_sets(run, capsys):
    images = str(run.path.parent / "birds" / "test")
    for words in (["predict", str(run.path), images], ["test", str(run.path)]):
        assert main([*words, "--coverage", "0.9", "--device", "cpu"]) == 2
        assert "has no prediction sets, which --coverage needs" in capsys.readouterr().err
    assert main(["predict", str(run.path), images, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("path,label,probability,error\n")


def test_one_class_has_a_threshold_and_sets_of_one():
    """A dataset needs two classes, but a run may have one."""
    logits = torch.linspace(-1, 1, 40)[:, None]
    outputs = ViewOutputs(
        logits, torch.zeros(40, dtype=torch.int64), logits[None], torch.ones(40, dtype=torch.bool), {"1": [0]}
    )
    found = calibrate_outputs(outputs, dataset="folder", split="val")
    assert found.rejection.thresholds == {"1": pytest.approx(logits[1, 0].item())}
    assert set(found.sets.least_probability["1"]) == {1.0}
    assert found.temperature == 1


@pytest.mark.parametrize(("images", "keep"), [(40, 1.0), (12, 0.95)])
def test_the_weight_of_class_means_is_kept_where_no_image_is_rejected(tmp_path, images, keep):
    """Every image is to be kept, or there are too few for a threshold."""
    run = Run(write_run(tmp_path / "run"))
    logits = torch.randn(images, 3, generator=torch.Generator().manual_seed(0))
    outputs = ViewOutputs(
        logits,
        torch.zeros(images, dtype=torch.int64),
        logits[None],
        torch.ones(images, dtype=torch.bool),
        {"1": [0]},
        torch.linspace(0, 1, images)[None],
    )
    for kept, weight in ((keep, 2.5), (keep, None), (0.5, 3.5), (0.5, None)):
        calibrate_outputs(outputs, keep=kept, weight=weight).write(run)
        spec = run.read_spec()
        assert (spec.rejection is None) == (kept == keep)
        assert spec.score_weight == weight
        assert ("combined_weight" in read_json(run.spec)) == (kept == keep and weight is not None)
