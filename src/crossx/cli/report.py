"""``crossx report RUN``."""

from __future__ import annotations

from collections.abc import Sequence

from crossx.cli.options import VerbParser, add_device, add_loading, add_run
from crossx.cli.test import add_data, is_tested, print_results, test


def run(arguments: Sequence[str]) -> int:
    """Write the page of a run, testing it first where that was not done."""
    parser = VerbParser(
        "report",
        "Write one HTML page about a trained run: curves, accuracies with intervals, calibration, the worst and best\n"
        "classes, what is taken for what and what the network's parts looked at. The page needs no network and no\n"
        "other file. A run that was not tested yet is tested first.",
        [
            "crossx report runs/mine",
            "crossx report runs/mine --output mine.html",
            "crossx report runs/mine --split val --data.root /other/place/CUB_200_2011",
        ],
    )
    add_run(parser)
    parser.add_argument("--output", metavar="FILE.html", help="the page (default: RUN/SPLIT/report.html)")
    add_data(parser)
    add_loading(parser)
    add_device(parser)
    options = parser.parse(arguments)

    from crossx.report.run import report_path, report_run

    report_path(options.run, options.split, options.output)
    if not is_tested(options.run, options):
        print_results(options.run, test(options.run, options))
    page = report_run(options.run, split=options.split, output=options.output, device=options.device)
    print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0
