"""Which packages a verb imports that it does not need: each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

import layouts
from crossx.cli.main import main

UNNEEDED = {
    "matplotlib", "scipy", "sklearn", "pandas", "pyarrow", "lightning", "torchmetrics", "fastapi", "uvicorn",
    "onnxruntime", "openvino", "ray", "tensorboard", "transformers", "optuna", "datasets", "webdataset",
}  # fmt: skip
CODE = """
import sys
from crossx.cli.main import main
code = main(sys.argv[1:])
print("imported", *{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
sys.exit(code)
"""
CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("imports")
    layouts.write_folder(place / "images", split_folders=True)
    layouts.write_run(place / "run", sorted(layouts.FOLDERS))
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (("predict", "run", "images/test", *CPU), set()),
        (("predict", "run", "images/test", "--output", "a.csv", *CPU), set()),
        (("predict", "run", "images/test", "--output", "a.parquet", *CPU), {"pyarrow", "pandas"}),
        # the picture of the confusion matrix
        (("test", "run", "--data.root", "images", "--data.num_workers", "0", *CPU), {"matplotlib"}),
        (("export", "run", "--output", "a.safetensors", "--images", "images/test"), set()),
        (("explain", "run", "images/test", "--output", "maps", *CPU), {"matplotlib"}),
    ],
    ids=lambda part: "-".join(part) if isinstance(part, tuple) else "",
)
def test_a_verb_imports_what_it_needs(place: Path, words: tuple[str, ...], needed: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    imported = {*done.stderr.splitlines()[-1].split()}
    assert imported & UNNEEDED <= needed
    assert "torch" in imported


@pytest.mark.parametrize(
    "words", [("predict", "damaged", "images/test"), ("test", "damaged"), ("serve", "damaged")]
)
def test_a_damaged_description_is_found_without_torch(tmp_path: Path, words: tuple[str, ...]) -> None:
    layouts.write_folder(tmp_path / "images", split_folders=True)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/model.json").write_text("{")
    (tmp_path / "damaged/model.safetensors").touch()
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "damaged/model.json: not valid JSON" in " ".join(done.stderr.split())
    assert "torch" not in done.stderr.splitlines()[-1].split()


@pytest.mark.parametrize(
    "words",
    [
        ("fit", "--config", "finetune", "--data.root", "images", "--output"),
        ("tune", "--config", "finetune", "--data.root", "images", "--output"),
        ("ablate", "--suite", "heads", "--config", "quickstart", "--output"),
        ("explain", "run", "images", "--output"),
        ("share", "run", "--output"),
        ("export", "run", "--output"),
        ("datasets", "audit", "folder", "images", "--output"),
    ],
    ids=lambda words: words[0],
)
def test_a_file_in_the_place_of_the_output_is_found_without_torch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    layouts.write_folder(tmp_path / "images", classes=2, images_per_class=2)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    # where torch is imported
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main([*words, "file/deeper/a.onnx"]) == 1
    line = " ".join(capsys.readouterr().err.split())
    assert "there is a file where a folder is needed. Choose another --output." in line
    assert Path("file").read_bytes() == b""
