"""What reads the files of a target in a folder."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from crossx.errors import CrossXError

Read = Callable[[Path], object]


def recipe(path: Path) -> object:
    from crossx.recipes import load_recipe
    from crossx.training.config import Config

    loaded = load_recipe(path / "recipe.yaml")
    loaded.to_yaml()
    return Config.from_dict(loaded.to_dict())


def fit(path: Path) -> object:
    from crossx.cli.fit_options import parse_fit

    return parse_fit(["--config", str(path / "recipe.yaml"), "--print_config"]).config.to_yaml()


def words(path: Path) -> object:
    from crossx.cli.fit_options import parse_fit

    value = (path / "value").read_bytes().replace(b"\0", b"").decode(errors="surrogateescape")
    name, _, value = value.partition("=")
    return parse_fit([f"--{name}={value}", "--print_config"]).config.to_yaml()


def config(path: Path) -> object:
    from crossx.training.config import Config

    return Config.from_yaml(path / "config.yaml").to_yaml()


def suite(path: Path) -> object:
    from crossx.ablation.suite import load_suite
    from crossx.training.config import Config

    return load_suite(path / "suite.yaml").configure(Config())


def all_of(*reads: Callable[[], object]) -> None:
    """Call all, although some refuse."""
    refusals = []
    for read in reads:
        try:
            read()
        except CrossXError as error:
            refusals.append(error)
    raise_longest(refusals)


def raise_longest(refusals: Sequence[CrossXError]) -> None:
    """Raise the refusal that has most lines, if there is one."""
    if refusals:
        raise max(refusals, key=lambda error: (len(str(error).splitlines()), len(str(error))))


def separate(read: Callable[[Path], object]) -> Read:
    """Read files that have nothing to do with each other: those that were read before are not read again."""

    @functools.lru_cache(100)
    def refusal(path: Path, content: bytes) -> CrossXError | None:
        try:
            read(path)
        except CrossXError as error:
            return error
        return None

    def read_all(folder: Path) -> None:
        found = [refusal(path, path.read_bytes()) for path in sorted(folder.iterdir()) if path.is_file()]
        raise_longest([error for error in found if error])

    return read_all


def table(name: str) -> Read:
    return lambda path: read_tables(path / name)


def read_tables(path: Path) -> None:
    from crossx.data.readers.table import read_paths, read_table

    all_of(lambda: read_paths(path), lambda: read_table(path))


def listed(path: Path) -> object:
    from crossx.predict.inputs import expand_paths

    return expand_paths([path])


def pictured(path: Path) -> None:
    from crossx.data.images import FORMATS, inspect_image, read_image, read_size
    from crossx.predict.predictor import Predictor
    from crossx.serve.limits import Limits
    from crossx.serve.uploads import Upload

    predictor = tiny_predictor(path.parent / "run", os.getpid())
    assert isinstance(predictor, Predictor)
    content = path.read_bytes()
    all_of(
        # the check of fit, in both ways, and what it reads in training
        lambda: inspect_image(path),
        lambda: inspect_image(path, full=True),
        lambda: read_size(path, min_side=16),
        lambda: read_image(path, min_side=16),
        # predict
        lambda: predictor.prepare(path),
        # the service, with all formats allowed
        lambda: predictor.prepare(Upload("x", content).check(Limits(formats=FORMATS)).data),
    )


@functools.lru_cache(1)
def tiny_predictor(run: Path, process: int) -> object:
    from crossx.predict.predictor import Predictor

    return Predictor.load(run, device="cpu")


def collection(path: Path) -> None:
    from crossx.predict.shards import find_collection

    for shard in find_collection(path, 2).shards:
        list(shard.read())


def outputs(path: Path) -> None:
    from crossx.predict.shards import count_failed

    all_of(lambda: read_tables(path), lambda: listed(path))
    if path.suffix == ".parquet":
        count_failed(path)


def embedded(path: Path) -> None:
    cache = path.parent / "cache"
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(cache)):
        try:
            all_of(lambda: read_tables(path), lambda: collection(path))
        finally:
            shutil.rmtree(cache, ignore_errors=True)


def cached(name: str) -> Read:
    """Read a dataset whose images are unpacked into the cache, with a cache of its own."""

    def read(path: Path) -> None:
        cache = path.parent / "cache"
        with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(cache)):
            try:
                archive(name)(path)
            finally:
                shutil.rmtree(cache, ignore_errors=True)

    return read


def class_table(path: Path) -> object:
    from crossx.runs import Run
    from crossx.share.model_card import CardData

    results = {"split": "test", "n": 3, "top1": 0.5, "class_mean": 0.5, "dataset": "folder"}
    nothing: Any = None
    return CardData.read(nothing, nothing, Run(path), results)


def asked(path: Path) -> None:
    from service import ask

    ask(path.parent / "run", path.read_bytes())


def archive(name: str) -> Read:
    def read(path: Path) -> object:
        from crossx.data.catalog import read_dataset

        return read_dataset(name, str(path))

    return read


def run_files(path: Path) -> object:
    from crossx.report.results import NEEDED
    from crossx.runs import Run, read_history, read_results

    run = Run(path)
    run.read_spec()
    run.read_info()
    read_history(path / "metrics.json")
    return read_results(path / "test.json", NEEDED)


def weights(path: Path) -> object:
    from crossx.backbones import read_state_dict

    for name in ("model.safetensors", "weights.pt"):
        read_state_dict(path / name)
    return None


def network(path: Path) -> object:
    from crossx.methods.weights import load_method

    return load_method(path)


def checkpoint(path: Path) -> object:
    from crossx.training.checkpoints import read_checkpoint

    return read_checkpoint(path / "last.ckpt")


def predictions(path: Path) -> object:
    from crossx.evaluation.predictions import Predictions

    return Predictions.load(path / "test_predictions.npz", path, "test")


def loadable(path: Path) -> None:
    import datasets

    with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", path.parent / "cache" / "hub"):
        cached("huggingface")(path)
