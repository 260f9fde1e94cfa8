import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_summary import SEEDS, ablation, failures

import layouts
from crossx.ablation.earlier import (
    check_data,
    describe_contents,
    describe_images,
    pack,
    read_earlier,
    unpack,
)
from crossx.ablation.runner import Trial, describe_training, plan
from crossx.ablation.suite import load_suite
from crossx.ablation.summary import summarize_suite, write_summary
from crossx.cli.ablate import _run
from crossx.data.catalog import read_configured
from crossx.data.fingerprints import fingerprints
from crossx.errors import CrossXError
from crossx.evaluation.predictions import relative_paths
from crossx.methods import list_methods
from crossx.training.config import Config
from refusals import refusal

__all__ = ["ablation"]


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_answers_survive_their_digits(values: list[bool]) -> None:
    correct = np.array(values)
    assert np.array_equal(unpack(pack(correct), len(correct)), correct)
    bits = "".join("01"[value] for value in values)
    assert int(pack(correct), 16) == int(bits.ljust(4 * len(pack(correct)), "0"), 2)


@pytest.fixture
def results(ablation, tmp_path: Path) -> Path:
    """The results of all seeds but the last, from a machine whose runs are gone."""
    suite, trials, _ = ablation
    first = [trial for trial in trials if trial.seed != SEEDS[-1]]
    write_summary(summarize_suite(suite, first, failures(first)), tmp_path)
    return tmp_path / "results.json"


def test_a_table_from_earlier_results_is_that_from_the_runs(ablation, results: Path) -> None:
    suite, trials, _ = ablation
    whole = summarize_suite(suite, trials, failures(trials))
    for trial in trials:
        if trial.seed != SEEDS[-1] and trial.variant != "broken":
            shutil.rmtree(trial.run.path)
    known = read_earlier([results], trials)
    assert {(trial.variant, trial.seed) for trial in known} == {
        (variant, seed) for variant in ("base", "better") for seed in SEEDS[:-1]
    }
    again = summarize_suite(suite, trials, failures(trials), earlier=known)
    assert json.dumps(again) == json.dumps(whole)


def test_runs_at_hand_count_more_than_earlier_results(ablation, results: Path) -> None:
    assert read_earlier([results], ablation[1]) == {}


def test_only_what_is_neither_known_nor_done_is_trained_and_the_counts_say_so(
    ablation, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trials, _ = ablation
    by_name = {str(trial): trial for trial in trials}
    for name in ("base, seed 0", "better, seed 1"):
        shutil.rmtree(by_name[name].run.path)
    (by_name["base, seed 2"].run.path / "test.json").unlink()
    known = read_earlier([results], trials)
    assert set(map(str, known)) == {"base, seed 0", "better, seed 1"}
    steps, ran = [], []

    def run_trials(left: Sequence[Trial], *_: object, test: bool) -> dict[Trial, str]:
        ran.append([str(trial) for trial in left])
        return {trial: "reason" for trial in left if trial.variant == "broken"}

    monkeypatch.setattr("crossx.ablation.runner.run_trials", run_trials)
    monkeypatch.setattr("crossx.cli.ablate.step", lambda text: steps.append(text) or contextlib.nullcontext())
    broken = [f"broken, seed {seed}" for seed in SEEDS]
    assert set(map(str, _run(trials, known, 1, Path("out")))) == set(broken)
    assert sorted(ran[0]) == sorted(["base, seed 2", *broken])
    # what is trained and not tested yet is done for a search, which tests nothing
    assert set(map(str, _run(trials, (), 1, Path("out"), test=False))) == set(broken)
    assert sorted(ran[1]) == sorted([*broken, "base, seed 0", "better, seed 1"])
    _run([by_name["broken, seed 0"]], (), 1, Path("out"))
    assert steps == [
        "Training 3 of 9 networks (2 known from --earlier, 3 already done, 1 only to test); each has a log in out",
        "Training 5 of 9 networks (4 already done); each has a log in out",
        "Training 1 of 1 network; each has a log in out",
    ]


@pytest.mark.slow
def test_other_options_and_seeds_are_not_taken(results: Path, tmp_path: Path) -> None:
    suite = load_suite(tmp_path / "suite.yaml")
    output = tmp_path / "new"
    assert len(read_earlier([results], plan(suite, Config(), SEEDS, output))) == 4
    assert read_earlier([results], plan(suite, Config(), [7], output)) == {}
    changed = Config.from_dict({"optim": {"weight_decay": 0.5}})
    assert read_earlier([results], plan(suite, changed, SEEDS, output)) == {}
    faster = Config.from_dict({"data": {"num_workers": 7}})
    assert len(read_earlier([results], plan(suite, faster, SEEDS, output))) == 4
    other = Config.from_dict({"data": {"root": "other_birds"}})
    assert read_earlier([results], plan(suite, other, SEEDS, output)) == {}


def test_an_option_that_did_not_exist_has_its_default(results: Path, tmp_path: Path) -> None:
    suite = load_suite(tmp_path / "suite.yaml")
    values = json.loads(results.read_text())
    for run in values["runs"]:
        run.get("training", {}).pop("optim.ema_decay", None)
    results.write_text(json.dumps(values))
    assert len(read_earlier([results], plan(suite, Config(), SEEDS, tmp_path / "new"))) == 4
    averaged = Config.from_dict({"optim": {"ema_decay": 0.9}})
    assert read_earlier([results], plan(suite, averaged, SEEDS, tmp_path / "new")) == {}


def test_paths_of_the_same_name_are_refused(results: Path, tmp_path: Path) -> None:
    suite = tmp_path / "twins.yaml"
    suite.write_text("variants: {a: {data: {root: /a/birds}}, b: {data: {root: /b/birds}}}")
    values = json.loads(results.read_text())
    for run in values["runs"]:
        run.get("training", {})["data.root"] = "birds"
    results.write_text(json.dumps(values))
    trials = plan(load_suite(suite), Config(), [0], tmp_path / "new")
    assert "b, seed 0 and a, seed 0 differ only in the folder of a path" in refusal(
        read_earlier, [results], trials
    )


def test_two_different_results_of_one_training_are_refused(results: Path, tmp_path: Path) -> None:
    values = json.loads(results.read_text())
    first = values["runs"][0]
    values["runs"].append({**first, "correct": first["correct"][::-1]})
    results.write_text(json.dumps(values))
    trials = plan(load_suite(tmp_path / "suite.yaml"), Config(), SEEDS, tmp_path / "new")
    assert "several different trainings of these options" in refusal(read_earlier, [results], trials)


def test_a_local_backbone_is_known_by_its_name() -> None:
    here, there, other = (
        Config.from_dict({"model": {"backbone": f"local-dir:{path}"}})
        for path in ("/a/net", "b/net", "/a/other")
    )
    assert describe_training(here) == describe_training(there)
    assert describe_training(here)["model.backbone"] == "local-dir:net"
    assert describe_training(other) != describe_training(here)


def test_methods_without_options_are_different_trainings() -> None:
    trainings = [describe_training(Config.from_dict({"model": {"method": name}})) for name in list_methods()]
    assert all(trainings.count(training) == 1 for training in trainings)


def test_other_images_are_refused(ablation, results: Path) -> None:
    suite, trials, _ = ablation
    values = json.loads(results.read_text())
    for run in values["runs"]:
        if run["variant"] == "better":
            run["images"] = "0" * 32
    results.write_text(json.dumps(values))
    shutil.rmtree(trials[1].run.path)
    known = read_earlier([results], trials)
    with pytest.raises(
        CrossXError, match=r"better, seed 0 and base, seed 0 were not tested on the same images"
    ):
        summarize_suite(suite, trials, failures(trials), earlier=known)


@pytest.mark.slow
def test_other_contents_are_refused_also_under_the_same_names(ablation, results: Path) -> None:
    suite, trials, _ = ablation
    values = json.loads(results.read_text())
    digests = {run["contents"] for run in values["runs"] if "contents" in run}
    # in whatever order the images were tested
    assert len(digests) == 1
    for run in values["runs"]:
        if run["variant"] == "better":
            run["contents"] = "0" * 32
    results.write_text(json.dumps(values))
    shutil.rmtree(trials[1].run.path)
    known = read_earlier([results], trials)
    message = refusal(summarize_suite, suite, trials, failures(trials), earlier=known)
    assert "better, seed 0 and base, seed 0 were not tested on the same contents of the images" in message
    # of a version that did not know contents
    for run in values["runs"]:
        run.pop("contents", None)
    results.write_text(json.dumps(values))
    known = read_earlier([results], trials)
    assert len(summarize_suite(suite, trials, failures(trials), earlier=known)["rows"]) == 3


def test_replaced_test_images_are_refused_before_anything_is_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = layouts.write_folder(tmp_path / "photos", classes=2, images_per_class=5)
    suite = tmp_path / "suite.yaml"
    suite.write_text("variants: {a: {}, small: {data: {image_size: 64}}, lax: {data: {bad_images: skip}}}")
    base = Config.from_dict({"data": {"dataset": "folder", "root": str(root)}})
    trial, small, lax = plan(load_suite(suite), base, [0], tmp_path / "out")
    index = read_configured(trial.config.data)
    records = index.split("test")
    paths = relative_paths(index, "test", str(root))
    images = describe_images(paths, [record.label for record in records], index.classes)
    contents = describe_contents(paths[::-1], fingerprints([record.path for record in records])[::-1])
    same = {"images": images, "contents": contents}
    check_data({trial: same, small: same})
    assert not caplog.messages
    first, second = records[0].path, records[1].path
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    message = refusal(check_data, {trial: {"images": images}, small: same})
    assert "small, seed 0: the test images of --data.root" in message
    assert "have the names of those of the earlier results, but other contents" in message
    check_data({lax: same})
    caplog.clear()
    check_data({trial: {"images": images}, small: {"images": images, "contents": None}})
    assert caplog.messages == [
        "--earlier: the results of 2 trainings are from an earlier version: their images are known by name only."
    ]


def test_other_data_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    root = layouts.write_folder(tmp_path / "photos", classes=2, images_per_class=5)
    suite = tmp_path / "suite.yaml"
    suite.write_text("variants: {a: {}, lax: {data: {bad_images: skip}}}")
    base = Config.from_dict({"data": {"dataset": "folder", "root": str(root)}})
    trial, lax = plan(load_suite(suite), base, [0], tmp_path / "out")
    records = read_configured(trial.config.data).split("test")
    paths = [record.path.relative_to(root).as_posix() for record in records][::-1]
    labels = [record.label for record in records][::-1]
    same = {"images": describe_images(paths, labels, sorted({record.path.parent.name for record in records}))}
    check_data({trial: same})
    records[0].path.rename(records[0].path.with_name("renamed.png"))
    assert "a, seed 0: the earlier results are of other test images" in refusal(check_data, {trial: same})
    check_data({lax: same})  # some of the images may be unreadable, so nothing is known yet


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("runs"), "it has no list `runs`"),
        pytest.param(
            lambda values: values["runs"].append(1), "it has no list `runs`", marks=pytest.mark.slow
        ),
        (
            lambda values: values["runs"][0].pop("training"),
            "training base 0: not a training in the results of",
        ),
        (lambda values: values["runs"][0].update(correct="zz"), "correct"),
        pytest.param(
            lambda values: values["runs"][0].update(n=9),
            "correct has 100 digits for 9 images",
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda values: values["runs"][0].update(top1=1.5), "top1", marks=pytest.mark.slow),
        (
            lambda values: values["runs"][0]["selection"].update(epoch=9),
            "selection.epoch is not one of 2 epochs",
        ),
        (
            lambda values: values["runs"][0]["selection"].update(epoch=None),
            "selection.epoch is not one of 2 epochs",
        ),
        pytest.param(
            lambda values: values["runs"][0].update(val_top1=[]),
            "selection.epoch is not one of 0 epochs",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_damaged_results_are_refused(ablation, results: Path, change, message: str) -> None:
    values = json.loads(results.read_text())
    change(values)
    results.write_text(json.dumps(values))
    assert message in refusal(read_earlier, [results], ablation[1])
