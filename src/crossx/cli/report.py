"""``crossx report RUN``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from crossx.cli.neighbors import open_index
from crossx.cli.options import Device, RunPath, Split, TestedData, check_run
from crossx.cli.test import is_tested, print_results, test_run
from crossx.cli.values import Natural
from crossx.runs import check_writable, open_run
from crossx.terminal import step

if TYPE_CHECKING:
    from crossx.report.examples import FindSimilar


def report(
    run: RunPath,
    *,
    output: Annotated[str, "FILE.html"] | None = None,
    split: Split = "test",
    neighbors: Annotated[Natural, "K"] = 0,
    data: TestedData,
    device: Device = "auto",
) -> None:
    """Write one HTML page about a trained network.

    The page shows training curves, accuracies with intervals, calibration, the worst and best classes, confusions, and
    images with what the network's parts look at. It needs no network connection and no other file. A run that was not
    tested yet is tested first.

    Args:
        output: The page (default: RUN/SPLIT/report.html).
        neighbors: Show this many training images that are most similar to the mistakes of the most confused pairs
            (their features are computed once and kept in the run).

    Examples:
        crossx report runs/mine
        crossx report runs/mine --output mine.html
        crossx report runs/mine --neighbors 5
        crossx report runs/mine --split val --data.root /other/place/CUB_200_2011
    """
    check_run(run)

    with step("Loading the results"):
        from crossx.report.results import read_records
        from crossx.report.run import report_path, report_run

    opened, tested = open_run(run)[0], is_tested(run, split, data)
    if not tested:
        # another --output would not help
        folder = opened.results_folder()
        check_writable(folder, folder / opened.info.name)
    report_path(run, split, output)
    # before a test that takes minutes
    read_records(opened, split)
    if not tested:
        print_results(run, test_run(run, split, data, device))
    find = _similar_finder(run, neighbors, data, device) if neighbors else None
    with step("Writing the report"):
        page = report_run(run, split=split, output=output, device=device, find_similar=find)
    print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB)")


def _similar_finder(run: str, top: int, data: TestedData, device: str) -> FindSimilar:
    from crossx.predict.predictor import Predictor
    from crossx.report.examples import Similar

    def find(files: Sequence[Path]) -> list[list[Similar]]:
        index = open_index(Predictor.load(run, device), root=data.root)
        return [
            [
                # a path of an index whose images are gone may be of another machine
                Similar(near.label, near.similarity, near.path if index.has_images else None)
                for near in found.neighbors
            ]
            for found in index.find(files, top)
        ]

    return find
