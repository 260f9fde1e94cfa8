"""Every wrong input of docs/errors.md through ``main``: the exit code and the line that it gives."""

import errno
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

import layouts
from crossx.cli.main import main

SMALL = shlex.split(
    "--model.method plain --model.backbone resnet10t --model.backbone_args.channels [4,8,16,32] "
    "--model.pretrained false --data.image_size 64 --data.batch_size 4 --data.num_workers 0 "
    "--trainer.max_epochs 1 --trainer.logger false --trainer.accelerator cpu"
)
OWN = ["--data.dataset", "folder", "--data.root", "own"]
CROSSX = ["--model.method", "crossx"]
MAMC = ["--model.method", "mamc"]
VIT = ["--model.backbone", "vit_tiny_patch16_224", "--model.backbone_args", "{}"]

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write ``own`` (3 classes of 6 images), ``run`` (trained on it) and what is wrong in one way each."""
    base = tmp_path_factory.mktemp("wrong")
    for label in range(3):
        for number in range(6):
            layouts.write_image(base / f"own/class {label}/{number}.jpg", label, number)
    for name in ("corrupt", "empty_class", "test_only", "another", "two_splits"):
        shutil.copytree(base / "own", base / name)
    (base / "corrupt/class 1/2.jpg").write_bytes(b"no image")
    (base / "empty_class/class 9").mkdir()
    shutil.copytree(base / "own/class 0", base / "another/class 3")
    shutil.rmtree(base / "two_splits")
    shutil.copytree(base / "own", base / "two_splits/train")
    shutil.copytree(base / "another", base / "two_splits/test")
    layouts.write_cub(base / "half_archive")
    (base / "half_archive/image_class_labels.txt").unlink()
    layouts.write_cub(base / "half_images")
    shutil.rmtree(base / "half_images/images/002.Laysan_Albatross")
    (base / "no_column.csv").write_text("path,species\na.jpg,robin\n")
    (base / "windows.csv").write_text("path,label\nC:\\birds\\1.jpg,robin\na.jpg,wren\n")
    shutil.copytree(base / "own", base / "unclear/train")
    shutil.copytree(base / "own", base / "unclear/holdout")
    (base / "no_run").mkdir()
    (base / "folder.parquet").mkdir()
    (base / "file").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        assert main(["fit", *SMALL, *OWN, "--output", "run"]) == 0
    shutil.copytree(base / "run", base / "no_weights")
    for weights in [base / "no_weights/model.safetensors", *(base / "no_weights/checkpoints").iterdir()]:
        weights.unlink()
    return base


@pytest.fixture
def refused(places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return a function that runs a command which must fail, and gives its line without ``crossx VERB: error:``."""
    monkeypatch.chdir(places)

    def run(code: int, *words: str) -> str:
        assert main(words) == code
        errors = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
        assert len(errors) == 1
        command, _, message = errors[0].partition(": error: ")
        assert command == f"crossx {words[0]}"
        assert message.endswith(".")
        return message

    return run


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (2, ["--data.dataset", "cub"], "dataset 'cub' needs --data.root: https://data.caltech.edu/"),
        (1, ["--data.dataset", "cub", "--data.root", "nowhere"], "nowhere does not exist: pass the folder"),
        (1, ["--data.dataset", "folder", "--data.root", "nowhere"], "nowhere: no such folder"),
        (
            1,
            ["--data.dataset", "cub", "--data.root", "half_archive"],
            "image_class_labels.txt is missing: check",
        ),
        (
            1,
            ["--data.dataset", "cub", "--data.root", "half_images"],
            r"4 of 12 images cannot be read: .*no such file",
        ),
        (
            1,
            ["--data.dataset", "folder", "--data.root", "corrupt"],
            r"1 of 18 images cannot be read: .*/class 1/2.jpg: ",
        ),
        (
            1,
            ["--data.dataset", "folder", "--data.root", "empty_class"],
            "empty_class: no images in class 'class 9'",
        ),
        (
            1,
            ["--data.dataset", "folder", "--data.root", "two_splits"],
            "class 'class 3' only in the test split",
        ),
        (
            1,
            ["--data.dataset", "table", "--data.root", "no_column.csv"],
            "no_column.csv: there is no column 'label'",
        ),
        (
            1,
            ["--data.dataset", "folder", "--data.root", "unclear"],
            "unclear: 'holdout' may be a validation or a test split",
        ),
        (
            1,
            ["--data.dataset", "table", "--data.root", "windows.csv"],
            "line 2: 'C:.*' is on a Windows drive",
        ),
        (2, ["--data.dataset", "table", "--data.root", "birds.xlsx"], "birds.xlsx: is a spreadsheet"),
        (2, ["--data.dataset", "foldr"], "unknown dataset 'foldr'. Did you mean 'folder'?"),
        (2, [*OWN, "--model.method", "crossy"], "unknown method 'crossy'. Did you mean 'crossx'?"),
        (
            2,
            [*OWN, "--model.backbone", "resnet10x"],
            "unknown backbone 'resnet10x'. Did you mean 'resnet10t'?",
        ),
        (2, [*OWN, "--config", "finetun"], "unknown recipe 'finetun'. Did you mean 'finetune'?"),
        (2, [*OWN, "--preset", "fst"], "unknown preset 'fst'. Did you mean 'fast'?"),
        (
            2,
            [*OWN, "--optim.cached_views", "4"],
            "optim.cached_views stores the maps of frozen layers: say which",
        ),
        (
            2,
            [*OWN, "--data.imagesize", "64"],
            "unknown option '--data.imagesize'. Did you mean '--data.image_size'?",
        ),
        (2, [*OWN, *CROSSX, "--model.num_parts", "0"], "num_parts must be at least 1, not 0"),
        (
            2,
            [*OWN, *CROSSX, "--model.gates", "competing", "--model.osme_placement", "residual"],
            "osme_placement=residual: the shortcut would bypass competing gates; use output",
        ),
        (
            2,
            [*OWN, *CROSSX, "--model.separation_weights", "[1]"],
            "separation_weights takes 2 numbers (last, previous), not 1",
        ),
        (
            2,
            [*OWN, *MAMC, "--data.sampling", "uniform"],
            "method 'mamc' needs data.sampling pairs, not uniform. Leave the option out, or give pairs",
        ),
        (
            2,
            [*OWN, *MAMC, "--data.batch_size", "5"],
            "data.batch_size must be even for data.sampling pairs, not 5",
        ),
        (2, [*OWN, "--data.image_size", "16"], "data.image_size must be at least 32, not 16"),
        (
            2,
            [*OWN, *CROSSX, "--data.image_size", "32"],
            "image_size 32 is too small for backbone 'resnet10t'",
        ),
        (
            2,
            [*OWN, "--output", "run"],
            "run already holds a run. Continue it with `crossx fit --resume run`, or",
        ),
        (2, [*OWN, *VIT], "image_size 64 does not work with backbone 'vit_tiny_patch16_224'"),
        (1, [*OWN, "--model.backbone_weights", "run/model.safetensors"], "keys .* belongs to this backbone"),
        (1, [*OWN, "--init", "nowhere"], "nowhere: no such run folder or checkpoint file"),
        (1, [*OWN, "--init", "no_run"], "no_run: not a run folder (no model.json)"),
        (1, [*OWN, "--init", "no_weights"], "no_weights: the run has no weights yet"),
        (2, [*OWN, "--init", "no_column.csv"], "no_column.csv: belongs to no run (no model.json"),
        (
            2,
            [*OWN, "--init", "run", "--model.backbone", "resnet14t"],
            "'resnet10t', and this run's is 'resnet14t'",
        ),
        (
            2,
            [*OWN, "--init", "run", "--model.backbone_args", "{}"],
            "tensors fit: its backbone_args are {'channels':",
        ),
        (
            2,
            [*OWN, "--init", "run", "--model.backbone_weights", "w"],
            "init and model.backbone_weights both say",
        ),
        (1, [*OWN, "--model.backbone_weights", "run"], "It is a model of crossx: give it as --init"),
        (2, [*OWN, "--model.backbone", "local-dir:run"], "run is a model of crossx: give it as --init"),
        (1, [*OWN, "--optim.lr", "1e30"], "the loss is not finite at step .*Lower --optim.lr"),
        (
            2,
            [*OWN, "--output", "caf\udce9"],
            "'caf\\udce9': the path is not valid UTF-8. Rename it, give a link as",
        ),
        (1, [*OWN, "--output", "file/run"], "file/run: there is a file where a folder is needed"),
    ],
)
def test_fit(code: int, words: list[str], message: str, refused: Refused) -> None:
    line = refused(code, "fit", *SMALL, *words)
    assert re.search(message, line) if ".*" in message else message in line


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (1, "test run --data.root another", "'class 3'"),
        (1, "test no_run", "no_run: not a run folder (no model.json)"),
        (1, "test no_weights", "no_weights: the run has no weights yet"),
        (1, "test nowhere", "nowhere: no such run folder or checkpoint file"),
        (2, "test run --split tets", "unknown split 'tets'"),
        (1, "test run --against no_run", "no_run: not a run folder"),
        (
            2,
            "test run --parts --against run",
            "--parts measures one run and cannot be combined with --against",
        ),
        (2, "test run --against run/checkpoints/last.ckpt", "a run folder holds the results of one network"),
        (1, "predict no_weights own", "no_weights: the run has no weights yet"),
        (1, "predict run nowhere.jpg", "nowhere.jpg: no such file or folder"),
        (1, "predict run own --output file/p.csv", "file: there is a file where a folder is needed"),
        (1, "predict run *.jpg", "*.jpg: no such file, and as a pattern it matches no image."),
        (2, "predict run own --output out.json", "a file of predictions ends in .csv, .jsonl, .parquet."),
        (2, "predict run own --features features.npy", "features.npy: must end in .parquet."),
        (
            2,
            "predict run own --features folder.parquet",
            "folder.parquet is a folder: give the name of a file.",
        ),
        (2, "predict run own --precision fp8", "unknown precision 'fp8'. Did you mean 'fp32'?"),
        (1, "calibrate run --split train", "run: was trained on its train images"),
        (2, "calibrate run/checkpoints/last.ckpt", "Give the run folder"),
        (2, "fit --resume run", "run: this run is finished"),
        (
            2,
            "fit --resume run --trainer.max_epochs 1",
            "trainer.max_epochs 1 leaves nothing to train: give more than 1",
        ),
        (2, "fit --resume run --optim.lr 1", "leave out --optim.lr"),
        (2, "fit --resume no_run", "no_run: no run to resume"),
        (1, "import-released own --dataset cub --output new", "own"),
        (
            2,
            "import-released run/model.safetensors --dataset cubs --output new",
            "unknown dataset 'cubs'. Did you mean 'cub'?",
        ),
        (
            1,
            "import-released run/model.safetensors --dataset cub --output new",
            "not a released Cross-X checkpoint",
        ),
        (2, "datasets check cubb own", "unknown dataset 'cubb'. Did you mean 'cub'?"),
        (1, "datasets check folder nowhere", "nowhere: no such folder. ROOT takes the folder that holds one"),
        (1, "datasets check cub own", "classes.txt is missing: check ROOT, or unpack the archive again."),
        (
            1,
            "datasets audit folder nowhere --output new",
            "nowhere: no such folder. ROOT takes the folder that holds",
        ),
        (
            1,
            "test run --data.root nowhere",
            "nowhere: no such folder. --data.root takes the folder that holds",
        ),
        (2, "quickstart --output run", "run is not empty: choose another --output"),
    ],
)
def test_other_verbs(code: int, words: str, message: str, refused: Refused) -> None:
    assert message in refused(code, *words.split())


def test_no_network_for_pretrained_weights(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    words = [
        "--model.pretrained",
        "true",
        "--model.backbone",
        "resnet18.a1_in1k",
        "--model.backbone_args",
        "{}",
    ]
    line = refused(1, "fit", *SMALL, *OWN, *words)
    assert "backbone 'resnet18.a1_in1k': its pretrained weights cannot be loaded" in line
    assert "--model.backbone_weights FILE" in line


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left on the disk. What was written before is intact: free some room."),
        (errno.EACCES, "no permission to write there. Choose another --output."),
    ],
)
def test_disk_that_takes_nothing(
    number: int, message: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    # the last call of each atomic write; what fails earlier gives the same OSError
    monkeypatch.setattr(os, "fsync", refuse)
    assert refused(1, "fit", *SMALL, *OWN, "--output", f"full {number}").endswith(message)
    assert refused(1, "predict", "run", "own", "--output", "p.csv") == f"p.csv: {message}"


def test_unreadable_image_keeps_its_row_and_gives_1(
    places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(places)
    assert main(["predict", "run", "corrupt/class 1", "--output", "rows.csv"]) == 1
    rows = (places / "rows.csv").read_text().splitlines()
    assert rows[0] == "path,label,probability,error"
    assert len(rows) == 7
    assert [row for row in rows if row.startswith("corrupt/class 1/2.jpg,,,")]
    assert capsys.readouterr().err == "crossx predict: 1 of 6 images cannot be read: see the column error.\n"
