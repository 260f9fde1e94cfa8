"""``crossx report RUN``."""

from __future__ import annotations

from typing import Annotated

from crossx.cli.options import Device, RunPath, Split, TestedData, check_run
from crossx.cli.test import is_tested, print_results, test_run
from crossx.terminal import step


def report(
    run: RunPath,
    *,
    output: Annotated[str, "FILE.html"] | None = None,
    split: Split = "test",
    data: TestedData,
    device: Device = "auto",
) -> None:
    """Write one HTML page about a trained network.

    The page shows training curves, accuracies with intervals, calibration, the worst and best classes, confusions, and
    images with what the network's parts look at. It needs no network connection and no other file. A run that was not
    tested yet is tested first.

    Args:
        output: The page (default: RUN/SPLIT/report.html).

    Examples:
        crossx report runs/mine
        crossx report runs/mine --output mine.html
        crossx report runs/mine --split val --data.root /other/place/CUB_200_2011
    """
    check_run(run)

    with step("Loading the results"):
        from crossx.report.run import report_path, report_run

    report_path(run, split, output)
    if not is_tested(run, split, data):
        print_results(run, test_run(run, split, data, device))
    with step("Writing the report"):
        page = report_run(run, split=split, output=output, device=device)
    print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB)")
