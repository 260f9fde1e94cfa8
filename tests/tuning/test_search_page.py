"""The page of a search, rendered from made-up trials."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from crossx.report import charts
from crossx.training.config import Config, DataConfig, ModelConfig, TrainerConfig
from crossx.tuning.outcome import TrialResult, Tuned, best_of
from crossx.tuning.page import render
from crossx.tuning.results import build_table
from crossx.tuning.space import Choices, Range, Space

ACCURACIES = [0.5, 0.25, 0.75, None, 0.625, 0.875, 0.25]
STATES = ["complete", "pruned", "complete", "failed", "complete", "complete", "stopped"]
SPACE = {
    "optim.lr": Range(1e-4, 1e-2, whole=False, log=True),
    "data.augmentation": Choices(["crop", "trivial"]),
    "trainer.max_epochs": Range(2, 8, whole=True),
}


@pytest.fixture
def tuned(tmp_path: Path) -> Tuned:
    tmp_path, trials = tmp_path / "my search", []
    for number, (accuracy, state) in enumerate(zip(ACCURACIES, STATES, strict=True), start=1):
        run = tmp_path / f"trial-{number}"
        run.mkdir(parents=True)
        epochs = 0 if accuracy is None else 1 if state == "pruned" else 4
        rows = [
            {"epoch": epoch, "val/top1": (accuracy or 0) * epoch / epochs} for epoch in range(1, epochs + 1)
        ]
        (run / "metrics.json").write_text(json.dumps({"schema": 1, "epochs": rows}))
        values = {"optim.lr": 10 ** (-4 + number / 4), "data.augmentation": "crop", "trainer.max_epochs": 4}
        reason = "out of <memory>" if state == "failed" else ""
        trials.append(TrialResult(number, state, values, accuracy, epochs, 10.0 * epochs, run, reason))
    best = best_of(trials)
    assert best is not None
    config = Config(
        ModelConfig(method="plain", backbone="local-dir:<b>/a_b"),
        DataConfig(dataset="folder", root="photos"),
        trainer=TrainerConfig(max_epochs=4),
    )
    return Tuned(best, config, trials, Space(SPACE, ""), tmp_path, 100, trials[0].values, 200.4, {})


def text_of(page: str) -> str:
    return " ".join(unescape(re.sub(r"<(style|svg)\b.*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL)).split())


def chart(page: str, title: str) -> str:
    (found,) = re.findall(rf"<h3>{re.escape(title)}</h3>\n(<svg.*?</svg>)", page, re.DOTALL)
    return str(found)


def heights(page: str, title: str) -> tuple[Any, Any]:
    """Return the functions that give number and accuracy of a coordinate, from two ticks of each axis."""
    ticks = re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([\d.]+)%?</text>', chart(page, title)
    )
    ups = [(float(y) - 4, float(text) / 100) for _, y, anchor, text in ticks if anchor == "end"]
    across = [(float(x), float(text)) for x, _, anchor, text in ticks if anchor == "middle"]

    def line(points: list[tuple[float, float]]) -> Any:
        (a, first), (b, last) = points[0], points[-1]
        return lambda place: first + (place - a) / (b - a) * (last - first)

    return line(across), line(ups)


def test_the_numbers_of_a_search(tuned: Tuned) -> None:
    page = render(tuned, build_table(tuned))
    text = text_of(page)
    assert "best validation accuracy 87.50% trial 6 points above the configuration +37.50" in text
    assert "complete 4 pruned 1 failed 1 stopped 1 time 0:03:20" in text
    low, high = stats.binomtest(88, 100).proportion_ci()
    assert f"95% interval of this accuracy alone is {100 * low:.1f} to {100 * high:.1f}%" in text
    # 16 epochs of complete trials, 1 of the pruned one, 4 of the stopped one
    assert (
        "complete 4 16 0:02:40 pruned 1 1 0:00:10 failed 1 0 0:00:00 stopped 1 4 0:00:40 all 7 21 0:03:30"
        in text
    )
    assert "Pruning left out 3 of the 4 epochs" in text
    assert "trial 4: out of <memory>" in text
    assert "local- dir:<b>/ a_ b · 7 trials" in text
    assert "optim.lr 0.00316 0.000178 0.0001 to 0.01, logarithmic" in text
    assert "Not computed: 4 complete trials are too few, or their accuracies too similar." in text
    ((command),) = re.findall(r"<code>(crossx test .*?)</code>", page.replace("<wbr>", ""))
    assert shlex.split(unescape(command)) == ["crossx", "test", str(tuned.best.run)]
    assert "<script" not in page
    assert "src=" not in page


def test_the_curve_of_the_best_so_far(tuned: Tuned) -> None:
    page = render(tuned, build_table(tuned))
    number, accuracy = heights(page, "Trials in order")
    (path,) = re.findall(r'<path d="M([^"]+)"', chart(page, "Trials in order"))
    drawn = [tuple(map(float, point.split(","))) for point in path.split("L")]
    found = {}
    for x, y in drawn:
        # after a step
        found[round(number(x))] = accuracy(y)
    expected, highest = {}, 0.0
    for trial in tuned.trials:
        highest = max(highest, trial.val_top1 or 0.0) if trial.state == "complete" else highest
        if trial.val_top1 is not None:
            expected[trial.number] = highest
    assert found == pytest.approx(expected, abs=0.01)
    assert [a <= b for a, b in zip(drawn[1:], drawn, strict=False)]


def test_each_option_has_its_values_where_they_belong(tuned: Tuned) -> None:
    page = render(tuned, build_table(tuned))
    circles = re.findall(
        r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4"><title>trial (\d)', chart(page, "optim.lr")
    )
    number, accuracy = heights(page, "optim.lr")
    del number
    drawn = {int(trial): (float(x), accuracy(float(y))) for x, y, trial in circles}
    assert set(drawn) == {1, 2, 3, 5, 6}
    assert {trial: y for trial, (_, y) in drawn.items()} == pytest.approx(
        {n: ACCURACIES[n - 1] for n in drawn}, abs=0.01
    )
    # logarithmic: equal factors are equal distances
    assert drawn[2][0] - drawn[1][0] == pytest.approx(drawn[3][0] - drawn[2][0], abs=0.2)
    assert "crop" in chart(page, "data.augmentation")


def test_an_accuracy_of_1_on_few_images_is_not_certain(tuned: Tuned) -> None:
    perfect = replace(tuned, best=replace(tuned.best, val_top1=1.0), images=6)
    text = text_of(render(perfect, build_table(perfect)))
    # all six right is as probable as the tail at this share: p ** 6 = 0.025
    assert f"is {100 * 0.025 ** (1 / 6):.1f} to 100.0%" in text


def test_importances_and_a_search_without_epochs(tuned: Tuned) -> None:
    for trial in tuned.trials:
        (trial.run / "metrics.json").unlink()
    found = {"optim.lr": 0.75, "trainer.max_epochs": 0.25, "data.augmentation": 0.0}
    page = render(replace(tuned, importances=found, unchanged=None, images=None), build_table(tuned))
    text = text_of(page)
    assert "optim.lr 75% trainer.max_epochs 25% data.augmentation 0%" in text
    assert "After each epoch" not in page
    assert "95% interval" not in text
    assert "above the configuration" not in text


def test_the_longest_trial_is_named_if_their_length_is_searched(tuned: Tuned) -> None:
    trials = [replace(tuned.trials[0], values={**tuned.trials[0].values, "trainer.max_epochs": 1000})]
    trials = [*trials, *tuned.trials[1:]]
    space = Space({**SPACE, "trainer.max_epochs": Range(2, 1000, whole=True)}, "")
    page = render(replace(tuned, trials=trials, space=space), build_table(tuned))
    assert "7 trials of at most 1,000 epochs" in text_of(page)
    assert ">1000</text>" in chart(page, "trainer.max_epochs")


def test_the_charts_use_their_width(tuned: Tuned) -> None:
    page = render(tuned, build_table(tuned))
    places = [float(x) for x in re.findall(r'cx="([\d.]+)"', chart(page, "data.augmentation"))]
    assert all(charts.LEFT <= x <= charts.WIDTH - charts.RIGHT for x in places)
