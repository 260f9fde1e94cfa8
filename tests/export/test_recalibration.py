"""Thresholds of a quantised file, set again on the images that the run was calibrated on."""

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import layouts
from crossx.data.image_files import find_images
from crossx.data.transforms import Normalize, eval_transform
from crossx.evaluation.network import TorchNetwork
from crossx.evaluation.subject import open_data
from crossx.export.export import export_run
from crossx.export.recalibration import Recalibration, recalibrate
from crossx.methods.weights import load_method, save_weights
from crossx.predict.exported import ExportedModel
from crossx.predict.predictor import Predictor
from crossx.runs import PredictionSets, Rejection, Run, write_json
from refusals import refusal

KEEP, WEIGHT, VIEWS = 0.9, 3.0, ("1", "1+flip")


class Rounded:
    """A network whose logits and similarities are rounded, as by int8, and shifted."""

    def __init__(self, network: TorchNetwork, similarities: bool = True) -> None:
        self.network, self.has_similarities = network, similarities

    def logits(self, images: Tensor) -> Tensor:
        return (8 * self.network.logits(images)).round() / 8 - 0.3

    def logits_and_similarities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        _, similarities = self.network.logits_and_similarities(images)
        return self.logits(images), 0.9 * similarities


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with class means that was calibrated on 33 validation images."""
    place = tmp_path_factory.mktemp("recalibration")
    root = layouts.write_folder(place / "birds", classes=3, images_per_class=44, split_folders=True)
    run = Run(
        layouts.write_run(place / "run", sorted(path.name for path in (root / "val").iterdir()), "plain")
    )
    method, spec = load_method(run.path)
    width = method.width_of_class_means
    method.class_means = torch.nn.functional.normalize(
        torch.rand(3, width, generator=torch.Generator().manual_seed(0))
    )
    save_weights(method, run.weights)
    # without room for crops, there are two views
    spec = replace(spec, preprocessing=replace(spec.preprocessing, resize_size=64))
    rejection = Rejection("combined", KEEP, 33, dict.fromkeys(VIEWS, 100.0), WEIGHT)
    sets = PredictionSets(33, dict.fromkeys(VIEWS, (0.5, 0.4)))
    write_json(run.spec, replace(spec, temperature=1.5, rejection=rejection, sets=sets).to_json())
    data = {"dataset": "folder", "root": str(root), "batch_size": 7}
    calibration = {"dataset": "folder", "data_root": str(root), "split": "val", "n": 33}
    info = {"status": "finished", "dataset": "folder", "data_root": str(root), "data": data}
    write_json(run.info, {**info, "calibration": calibration})
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy to change."""
    return Run(shutil.copytree(trained.path, tmp_path / "run"))


def images_of(run: Run) -> Path:
    return Path(run.read_info()["data_root"])


def rounded(run: Run, similarities: bool = True) -> Rounded:
    method, spec = load_method(run.path)
    return Rounded(TorchNetwork(method, Normalize(spec.preprocessing), "cpu"), similarities)


def again(run: Run, network: Rounded, **options: str) -> Recalibration:
    spec = run.read_spec()
    return recalibrate(network, run, spec, partial(open_data, run, spec, **options))


def scores_and_own(
    run: Run, network: Rounded, files: list[Path], flip: bool
) -> tuple[list[float], list[float]]:
    """Return the score and the probability of its own class of each image, by the definitions."""
    spec = run.read_spec()
    transform = eval_transform(spec.preprocessing)
    images = torch.stack([transform(transform.read(file)) for file in files])
    views = [
        network.logits_and_similarities(view) for view in ([images, images.flip(-1)] if flip else [images])
    ]
    scores, own = [], []
    for number, file in enumerate(files):
        rows = [(logits[number], float(cosines[number])) for logits, cosines in views]
        scores.append(sum(float(logits.max()) + WEIGHT * cosine for logits, cosine in rows) / len(rows))
        label = spec.classes.index(file.parent.name)
        own.append(sum(float((logits / 1.5).softmax(0)[label]) for logits, _ in rows) / len(rows))
    return scores, own


def test_thresholds_are_those_of_the_scores_of_the_file(run: Run) -> None:
    network, before = rounded(run), run.read_spec()
    found = again(run, network)
    assert (found.dataset, found.split, found.images) == ("folder", "val", 33)
    assert found.before == before.rejection.thresholds
    assert replace(found.spec, rejection=before.rejection, sets=before.sets) == before
    files = sorted((images_of(run) / "val").rglob("*.jpg"))
    for views in VIEWS:
        scores, own = scores_and_own(run, network, files, views == "1+flip")
        # 34 x 0.1 = 3.4: the third smallest is kept; 34 x 0.9 = 30.6: 31 images are covered
        assert found.spec.rejection.thresholds[views] == pytest.approx(sorted(scores)[2], rel=1e-5)
        assert found.spec.sets.least_probability[views][40] == pytest.approx(sorted(own)[-31], rel=1e-5)
    assert found.thresholds == (100.0, found.spec.rejection.thresholds["1"])
    values = found.to_json()
    assert values["rejection"]["thresholds"] == found.spec.rejection.thresholds
    assert values["sets"]["images"] == 33
    assert values["recalibrated"] == {
        "dataset": "folder", "split": "val", "images": 33, "float32_thresholds": dict.fromkeys(VIEWS, 100.0)
    }  # fmt: skip
    assert run.read_spec() == before


def test_without_class_means_only_the_sets_are_set_again(run: Run) -> None:
    """As in a checkpoint, by which no image is rejected."""
    found = again(run, rounded(run, similarities=False))
    assert found.spec.rejection == run.read_spec().rejection
    assert found.spec.sets != run.read_spec().sets
    assert found.thresholds is None
    assert "float32_thresholds" not in found.to_json()["recalibrated"]


def test_a_run_without_sets_gets_none(run: Run) -> None:
    write_json(run.spec, replace(run.read_spec(), sets=None).to_json())
    found = again(run, rounded(run))
    assert found.spec.sets is None
    assert found.thresholds is not None
    assert "sets" not in found.to_json()


def elsewhere(run: Run, tmp_path: Path) -> Path:
    """Calibrate the run on the test split of other images."""
    root = layouts.write_folder(tmp_path / "other", classes=3, images_per_class=24, split_folders=True)
    calibration = {"dataset": "folder", "data_root": str(root), "split": "test", "n": 18}
    write_json(run.info, {**run.read_info(), "calibration": calibration})
    return root


def test_the_images_are_those_of_the_calibration(run: Run, tmp_path: Path) -> None:
    root = elsewhere(run, tmp_path)
    network = rounded(run)
    found = again(run, network)
    files = sorted((root / "test").rglob("*.jpg"))
    assert (found.split, found.images) == ("test", len(files))
    scores, _ = scores_and_own(run, network, files, flip=False)
    rank = math.floor((len(files) + 1) * (1 - KEEP) + 1e-9)
    assert found.spec.rejection.thresholds["1"] == pytest.approx(sorted(scores)[rank - 1], rel=1e-5)
    shutil.rmtree(root)
    assert str(root) in refusal(again, run, network)


def test_another_dataset_of_the_same_folder_is_not_taken_for_the_runs(run: Run) -> None:
    info = run.read_info()
    write_json(run.info, {**info, "calibration": {**info["calibration"], "dataset": "webdataset"}})
    message = refusal(again, run, rounded(run))
    assert str(images_of(run)) in message
    assert ".tar" in message


def test_images_that_have_moved_are_found(run: Run, tmp_path: Path) -> None:
    moved = shutil.copytree(images_of(run), tmp_path / "moved")
    found = again(run, rounded(run))
    gone = str(tmp_path / "gone")
    info = run.read_info()
    write_json(
        run.info, {**info, "data_root": gone, "calibration": {**info["calibration"], "data_root": gone}}
    )
    assert again(run, rounded(run), root=str(moved)) == found
    assert "gone" in refusal(again, run, rounded(run))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "imported"}, "the network was trained on the val images of folder."),
        ({"calibration": {"split": "train"}}, "the network was trained on the train images of folder."),
    ],
)
def test_images_that_were_trained_on_are_refused(run: Run, changes: dict[str, object], message: str) -> None:
    write_json(run.info, {**run.read_info(), **changes})
    assert refusal(again, run, rounded(run)) == message


def test_too_few_images_are_refused(run: Run) -> None:
    spec = run.read_spec()
    write_json(run.spec, replace(spec, rejection=replace(spec.rejection, keep=0.99)).to_json())
    assert refusal(again, run, rounded(run)) == (
        "33 val images of folder are too few: to keep 0.99 needs 99."
    )


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_the_int8_file_keeps_the_share_that_was_asked_for(run: Run, tmp_path: Path, suffix: str) -> None:
    for package in ("onnxscript", "onnxruntime", "openvino", "nncf"):
        pytest.importorskip(package)
    output = tmp_path / f"network{suffix}"
    report = export_run(run.path, output, precision="int8", tolerance=1.0)
    assert report.not_recalibrated is None
    model = ExportedModel.load(output)
    assert report.recalibration is not None
    assert model.spec == report.recalibration.spec != run.read_spec()
    assert model.description["recalibrated"]["images"] == 33
    assert model.description["accuracy"]["kept"]["after"] == report.accuracy.kept.after
    files = find_images(images_of(run) / "val")
    for options in ({}, {"flip": True}):
        predictions = Predictor.load(output, **options).predict(files)
        # the third smallest score of 33 is the threshold, up to rounding
        assert sum(one.rejected for one in predictions) in (2, 3)


@pytest.mark.slow
def test_without_its_images_the_file_keeps_the_thresholds(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    shutil.rmtree(elsewhere(run, tmp_path))
    output = tmp_path / "network.onnx"
    report = export_run(run.path, output, precision="int8", tolerance=1.0)
    assert report.recalibration is None
    assert str(tmp_path / "other") in report.not_recalibrated
    model = ExportedModel.load(output)
    assert model.spec == run.read_spec()
    assert "recalibrated" not in model.description
