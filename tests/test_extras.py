"""What crossx can do without the packages of its extras, and what it says where it needs one."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import layouts
from crossx.data.readers.table import read_table
from crossx.extras import is_installed, require
from crossx.predict.collection import predict_collection
from crossx.predict.outputs import check_output
from install_size import installed_by
from refusals import refusal

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# a finder in place of all others, for which blocked packages are not there
BLOCKED = """
import json, os, sys

class Finder:
    names = set(json.loads(os.environ["BLOCKED"]))
    finders = [*sys.meta_path]

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.names:
            specs = (finder.find_spec(name, path, target) for finder in self.finders)
            return next((spec for spec in specs if spec is not None), None)

    def find_distributions(self, *context):
        for finder in self.finders:
            yield from getattr(finder, "find_distributions", lambda *_: ())(*context)

    def invalidate_caches(self):
        for finder in self.finders:
            getattr(finder, "invalidate_caches", lambda: None)()

sys.meta_path[:] = [Finder()]
"""
RUN = BLOCKED + "from crossx.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
TRAINING = (
    "lightning", "lightning_fabric", "pytorch_lightning", "lightning_utilities", "torchmetrics", "scipy",
)  # fmt: skip
"""Packages of the base that only training and testing use."""


def outside_of_the_base() -> list[str]:
    """Return the modules of installed distributions that the base does not install."""
    base = {*installed_by(PROJECT)}
    tools = {"pip", "setuptools", "crossx", "pytest"}
    modules = metadata.packages_distributions()
    return sorted(
        module
        for module, distributions in modules.items()
        if not {canonicalize_name(name) for name in distributions} & (base | tools)
    )


def command(
    words: Sequence[str | Path], folder: Path, blocked: Sequence[str], code: str = RUN
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=folder, env={**os.environ, "BLOCKED": json.dumps(blocked)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)


def test_require_names_what_is_missing() -> None:
    require("this", "json", "sys", extra="parquet")
    message = refusal(require, "this", "json", "no_such_one", "no.such.other", extra="parquet")
    assert message == "this needs no_such_one, no.such.other: pip install 'crossx[parquet]'."


@pytest.mark.usefixtures("without_pyarrow")
def test_parquet_files_are_refused_before_any_work(tmp_path: Path) -> None:
    assert not is_installed("pyarrow")
    hint = "needs pyarrow: pip install 'crossx[parquet]'."
    table = tmp_path / "birds.parquet"
    table.write_bytes(b"PAR1")
    assert refusal(read_table, table) == f"{table}: a Parquet file {hint}"
    output = tmp_path / "predictions.parquet"
    assert refusal(check_output, output, [".parquet"]) == f"{output}: a Parquet file {hint}"
    message = refusal(predict_collection, tmp_path / "run", tmp_path, tmp_path / "predictions")
    assert message == f"a folder of predictions {hint}"
    assert os.listdir(tmp_path) == [table.name]


def test_the_base_has_neither_parquet_nor_tensorboard() -> None:
    needed = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert {"torch", "lightning", "timm"} <= needed
    assert not {"pyarrow", "tensorboard", "fastapi", "onnx", "ray"} & needed


@pytest.mark.slow
def test_the_base_trains_tests_and_predicts(tmp_path: Path) -> None:
    """Without any package that the base does not install, the verbs of README's first page work."""
    blocked = outside_of_the_base()
    assert {"pyarrow", "tensorboard", "fastapi"} <= {*blocked}
    layouts.write_folder(tmp_path / "images", split_folders=True)
    fit = (
        "fit", "--config", "finetune", "--data.root", "images", "--output", "run", "--model.backbone", "test_resnet",
        "--model.pretrained", "false", "--data.image_size", "64", "--data.num_workers", "0",
        "--trainer.max_epochs", "1",
        "--trainer.accelerator", "cpu",
    )  # fmt: skip
    for words in (
        fit,
        ("test", "run"),
        ("report", "run"),
        ("predict", "run", "images/test", "--output", "a.csv"),
        ("new-method", "mine"),
    ):
        done = command(words, tmp_path, blocked)
        assert done.returncode == 0, (words, done.stderr)
    assert not (tmp_path / "run" / "tensorboard").exists()
    for words, extra in (
        ((*fit[:-4], "--trainer.logger", "tensorboard", "--output", "other"), "tensorboard"),
        (("predict", "run", "images/test", "--output", "a.parquet"), "parquet"),
        (("predict", "run", "images/test", "--features", "b.parquet"), "parquet"),
        (("predict", "run", "images/test", "--output", "folder"), "parquet"),
        (("serve", "run"), "serve"),
        (("export", "run", "--output", "a.onnx"), "export"),
    ):
        done = command(words, tmp_path, blocked)
        assert done.returncode == 2, (words, done.stderr)
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1, (words, done.stderr)
        assert lines[0].endswith(f"pip install 'crossx[{extra}]'.")


@pytest.mark.slow
def test_predict_and_serve_need_no_training_packages(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="needs crossx[serve]")
    layouts.write_folder(tmp_path / "images", split_folders=True)
    layouts.write_run(tmp_path / "run", sorted(layouts.FOLDERS))
    done = command(("predict", "run", "images/test", "--output", "a.csv"), tmp_path, TRAINING)
    assert done.returncode == 0, done.stderr
    code = """
from fastapi.testclient import TestClient
from crossx.predict.predictor import Predictor
from crossx.serve.app import create_app

image = next(iter(sorted(__import__("pathlib").Path("images/test").rglob("*.jpg"))))
with TestClient(create_app(Predictor.load("run", device="cpu"))) as client:
    answer = client.post("/predict", files={"images": image.open("rb")})
print(answer.status_code, answer.json())
sys.exit(answer.status_code != 200)
"""
    done = command((), tmp_path, TRAINING, BLOCKED + code)
    assert done.returncode == 0, (done.stdout, done.stderr)
