from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import layouts
from crossx.ablation import runner
from crossx.errors import CrossXError, Stopped, UsageError
from crossx.runs import Run
from crossx.training.config import Config, DataConfig, ModelConfig, OptimConfig
from crossx.tuning import search
from crossx.tuning.search import tune

pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.write_folder(tmp_path_factory.mktemp("images"), classes=3, images_per_class=12)


@pytest.fixture
def base(images: Path) -> Config:
    model = ModelConfig(method="plain", backbone="test_resnet", pretrained=False)
    data = DataConfig(root=str(images), image_size=64, batch_size=8, num_workers=0)
    return Config(model, data, OptimConfig(), {"max_epochs": 4, "accelerator": "cpu"}, seed=3)  # type: ignore[arg-type]


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text("optim.lr: {low: 1e-4, high: 1, log: true}\ndata.augmentation: [crop, trivial]\n")
    return path


def accuracies(config: Config) -> list[float]:
    """Return the validation accuracy of each epoch of a stand-in, best at a learning rate of 0.1."""
    import math

    best = 1 - abs(math.log10(config.optim.lr) + 1) / 4 + 0.05 * (config.data.augmentation == "trivial")
    return [best * (epoch + 1) / 10 for epoch in range(config.trainer.max_epochs)]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the processes that train; returns the names of the trials that were trained."""
    names: list[str] = []

    def call(
        self: object,
        trial: runner.Trial,
        variables: object,
        words: Any,
        watch: Callable[[], bool] = lambda: False,
    ) -> None:
        names.append(f"{words[0]} {words[1]} {trial.variant}")
        run = trial.run
        run.path.mkdir(exist_ok=True)
        run.config.write_text(trial.config.to_yaml())
        rows: list[dict[str, Any]] = []
        for epoch, value in enumerate(accuracies(trial.config), start=1):
            rows.append({"epoch": epoch, "val/top1": value, "seconds": float(epoch)})
            (run.path / "metrics.json").write_text(json.dumps({"schema": 1, "epochs": rows}))
            if watch():
                run.info.write_text(json.dumps({"status": "stopped"}))
                return
        selection = {"epoch": len(rows), "value": rows[-1]["val/top1"]}
        run.info.write_text(json.dumps({"status": "finished", "selection": selection, "images": {"val": 3}}))

    monkeypatch.setattr(runner.Processes, "_call", call)
    return names


def values(folder: Path) -> list[dict[str, Any]]:
    return [trial["values"] for trial in json.loads((folder / "results.json").read_text())["trials"]]


def test_the_best_on_validation_is_found_written_and_named(
    base: Config, space: Path, tmp_path: Path, trained: list[str]
) -> None:
    seen = []
    tuned = tune(
        base, tmp_path / "out", space=space, trials=12, report=lambda trial, best: seen.append((trial, best))
    )
    assert [trial.number for trial, _ in seen] == list(range(1, 13))
    assert dict(tuned.trials[0].values) == {"optim.lr": 0.01, "data.augmentation": "crop"}
    complete = [trial for trial in tuned.trials if trial.state == "complete"]
    assert (
        tuned.best.val_top1
        == max(trial.val_top1 or 0 for trial in complete)
        > (tuned.trials[0].val_top1 or 0)
    )
    pruned = [trial for trial in tuned.trials if trial.state == "pruned"]
    assert pruned
    assert all(0 < trial.epochs < 4 for trial in pruned)
    # the median of at least as many complete trials was better at that epoch
    assert all(trial.number > search.PRUNED_AFTER for trial in pruned)

    best = Config.from_yaml(tmp_path / "out/best.yaml")
    assert (best.optim.lr, best.data.augmentation) == (
        tuned.best.values["optim.lr"],
        tuned.best.values["data.augmentation"],
    )
    sentence = f"the best of 12 trials of `crossx tune`, {len(pruned)} of them pruned, "
    sentence += "by the accuracy on 3 validation images"
    assert best.tuned == tuned.sentence() == tuned.run.read_info()["tuned"] == sentence
    assert best.output is None
    others = [Run(trial.run).read_info().get("tuned") for trial in tuned.trials if trial is not tuned.best]
    assert others == [None] * 11
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["best"], results["metric"], len(results["trials"])) == (tuned.best.number, "val/top1", 12)
    assert sentence in (tmp_path / "out/table.md").read_text()
    assert (tmp_path / "out/search.png").stat().st_size > 0
    assert (
        f"best validation accuracy</dt><dd>{tuned.best.val_top1:.2%}"
        in (tmp_path / "out/report.html").read_text()
    )


@pytest.mark.slow
def test_a_search_that_was_stopped_continues_as_one_that_was_not(
    base: Config, space: Path, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(base, tmp_path / "whole", space=space, trials=7)
    whole, trained[:] = [*trained], []
    call = runner.Processes._call

    def stopped(self: Any, trial: runner.Trial, *rest: Any) -> None:
        if trial.variant == "trial-4" and "fit --config trial-4" not in trained:
            trained.append("fit --config trial-4")
            trial.run.path.mkdir()
            trial.run.config.write_text(trial.config.to_yaml())
            raise KeyboardInterrupt
        call(self, trial, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(runner.Processes, "_call", stopped)
        with pytest.raises(Stopped, match="stopped after 3 of 7 trials; the same command continues"):
            tune(base, tmp_path / "parts", space=space, trials=7)
    # of what was complete when it was stopped
    assert len(values(tmp_path / "parts")) == 4
    assert "stopped</dt><dd>1<" in (tmp_path / "parts/report.html").read_text()
    # as a kill leaves it that hits in the middle of a line
    with (tmp_path / "parts/journal.log").open("a") as journal:
        journal.write('{"op_code": 8, "trial')
    tune(base, tmp_path / "parts", space=space, trials=5)
    tune(base, tmp_path / "parts", space=space, trials=7)
    assert values(tmp_path / "parts") == values(tmp_path / "whole")
    expected = [*whole[:4], "fit --resume trial-4", *whole[4:]]
    expected[3] = "fit --config trial-4"
    assert trained == expected
    done = len(trained)
    assert tune(base, tmp_path / "parts", space=space, trials=7).best.number
    assert len(trained) == done


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    ["optim.lr: {low: 1e-4, high: 1e-1, log: true}\n", "optim.lr: [0.01, 0.1]\n"],
    ids=["range", "choices"],
)
def test_a_search_continues_from_a_kill_after_any_line_of_the_journal(
    base: Config, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.setattr(search, "write_results", lambda tuned: None)
    space = tmp_path / "space.yaml"
    space.write_text(options + "data.augmentation: [crop, trivial]\n")
    whole = [
        (trial.number, trial.values) for trial in tune(base, tmp_path / "whole", space=space, trials=3).trials
    ]
    lines = (tmp_path / "whole/journal.log").read_bytes().splitlines(keepends=True)
    for count, line in enumerate(lines):
        # accuracies of epochs, and seconds
        if json.loads(line)["op_code"] in (2, 7):
            continue
        cut = tmp_path / f"cut-{count}"
        cut.mkdir()
        (cut / "tune.json").write_bytes((tmp_path / "whole/tune.json").read_bytes())
        (cut / "journal.log").write_bytes(b"".join(lines[:count]))
        trained.clear()
        tuned = tune(base, cut, space=space, trials=3)
        assert [(trial.number, trial.values) for trial in tuned.trials] == whole, line
        assert len({*trained}) == len(trained)


@pytest.mark.slow
def test_no_combination_is_trained_twice(base: Config, tmp_path: Path, trained: list[str]) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("optim.lr: [0.01, 0.1]\ndata.augmentation: [crop, trivial]\n")
    tuned = tune(base, tmp_path / "out", space=path, trials=20, pruner="none")
    found = {(trial.values["optim.lr"], trial.values["data.augmentation"]) for trial in tuned.trials}
    assert len(tuned.trials) == len(found) == len(trained) == 4
    assert dict(tuned.best.values) == {"optim.lr": 0.1, "data.augmentation": "trivial"}


@pytest.mark.slow
def test_the_option_that_makes_the_difference_is_the_most_important(
    base: Config, tmp_path: Path, trained: list[str]
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("optim.momentum: {low: 0.5, high: 0.9}\noptim.lr: {low: 1e-4, high: 1, log: true}\n")
    few = tune(base, tmp_path / "out", space=path, trials=9, pruner="none")
    assert dict(few.importances) == {}
    tuned = tune(base, tmp_path / "out", space=path, trials=20, pruner="none")
    assert sum(tuned.importances.values()) == pytest.approx(1)
    # the stand-in trains as if momentum made no difference
    assert tuned.importances["optim.lr"] > 0.7
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["importances"] == dict(tuned.importances)
    assert 0 < results["seconds"] == tuned.seconds


@pytest.mark.slow
def test_equal_accuracies_have_no_importances(
    base: Config, space: Path, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "accuracies", lambda config: [0.5])
    tuned = tune(base, tmp_path / "out", space=space, trials=10, pruner="none")
    assert len(tuned.trials) == 10
    assert dict(tuned.importances) == {}
    assert "10 complete trials are too few, or their" in (tmp_path / "out/report.html").read_text()


def test_the_first_trial_has_every_digit_of_the_configuration(
    base: Config, space: Path, tmp_path: Path, trained: list[str]
) -> None:
    base.optim.lr = 0.0123456
    tuned = tune(base, tmp_path / "out", space=space, trials=2, pruner="none")
    first, second = (trial.values["optim.lr"] for trial in tuned.trials)
    assert first == 0.0123456
    assert dict(tuned.trials[0].values) == tuned.unchanged
    assert second == float(f"{second:.3g}")
    assert Config.from_yaml(tmp_path / "out/trial-1/config.yaml").optim.lr == 0.0123456


@pytest.mark.slow
def test_another_search_in_the_folder_is_refused(
    base: Config, space: Path, tmp_path: Path, trained: list[str]
) -> None:
    out = tmp_path / "out"
    tune(base, out, space=space, trials=2)
    other = tmp_path / "other.yaml"
    other.write_text(space.read_text().replace("1e-4", "1e-3"))
    from dataclasses import replace

    for arguments, message in (
        ({"config": replace(base, seed=4)}, "this search has seed 3, and now it is 4"),
        (
            {"config": replace(base, optim=OptimConfig(momentum=0.5))},
            "has optim.momentum 0.9, and now it is 0.5",
        ),
        ({"space": other}, "this search searches optim.lr"),
        ({"pruner": "none"}, "has the pruner median"),
    ):
        with pytest.raises(UsageError, match=message):
            tune(**{"config": base, "output": out, "space": space, "trials": 2, **arguments})
    # options that change only the speed
    tune(replace(base, data=replace(base.data, num_workers=1)), out, space=space, trials=2)
    assert len(trained) == 2
    with pytest.raises(UsageError, match="is not empty"):
        tune(base, tmp_path, space=space, trials=2)


@pytest.mark.slow
def test_failures(
    base: Config, space: Path, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, bad = runner.Processes._call, {"trial-1", "trial-3"}

    def failing(self: Any, trial: runner.Trial, *rest: Any) -> None:
        if trial.variant in bad:
            raise CrossXError("crossx fit: error: out of memory.")
        call(self, trial, *rest)

    monkeypatch.setattr(runner.Processes, "_call", failing)
    with pytest.raises(
        CrossXError, match=r"the first trial failed: crossx fit: error: out of memory\. \(log: "
    ):
        tune(base, tmp_path / "out", space=space, trials=4)
    bad.remove("trial-1")
    tuned = tune(base, tmp_path / "out", space=space, trials=4)
    assert [trial.state for trial in tuned.trials] == ["complete", "complete", "failed", "complete"]
    assert tuned.trials[2].reason == "crossx fit: error: out of memory."
    (tmp_path / "out/journal.log").write_text("{}\n{}\n")
    with pytest.raises(CrossXError, match=r"journal\.log: damaged"):
        tune(base, tmp_path / "out", space=space, trials=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": {"val_fraction": 0}},
            "data.val_fraction 0 of .* training images in .* classes holds none out",
        ),
        ({"data": {"train_on": "trainval"}}, "leave out --data.train_on trainval"),
        ({"optim": {"selection": "best_on_test"}}, "best_on_test on the test images"),
        ({"trainer": {"max_steps": 3}}, "max_steps may stop within an epoch"),
        ({"trainer": {"limit_val_batches": 0}}, "tuning needs validation after the last epoch"),
        ({"model": {"backbone": "resnet10x"}}, "unknown backbone"),
        ({"data": {"root": "none"}}, "none: no such folder"),
    ],
)
def test_what_cannot_be_tuned_leaves_no_folder(
    base: Config, space: Path, tmp_path: Path, change: dict[str, dict[str, Any]], message: str
) -> None:
    from crossx.ablation.suite import apply_changes

    with pytest.raises(CrossXError, match=message):
        tune(apply_changes(base, change), tmp_path / "out", space=space, trials=2)
    assert not (tmp_path / "out").exists()


def test_wrong_calls(base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        ({"trials": 0}, "trials must be a whole number of at least 1, not 0"),
        ({"max_time": "soon"}, "max_time takes a time such as 1h30m"),
        ({"max_time": "0s"}, "max_time must be above 0"),
        ({"pruner": "mean"}, "Did you mean 'median'"),
    ):
        with pytest.raises(UsageError, match=message):
            tune(base, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"needs optuna: pip install 'crossx\[tune\]'"):
        tune(base, tmp_path / "out")


@pytest.mark.slow
def test_no_trial_begins_after_the_time(
    base: Config, space: Path, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(search, "monotonic", lambda: float(next(clock)))
    tuned = tune(base, tmp_path / "out", space=space, trials=50, max_time="5m")
    assert 1 < len(tuned.trials) < 30
    # the time before counts
    assert len(tune(base, tmp_path / "out", space=space, trials=50, max_time="5m").trials) == len(
        tuned.trials
    )
    assert len(tune(base, tmp_path / "out", space=space, trials=50, max_time="10m").trials) > len(
        tuned.trials
    )
