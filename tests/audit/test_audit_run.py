"""The whole audit, on drawn photographs with known defects."""

import csv
import itertools
import json
import re
import shlex
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

pytest.importorskip("cleanlab")
pytest.importorskip("cleanvision")

from crossx.audit.page import render
from crossx.audit.result import Audit, DuplicateGroup
from crossx.audit.run import audit_dataset
from crossx.cli.main import main
from crossx.data.catalog import read_configured
from crossx.data.config import DataConfig
from crossx.errors import CrossXError
from photographs import photograph, product

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("my audit")


@pytest.fixture(scope="module")
def audit(photographs: Path, backbone: str, output: Path) -> Audit:
    return audit_dataset("folder", photographs, output=output, backbone=backbone)


def rows(output: Path) -> dict[str, tuple[str, str]]:
    with (output / "exclude.csv").open(newline="") as file:
        return {row["path"]: (row["reason"], row["detail"]) for row in csv.DictReader(file)}


def test_copies_are_found_and_the_one_to_test_on_is_kept(audit: Audit) -> None:
    groups = {frozenset(audit.paths[number] for number in group.images): group for group in audit.groups}
    leak = groups[frozenset({"train/red/00.png", "test/red/cropped.jpg"})]
    same = groups[frozenset({"train/red/01.png", "train/red/same.png"})]
    conflict = groups[frozenset({"train/red/02.png", "train/blue/mirrored.png"})]
    assert len(groups) == 3
    assert [audit.paths[number] for number in leak.kept] == ["test/red/cropped.jpg"]
    assert (leak.leak, same.leak, same.identical, conflict.conflict, conflict.kept) == (
        True, False, True, True, (),
    )  # fmt: skip


def test_the_list_of_images_to_leave_out_is_taken_by_fit(
    audit: Audit, output: Path, photographs: Path
) -> None:
    listed = rows(output)
    assert listed["train/red/00.png"][0] == "leak"
    assert listed["train/red/same.png"][0] == "duplicate"
    assert listed["train/blue/broken.jpg"][0] == "unreadable"
    assert {"train/red/02.png", "train/blue/mirrored.png"} <= listed.keys()
    assert "test/red/cropped.jpg" not in listed
    (command,) = re.findall("<pre>(crossx fit .*)</pre>", (output / "report.html").read_text())
    options = ["--data.dataset", "folder", "--data.root", str(photographs)]
    options += ["--data.exclude", str(output / "exclude.csv")]
    assert shlex.split(unescape(command)) == ["crossx", "fit", *options, "..."]
    index = read_configured(DataConfig(root=str(photographs), exclude=str(output / "exclude.csv")))
    assert {record.path.relative_to(photographs).as_posix() for record in index.excluded} == listed.keys()


def test_photographs_of_products_that_look_alike_are_shown_and_kept(backbone: str, tmp_path: Path) -> None:
    root = tmp_path / "products"
    for kind, shot in itertools.product(range(3), range(8)):
        folder = root / ("test" if shot > 5 else "train") / f"product {kind}"
        folder.mkdir(parents=True, exist_ok=True)
        product(kind, shot).save(folder / f"{shot}.png")
    found = audit_dataset("folder", root, output=tmp_path / "audit", backbone=backbone, checks=["duplicates"])
    assert (found.copies, len(found.duplicates.alike), found.alike_across_splits) == (0, 3, 3)
    assert found.alike > 18
    assert f"{found.alike} images look alike" in found.summary()
    assert not rows(tmp_path / "audit")
    page = (tmp_path / "audit/report.html").read_text()
    assert f"{found.alike} images in 3 groups" in page
    assert "3 groups with images in several splits" in page
    reasons = replace(found, reasons=("alike",)).excluded
    # all but one image of each product
    assert len(reasons) == found.alike - 3
    assert {reason for _, reason, _ in reasons} == {"alike"}


def test_a_large_group_shows_and_names_its_other_labels_and_splits(audit: Audit) -> None:
    numbers = {path: number for number, path in enumerate(audit.paths)}
    red = [f"train/red/{number:02d}.png" for number in range(12) if number % 4 != 3]
    other, tested = "train/blue/00.png", "test/red/03.png"
    images = tuple(numbers[path] for path in (*red, other, tested))
    group = DuplicateGroup(images, kept=(), identical=False, correlation=0.9, leak=True, conflict=True)
    changed = replace(audit, groups=(group,), labels=(), outliers=(), quality={})
    (shown,) = re.findall('<div class="group">(.*?)</div>', render(changed, lambda *_: None), re.DOTALL)
    assert {other, tested} <= set(re.findall('alt="(.*?)"', shown))
    reasons = {path: detail for path, _, detail in changed.excluded}
    assert reasons[red[0]] == f"same picture as {other} (train), which is labelled blue"


def test_poor_images_are_named(audit: Audit, output: Path) -> None:
    dark = [audit.paths[number] for number, _ in audit.quality["dark"]]
    assert dark == ["train/blue/dark.png"]
    written = json.loads((output / "audit.json").read_text())
    assert written == json.loads(json.dumps(audit.to_json()))
    assert [row["path"] for row in written["quality"]["dark"]] == dark
    assert written["unreadable"][0]["path"] == "train/blue/broken.jpg"
    assert {row["class"]: row["test"] for row in written["classes"]} == {"blue": 6, "red": 7}


def test_the_page_is_self_contained(audit: Audit, output: Path) -> None:
    page = (output / "report.html").read_text()
    assert not re.search(r">1 images|score -0\.00", page)
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/webp") > 6
    assert "in several splits" in page


def test_a_second_audit_takes_the_embeddings_and_finds_the_same(
    audit: Audit, photographs: Path, backbone: str, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossx.predict.predictor import Predictor

    monkeypatch.setattr(Predictor, "iter_image_features", lambda *_: iter(()))
    before = {file.name: file.read_bytes() for file in output.iterdir() if file.suffix != ".npz"}
    again = audit_dataset("folder", photographs, output=output, backbone=backbone)
    assert again == audit
    assert {file.name: file.read_bytes() for file in output.iterdir() if file.suffix != ".npz"} == before


def test_the_command_prints_a_summary(
    photographs: Path, backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output", str(tmp_path / "out"), "--backbone", backbone, "--checks", "duplicates"]
    assert main(["datasets", "audit", "folder", str(photographs), *words]) == 0
    printed = capsys.readouterr().out
    assert "3 copies in 3 groups, 1 of them in several splits (leakage), 1 under several labels" in printed
    assert printed.count("not checked") == 3
    assert "probable label error" not in printed
    page = (tmp_path / "out/report.html").read_text()
    assert "Not checked." in page
    assert "<dt>copies</dt>" in page
    assert "<dt>outliers</dt>" not in page


@pytest.mark.parametrize(("classes", "each"), [(2, 2), (3, 1)])
def test_tiny_datasets_are_audited(classes: int, each: int, backbone: str, tmp_path: Path) -> None:
    for label in range(classes):
        (tmp_path / f"data/train/c{label}").mkdir(parents=True)
        for number in range(each):
            photograph(10 * label + number).save(tmp_path / f"data/train/c{label}/{number}.png")
    found = audit_dataset("folder", tmp_path / "data", output=tmp_path / "out", backbone=backbone)
    assert (found.groups, found.labels, found.outliers) == ((), (), ())
    assert "exclude.csv</code> lists no image" in (tmp_path / "out/report.html").read_text()


def test_classes_without_training_images_are_named(backbone: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "train/<nothing>").mkdir(parents=True)
    for number, name in enumerate(["train/a/0", "train/a/1", "train/b/0", "test/a/2", "test/late/0"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        photograph(number).save(root / f"{name}.png")
    found = audit_dataset("folder", root, output=tmp_path / "out", backbone=backbone)
    assert found.untrained == ("<nothing>", "late")
    assert "classes      2 classes without training images: '<nothing>', 'late'" in found.summary()
    counts = {row["class"]: (row["train"], row["test"]) for row in found.to_json()["classes"]}
    assert counts == {"<nothing>": (0, 0), "a": (2, 1), "b": (1, 0), "late": (0, 1)}
    assert "training refuses: &lt;nothing&gt;, late." in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(
    ("each", "sizes"),
    [
        ((1, 1), "1 training image in each"),
        ((2, 3), "2 training images in the smallest, 3 training images in the largest"),
    ],
)
def test_the_sizes_of_classes_are_named(
    each: tuple[int, int], sizes: str, backbone: str, tmp_path: Path
) -> None:
    for label, count in enumerate(each):
        (tmp_path / f"data/train/c{label}").mkdir(parents=True)
        for number in range(count):
            photograph(10 * label + number).save(tmp_path / f"data/train/c{label}/{number}.png")
    found = audit_dataset("folder", tmp_path / "data", backbone=backbone, checks=["outliers"])
    assert found.summary().splitlines()[-1] == f"  classes      {sizes}"


def test_predictions_of_training_images_are_said_not_to_be_out_of_fold(
    photographs: Path, tmp_path: Path
) -> None:
    import layouts

    root = tmp_path / "data"
    shutil.copytree(photographs, root)
    run = layouts.write_run(tmp_path / "run", classes=("blue", "red"))
    (run / "run.json").write_text(
        json.dumps({"data_root": str(root), "data": {"dataset": "folder", "val_fraction": 0.0}})
    )
    found = audit_dataset("folder", root, run=run, output=tmp_path / "out", checks=["labels"])
    trained = {found.paths[number] for number in found.trained_on}
    assert {path for path in found.paths if path.startswith("train/")} == trained
    issues = found.to_json()["labels"]["issues"]
    assert all(issue["out_of_fold"] == issue["path"].startswith("test/") for issue in issues)
    # a network that learned every wrong label by heart finds no error
    none_found = replace(found, labels=())
    said = f"0 probable label errors; most errors are missed among the {len(trained)} images that the run was"
    assert f"{said} trained on" in none_found.summary()
    assert none_found.to_json()["labels"]["trained_on"] == len(trained)
    assert f"trained on {len(trained)} of the {len(found.paths)} images" in render(
        none_found, lambda done, total: None
    )
    assert "trained on" not in replace(none_found, checks=("duplicates",)).summary()
    shutil.copytree(root, tmp_path / "copied")
    copied = audit_dataset("folder", tmp_path / "copied", run=run, checks=["labels"])
    assert copied.trained_on == found.trained_on
    other = layouts.write_run(tmp_path / "other", classes=("green", "red"))
    with pytest.raises(CrossXError, match="other classes than the run"):
        audit_dataset("folder", root, run=other)
