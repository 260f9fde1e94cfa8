import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from crossx.ablation.earlier import read_earlier
from crossx.ablation.runner import Trial, plan
from crossx.ablation.suite import Suite, load_suite
from crossx.ablation.summary import build_table, summarize_suite, write_summary
from crossx.errors import CrossXError
from crossx.evaluation.predictions import Predictions, predictions_path
from crossx.runs import write_json
from crossx.training.config import Config

N = 400
SEEDS = (0, 1, 2)


def write_results(trial: Trial, correct: np.ndarray, order: np.ndarray) -> None:
    """Write what a training and its test leave, the images in some order of their own."""
    folder = trial.run.path
    folder.mkdir(parents=True)
    trial.run.weights.touch()
    logits = np.zeros((N, 2), np.float32)
    logits[np.arange(N), np.where(correct, 0, 1)] = 1
    names = np.array([f"{index:03}.jpg" for index in range(N)])
    contents = np.arange(N, dtype=np.uint64)[order]
    Predictions(logits[order], np.zeros(N, np.int64), names[order], np.array(["a", "b"]), contents).save(
        predictions_path(folder, "test")
    )
    accuracy = float(correct.mean())
    tested = {"top1": accuracy, "top5": 1.0, "class_mean": accuracy, "ece": 0.1, "n": N}
    tested |= {"heads": {"last": accuracy}, "intervals": {"top1": [0.0, 1.0]}, "options": {}}
    tested["selection"] = {"how": "best", "epoch": 1, "value": 0.7}
    write_json(folder / "test.json", tested)
    epochs = [{"epoch": 1, "val/top1": 0.7, "seconds": 4.0}, {"epoch": 2, "val/top1": 0.6, "seconds": 9.0}]
    write_json(folder / "metrics.json", {"schema": 1, "epochs": epochs})
    write_json(folder / "run.json", {"status": "finished", "environment": {"versions": {}}})


@pytest.fixture
def ablation(tmp_path: Path) -> tuple[Suite, list[Trial], dict[tuple[str, int], np.ndarray]]:
    path = tmp_path / "suite.yaml"
    path.write_text("variants: {base: {}, better: {optim: {lr: 0.5}}, broken: {optim: {lr: 0.6}}}")
    suite = load_suite(path)
    trials = plan(suite, Config(), SEEDS, tmp_path / "out")
    generator = np.random.default_rng(0)
    hard = generator.random(N)
    correct = {}
    for trial in trials[:]:
        if trial.variant != "broken":
            level = 0.6 + 0.1 * (trial.variant == "better")
            correct[trial.variant, trial.seed] = hard + 0.2 * generator.random(N) < level
            write_results(trial, correct[trial.variant, trial.seed], generator.permutation(N))
    return suite, trials, correct


def failures(trials: list[Trial]) -> dict[Trial, str]:
    return {trial: "the loss is not finite." for trial in trials if trial.variant == "broken"}


def test_means_deviations_and_intervals_over_seeds(ablation) -> None:
    suite, trials, correct = ablation
    row = summarize_suite(suite, trials, failures(trials))["rows"][1]
    values = [correct["better", seed].mean() for seed in SEEDS]
    assert row["values"] == pytest.approx(values)
    assert row["top1"] == pytest.approx(np.mean(values))
    assert row["sd"] == pytest.approx(np.std(values, ddof=1))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert row["intervals"]["seeds"] == pytest.approx([expected.low, expected.high])
    assert row["val_top1"] == pytest.approx(0.7)
    assert row["seconds"] == 9.0


def test_differences_are_paired_by_seed_and_by_image_whatever_the_order_of_the_images(ablation) -> None:
    suite, trials, correct = ablation
    base, better, broken = summarize_suite(suite, trials, failures(trials))["rows"]
    assert base["against"] is None
    assert broken["against"] is None
    by_seed = np.array([correct["better", s].astype(float) - correct["base", s] for s in SEEDS])
    against = better["against"]
    assert against["difference"] == pytest.approx(by_seed.mean())
    expected = stats.ttest_rel(
        [correct["better", s].mean() for s in SEEDS], [correct["base", s].mean() for s in SEEDS]
    ).confidence_interval(0.95)
    assert against["intervals"]["seeds"] == pytest.approx([expected.low, expected.high])
    resampled = stats.bootstrap(
        (by_seed.mean(axis=0),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert against["intervals"]["images"] == pytest.approx([resampled.low, resampled.high], abs=0.004)


def test_seeds_that_one_variant_lacks_count_for_neither_difference(ablation) -> None:
    suite, trials, correct = ablation
    failed = failures(trials) | {t: "killed" for t in trials if (t.variant, t.seed) == ("base", 1)}
    rows = summarize_suite(suite, trials, failed)["rows"]
    assert rows[0]["seeds"] == [0, 2]
    assert rows[1]["seeds"] == [0, 1, 2]
    assert rows[1]["against"]["seeds"] == [0, 2]
    expected = np.mean([correct["better", s].mean() - correct["base", s].mean() for s in (0, 2)])
    assert rows[1]["against"]["difference"] == pytest.approx(expected)


def test_another_variant_can_be_the_reference(ablation) -> None:
    suite, trials, _ = ablation
    default = summarize_suite(suite, trials, failures(trials))
    turned = summarize_suite(suite, trials, failures(trials), "better")
    assert turned["rows"][1]["against"] is None
    forth, back = default["rows"][1]["against"], turned["rows"][0]["against"]
    assert back["difference"] == pytest.approx(-forth["difference"])
    assert back["intervals"]["seeds"] == pytest.approx(
        [-bound for bound in reversed(forth["intervals"]["seeds"])]
    )
    assert "Δ better" in build_table(turned).columns


def test_everything_is_written_and_agrees(ablation, tmp_path: Path) -> None:
    suite, trials, _ = ablation
    summary = summarize_suite(suite, trials, failures(trials))
    write_summary(summary, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == json.loads(
        json.dumps(summary["rows"])
    )
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [row["variant"] for row in rows] == ["base", "better", "broken"]
    assert rows[1]["top-1"] == f"{100 * summary['rows'][1]['top1']:.2f}"
    assert rows[2]["top-1"] == "–"
    assert rows[1]["Δ base"] == f"{100 * summary['rows'][1]['against']['difference']:+.2f}"
    assert "\\toprule" in (tmp_path / "table.tex").read_text()
    assert [run.get("failed") for run in summary["runs"]].count("the loss is not finite.") == 3
    with Image.open(tmp_path / "chart.png") as chart:
        assert chart.width > 400


def test_one_seed_has_no_interval_over_seeds(ablation) -> None:
    suite, trials, _ = ablation
    first = [trial for trial in trials if trial.seed == 0]
    summary = summarize_suite(suite, first, failures(first))
    assert summary["rows"][1]["sd"] is None
    assert not any("seeds)" in column for column in build_table(summary).columns)


def test_a_training_without_epochs_has_no_validation_and_no_duration(ablation, tmp_path: Path) -> None:
    suite, trials, correct = ablation
    for trial in trials:
        if trial.variant == "better":
            write_json(trial.run.path / "metrics.json", {"schema": 1, "epochs": []})
            tested = json.loads((trial.run.path / "test.json").read_text())
            tested["selection"] = {"how": "last", "split": None, "epoch": None, "value": None}
            write_json(trial.run.path / "test.json", tested)
    summary = summarize_suite(suite, trials, failures(trials))
    row = summary["rows"][1]
    assert row["values"] == pytest.approx([correct["better", seed].mean() for seed in SEEDS])
    assert row["val_top1"] is None
    assert row["seconds"] is None
    table = build_table(summary)
    assert table.rows[1][table.columns.index("val")] == "–"
    write_summary(summary, tmp_path / "first")
    known = read_earlier(
        [tmp_path / "first" / "results.json"], plan(suite, Config(), SEEDS, tmp_path / "new")
    )
    assert {trial.variant for trial in known} == {"base", "better"}


def test_other_test_images_are_refused(ablation) -> None:
    suite, trials, _ = ablation
    other = trials[-2]
    tested = Predictions.load(predictions_path(other.run.path, "test"), other.run.path, "test")
    renamed = np.char.add("other/", tested.paths)
    Predictions(tested.logits, tested.targets, renamed, tested.classes).save(
        predictions_path(other.run.path, "test")
    )
    with pytest.raises(CrossXError, match="not tested on the same images"):
        summarize_suite(suite, trials, failures(trials))


def test_nothing_done_is_a_table_without_numbers(ablation, tmp_path: Path) -> None:
    suite, trials, _ = ablation
    summary = summarize_suite(suite, trials, dict.fromkeys(trials, "no disk"))
    write_summary(summary, tmp_path)
    assert not (tmp_path / "chart.png").exists()
    assert {row["top1"] for row in summary["rows"]} == {None}


def test_printed_intervals_end_where_accuracies_and_differences_do(ablation) -> None:
    suite, trials, _ = ablation
    found = summarize_suite(suite, trials, failures(trials))
    found["rows"][1]["intervals"]["seeds"] = [-0.2, 1.3195]
    found["rows"][1]["against"]["intervals"]["seeds"] = [-1.2, 1.3]
    cells = build_table(found).rows[1]
    assert "0.00 to 100.00" in cells
    assert "-100.00 to +100.00" in cells
