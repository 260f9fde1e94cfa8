import pickle
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import layouts
from crossx.errors import UsageError
from crossx.methods.weights import load_method
from crossx.predict import cluster
from crossx.predict.attempt_counter import AttemptCounter
from crossx.predict.cluster import Worker, divide_cluster
from crossx.predict.collection import predict_collection
from crossx.predict.shards import find_collection
from refusals import refusal


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return layouts.write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    layouts.write_folder(root, classes=2, images_per_class=8)
    (root / "zero.jpg").touch()
    return root


@pytest.fixture(scope="module")
def ray_session():
    """Start Ray once for the tests of this file."""
    pytest.importorskip("ray", reason="needs crossx[ray]")
    with cluster.ray_session():
        yield


def rows(output):
    return pq.read_table(output).to_pylist()


@pytest.mark.parametrize(
    ("nodes", "workers", "shards", "on_gpu", "expected"),
    [
        ([{"CPU": 2}], None, 9, False, (1, 2)),
        ([{"CPU": 16}], None, 99, False, (4, 4)),
        ([{"CPU": 16}, {"CPU": 6}], None, 99, False, (5, 4)),
        ([{"CPU": 16}], None, 2, False, (2, 8)),
        ([{"CPU": 2}], 2, 9, False, (2, 1)),
        ([{"CPU": 5}, {"CPU": 5}], 3, 9, False, (3, 2)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 64}], None, 9, True, (2, 4)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 64, "GPU": 1}], 3, 9, True, (3, 4)),
        ([{"CPU": 8, "GPU": 2}], 1, 9, True, (1, 8)),
    ],
)
def test_a_cluster_is_shared_so_that_all_workers_fit(nodes, workers, shards, on_gpu, expected):
    assert divide_cluster(nodes, workers, shards, on_gpu=on_gpu) == expected


def test_more_workers_than_room_are_refused():
    assert refusal(divide_cluster, [{"CPU": 2}], 3, 9, on_gpu=False).startswith(
        "--workers 3: Ray has 2 CPU cores."
    )
    assert refusal(divide_cluster, [{"CPU": 2}], None, 9, on_gpu=True).startswith("Ray has no GPUs.")
    assert refusal(divide_cluster, [{"CPU": 1, "GPU": 4}], 2, 9, on_gpu=True).startswith(
        "--workers 2: Ray has 1 GPUs."
    )


def test_attempts_are_counted_by_shard():
    attempts = AttemptCounter()
    assert [attempts.begin(number) for number in (3, 3, 5, 3)] == [1, 2, 1, 3]


def test_ray_is_an_extra(run, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'crossx\[ray\]'"):
        predict_collection(run, photos, tmp_path, engine="ray")
    with pytest.raises(UsageError, match="Ray gives each worker its GPU"):
        predict_collection(run, photos, tmp_path, engine="ray", device="cuda:1")


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_refused_at_once(run, photos, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs crossx[ray]")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    message = refusal(predict_collection, run, photos, tmp_path, engine="ray")
    assert message.startswith("Ray cannot be joined at RAY_ADDRESS=127.0.0.1:1 (")


@pytest.mark.slow
def test_two_workers_predict_what_one_process_does(ray_session, run, photos, tmp_path):
    options = {"shard_size": 4, "top": 2, "device": "cpu"}
    local = predict_collection(run, photos, tmp_path / "local", **options)
    done = predict_collection(run, photos, tmp_path / "ray", engine="ray", workers=2, **options)
    assert (done.images, done.failed, done.predicted) == (local.images, local.failed, 17) == (17, 1, 17)
    for here, there in zip(rows(tmp_path / "local"), rows(tmp_path / "ray"), strict=True):
        assert here.pop("probability") == pytest.approx(there.pop("probability"), abs=1e-6)
        assert here == there


@pytest.mark.slow
def test_a_workers_error_is_an_answer(ray_session, run, photos):
    import ray

    method, spec = load_method(run)
    with torch.no_grad():
        next(iter(method.heads.values())).bias[0] = torch.nan
    (shard,) = find_collection(photos, 100).shards
    batch = pa.table({"number": [7], "shard": [pickle.dumps(shard)]})
    attempts = ray.remote(AttemptCounter).options(num_cpus=0).remote()
    worker = Worker(spec, [ray.put(method.state_dict())], attempts, "cpu", 1, 16, {})
    damaged = {
        "number": 7,
        "part": None,
        "error": "the network's output is not finite: its weights are damaged.",
    }
    for _ in range(cluster.MAX_ATTEMPTS):
        assert worker(batch).to_pylist() == [damaged]
    (answer,) = worker(batch).to_pylist()
    assert answer["error"].startswith(f"3 workers died while predicting {shard}")
