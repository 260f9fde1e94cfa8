"""``crossx neighbors RUN IMAGES...``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from crossx.cli.options import BatchSize, Device, RunPath, check_run
from crossx.cli.values import Folder, Positive
from crossx.errors import UsageError, counted
from crossx.terminal import step

if TYPE_CHECKING:
    from crossx.predict.neighbors import NeighborIndex
    from crossx.predict.predictor import Predictor

FILES = (".csv", ".jsonl")
COLUMNS = ("path", "rank", "neighbor", "label", "similarity", "error")


@dataclass(frozen=True)
class TrainingData:
    """Training images.

    Attributes:
        root: The training images' folder (default: as in training).
    """

    root: Folder | None = None


def neighbors(
    run: RunPath,
    images: Sequence[Annotated[str, "IMAGES"]],
    *,
    output: Annotated[str, "FILE"] | None = None,
    top: Annotated[Positive, "K"] = 5,
    approximate: bool = False,
    data: TrainingData,
    batch_size: BatchSize = 16,
    device: Device = "auto",
) -> int:
    """Find the training images most similar to given images.

    The images are compared by the cosine of the run's features. Those of the training images are computed once and
    kept in the run folder (neighbors.npz); images that have changed since, and all after further training, are computed
    again.

    The table has the columns path, rank, neighbor (relative to the folder of the training images), label, similarity
    and error. An image that cannot be read has one row, with the reason, and the exit code is 1.

    Args:
        images: Image files, folders, patterns, tables or lists, as for `crossx predict`.
        output: File to write, ending in .csv or .jsonl (default: print CSV).
        top: Neighbours per image.
        approximate: Search with usearch, which is faster with very many training images and may miss a neighbour
            (needs crossx[neighbors]; above a million images it is always used).

    Examples:
        crossx neighbors runs/mine bird.jpg
        crossx neighbors runs/mine photos/ --top 10 --output neighbors.csv
        crossx neighbors runs/mine bird.jpg --data.root /other/place/images
    """
    target = None if output is None else Path(output)
    if target is not None:
        if target.suffix.lower() not in FILES:
            raise UsageError(f"--output {output}: a table of neighbours ends in {' or '.join(FILES)}.")
        from crossx.runs import check_output_file

        check_output_file(target)
    from crossx.predict.inputs import expand_paths

    files = expand_paths(images)
    check_run(run)

    with step("Loading PyTorch"):
        from crossx.evaluation.tables import write_table
        from crossx.predict.outputs import utf8
        from crossx.predict.predictor import Predictor
        from crossx.runs import write_text
        from crossx.runs.spreadsheet import write_rows

    with step("Loading the network"):
        predictor = Predictor.load(run, device)
    index = open_index(predictor, root=data.root, approximate=approximate or None, batch_size=batch_size)
    rows: list[dict[str, object]] = []
    failed = 0
    for found in index.find(files, top, batch_size):
        failed += found.error is not None
        if found.error is not None:
            rows.append({"path": utf8(str(found.path)), "error": found.error})
        rows += [
            {
                "path": utf8(str(found.path)),
                "rank": rank,
                "neighbor": utf8(neighbor.name),
                "label": neighbor.label,
                "similarity": round(neighbor.similarity, 4),
            }
            for rank, neighbor in enumerate(found.neighbors, start=1)
        ]
    table = [[row.get(name) for name in COLUMNS] for row in rows]
    if target is None:
        write_rows(sys.stdout, [COLUMNS, *table])
    else:
        if target.suffix.lower() == ".csv":
            write_table(target, COLUMNS, table)
        else:
            write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{counted(len(files), 'image')}, {failed} failed: {target}")
    if failed:
        sys.stdout.flush()
        print(
            f"crossx neighbors: {failed} of {counted(len(files), 'image')} cannot be read: see the column error.",
            file=sys.stderr,
        )
    return 1 if failed else 0


def open_index(predictor: Predictor, **options: Any) -> NeighborIndex:
    """Open the index of a run with a progress bar; options as for ``NeighborIndex.open``."""
    from crossx.evaluation.progress import images_bar
    from crossx.predict.neighbors import NeighborIndex

    with images_bar("Reading the training images") as (bar, task):
        return NeighborIndex.open(
            predictor,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **options,
        )
