import json
import os
import signal
import sys
import textwrap
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

import layouts
from crossx.ablation import runner
from crossx.ablation.runner import Processes, Trial, check_trials, divide_machine, plan, run_trials
from crossx.ablation.suite import load_suite
from crossx.errors import CrossXError, UsageError
from crossx.runs import locked_folder
from crossx.training.config import Config, ModelConfig

BASE = Config(
    model=ModelConfig(
        backbone="resnet10t",
        backbone_args={"channels": [4, 8, 16, 32]},
        pretrained=False,
        options={"num_parts": 2},
    )
)

# Stands in for the command: notes what it was asked for, waits for as many trainings as MEETS says, and fails where the
# seed is 1. With HANGS it does not end by itself.
COMMAND = """
import json, os, pathlib, sys, time, yaml
words = sys.argv[3:]
if words[0] == "fit" and "--config" in words:
    folder = pathlib.Path(yaml.safe_load(open(words[2]))["output"])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(open(words[2]).read())
else:
    folder = pathlib.Path(words[words.index("--resume") + 1] if words[0] == "fit" else words[1])
with open(folder.parent / "asked", "a") as asked:
    print(folder.name, *words[:2], os.environ.get("OMP_NUM_THREADS"), os.getpid(), file=asked)
deadline = time.monotonic() + 600
while (folder.parent / "asked").read_text().count(" fit ") < int(os.environ.get("MEETS", 0)):
    assert time.monotonic() < deadline, "the other training has not begun"
    time.sleep(0.01)
while "HANGS" in os.environ and time.monotonic() < deadline:
    time.sleep(1)
if folder.name == "seed-1":
    print("much output")
    print("crossx fit: error: the loss is not finite.")
    sys.exit(1)
if folder.name == "seed-2":
    os.kill(os.getpid(), 9)
if words[0] == "fit":
    (folder / "run.json").write_text(json.dumps({"status": "finished"}))
    (folder / "model.safetensors").touch()
else:
    (folder / "test.json").write_text("{}")
with open(folder.parent / "asked", "a") as asked:
    print(folder.name, "ended", file=asked)
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the stand-in in the place of Python; return the folder for the trials."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(wrapper))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "out"


def trials(output: Path, *seeds: int, text: str = "variants: {a: {}}") -> list[Trial]:
    path = output.parent / "suite.yaml"
    path.write_text(text)
    return plan(load_suite(path), BASE, seeds, output)


def asked(output: Path, variant: str = "a") -> list[list[str]]:
    return [line.split() for line in (output / variant / "asked").read_text().splitlines()]


def test_a_trial_is_trained_and_tested_once(command: Path) -> None:
    assert run_trials(trials(command, 0)) == {}
    assert [words[1] for words in asked(command)] == ["fit", "ended", "test", "ended"]
    assert run_trials(trials(command, 0)) == {}
    assert len(asked(command)) == 4


def test_what_was_tested_before_its_weights_changed_is_tested_again(command: Path) -> None:
    run_trials(trials(command, 0))
    run = trials(command, 0)[0].run
    later = (run.path / "test.json").stat().st_mtime + 10
    os.utime(run.weights, (later, later))
    run_trials(trials(command, 0))
    assert [words[1] for words in asked(command)][4:] == ["test", "ended"]


def test_what_was_stopped_is_resumed(command: Path) -> None:
    run_trials(trials(command, 0))
    trial = trials(command, 0)[0]
    trial.run.info.write_text(json.dumps({"status": "stopped"}))
    run_trials([trial])
    assert asked(command)[4][1:3] == ["fit", "--resume"]


def test_a_training_that_outlived_its_command_is_waited_for(
    command: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner, "WATCHED_EVERY", 0.01)
    [trial] = trials(command, 0)
    looked = threading.Event()
    found = runner.lock_holder

    def look(folder: Path) -> str | None:
        holder = found(folder)
        looked.set()
        return holder

    monkeypatch.setattr(runner, "lock_holder", look)
    failed: list[object] = []
    with locked_folder(trial.run.path, "training in it"):
        trial.run.config.touch()
        thread = threading.Thread(target=lambda: failed.append(run_trials([trial])))
        thread.start()
        looked.wait()
        # as the process that holds the lock does at its end
        trial.run.info.write_text(json.dumps({"status": "finished"}))
        trial.run.weights.touch()
        assert not (command / "a/asked").exists()
    thread.join()
    assert failed == [{}]
    # it is not trained again
    assert [words[1] for words in asked(command)] == ["test", "ended"]
    assert f"another process is training in it (process {os.getpid()} on " in caplog.text


@pytest.mark.parametrize("reached", [True, False])
def test_a_training_of_a_killed_command_is_stopped_when_it_is_hopeless(
    command: Path, monkeypatch: pytest.MonkeyPatch, reached: bool
) -> None:
    monkeypatch.setattr(runner, "WATCHED_EVERY", 0.01)
    [trial] = trials(command, 0)
    trial.run.config.parent.mkdir(parents=True)
    trial.run.config.touch()
    looks, asked_to_end = iter([" (process 7)"] * 4), []
    monkeypatch.setattr(runner, "lock_holder", lambda folder: next(looks, None))
    monkeypatch.setattr(runner, "stop_holder", lambda folder: asked_to_end.append(folder) or reached)
    hopeless = iter([False, True, True])
    assert Processes(1).run(trial, test=False, watch=lambda: next(hopeless, False)) is None
    # a process elsewhere is asked again, and its training then continued until it is hopeless here
    assert asked_to_end == [trial.run.path] * (1 if reached else 2)
    assert (command / "a/asked").exists() != reached


@pytest.mark.parametrize("ends", [True, False])
def test_a_training_that_locks_the_folder_later_is_waited_for(
    command: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """It had begun to start when its command was killed, so that this one's own training is refused."""
    monkeypatch.setattr(runner, "WATCHED_EVERY", 0.01)
    [trial] = trials(command, 1)  # of a seed whose trainings fail
    looks = iter([None, " (process 7)", "", ""])
    monkeypatch.setattr(runner, "lock_holder", look := lambda folder: next(looks, None))
    if ends:

        def finished(folder: Path) -> str | None:
            holder = look(folder)
            if holder == "":
                trial.run.info.write_text(json.dumps({"status": "finished"}))
                trial.run.weights.touch()
            return holder

        monkeypatch.setattr(runner, "lock_holder", finished)
    failed = run_trials([trial], test=False)
    # as the orphan did not train to the end, its training is continued, which fails
    assert failed == ({} if ends else {trial: "crossx fit: error: the loss is not finite."})
    assert [words[1] for words in asked(command)] == ["fit"] * (1 if ends else 2)
    assert (asked(command)[-1][2] == "--resume") == (not ends)


def test_a_failure_is_told_in_one_line_and_stops_no_other(command: Path) -> None:
    reports = []
    failed = run_trials(
        trials(command, 1, 2, 0), report=lambda trial, reason: reports.append((trial.seed, reason))
    )
    reasons = {trial.seed: reason for trial, reason in failed.items()}
    assert reasons.keys() == {1, 2}
    assert reasons[1] == "crossx fit: error: the loss is not finite."
    assert reasons[2] == "killed by SIGKILL, as where memory is short."
    assert sorted(reports) == sorted([(0, None), *reasons.items()], key=lambda pair: pair[0])


def test_a_folder_that_cannot_be_made_stops_no_other(command: Path) -> None:
    planned = trials(command, 0, text="variants: {a: {}, b: {}}")
    command.mkdir()
    (command / "a").touch()
    failed = run_trials(planned)
    assert {trial.variant for trial in failed} == {"a"}
    assert planned[1].is_done


def test_jobs_run_at_the_same_time_and_share_the_cores(
    command: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEETS", "2")
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 6)
    assert run_trials(trials(command, 0, 3), jobs=2) == {}
    assert [words[1] for words in asked(command)][:2] == ["fit", "fit"]
    assert {words[3] for words in asked(command) if words[1] == "fit"} == {"3"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_processes_and_what_is_left_runs_next_time(
    command: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, number: signal.Signals
) -> None:
    # A shell that starts the tests in the background has SIGINT ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setenv("HANGS", "")
    notes = command / "a" / "asked"

    def interrupt() -> None:
        deadline = time.monotonic() + 600
        while not (notes.exists() and notes.read_text().endswith("\n")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        run_trials(trials(command, 0, 3, text="variants: {a: {}, b: {}}"))
    interrupting.join()
    # nothing was begun of what was waiting
    assert not (command / "b").exists()
    ((_, verb, *_, process),) = asked(command)
    assert verb == "fit"
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


def test_an_existing_run_with_other_options_is_refused_before_anything_runs(command: Path) -> None:
    run_trials(trials(command, 0))
    with pytest.raises(UsageError, match=r"a/seed-0: trained with model.num_parts 2, and now it is 4"):
        trials(command, 0, text="variants: {a: {model: {num_parts: 4}}}")
    # what changes no result is no other option
    trials(command, 0, text="variants: {a: {data: {num_workers: 3}}}")


def test_an_option_left_out_and_given_is_the_same_training(command: Path) -> None:
    run_trials(trials(command, 0))
    assert trials(command, 0, text="variants: {a: {data: {sampling: uniform}}}")[0].is_done


def test_a_seed_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="twice: 3 0 3"):
        trials(tmp_path / "out", 3, 0, 3)


def test_what_no_training_could_do_is_found_first(tmp_path: Path) -> None:
    data = f"dataset: synthetic, root: {tmp_path / 'images'}, num_classes: 2, images_per_class: 4"
    good = f"good: {{data: {{{data}}}}}"
    check_trials(trials(tmp_path / "out", 0, text=f"variants: {{{good}}}"))
    for more, sections, message in (
        ("", "model: {c3s_weights: [1]}", "c3s_weights takes 3 numbers"),
        ("", "model: {num_parts: two}", "method 'crossx': option num_parts is of the wrong type"),
        ("", "model: {osme_placement: outptu}", "Did you mean 'output'"),
        ("image_size: 32", "", "image_size 32 is too small"),
        ("image_size: 64", "model: {method: nts, num_proposals: 40}", "images of 64 pixels have 39 anchors"),
        ("batch_size: 5", "model: {method: mamc}", "batch_size must be even"),
        ("sampling: uniform", "model: {method: mamc}", "needs data.sampling pairs"),
        ("", "model: {method: mamc}, optim: {mixup: 0.2}", "needs one class per image"),
    ):
        bad = f"bad: {{data: {{{data}, {more}}}, {sections}}}"
        with pytest.raises(UsageError, match=f"variant bad: .*{message}"):
            check_trials(trials(tmp_path / "out", 0, text=f"variants: {{{good}, {bad}}}"))
    photos = layouts.write_folder(tmp_path / "photos", classes=2, images_per_class=4)
    untestable = f"variants: {{a: {{data: {{dataset: folder, root: {photos}, test_fraction: 0}}}}}}"
    with pytest.raises(CrossXError, match="variant a: dataset 'folder' has no test images"):
        check_trials(trials(tmp_path / "out", 0, text=untestable))
    lost = "data: {dataset: cub, root: nowhere}"
    with pytest.raises(CrossXError, match=r"variant a: .*nowhere"):
        check_trials(trials(tmp_path / "out", 0, text=f"variants: {{a: {{{lost}}}}}"))
    with pytest.raises(CrossXError, match=r"variant b: .*nowhere"):
        check_trials(trials(tmp_path / "out", 0, text=f"variants: {{{good}, b: {{{lost}}}}}"))
    # no variant is to blame for what all have
    both = f"variants: {{a: {{{lost}}}, b: {{{lost}, model: {{method: plain}}}}}}"
    with pytest.raises(CrossXError, match=r"^(?!variant).*nowhere"):
        check_trials(trials(tmp_path / "out", 0, text=both))


def test_tuning_needs_validation_of_the_epoch_that_is_kept(tmp_path: Path) -> None:
    data = f"dataset: synthetic, root: {tmp_path / 'images'}, num_classes: 2, images_per_class: 8"
    for more, sections, message in (
        ("", "", ""),
        ("", "trainer: {check_val_every_n_epoch: 2, max_epochs: 4}", ""),
        ("", "trainer: {check_val_every_n_epoch: 2, max_epochs: 5}", "validation after the last epoch"),
        ("", "trainer: {limit_val_batches: 0}", "validation after the last epoch"),
        ("", "model: {method: probe}, trainer: {max_epochs: 0}", "validation after the last epoch"),
        ("", "optim: {selection: best_on_test}", "tuning chooses on validation images"),
        ("", "trainer: {max_steps: 3}", "trainer.max_steps may stop within an epoch"),
        ("train_on: trainval", "", "validation images that are not trained on"),
    ):
        text = f"variants: {{a: {{data: {{{data}, {more}}}, {sections}}}}}"
        searched = trials(tmp_path / "out", 0, text=text)
        with pytest.raises(UsageError, match=f"variant a: .*{message}") if message else nullcontext():
            check_trials(searched, tuned=True)


def test_processes_share_cores_and_take_gpus_in_turn() -> None:
    assert divide_machine(1, 8, ["0", "1"], {}) == [{}]
    assert divide_machine(2, 8, [], {}) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert divide_machine(3, 2, ["0"], {"OMP_NUM_THREADS": "9"}) == [{}] * 3
    gpus = [place["CUDA_VISIBLE_DEVICES"] for place in divide_machine(3, 8, ["4", "7"], {})]
    assert gpus == ["4", "7", "4"]


@pytest.mark.slow
def test_the_real_command_fails_as_the_stand_in_does(tmp_path: Path) -> None:
    suite = textwrap.dedent("""
        variants:
          a:
            data: {dataset: folder, root: nowhere}
    """)
    failed = run_trials(trials(tmp_path / "out", 0, text=suite))
    assert "crossx fit: error: " in "".join(failed.values())
    assert "nowhere" in "".join(failed.values())
