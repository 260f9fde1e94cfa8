"""Rejection by class means: the same everywhere, and nothing new for runs without them."""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from crossx.backbones import create_backbone
from crossx.cli.main import main
from crossx.errors import CrossXError, UsageError
from crossx.evaluation.calibration import calibrate_run, compute_class_means
from crossx.evaluation.run import test_run
from crossx.evaluation.subject import open_data
from crossx.export.export import export_run
from crossx.methods.plain import Plain
from crossx.methods.start import Start
from crossx.methods.weights import load_method
from crossx.predict.checksums import CHECKSUMS
from crossx.predict.exported import KEY
from crossx.predict.predictor import Predictor
from crossx.runs import Run, read_json, write_json
from crossx.share.sharing import save_pretrained
from layouts import write_folder, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that rejects by class means, set on 21 images."""
    folder = tmp_path_factory.mktemp("means")
    root = write_folder(folder / "birds", classes=3, images_per_class=28, split_folders=True)
    run = Run(write_run(folder / "run", sorted(path.name for path in (root / "train").iterdir())))
    data = {"dataset": "folder", "root": str(root), "batch_size": 5, "num_workers": 0}
    write_json(run.info, {"status": "finished", "dataset": "folder", "data_root": str(root), "data": data})
    calibrate_run(run.path, device="cpu", score="combined", keep=0.7)
    return run


def photos(run: Run) -> list[Path]:
    return sorted((run.path.parent / "birds" / "test").rglob("*.jpg"))


def test_class_means_are_those_of_the_training_images(run: Run) -> None:
    method, spec = load_method(run.path)
    assert method.class_means is not None
    data = open_data(run, spec)
    features, labels = [], []
    for images, targets in data.eval_loader("train"):
        # the input of the head `last`, in the middle of the concatenated heads
        parts = method.part_features(data.normalize(images))["last"].flatten(1)
        features.append(normalize(parts.detach()))
        labels.append(targets)
    joined, known = torch.cat(features), torch.cat(labels)
    expected = torch.stack([joined[known == label].mean(0) for label in range(3)])
    torch.testing.assert_close(method.class_means, normalize(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, pytest.param({"crops": 5, "flip": True}, marks=pytest.mark.slow)])
def test_scores_are_those_of_the_formula_and_thresholds_keep_their_share(run: Run, options: dict) -> None:
    predictor = Predictor.load(run.path, "cpu", **options)
    method, rejection = predictor.method, predictor.spec.rejection
    images = torch.stack([predictor.prepare(path) for path in photos(run)])
    scores = []
    for view in predictor._views.split(images):
        inputs = predictor.network.inputs(view)
        with torch.no_grad():
            last = normalize(method.part_features(inputs)["last"].flatten(1))
            cosine = (last @ method.class_means.T).amax(1)
            scores.append(method(inputs).amax(1) + rejection.weight * cosine)
    expected = torch.stack(scores).mean(0)
    found = predictor.predict(photos(run))
    np.testing.assert_allclose([one.score for one in found], expected.numpy(), rtol=1e-3, atol=1e-4)
    for one in found:
        assert one.rejected == (one.score < predictor.rejection[1])

    validation = sorted((run.path.parent / "birds" / "val").rglob("*.jpg"))
    kept = [not one.rejected for one in predictor.predict(validation)]
    # 22 x 0.3 = 6.6: five are below the sixth
    assert len(kept) - sum(kept) in (5, 6)


SLOW = [pytest.param(suffix, marks=pytest.mark.slow) for suffix in (".onnx", ".xml", ".pt2")]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", *SLOW])
def test_exported_files_reject_the_same_images(run: Run, tmp_path: Path, suffix: str) -> None:
    for needed in {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".xml": ("openvino", "onnx")}.get(
        suffix, ()
    ):
        pytest.importorskip(needed, reason="needs crossx[export]")
    file = tmp_path / f"mine{suffix}"
    report = export_run(run.path, file)
    assert list(report.description["outputs"]) == ["logits", "probabilities", "similarities"]
    assert report.description["rejection"]["score"] == "combined"
    kept = report.comparison.kept
    assert kept is not None
    assert (kept.same, kept.before, kept.moved) == (16, kept.after, False)
    expected = Predictor.load(run.path, "cpu", flip=True).predict(photos(run))
    found = Predictor.load(file, flip=True, trust=True).predict(photos(run))
    assert [one.label for one in found] == [one.label for one in expected]
    np.testing.assert_allclose(
        [one.score for one in found], [one.score for one in expected], rtol=1e-3, atol=1e-3
    )
    everything = Predictor.load(file, accept="all", trust=True).predict(photos(run))
    assert all(one.label and one.score is None for one in everything)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_the_export_to_int8_tells_how_many_images_are_kept(run: Run, tmp_path: Path, suffix: str) -> None:
    for needed in ("onnxscript", "onnxruntime", "openvino", "nncf"):
        pytest.importorskip(needed, reason="needs crossx[export]")
    root = write_folder(tmp_path / "many", classes=3, images_per_class=110, split_folders=True)
    file = tmp_path / f"mine{suffix}"
    report = export_run(run.path, file, precision="int8", root=root, dataset="folder", tolerance=1.0)
    assert report.accuracy is not None
    found = report.accuracy.kept
    assert found is not None
    before, after = (
        np.array([not one.rejected for one in Predictor.load(path, "cpu").predict(root / "test")])
        for path in (run.path, file)
    )
    assert (found.before, found.after) == pytest.approx((before.mean(), after.mean()))
    assert found.same == (before == after).sum()
    assert found.lost.low <= found.before - found.after <= found.lost.high
    assert report.description["accuracy"]["kept"]["after"] == found.after


@pytest.mark.slow
def test_a_file_without_the_third_output_is_as_before(run: Run, tmp_path: Path) -> None:
    other = Run(shutil.copytree(run.path, tmp_path / "run"))
    calibrate_run(other.path, device="cpu", score="max_logit", keep=0.7)
    report = export_run(other.path, tmp_path / "mine.safetensors")
    assert list(report.description["outputs"]) == ["logits", "probabilities"]
    expected = Predictor.load(other.path, "cpu").predict(photos(run))
    found = Predictor.load(tmp_path / "mine.safetensors").predict(photos(run))
    assert [one.label for one in found] == [one.label for one in expected]


def test_shared_models_have_class_means(run: Run, tmp_path: Path) -> None:
    save_pretrained(Predictor.load(run.path, "cpu"), tmp_path / "shared")
    expected = Predictor.load(run.path, "cpu").predict(photos(run))
    assert Predictor.load(tmp_path / "shared", "cpu").predict(photos(run)) == expected


@pytest.mark.slow
def test_calibrating_again_computes_no_class_means_and_keeps_the_results(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Run(shutil.copytree(run.path, tmp_path / "run"))
    before = other.read_spec()
    monkeypatch.setattr("crossx.evaluation.calibration.compute_class_means", None)
    calibrate_run(other.path, device="cpu", keep=1)
    assert other.read_spec().rejection is None
    calibrate_run(other.path, device="cpu", keep=0.7)  # the default is the run's score
    assert other.read_spec().rejection == before.rejection
    # another score keeps the weight, also in a shared copy, which does not know the training images
    calibrate_run(other.path, device="cpu", score="energy", keep=0.7)
    found = other.read_spec().rejection
    assert (found.score, found.weight) == ("energy", before.rejection.weight)
    save_pretrained(Predictor.load(other.path, "cpu"), tmp_path / "shared")
    root = run.read_info()["data_root"]
    calibrate_run(tmp_path / "shared", device="cpu", keep=0.7, dataset="folder", root=root)
    shared = Run(tmp_path / "shared").read_spec().rejection
    assert (shared.score, shared.weight) == ("combined", before.rejection.weight)
    assert shared.thresholds == pytest.approx(before.rejection.thresholds, rel=1e-5)


def without_class_means(run: Run, folder: Path) -> Run:
    other = Run(write_run(folder, run.read_spec().classes))
    shutil.copy(run.info, other.info)
    return other


def test_a_run_without_class_means_is_as_before(run: Run, tmp_path: Path) -> None:
    other = without_class_means(run, tmp_path / "run")
    weights = other.weights.read_bytes()
    found = calibrate_run(other.path, device="cpu", keep=0.7)
    assert (found.rejection.score, found.rejection.weight) == ("max_logit", None)
    assert "weight" not in read_json(other.spec)["rejection"]
    assert other.weights.read_bytes() == weights


@pytest.mark.slow
def test_a_run_gets_class_means_when_a_score_needs_them(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = without_class_means(run, tmp_path / "run")
    tested = test_run(other.path, device="cpu")
    assert "class_means" not in load_file(other.weights)
    assert (
        main(["calibrate", str(other.path), "--score", "combined", "--keep", "0.7", "--device", "cpu"]) == 0
    )
    assert "of images whose score combined is below " in capsys.readouterr().out
    assert other.read_spec().rejection == run.read_spec().rejection
    # the same network, so that its results are still those of these weights
    assert other.read_results(other.weights)["top1"] == tested["top1"]
    for name, value in load_file(run.weights).items():
        torch.testing.assert_close(load_file(other.weights)[name], value)


@pytest.mark.slow
def test_the_test_measures_the_scores_of_features(run: Run, tmp_path: Path) -> None:
    others = write_folder(tmp_path / "others", classes=1, images_per_class=5)
    results = test_run(run.path, device="cpu", unknown=others)
    assert list(results["unknown"]["scores"]) == [
        "max_probability", "max_logit", "energy", "similarity", "combined",
    ]  # fmt: skip
    predictor = Predictor.load(run.path, "cpu")
    kept = [not one.rejected for one in predictor.predict(photos(run))]
    assert results["rejection"]["kept"] == pytest.approx(np.mean(kept))
    rejected = [one.rejected for one in predictor.predict(others)]
    assert results["unknown"]["rejected"] == pytest.approx(np.mean(rejected))


@pytest.mark.slow
def test_weights_without_class_means_reject_nothing_and_say_so(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints of a training have none: those of the run are of its selected weights."""
    other = Run(shutil.copytree(run.path, tmp_path / "run"))
    method, _ = load_method(run.path)
    method.class_means = None
    torch.save(
        {"state_dict": {f"method.{key}": value for key, value in method.state_dict().items()}},
        other.path / "a.ckpt",
    )
    with caplog.at_level(logging.WARNING):
        predictor = Predictor.load(other.path / "a.ckpt", "cpu")
    assert "no image is rejected: the score combined needs class means" in caplog.text
    assert predictor.rejection is None
    assert all(one.label and one.score is None for one in predictor.predict(photos(run)))
    assert "rejection" not in test_run(other.path / "a.ckpt", device="cpu", root=run.read_info()["data_root"])


def test_another_training_does_not_start_from_class_means(run: Run) -> None:
    assert "class_means" not in Start.read(run.path).state


@pytest.mark.slow
def test_a_file_that_lacks_a_described_output_is_damaged(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    export_run(run.path, file)
    weights = load_file(file)
    del weights["class_means"]
    with safe_open(file, "pt") as opened:
        description = json.loads(opened.metadata()[KEY])
    del description[CHECKSUMS]  # as in files of earlier versions
    save_file(weights, file, {KEY: json.dumps(description)})
    with pytest.raises(
        CrossXError, match=r"mine.safetensors: returns \(1, 3\), \(1, 3\), but describes 3 classes and"
    ):
        Predictor.load(file).predict(photos(run)[:1])


def test_class_means_of_another_size_are_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Run(shutil.copytree(run.path, tmp_path / "run"))
    weights = load_file(other.weights)
    save_file({**weights, "class_means": weights["class_means"][:, :-1].contiguous()}, other.weights)
    assert main(["predict", str(other.path), str(photos(run)[0])]) == 1
    assert "its weights do not fit the network of model.json" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["predict", "test", pytest.param("calibrate", marks=pytest.mark.slow)])
def test_class_means_that_are_not_finite_are_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    other = Run(shutil.copytree(run.path, tmp_path / "run"))
    weights = load_file(other.weights)
    save_file({**weights, "class_means": weights["class_means"].fill_(torch.nan)}, other.weights)
    assert main([verb, str(other.path), *([str(photos(run)[0])] if verb == "predict" else [])]) == 1
    assert re.search(
        r"the network's output is not finite.*: its weights are damaged", capsys.readouterr().err
    )
    assert other.read_spec() == run.read_spec()


@pytest.mark.parametrize(
    "change", [{"weight": None}, {"weight": -1.0}, {"weight": 1e13}, {"weight": "1"}, {"score": "neighbors"}]
)
def test_a_rejection_that_cannot_be_is_refused(run: Run, tmp_path: Path, change: dict) -> None:
    values = read_json(run.spec)
    changed = {**values["rejection"], **change}
    write_json(tmp_path / "model.json", {**values, "rejection": changed})
    with pytest.raises(Exception, match=r"model.json: not a model description of crossx .rejection"):
        Run(tmp_path).read_spec()


def test_training_images_that_are_missing_are_named_with_the_way_out(run: Run, tmp_path: Path) -> None:
    other = without_class_means(run, tmp_path / "run")
    info = read_json(other.info)
    write_json(
        other.info, {**info, "data_root": str(tmp_path / "gone"), "data": info["data"] | {"root": "gone"}}
    )
    weights = other.weights.read_bytes()
    with pytest.raises(
        CrossXError, match=r"gone.*Score combined needs class means .* --score max_logit does not"
    ):
        calibrate_run(other.path, device="cpu", score="combined", root=info["data_root"])
    assert other.weights.read_bytes() == weights
    assert "rejection" not in read_json(other.spec)


class NeedsAllHeads(Plain):
    """One head is not linear, and the prediction needs it by name."""

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        heads = super().head_logits(images)
        return {**heads, "other": heads["last"].tanh()}

    def combine_heads(self, heads: Mapping[str, Tensor]) -> Tensor:
        return heads["last"] + heads["other"]


class IgnoresMissingHeads(NeedsAllHeads):
    """The same, but the sum of the heads there are."""

    def combine_heads(self, heads: Mapping[str, Tensor]) -> Tensor:
        return sum(heads.values())


class OtherFeatures(Plain):
    """Breaks the contract: its head does not take these features."""

    def head_features(self, images: Tensor) -> dict[str, Tensor]:
        features = self.embeddings(images)
        return {"last": torch.cat([features, features], 1)}


@pytest.mark.parametrize(
    ("method", "warned"),
    [
        (NeedsAllHeads, "does not give what head_logits does"),
        (IgnoresMissingHeads, "does not give what head_logits does"),
        (OtherFeatures, "cannot be applied to its features"),
    ],
)
def test_methods_that_do_not_predict_by_linear_heads_alone_have_no_class_means(
    run: Run, caplog: pytest.LogCaptureFixture, method: type[Plain], warned: str
) -> None:
    """A training is not lost at its end, whatever the method of a user does."""
    data = open_data(run, run.read_spec())
    network = method(create_backbone("test_resnet", pretrained=False), 3)
    with caplog.at_level(logging.WARNING):
        assert compute_class_means(network, data, "cpu") is None
    (message,) = caplog.messages
    assert message.startswith("no class means")
    assert warned in message


def test_a_method_without_linear_heads_has_no_class_means(run: Run, tmp_path: Path) -> None:
    other = Run(write_run(tmp_path / "run", run.read_spec().classes, method="pdisconet"))
    shutil.copy(run.info, other.info)
    with pytest.raises(UsageError, match="'pdisconet' has no class means: they need linear heads"):
        calibrate_run(other.path, device="cpu", score="combined", keep=0.7)
    assert "rejection" not in read_json(other.spec)
