"""``crossx test RUN``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossx.cli.options import VerbParser, add_device, add_loading, add_run
from crossx.errors import UsageError
from crossx.evaluation.notices import result_notices
from crossx.runs import open_run, write_json


def run(arguments: Sequence[str]) -> int:
    """Test a run, or two against each other, print the numbers and where everything is written."""
    parser = VerbParser(
        "test",
        "Measure a trained network on the images of one split: accuracies with intervals, for each head and class,\n"
        "confusion matrix, calibration. With --against, the paired test of two runs on the same images; with --parts,\n"
        "what the excitations of one look at.",
        [
            "crossx test runs/mine",
            "crossx test runs/mine --data.root /other/place/CUB_200_2011 --split val",
            "crossx test runs/mine/checkpoints/last.ckpt",
            "crossx test runs/crossx --against runs/plain",
            "crossx test runs/crossx --parts",
        ],
    )
    add_run(parser)
    add_data(parser)
    parser.add_argument("--against", metavar="RUN_B", help="compare with this run, image by image")
    parser.add_argument(
        "--parts",
        action="store_true",
        help="measure the activation maps beside known parts instead (cub, nabirds, synthetic)",
    )
    add_loading(parser)
    add_device(parser)
    options = parser.parse(arguments)
    if options.parts and options.against is not None:
        raise UsageError("--parts measures one run and does not go with --against: leave one of them out.")
    if options.parts:
        _measure_parts(options)
    elif options.against is None:
        print_results(options.run, test(options.run, options))
    else:
        _compare(options)
    return 0


def add_data(parser: argparse.ArgumentParser, split: str = "test") -> None:
    """Add the options on which images are taken, those of ``split`` by default."""
    parser.add_argument(
        "--split", default=split, metavar="NAME", help=f"train, val or test (default: {split})"
    )
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="the data (default: as in training)")
    parser.add_argument(
        "--data.dataset", dest="dataset", metavar="NAME", help="the dataset (default: as in training)"
    )


def print_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """Print what ``test_run`` returned for the run at ``path``."""
    folder, split = open_run(path)[0].path, results["split"]
    low_high = results["intervals"]
    print(
        f"{results['method']} ({results['backbone']}) on {results['dataset']}, {split}: {results['n']} images, "
        f"{results['num_classes']} classes, weights {results['weights']}"
    )
    rows = {
        "top-1": _percent(results["top1"], low_high["top1"]),
        "top-5": _percent(results["top5"]),
        "class mean": _percent(results["class_mean"], low_high["class_mean"]),
    }
    for kind in ("heads", "levels"):
        if len(results[kind]) > 1 or kind == "levels":
            rows |= {
                f"{kind.removesuffix('s')} {name}": _percent(value) for name, value in results[kind].items()
            }
    rows["calibration error"] = _percent(results["ece"])
    if results["temperature"] != 1:
        calibrated = f"{_percent(results['ece_calibrated'])} at temperature {results['temperature']:.3g}"
        rows["calibration error"] += f", {calibrated}"
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")
    for notice in result_notices(results):
        print(f"  {notice}")
    print(f"results: {folder / f'{split}.json'}; tables and pictures: {folder / split}")


def print_parts(path: str | Path, results: Mapping[str, Any]) -> None:
    """Print what ``measure_run`` returned for the run at ``path``."""
    from crossx.report.part_tables import excitations, share_rows

    folder, split = open_run(path)[0].path, results["split"]
    print(
        f"{results['method']} ({results['backbone']}) on {results['dataset']}, {split}: {results['n']} images, "
        f"{len(results['parts'])} parts, weights {results['weights']}"
    )
    stages = results["stages"]
    columns = excitations(stages)
    header = ("", "images", *(f"{stage} {number}" for stage, number, _ in columns))
    shares, views = share_rows(results, {"flip": "r with flipped", "zoom": "r with zoomed"})
    peaks = [
        (name, "", *(f"{excitation['any_part'][key]:.2f}" for *_, excitation in columns))
        for key, name in (("value", "peak in a part"), ("chance", "  by chance"))
    ]
    rows = [*shares, *peaks, *views]
    print(
        "share of activation over share of area, by stage and excitation; "
        "peak: the largest place; r: correlation of maps"
    )
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  " + "  ".join([row[0].ljust(widths[0]), *cells]))
    for stage, measured in stages.items():
        if measured["consistency"] is not None:
            _print_excitations(stage, measured)
    for notice in result_notices(results):
        print(f"  {notice}")
    print(f"results: {folder / f'{split}_parts.json'}; picture: {folder / split / 'parts.png'}")


def _print_excitations(stage: str, measured: Mapping[str, Any]) -> None:
    height, width = measured["size"]
    consistency, diversity = measured["consistency"], measured["diversity"]
    overlap, correlation = diversity["overlap"], diversity["correlation"]
    print(
        f"{stage}, {height} x {width} places:\n"
        f"  part and excitation  NMI {consistency['nmi']:.3f}{_interval(consistency['interval'])}, "
        f"by chance {consistency['chance']:.3f}, p = {consistency['p_value']:.3g}\n"
        f"  overlap of foci      {overlap['value']:.3f}{_interval(overlap['interval'])}, "
        f"by chance {overlap['chance']:.3f}\n"
        f"  correlation          {correlation['value']:.3f}{_interval(correlation['interval'])}"
    )


def _interval(interval: Sequence[float]) -> str:
    return f" ({interval[0]:.3f} to {interval[1]:.3f})"


def _measure_parts(options: argparse.Namespace) -> None:
    from crossx.evaluation.parts.run import measure_run

    print_parts(options.run, measure_run(options.run, **_subject_options(options)))


def test(path: str, options: argparse.Namespace) -> dict[str, Any]:
    """Test the run at ``path`` with the options of this verb."""
    from crossx.evaluation.run import test_run

    return test_run(path, **_subject_options(options))


def _subject_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of ``Subject.open``."""
    names = ("root", "dataset", "split", "batch_size", "num_workers", "device")
    return {name: getattr(options, name) for name in names}


def _compare(options: argparse.Namespace) -> None:
    from crossx.evaluation.comparison import compare_runs

    folders = [open_run(path)[0].path for path in (options.run, options.against)]
    if folders[0].resolve() == folders[1].resolve():
        raise UsageError(
            f"{folders[0]}: a run folder holds the results of one network; compare two run folders."
        )
    for path in (options.run, options.against):
        if not is_tested(path, options):
            print_results(path, test(path, options))
    result = compare_runs(options.run, options.against, options.split)
    target = folders[0] / f"{options.split}_against_{folders[1].resolve().name}.json"
    write_json(target, result)
    low, high = result["interval"]["difference"]
    print(
        f"{options.run}: {_percent(result['top1']['a'])} top-1\n"
        f"{options.against}: {_percent(result['top1']['b'])} top-1\n"
        f"difference: {100 * result['difference']:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}, 95% interval)\n"
        f"right on one alone: {result['correct']['only_a']} and {result['correct']['only_b']} of {result['n']} images, "
        f"McNemar's exact test p = {result['p_value']:.3g}\n"
        f"results: {target}"
    )


def is_tested(path: str, options: argparse.Namespace) -> bool:
    """Say whether the results in the run folder are those of these weights and this request."""
    run, weights = open_run(path)
    results = {} if options.root or options.dataset else run.read_results(weights, options.split)
    return bool(results) and results.get("temperature", 1.0) == run.read_spec().temperature


def _percent(value: float, interval: Sequence[float] | None = None) -> str:
    text = f"{100 * value:.2f}%"
    return f"{text}  ({100 * interval[0]:.2f} to {100 * interval[1]:.2f}, 95% interval)" if interval else text
