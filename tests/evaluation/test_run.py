import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossx.data.catalog import read_dataset
from crossx.data.fingerprints import fingerprint
from crossx.data.images import read_image
from crossx.data.transforms import Normalize, eval_transform
from crossx.errors import CrossXError, UsageError
from crossx.evaluation.comparison import compare_runs
from crossx.evaluation.predictions import Predictions
from crossx.evaluation.run import evaluate, test_run
from crossx.methods.registry import create_method
from crossx.methods.weights import describe, load_method, save_weights
from crossx.runs import Preprocessing, Run, read_json, write_json
from layouts import write_aircraft, write_folder

PREPROCESSING = Preprocessing(64, 72, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SELECTION = {"how": "best on val", "split": "val", "epoch": 3, "value": 0.5}


def make_method(num_classes=3):
    torch.manual_seed(0)
    return create_method("crossx", backbone="test_resnet", num_classes=num_classes)


def write_run(folder, root, dataset="folder", **options):
    index = read_dataset(dataset, root)
    run = Run(folder)
    folder.mkdir(exist_ok=True)
    method = make_method(len(index.classes))
    spec = describe(
        method, classes=index.classes, preprocessing=PREPROCESSING, dataset=dataset, levels=index.levels
    )
    write_json(run.spec, spec.to_json())
    save_weights(method, run.weights)
    write_json(
        run.info,
        {
            "schema": 1,
            "method": "crossx",
            "backbone": "test_resnet.r160_in1k",
            "pretrained": True,
            "backbone_weights": None,
            "dataset": dataset,
            "data_root": str(root),
            "seed": 7,
            "selection": SELECTION,
            "data": {"dataset": dataset, "root": str(root), "batch_size": 5, "num_workers": 0, **options},
        },
    )
    return run


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "birds", classes=3, images_per_class=8, split_folders=True)


@pytest.fixture
def run(tmp_path, root):
    return write_run(tmp_path / "run", root)


@torch.inference_mode()
def predict_one_by_one(run, records):
    method, spec = load_method(run.path)
    transform, normalize = eval_transform(spec.preprocessing), Normalize(spec.preprocessing)
    images = [normalize(transform(read_image(record.path))[None]) for record in records]
    return np.stack([method(image)[0].numpy() for image in images])


@pytest.mark.parametrize("channels_last", [True, False])
def test_evaluate_answers_in_order_with_the_sum_of_heads(channels_last):
    method = make_method()
    images, targets = torch.randn(7, 3, 64, 64), torch.arange(7) % 3
    batches = list(zip(images.split(3), targets.split(3), strict=True))
    outputs = evaluate(method, batches, "cpu", channels_last=channels_last)
    with torch.inference_mode():
        expected = torch.cat([method(image[None]) for image in images])
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.logits, sum(outputs.heads.values()))
    assert len(outputs.heads) == 3
    assert torch.equal(outputs.targets, targets)
    assert not method.training
    assert not outputs.logits.requires_grad


def test_evaluate_normalizes_bytes_on_the_device():
    method, normalize = make_method(), Normalize(PREPROCESSING)
    images, targets = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8), torch.arange(5) % 3
    from_bytes = evaluate(method, [(images, targets)], "cpu", normalize=normalize)
    from_floats = evaluate(method, [(normalize(images), targets)], "cpu")
    assert torch.equal(from_bytes.logits, from_floats.logits)


def test_evaluate_refuses_logits_that_are_not_finite():
    method = make_method()
    images = torch.randn(4, 3, 64, 64)
    images[2] = torch.inf
    with pytest.raises(CrossXError, match="not finite on 1 of 4 images"):
        evaluate(method, [(images, torch.zeros(4, dtype=torch.long))], "cpu")


def test_results_are_those_of_a_plain_loop(run, root):
    results = test_run(run.path)
    records = read_dataset("folder", root).split("test")
    logits = predict_one_by_one(run, records)
    targets = np.array([record.label for record in records])
    right = logits.argmax(1) == targets
    assert results["n"] == len(records) == 6
    assert results["top1"] == pytest.approx(right.mean())
    assert results["class_mean"] == pytest.approx(np.mean([right[targets == c].mean() for c in range(3)]))
    assert results["top5"] == 1
    assert set(results["heads"]) == set(load_method(run.path)[0].head_logits(torch.zeros(1, 3, 64, 64)))
    low, high = results["intervals"]["top1"]
    assert 0 <= low <= results["top1"] <= high <= 1
    assert results["intervals"]["confidence"] == 0.95
    assert results["levels"] == {}

    stored = Predictions.load(run.path / "test" / "predictions.npz", run.path, "test")
    np.testing.assert_allclose(stored.logits, logits, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(stored.targets, targets)
    assert stored.paths.tolist() == [record.path.relative_to(root).as_posix() for record in records]
    assert stored.classes.tolist() == list(load_method(run.path)[1].classes)
    assert stored.contents is not None
    assert stored.contents.tolist() == [fingerprint(record.path) for record in records]


def test_results_say_what_they_belong_to(run, root):
    results = test_run(run.path, device="cpu")
    assert read_json(run.path / "test.json") == json.loads(json.dumps(results))
    assert {
        "method": "crossx",
        "backbone": "test_resnet.r160_in1k",
        "pretrained": True,
        "weights": "model.safetensors",
        "dataset": "folder",
        "data_root": str(root),
        "split": "test",
        "seen_in_training": False,
        "seed": 7,
        "selection": SELECTION,
        "skipped": [],
    }.items() <= results.items()
    assert torch.__version__.startswith(results["environment"]["versions"]["torch"])


def test_files_agree_with_the_results(run):
    results = test_run(run.path)
    folder = run.path / "test"
    with (folder / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["n"]) for row in rows) == results["n"]
    assert np.mean([float(row["accuracy"]) for row in rows]) == pytest.approx(results["class_mean"])
    with (folder / "confusion.csv").open(newline="") as file:
        confusion = np.array([row[1:] for row in csv.reader(file)][1:], dtype=int)
    assert np.trace(confusion) / confusion.sum() == pytest.approx(results["top1"])
    with (folder / "confused_pairs.csv").open(newline="") as file:
        pairs = list(csv.DictReader(file))
    assert sum(int(pair["n"]) for pair in pairs) == results["n"] - np.trace(confusion)
    assert [pair["n"] for pair in results["confused_pairs"]] == [int(pair["n"]) for pair in pairs]
    with Image.open(folder / "confusion.png") as image:
        image.verify()


def test_val_is_what_training_held_out(tmp_path):
    root = write_folder(tmp_path / "birds", classes=3, images_per_class=10)
    run = write_run(tmp_path / "run", root, val_fraction=0.25, split_seed=3, test_fraction=0.4)
    results = test_run(run.path, split="val")
    index = read_dataset("folder", root, test_fraction=0.4, split_seed=3).with_validation(0.25, 3)
    stored = Predictions.load(run.path / "val" / "predictions.npz", run.path, "val")
    assert stored.paths.tolist() == [r.path.relative_to(root).as_posix() for r in index.split("val")]
    assert (run.path / "val.json").is_file()
    assert not results["seen_in_training"]


@pytest.mark.parametrize("split", ["val", "train"])
def test_images_seen_in_training_are_said_to_be(tmp_path, root, split):
    run = write_run(tmp_path / "run", root, train_on="trainval")
    assert test_run(run.path, split=split)["seen_in_training"]


@pytest.mark.slow
def test_moved_data_compares_with_where_it_was(tmp_path, run, root):
    test_run(run.path)
    moved = tmp_path / "elsewhere" / "copy"
    shutil.move(root, moved)
    other = write_run(tmp_path / "other", moved)
    test_run(other.path, root=moved, batch_size=2, num_workers=0)
    assert compare_runs(run.path, other.path)["difference"] == 0
    with pytest.raises(CrossXError, match="birds"):
        test_run(run.path)


def test_levels_of_a_hierarchy(tmp_path):
    root = write_aircraft(tmp_path)
    run = write_run(tmp_path / "run", root, dataset="aircraft")
    results = test_run(run.path)
    index = read_dataset("aircraft", root)
    assert set(results["levels"]) == set(index.levels) != set()
    stored = Predictions.load(run.path / "test" / "predictions.npz", run.path, "test")
    # the images of a published dataset are known by their paths, also if they were compressed again
    assert stored.contents is None
    predicted = stored.logits.argmax(1)
    for level, groups in index.levels.items():
        right = [groups[p] == groups[t] for p, t in zip(predicted, stored.targets, strict=True)]
        assert results["levels"][level] == pytest.approx(np.mean(right))


def test_other_classes_are_refused(tmp_path, run, root):
    for split in ("train", "val", "test"):
        (root / split / "wren").rename(root / split / "dipper")
    with pytest.raises(CrossXError, match=r"does not know \('dipper'\).*'wren'"):
        test_run(run.path)


def test_a_subset_of_the_classes_is_refused(run, root):
    for split in ("train", "val", "test"):
        shutil.rmtree(root / split / "wren")
    with pytest.raises(CrossXError, match=r"only 2 of the run's 3 classes \(missing: 'wren'\)"):
        test_run(run.path)


def test_unreadable_images_stop_the_test(run, root):
    image = next((root / "test" / "wren").iterdir())
    image.write_bytes(b"")
    with pytest.raises(CrossXError, match=rf"1 of 6 images cannot be read: {image}"):
        test_run(run.path)
    assert not (run.path / "test.json").exists()


def test_unreadable_images_are_left_out_where_training_did(tmp_path, root):
    run = write_run(tmp_path / "run", root, bad_images="skip")
    image = next((root / "test" / "wren").iterdir())
    image.write_bytes(b"")
    results = test_run(run.path)
    assert results["n"] == 5
    assert len(results["skipped"]) == 1
    assert results["skipped"][0].startswith(str(image))


def test_a_checkpoint_file_is_not_called_the_selected_one(run):
    run.checkpoints.mkdir()
    shutil.copy(run.weights, run.checkpoints / "epoch3.safetensors")
    results = test_run(run.checkpoints / "epoch3.safetensors")
    assert results["weights"] == str(Path("checkpoints") / "epoch3.safetensors")
    assert results["selection"] == {"how": "checkpoint given"}


def test_output_elsewhere(tmp_path, run):
    test_run(run.path, output=tmp_path / "results")
    assert (tmp_path / "results" / "test.json").is_file()
    assert not (run.path / "test.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CrossXError, match="there is a file where a folder is needed"):
        test_run(run.path, output=tmp_path / "file" / "results")


@pytest.mark.slow
def test_a_run_without_run_json_needs_a_root(run, root):
    run.info.unlink()
    with pytest.raises(UsageError, match=r"--data\.root"):
        test_run(run.path)
    results = test_run(run.path, root=root, num_workers=0)
    assert (results["n"], results["seed"], results["selection"], results["pretrained"]) == (
        6,
        None,
        None,
        None,
    )


def test_numbered_classes_cannot_be_tested(run):
    write_json(run.info, {**read_json(run.info), "class_names": "numbered in the released order"})
    with pytest.raises(CrossXError, match=r"only numbered\. Import the checkpoint again"):
        test_run(run.path)


def test_unknown_names_are_refused(run):
    with pytest.raises(UsageError, match=r"unknown split 'tset'\. Did you mean 'test'"):
        test_run(run.path, split="tset")
    with pytest.raises(UsageError, match=r"unknown dataset 'foldr'\. Did you mean 'folder'"):
        test_run(run.path, dataset="foldr")


def test_an_empty_split_says_which_there_are(tmp_path, root):
    run = write_run(tmp_path / "run", root)
    shutil.rmtree(root / "test")
    with pytest.raises(CrossXError, match="no test images; it has: train, val"):
        test_run(run.path)
