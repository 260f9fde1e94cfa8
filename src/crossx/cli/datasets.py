"""``crossx datasets list`` and ``crossx datasets check NAME ROOT``."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence

from crossx.cli.options import VerbParser, positive
from crossx.data.catalog import DATASETS, DatasetInfo
from crossx.errors import UsageError, nearest

ACTIONS = ("list", "check")


def run(arguments: Sequence[str]) -> int:
    """List what datasets there are, or check one on disk; 1 where something is wrong with it."""
    if arguments and arguments[0] == "check":
        return _check(arguments[1:])
    parser = VerbParser(
        "datasets",
        "list: where each dataset is to be had, its licence, size, checksums and known defects.\n"
        "check NAME ROOT: count what lies in ROOT, and name files that are missing, unreadable, duplicate or\n"
        "mislabelled (`crossx datasets check --help`).",
        ["crossx datasets list", "crossx datasets check cub data/CUB_200_2011"],
    )
    parser.add_argument("action", metavar="list|check", help="what to do")
    action = parser.parse(arguments).action
    if action not in ACTIONS:
        raise UsageError(
            f"unknown action {action!r}.{nearest(action, ACTIONS)} Choose from: {', '.join(ACTIONS)}."
        )
    print("\n\n".join("\n".join(_lines(info)) for info in DATASETS.values()))
    return 0


def _check(arguments: Sequence[str]) -> int:
    parser = VerbParser(
        "datasets check",
        "Count what lies in ROOT against Table 1 of the paper (a difference is a note), decode every image, and name\n"
        "files that are missing, unreadable, duplicate or mislabelled. Exit code 1 where something is wrong.",
        [
            "crossx datasets check cub data/CUB_200_2011",
            "crossx datasets check folder my_images --json > report.json",
        ],
    )
    parser.add_argument("name", metavar="NAME", help="dataset, see `crossx datasets list`")
    parser.add_argument("root", metavar="ROOT", help="its folder (`table`: the CSV or Parquet file)")
    parser.add_argument("--json", action="store_true", help="print everything found as JSON")
    parser.add_argument("--data.level", dest="level", metavar="NAME", help="as in `crossx fit`")
    parser.add_argument("--data.num_classes", dest="num_classes", type=positive, help="as in `crossx fit`")
    parser.add_argument(
        "--data.images_per_class", dest="images_per_class", type=positive, help="as in `crossx fit`"
    )
    options = parser.parse(arguments)

    from crossx.data.check import check_dataset
    from crossx.evaluation.progress import images_bar

    with images_bar("Looking at images") as (bar, task):
        report = check_dataset(
            options.name,
            options.root,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            level=options.level,
            num_classes=options.num_classes,
            images_per_class=options.images_per_class,
        )
    print(json.dumps(report.to_json(), indent=2, ensure_ascii=False) if options.json else report.summary())
    return report.exit_code


def _lines(info: DatasetInfo) -> Iterator[str]:
    yield f"{info.name}: {info.title}"
    if info.table1:
        classes, train, test = info.table1
        yield f"  contents  {classes} classes, {train:,} training and {test:,} test images"
    facts = {"home": info.homepage, "download": info.download, "licence": info.licence, "size": info.size}
    rows = [(name, value) for name, value in facts.items() if value]
    rows += [("checksum", f"{file} {checksum}") for file, checksum in info.checksums.items()]
    rows += [("defect", defect) for defect in info.defects]
    width = max(60, min(120, shutil.get_terminal_size((110, 24)).columns))
    for name, value in rows:
        yield textwrap.fill(
            value,
            width,
            initial_indent=f"  {name:<9} ",
            subsequent_indent=" " * 12,
            break_long_words=False,
            break_on_hyphens=False,
        )
