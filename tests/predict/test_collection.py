import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import layouts
from crossx.errors import CrossXError, Stopped, UsageError
from crossx.predict import collection as module
from crossx.predict.collection import MANIFEST, predict_collection
from crossx.predict.predictor import Predictor
from crossx.runs import locked_folder
from refusals import refusal


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return layouts.write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Write 19 images and one that is none."""
    root = tmp_path_factory.mktemp("photos")
    layouts.write_folder(root, classes=1, images_per_class=19)
    (root / "zero.jpg").touch()
    return root


def predict(run, photos, output, **options):
    return predict_collection(run, photos, output, **{"shard_size": 4, "device": "cpu", **options})


def rows(output):
    return pq.read_table(output).to_pylist()


def parts(output):
    return {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}


def test_a_folder_of_parts_is_one_table_of_all_images(run, photos, tmp_path):
    seen = []
    output = tmp_path / "deep" / "out"
    done = predict(run, photos, output, top=2, progress=lambda *counts: seen.append(counts))
    assert (done.images, done.failed, done.predicted) == (20, 1, 20)
    assert seen == [(count, 20) for count in range(0, 21, 4)]
    assert sorted(parts(output)) == [f"part-{number:06d}.parquet" for number in range(5)]
    found = rows(output)
    expected = Predictor.load(run, "cpu").predict(photos, top=2)
    assert len(found) == 2 * 19 + 1
    for prediction in expected[:-1]:
        name = str(prediction.path.relative_to(photos))
        own = [row for row in found if row["path"] == name]
        assert [row["label"] for row in own] == [label for label, _ in prediction.top]
        assert [row["probability"] for row in own] == pytest.approx([p for _, p in prediction.top], abs=1e-6)
    assert found[-1]["path"] == "zero.jpg"
    assert found[-1]["error"] == "is empty (0 bytes)"


def test_what_was_stopped_goes_on_without_doing_work_twice(run, photos, tmp_path, monkeypatch):
    def stop(done, total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(Stopped, match="stopped after 8 of 20 images"):
        predict(run, photos, tmp_path / "out", progress=stop)
    (tmp_path / "out" / ".part-000002.parquet.x.tmp").write_bytes(b"half")
    before = parts(tmp_path / "out")
    assert len(before) == 2
    predicted = []
    predict_shard = module.predict_shard
    monkeypatch.setattr(module, "predict_shard", lambda *a: predicted.append(a[1]) or predict_shard(*a))
    done = predict(run, photos, tmp_path / "out")
    assert (done.images, done.failed, done.predicted) == (20, 1, 12)
    assert [str(shard).split()[0] for shard in predicted] == [
        "robin/008.jpg",
        "robin/012.jpg",
        "robin/016.jpg",
    ]
    assert before.items() <= parts(tmp_path / "out").items()
    assert not list((tmp_path / "out").glob(".*"))
    predict(run, photos, tmp_path / "whole")
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_a_kill_leaves_whole_parts_to_go_on_from(run, photos, tmp_path):
    script = Path(__file__).with_name("killed_prediction.py")
    killed = subprocess.run([sys.executable, script, run, photos, tmp_path / "out", "12"], check=False)
    assert killed.returncode == -signal.SIGKILL
    before = parts(tmp_path / "out")
    assert len(before) == 3
    assert predict(run, photos, tmp_path / "out").predicted == 8
    assert before.items() <= parts(tmp_path / "out").items()
    predict(run, photos, tmp_path / "whole")
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(run, photos, tmp_path, monkeypatch):
    predict(run, photos, tmp_path)
    before = parts(tmp_path)
    monkeypatch.setattr(Predictor, "load", None)
    done = predict(run, photos, tmp_path)
    assert (done.images, done.failed, done.predicted) == (20, 1, 0)
    assert parts(tmp_path) == before


def test_the_manifest_says_what_the_predictions_are_of(run, photos, tmp_path):
    predict(run, photos, tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert (manifest["run"], manifest["source"]) == (str(run), str(photos))
    assert (manifest["images"], manifest["shards"], manifest["shard_size"], manifest["top"]) == (20, 5, 4, 1)
    assert manifest["files"] == {
        name: hashlib.sha256((run / name).read_bytes()).hexdigest()
        for name in ("model.json", "model.safetensors")
    }


def test_a_folder_of_an_earlier_version_is_continued(run, photos, tmp_path):
    predict(run, photos, tmp_path)
    path = tmp_path / MANIFEST
    old = json.loads(path.read_text())
    for key in ("files", "flip", "crops"):
        del old[key]
    path.write_text(json.dumps({**old, "crossx": "0.1.0"}))
    (tmp_path / "part-000001.parquet").unlink()
    assert predict(run, photos, tmp_path).predicted == 4


def test_another_call_is_refused(run, photos, tmp_path):
    predict(run, photos, tmp_path / "out")
    before = parts(tmp_path / "out")
    other_photos = shutil.copytree(photos, tmp_path / "photos")
    (other_photos / "zero.jpg").unlink()
    other_run = shutil.copytree(run, tmp_path / "run")
    spec = json.loads((run / "model.json").read_text())
    (other_run / "model.json").write_text(json.dumps({**spec, "classes": ["a", "b", "c"]}))
    for call, message in (
        ((run, other_photos, {}), "another collection"),
        ((other_run, photos, {}), "other weights"),
        ((run, photos, {"top": 2}), "another --top"),
        ((run, photos, {"shard_size": 5}), "another --shard_size"),
    ):
        found = refusal(predict, *call[:2], tmp_path / "out", **call[2])
        assert f"was started with {message}" in found
    assert parts(tmp_path / "out") == before


def test_a_folder_in_which_nothing_is_finished_takes_other_options(run, photos, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(Stopped, match="after 0 of 20"):
        predict(run, photos, tmp_path, progress=stop)
    assert predict(run, photos, tmp_path, top=2).predicted == 20


def test_folders_that_cannot_take_predictions_are_refused(run, photos, tmp_path):
    (tmp_path / "file").touch()
    for output, message in (
        (run, "holds other files (model.json)"),
        (tmp_path / "file", "there is a file where a folder is needed"),
        (tmp_path / "file" / "out", "there is a file where a folder is needed"),
        (photos / "out", "is inside the collection"),
        (photos, "is inside the collection"),
        (Path("/proc/out"), "cannot be written"),
    ):
        assert message in refusal(predict, run, photos, output)


def test_two_processes_do_not_share_a_folder(run, photos, tmp_path):
    with locked_folder(tmp_path, "predicting into it"):
        assert "another process is predicting into it" in refusal(predict, run, photos, tmp_path)
    assert predict(run, photos, tmp_path).predicted == 20
    assert not (tmp_path / ".lock").exists()


def test_engines_and_their_options(run, photos, tmp_path):
    with pytest.raises(UsageError, match="unknown engine 'rai'"):
        predict(run, photos, tmp_path, engine="rai")
    with pytest.raises(UsageError, match="--workers requires --engine ray"):
        predict(run, photos, tmp_path, workers=2)
    with pytest.raises(CrossXError, match="no such run folder"):
        predict("nowhere", photos, tmp_path)
    assert not list(tmp_path.iterdir())
