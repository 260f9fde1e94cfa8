"""``crossx datasets list``, ``crossx datasets check NAME ROOT`` and ``crossx datasets audit NAME ROOT``."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import jsonargparse

from crossx.audit.result import CHECKS, EXCLUDED
from crossx.cli.options import BatchSize, Device, check_folder, check_run
from crossx.cli.parser import MAX_WIDTH, build, call
from crossx.cli.values import Folder, Name, Natural, Positive
from crossx.commands import quoted
from crossx.data.catalog import DATASETS, DatasetInfo, dataset_info
from crossx.errors import UsageError
from crossx.suggestions import nearest
from crossx.terminal import fold, page_width

ACTIONS = ("list", "check", "audit")


@dataclass(frozen=True)
class DatasetOptions:
    """As in `crossx fit`.

    Attributes:
        level: FGVC-Aircraft only: label by variant, family or manufacturer.
        num_classes: Synthetic set only: number of classes.
        images_per_class: Synthetic set only: number of images per class.
        test_images_per_class: Synthetic set only: number of test images per class.
        seed: Synthetic set only: seed of the drawn classes and images.
        image_column: huggingface only: the column of the images, if there are several.
        label_column: huggingface and webdataset only: the column, or the field of a .json, with the label.
    """

    level: Name | None = None
    num_classes: Positive | None = None
    images_per_class: Positive | None = None
    test_images_per_class: Positive | None = None
    seed: Natural | None = None
    image_column: Name | None = None
    label_column: Name | None = None


def run(words: Sequence[str]) -> int:
    """Run the action that the first word names."""
    if words[:1] == ["check"]:
        return call(check, words[1:], "datasets check")
    if words[:1] == ["audit"]:
        return call(audit, words[1:], "datasets audit")
    return call(datasets, words, "datasets")


def parser(words: Sequence[str]) -> jsonargparse.ArgumentParser:
    """Return the parser for completions after these words."""
    if words[:1] == ["check"]:
        return build(check, "datasets check")
    if words[:1] == ["audit"]:
        return build(audit, "datasets audit")
    return build(datasets, "datasets")


def datasets(action: Annotated[str, "list|check|audit"]) -> None:
    """List the datasets and where to get them, or check or audit one on disk.

    list: where to download each dataset, its licence, size, checksums and known defects.

    check NAME ROOT: count the images in ROOT, and name files that are missing, unreadable, duplicated or mislabelled
    (`crossx datasets check --help`).

    audit NAME ROOT: also find near-duplicates, leakage between splits, probable label errors, outliers and poor images
    (`crossx datasets audit --help`).

    Args:
        action: What to do.

    Examples:
        crossx datasets list
        crossx datasets check cub data/CUB_200_2011
        crossx datasets audit cub data/CUB_200_2011
    """
    if action not in ACTIONS:
        raise UsageError(
            f"unknown action {action!r}.{nearest(action, ACTIONS)} Choose from: {', '.join(ACTIONS)}."
        )
    print("\n\n".join("\n".join(_describe(info)) for info in DATASETS.values()))


def check(dataset: Name, root: Annotated[str, "ROOT"], *, json: bool = False, data: DatasetOptions) -> int:
    """Check a dataset on disk.

    Compares the number of images in ROOT with Table 1 of the paper (a difference is only a note), decodes every image,
    and names files that are missing, unreadable, duplicated or mislabelled. The exit code is 1 if something is wrong.

    Args:
        dataset: Name of the dataset, see `crossx datasets list`.
        root: Its folder (`table`: the CSV or Parquet file).
        json: Print everything found as JSON.

    Examples:
        crossx datasets check cub data/CUB_200_2011
        crossx datasets check folder my_images --json > report.json
    """
    from crossx.data.check import check_dataset
    from crossx.evaluation.progress import images_bar

    with images_bar("Checking images") as (bar, task):
        report = check_dataset(
            dataset,
            root,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **vars(data),
        )
    print(
        json_format.dumps(report.to_json(), indent=2, ensure_ascii=False)
        if json
        else fold(report.summary(), hanging="    ")
    )
    return report.exit_code


def audit(
    dataset: Name,
    root: Annotated[str, "ROOT"],
    *,
    output: Folder | None = None,
    backbone: Name | None = None,
    run: Annotated[str, "RUN"] | None = None,
    checks: Sequence[Annotated[str, "CHECK"]] = CHECKS,
    exclude: Sequence[Annotated[str, "REASON"]] = EXCLUDED,
    json: bool = False,
    data: DatasetOptions,
    batch_size: BatchSize = 32,
    device: Device = "auto",
) -> None:
    """Find near-duplicates, leakage, label errors, outliers and poor images in a dataset.

    Writes a page with the pictures (report.html), everything found (audit.json) and a list of images to leave out
    (exclude.csv), which `crossx fit --data.exclude` takes. Needs crossx[audit].

    Label errors are found by confident learning on predictions of images that the classifier was not fitted on:
    logistic regression on frozen features of a pretrained backbone. With --run they come from that run, whose
    predictions of images that it was trained on are not out-of-fold, and miss most errors there.

    Args:
        dataset: Name of the dataset, see `crossx datasets list`.
        root: Its folder (`table`: the CSV or Parquet file).
        output: Folder for the results (default: audits/NAME); the embeddings are kept there for the next audit.
        backbone: Pretrained timm model, local-dir:FOLDER or hf-hub:NAME for the embeddings (default:
            resnet50.tv_in1k).
        run: Take embeddings and predictions from this run instead.
        checks: What to search for: duplicates, labels, outliers, quality.
        exclude: Reasons for which images get into exclude.csv: unreadable, leak, duplicate, label, alike, outlier,
            quality.
        json: Print everything found as JSON.

    Examples:
        crossx datasets audit cub data/CUB_200_2011
        crossx datasets audit folder my_images --output audits/mine
        crossx datasets audit folder my_images --backbone local-dir:weights/mobilenetv2_035
        crossx datasets audit folder my_images --run runs/mine --exclude leak duplicate
    """
    dataset_info(dataset)
    output = output or f"audits/{dataset}"
    check_folder(output)
    if run is not None:
        check_run(run)

    from crossx.audit.run import audit_dataset
    from crossx.evaluation.progress import images_bar

    with images_bar("Auditing") as (bar, task):
        found = audit_dataset(
            dataset,
            root,
            output=output,
            backbone=backbone,
            run=run,
            checks=checks,
            exclude=exclude,
            device=device,
            batch_size=batch_size,
            progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
            **vars(data),
        )
    if json:
        print(json_format.dumps(found.to_json(), indent=2, ensure_ascii=False))
        return
    print(fold(found.summary()))
    assert found.folder is not None
    excluded = quoted(found.folder / "exclude.csv")
    print(fold(f"report: {found.folder}/report.html"))
    print(fold(f"to leave images out: --data.exclude {excluded}"))


def _describe(info: DatasetInfo) -> Iterator[str]:
    width = min(MAX_WIDTH, page_width())
    yield fold(f"{info.name}: {info.title}", hanging="  ", width=width)
    contents = ""
    if info.table1:
        classes, train, test = info.table1
        contents = f"{classes} classes, {train:,} training and {test:,} test images"
    facts = {
        "contents": contents,
        "home": info.homepage,
        "download": info.download,
        "licence": info.licence,
        "size": info.size,
    }
    rows = [(name, value) for name, value in facts.items() if value]
    rows += [("checksum", f"{file} {checksum}") for file, checksum in info.checksums.items()]
    rows += [("defect", defect) for defect in info.defects]
    for name, value in rows:
        yield fold(f"  {name:<8}  {value}", width=width)
