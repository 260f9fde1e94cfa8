"""The nearest training images, against a plain search."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.neighbors import NearestNeighbors

import crossx
import layouts
from crossx.cli.main import main
from crossx.errors import CrossXError, UsageError
from crossx.predict.neighbors import NeighborIndex
from crossx.predict.predictor import Predictor
from crossx.predict.search import make_index, nearest_vectors


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A run and the images that it was trained on: 12 of two classes in train, 6 in test."""
    root = layouts.write_folder(tmp_path / "images", classes=2, images_per_class=12, split_folders=True)
    run = layouts.write_run(tmp_path / "run", classes=("robin", "wren"), method="plain")
    (run / "run.json").write_text(json.dumps({"data_root": str(root), "data": {"dataset": "folder"}}))
    return tmp_path


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images per batch whose features were computed."""
    computed: list[int] = []
    features = Predictor.features

    def count(self: Predictor, images: object) -> torch.Tensor:
        computed.append(len(images))  # type: ignore[arg-type]
        return features(self, images)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "features", count)
    return computed


def test_the_nearest_are_those_of_scikit_learn(place: Path) -> None:
    predictor = crossx.load(place / "run", "cpu")
    training = sorted((place / "images/train").rglob("*.jpg"))
    queries = sorted((place / "images/test").rglob("*.jpg"))

    def vectors(files: list[Path]) -> np.ndarray:
        return np.stack([features.vector for features in predictor.iter_features(files)])

    reference = NearestNeighbors(n_neighbors=3, metric="cosine").fit(vectors(training))
    distances, places = reference.kneighbors(vectors(queries))
    found = predictor.neighbors(queries, top=3)
    for result, row, expected in zip(found, places, distances, strict=True):
        similarities = [neighbor.similarity for neighbor in result.neighbors]
        # features are kept in half precision
        np.testing.assert_allclose(similarities, 1 - expected, atol=2e-3)
        assert similarities == sorted(similarities, reverse=True)
        assert result.neighbors[0].path in {training[number] for number in row}
        for neighbor in result.neighbors:
            assert neighbor.label == neighbor.path.parent.name
            assert neighbor.path == place / "images" / neighbor.name


def test_an_image_of_the_training_is_its_own_neighbour(place: Path) -> None:
    file = place / "images/train/wren/001.jpg"
    (found,) = crossx.load(place / "run", "cpu").neighbors(file, top=1)
    assert (found.neighbors[0].path, found.neighbors[0].label) == (file, "wren")
    assert found.neighbors[0].similarity == pytest.approx(1, abs=2e-3)
    index = NeighborIndex.open(crossx.load(place / "run", "cpu"))
    assert index.nearest(1.001 * index.index._vectors[:1].numpy(), 1)[0][0].similarity == 1


@pytest.mark.slow
def test_the_index_is_kept_until_weights_or_images_change(place: Path, counted: list[int]) -> None:
    def compute() -> int:
        counted.clear()
        NeighborIndex.open(crossx.load(place / "run", "cpu"))
        return sum(counted)

    assert compute() == 12
    assert compute() == 0
    layouts.write_image(place / "images/train/robin/000.jpg", 1, 5)
    assert compute() == 1
    (place / "images/train/robin/001.jpg").unlink()
    assert compute() == 0
    weights = load_file(place / "run/model.safetensors")
    name = next(name for name in weights if name.endswith("conv1.weight"))
    save_file({**weights, name: weights[name] * 1.1}, place / "run/model.safetensors")
    assert compute() == 11
    assert compute() == 0
    (place / "run/neighbors.npz").write_bytes(b"damaged")
    assert compute() == 11


def test_an_index_that_cannot_be_written_is_read(
    place: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise CrossXError(f"{path}: cannot be written.")

    predictor = crossx.load(place / "run", "cpu")
    NeighborIndex.open(predictor)
    monkeypatch.setattr("crossx.predict.neighbors.check_output_file", refuse)
    counted.clear()
    NeighborIndex.open(predictor)
    assert (counted, caplog.text) == ([], "")
    (place / "run/neighbors.npz").unlink()
    NeighborIndex.open(predictor)
    assert sum(counted) == 12
    assert "the index is not kept" in caplog.text


def test_the_images_are_those_of_the_training(place: Path) -> None:
    def count(train_on: str = "train", **info: str) -> int:
        data = {"dataset": "folder", "train_on": train_on}
        written = {"data_root": str(place / "images"), "data": data, **info}
        (place / "run/run.json").write_text(json.dumps(written))
        return len(NeighborIndex.open(crossx.load(place / "run", "cpu")).names)

    assert count() == 12
    assert count("trainval") == 18
    # the released checkpoints were trained on everything but test
    assert count(status="imported") == 18


def test_training_images_that_cannot_be_read_are_left_out(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = crossx.load(place / "run", "cpu")
    whole = NeighborIndex.open(predictor)
    empty, gone = (place / "images" / name for name in whole.names[:2])
    empty.write_bytes(b"")
    gone.unlink()
    # a table lists an image that is gone
    gone.symlink_to("nowhere.jpg")
    index = NeighborIndex.open(predictor)
    assert list(index.names) == list(whole.names[2:])
    assert "2 training images cannot be read and are left out" in caplog.text


@pytest.mark.parametrize("shape", [(12, 3), (12,), (12, 3, 2)])
@pytest.mark.parametrize("length", [5, 32])
def test_features_that_do_not_fit_are_computed_again(place: Path, shape: tuple, length: int) -> None:
    predictor, file = crossx.load(place / "run", "cpu"), place / "run/neighbors.npz"
    before = NeighborIndex.open(predictor).index.search(
        np.eye(1, predictor.feature_size, dtype=np.float32), 3
    )
    with np.load(file) as arrays:
        kept = dict(arrays)
    np.savez(file, **kept | {"keys": kept["keys"][:, :length], "vectors": np.zeros(shape, np.float16)})
    after = NeighborIndex.open(predictor).index.search(np.eye(1, predictor.feature_size, dtype=np.float32), 3)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_unfinished_index_is_finished(place: Path) -> None:
    predictor, file = crossx.load(place / "run", "cpu"), place / "run/neighbors.npz"
    NeighborIndex.open(predictor)
    with np.load(file) as arrays:
        kept = {name: arrays[name] for name in ("network", "keys", "vectors")}
    np.savez(file, **kept)
    NeighborIndex.open(predictor)
    (place / "images").rename(place / "elsewhere")
    assert len(NeighborIndex.open(predictor).names) == 12


@pytest.mark.parametrize(
    "change",
    [
        {"labels": np.full(12, 2)},
        {"labels": np.full(12, -1)},
        {"labels": np.zeros(12)},
        {"names": np.zeros(12)},
        {"names": np.full((12, 1), "a")},
        {"vectors": np.zeros((12, 3), np.float16)},
    ],
)
def test_an_index_that_does_not_fit_is_not_used(place: Path, change: dict) -> None:
    predictor, file = crossx.load(place / "run", "cpu"), place / "run/neighbors.npz"
    NeighborIndex.open(predictor)
    with np.load(file) as arrays:
        kept = dict(arrays)
    np.savez(file, **kept | change)
    (place / "images").rename(place / "elsewhere")
    with pytest.raises(CrossXError, match="its training images cannot be read"):
        NeighborIndex.open(predictor)


def test_without_the_images_the_index_is_enough_and_without_both_it_fails(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = crossx.load(place / "run", "cpu")
    query = shutil.copy(place / "images/test/wren/003.jpg", place / "query.jpg")
    before = predictor.neighbors(query, top=4)
    (place / "images").rename(place / "elsewhere")
    after = predictor.neighbors(query, top=4)
    assert [n.name for n in after[0].neighbors] == [n.name for n in before[0].neighbors]
    assert "the training images cannot be read" in caplog.text
    assert predictor.neighbors(query, root=place / "elsewhere")[0].neighbors[0].path.is_file()
    (place / "run/neighbors.npz").unlink()
    with pytest.raises(
        CrossXError, match=r"its training images cannot be read .*Give their folder as --data.root"
    ):
        predictor.neighbors(query)


def test_a_network_without_a_run_is_refused(place: Path) -> None:
    predictor = crossx.load(place / "run", "cpu")
    alone = Predictor.from_method(predictor.method, predictor.spec, "cpu")
    with pytest.raises(UsageError, match="neighbours need a run folder"):
        alone.neighbors(place / "images/test/wren/003.jpg")


def test_equal_products_are_in_the_order_of_the_vectors() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    products, places = nearest_vectors(torch.tensor([[1.0, 0.0]]), vectors, 3)
    assert places.tolist() == [[0, 2, 3]]
    assert products.tolist() == [[1, 1, 1]]


def test_the_approximate_index_agrees_on_few_vectors() -> None:
    pytest.importorskip("usearch")
    vectors = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    exact, approximate = (make_index(vectors, chosen).search(vectors[:20], 5) for chosen in (False, True))
    assert (exact[1] == approximate[1]).mean() > 0.95
    np.testing.assert_allclose(exact[0][:, 0], approximate[0][:, 0], atol=1e-5)


def test_without_usearch_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "usearch", None)
    with pytest.raises(UsageError, match=r"pip install 'crossx\[neighbors\]'"):
        make_index(np.eye(2, dtype=np.float32), approximate=True)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_command_writes_a_table(place: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    broken = place / "broken.jpg"
    broken.write_bytes(b"nothing")
    query = place / "images/test/wren/003.jpg"
    output = place / f"out{suffix}"
    words = ["neighbors", str(place / "run"), str(query), str(broken), "--top", "2", "--device", "cpu"]
    assert main([*words, "--output", str(output)]) == 1
    assert "1 of 2 images cannot be read" in capsys.readouterr().err
    lines = output.read_text().splitlines()
    assert len(lines) == 3 + (suffix == ".csv")
    assert "wren" in lines[-3] or "robin" in lines[-3]
    assert main(words) == 1
    assert capsys.readouterr().out.startswith("path,rank,neighbor,label,similarity,error\n")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere", "{query}"], 1, "nowhere: no such run folder"),
        (["{run}", "nowhere.jpg"], 1, "nowhere.jpg: no such file"),
        (["{run}", "{query}", "--output", "out.html"], 2, "a table of neighbours ends in .csv or .jsonl"),
        (["{run}", "{query}", "--top", "0"], 2, "--top takes a whole number of at least 1"),
        (["{run}", "{query}", "--data.root", "nowhere"], 1, "its training images cannot be read"),
    ],
)
def test_wrong_words(
    place: Path,
    words: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    query = place / "images/test/wren/003.jpg"
    assert main(["neighbors", *(word.format(run=place / "run", query=query) for word in words)]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
