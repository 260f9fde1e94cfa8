"""``crossx test RUN``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from crossx.cli.options import Device, RunPath, Split, TestedData, check_run
from crossx.cli.values import Coverage, Folder
from crossx.data.catalog import dataset_title
from crossx.errors import UsageError, counted
from crossx.evaluation.notices import result_notices
from crossx.runs import open_run, write_json
from crossx.terminal import fold, step


def test(
    run: RunPath,
    *,
    split: Split = "test",
    against: Annotated[str, "RUN_B"] | None = None,
    parts: bool = False,
    coverage: Coverage | None = None,
    unknown: Folder | None = None,
    data: TestedData,
    device: Device = "auto",
) -> None:
    """Measure a trained network, or compare two.

    Measures on the images of one split: accuracies with intervals, per head and class, the confusion matrix and the
    calibration. --against tests the difference between two runs on the same images; --parts measures what the
    excitations look at: whether they differ, move with the image and, where parts are annotated, find them.

    Args:
        against: Compare with this run, image by image.
        parts: Measure the activation maps instead, and compare them with annotated parts (cub, nabirds, synthetic).
        coverage: Also measure prediction sets that are to have the image's class with this probability, such as 0.9.
        unknown: Also measure how well the images in this folder, of none of the classes, are told apart.

    Examples:
        crossx test runs/mine
        crossx test runs/mine --data.root /other/place/CUB_200_2011 --split val
        crossx test runs/mine/checkpoints/last.ckpt
        crossx test runs/crossx --against runs/plain
        crossx test runs/crossx --parts
        crossx test runs/mine --coverage 0.9 --unknown not_birds/
    """
    if (coverage is not None or unknown is not None) and (parts or against is not None):
        raise UsageError(
            "--coverage and --unknown measure one run's predictions and cannot be combined with --parts or --against: "
            "leave one of them out."
        )
    if parts and against is not None:
        raise UsageError(
            "--parts measures one run and cannot be combined with --against: leave one of them out."
        )
    if parts:
        from crossx.cli.part_results import print_parts
        from crossx.evaluation.parts.run import measure_run

        print_parts(run, measure_run(run, split=split, device=device, **vars(data)))
    elif against is None:
        print_results(run, test_run(run, split, data, device, coverage=coverage, unknown=unknown))
    else:
        _compare(run, against, split, data, device)


def print_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """Print what ``test_run`` returned for the run at ``path``."""
    folder, split = open_run(path)[0].path, results["split"]
    low_high = results["intervals"]
    dataset = dataset_title(results["dataset"], results.get("data_root"))
    print(
        fold(
            f"{results['method']} ({results['backbone']}) on {dataset}, {split}: "
            f"{counted(results['n'], 'image')}, {results['num_classes']} classes, weights {results['weights']}",
            hanging="  ",
        )
    )
    rows = {
        "top-1": _percent(results["top1"], low_high["top1"]),
        # with five classes or fewer every image has its class among the first five
        **({"top-5": _percent(results["top5"])} if results["num_classes"] > 5 else {}),
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
    rows |= _open_set_rows(results)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(fold(f"  {name:<{width}}  {value}"))
    for notice in result_notices(results):
        print(fold(f"  {notice}"))
    print(f"results: {folder / f'{split}.json'}")
    print(f"tables and pictures: {folder / split}")


def _open_set_rows(results: Mapping[str, Any]) -> dict[str, str]:
    """Describe rejection, prediction sets and unknown images, where they were measured."""
    rows = {}
    if kept := results.get("rejection"):
        rows["kept"] = (
            f"{_percent(kept['kept'], kept['interval'])}, {kept['score']} at least {kept['threshold']:.4g}"
        )
        if kept["top1_kept"] is not None:
            rows["kept"] += f"; top-1 of these {_percent(kept['top1_kept'])}"
    if sets := results.get("sets"):
        low, high = sets["expected"]
        sizes = ", ".join(f"{size}: {count}" for size, count in sets["sizes"].items())
        rows[f"coverage {sets['coverage']:g}"] = (
            f"{_percent(sets['covered'], sets['interval'])}; {100 * low:.1f} to {100 * high:.1f} in 9 of 10 "
            f"calibrations on {counted(sets['calibration_images'], 'image')}"
        )
        rows["classes per set"] = f"{sets['mean_size']:.2f} on average ({sizes})"
    if unknown := results.get("unknown"):
        left_out = f", {unknown['skipped']} left out that cannot be read" if unknown["skipped"] else ""
        rows["unknown"] = f"{counted(unknown['n'], 'image')} of {unknown['folder']}{left_out}"
        if "rejected" in unknown:
            rows["unknown"] += f"; rejected: {_percent(unknown['rejected'], unknown['interval'])}"
        rows |= {
            f"  {name}": f"AUROC {_percent(found['auroc'])}, FPR95 {_percent(found['fpr95'])}, "
            f"OSCR {_percent(found['oscr'])}"
            for name, found in unknown["scores"].items()
        }
        rejected = unknown["scores"][unknown["score"]]["rejected"]
        rows |= {
            f"  keep {keep}": f"{_percent(share)} rejected by {unknown['score']}"
            for keep, share in rejected.items()
        }
    return rows


def test_run(
    path: str, split: str, data: TestedData, device: str, *, unknown: str | None = None, **measured: Any
) -> dict[str, Any]:
    """Test the run at ``path``, see ``crossx.evaluation.run.test_run``."""
    if unknown is not None:
        from crossx.data.image_files import require_images

        require_images(Path(unknown))
    check_run(path)

    with step("Loading PyTorch"):
        from crossx.evaluation.run import test_run

    return test_run(path, split=split, device=device, unknown=unknown, **measured, **vars(data))


def compare(run: str | Path, against: str | Path, split: str) -> tuple[dict[str, Any], Path]:
    """Compare two tested runs, see ``compare_runs``; return the result and the file that has it."""
    from crossx.evaluation.comparison import compare_runs

    folders = [open_run(path)[0].path for path in (run, against)]
    result = compare_runs(run, against, split)
    target = folders[0] / f"{split}_against_{folders[1].resolve().name}.json"
    write_json(target, result)
    return result, target


def _compare(run: str, against: str, split: str, data: TestedData, device: str) -> None:
    folders = [open_run(path)[0].path for path in (run, against)]
    if folders[0].resolve() == folders[1].resolve():
        raise UsageError(
            f"{folders[0]}: a run folder holds the results of one network; compare two run folders."
        )
    # of both before a test, which may take minutes
    for path in [path for path in (run, against) if not is_tested(path, split, data)]:
        print_results(path, test_run(path, split, data, device))
    result, target = compare(run, against, split)
    low, high = result["interval"]["difference"]
    text = (
        f"{run}: {_percent(result['top1']['a'])} top-1\n"
        f"{against}: {_percent(result['top1']['b'])} top-1\n"
        f"difference: {100 * result['difference']:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}, 95% interval)\n"
        f"right on only one: {result['correct']['only_a']} and {result['correct']['only_b']} of {result['n']} images, "
        f"McNemar's exact test p = {result['p_value']:.3g}\n"
        f"results: {target}"
    )
    print(fold(text, hanging="  "))


def is_tested(path: str, split: str, data: TestedData) -> bool:
    """Say whether the results in the run folder are those of these weights and this request."""
    run, weights = open_run(path)
    results = run.read_results(weights, split) if data.is_of_training else {}
    return bool(results) and results.get("temperature", 1.0) == run.read_spec().temperature


def _percent(value: float, interval: Sequence[float] | None = None) -> str:
    text = f"{100 * value:.2f}%"
    return f"{text}  ({100 * interval[0]:.2f} to {100 * interval[1]:.2f}, 95% interval)" if interval else text
