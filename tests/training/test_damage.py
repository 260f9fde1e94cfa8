"""Damaged and lost files of a run that is resumed: replaced by an intact copy, restored, or refused in one line."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from multiprocessing import connection
from pathlib import Path

import pytest
import torch

from crossx.cli.main import main
from crossx.data.datamodule import DataModule
from crossx.errors import UsageError
from crossx.runs import Run, write_json
from crossx.training import fit as training
from crossx.training import recovery
from crossx.training.checkpoints import read_checkpoint
from crossx.training.config import Config
from crossx.training.fit import fit, resume
from crossx.training.task import Task
from refusals import refusal

DAMAGES = {
    "missing": None,
    "empty": b"",
    "garbage": bytes(range(256)) * 8,
    "not UTF-8": b"\xff\xfe{",
    "wrong types": b'{"schema": 1, "epochs": 7, "status": [], "images": "many", "classes": 3}',
    "a list": b"[1, 2]",
}


def fail_at(patch, step: int) -> None:
    """Let the training fail instead of this step, counted from 1."""
    forward, seen = Task.forward, []

    def failing(self, *batch):
        seen.append(1)
        if len(seen) == step:
            raise RuntimeError("power cut")
        return forward(self, *batch)

    patch.setattr(Task, "forward", failing)


@pytest.fixture
def stopped(make_config, monkeypatch) -> Run:
    """A run of three epochs of four steps that failed in the third."""
    config = make_config("stopped")
    with monkeypatch.context() as patch:
        fail_at(patch, 11)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(config)
    return Run(config.run_path())


@pytest.fixture
def resumed(monkeypatch):
    """Resume without training; return the step at which it would begin, None for the start."""
    begun = []
    monkeypatch.setattr(
        training.Loop, "run", lambda loop: begun.append(loop.checkpoint and loop.checkpoint["step"])
    )
    monkeypatch.setattr(training, "finish", lambda loop, info: None)

    def call(path, **options):
        resume(path, **options)
        return begun[-1]

    return call


def copy(run: Run, name: str) -> Run:
    return Run(Path(shutil.copytree(run.path, run.path.with_name(name.replace(" ", "-")))))


def damage(path: Path, content: bytes | None) -> None:
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)


@pytest.mark.slow
def test_every_file_but_the_checkpoints_is_restored_or_not_needed(stopped, resumed, monkeypatch, caplog):
    run, spec, info = stopped, stopped.read_spec(), stopped.read_info()
    options, train, begun = Config.from_yaml(run.config), training._train, []
    kept = [name for name in training.KEPT if name != "status"]
    monkeypatch.setattr(training, "_train", lambda *arguments: begun.append(arguments))
    for name in ("config.yaml", "run.json", "model.json", "metrics.json", "metrics.csv"):
        whole = (run.path / name).read_bytes()
        for kind, content in {**DAMAGES, "half": whole[: len(whole) // 2]}.items():
            damage(run.path / name, content)
            caplog.clear()
            resume(run.path)
            config, _, before, checkpoint, _ = begun[-1]
            assert (config, checkpoint["step"]) == (options, 8), (name, kind)
            assert [before[key] for key in kept] == [info[key] for key in kept], (name, kind)
            assert recovery.read_or_restore(run.spec, run.read_spec, checkpoint) == spec
            restored = not name.startswith("metrics")
            assert (f"{run.path / name}: " in caplog.text) == restored, (name, kind)
            assert (run.path / name).exists() == (restored or kind != "missing")
    monkeypatch.setattr(training, "_train", train)
    run.info.unlink()
    assert resumed(run.path) == 8
    assert run.read_info()["id"]
    images = run.images.read_bytes()
    for content in (*DAMAGES.values(), images[: len(images) // 2]):
        damage(run.images, content)
        assert resumed(run.path) == 8
        assert run.images.read_bytes() == images


@pytest.mark.parametrize(
    "name", ["config.yaml", "model.json", "run.json", "images.npy", "metrics.csv", "checkpoints/last.ckpt"]
)
def test_a_folder_in_the_place_of_a_file_is_named(make_config, name):
    config = make_config()
    path = config.run_path() / name
    path.mkdir(parents=True)
    (config.run_path() / "checkpoints").mkdir(exist_ok=True)
    assert refusal(resume, config.run_path()) == f"{path}: a folder where the run has a file. Move it away."


def test_what_cannot_be_continued_is_refused_until_it_is_restarted(stopped, resumed):
    """No silent start from scratch, whatever tells that there was progress."""
    for kind in ("empty", "missing"):
        run = copy(stopped, kind)
        for path in run.checkpoints.glob("*.ckpt"):
            damage(path, DAMAGES[kind])
        assert f"`crossx fit --resume {run.path} --restart` starts over" in refusal(resumed, run.path)
        assert resumed(run.path, restart=True) is None
        assert not run.checkpoints.exists()
        assert not (run.path / "metrics.json").exists()
    shutil.rmtree(stopped.checkpoints)
    for name in ("metrics.json", "metrics.csv", "run.json"):
        assert "--restart" in refusal(resumed, stopped.path)
        (stopped.path / name).unlink()
    assert resumed(stopped.path) is None


def test_a_run_that_never_began_starts_over(stopped, resumed):
    shutil.rmtree(stopped.checkpoints)
    for path in recovery._histories(stopped):
        path.unlink()
    write_json(stopped.info, {**json.loads(stopped.info.read_text()), "selection": None})
    assert resumed(stopped.path) is None


def test_a_configuration_that_cannot_be_restored_is_refused(stopped, resumed):
    text = stopped.config.read_text()
    shutil.rmtree(stopped.checkpoints)
    for size in (0, len(text) // 3, len(text) // 2, text.index("output:")):
        stopped.config.write_text(text[:size])
        line = refusal(resumed, stopped.path, restart=True)
        assert line.startswith(f"{stopped.config}: ")
        assert "Put back a copy of the file, or train a new run" in line


def test_a_mistake_in_the_configuration_is_not_overwritten(stopped, resumed):
    text = stopped.config.read_text().replace("max_epochs: 3", "max_epochs: 0")
    stopped.config.write_text(text)
    assert "max_epochs must be at least 1" in refusal(resumed, stopped.path)
    assert stopped.config.read_text() == text


@pytest.mark.slow
def test_a_named_checkpoint_is_the_one_that_is_read(stopped, resumed, caplog):
    caplog.set_level("INFO")
    steps = {path: read_checkpoint(path)["step"] for path in stopped.checkpoints.glob("*.ckpt")}
    assert len(steps) == 3
    for path, step in steps.items():
        run = copy(stopped, path.name)
        named = run.checkpoints / path.name
        assert resumed(named) == step
        assert f"goes back to {named}: epoch {step // 4}, step {step}" in caplog.text
        assert read_checkpoint(run.last)["step"] == step
    for path, content in ((stopped.best, b""), (stopped.last, DAMAGES["garbage"])):
        damage(path, content)
        line = refusal(resume, path)
        assert line.startswith(f"{path}: damaged")
        assert f"`crossx fit --resume {stopped.path}` takes the newest intact one" in line
    assert "no such checkpoint" in refusal(resume, stopped.checkpoints / "other.ckpt")
    assert "not a checkpoint" in refusal(resume, stopped.config)
    assert "without a checkpoint" in refusal(resume, stopped.previous, restart=True)


@pytest.mark.slow
def test_a_damaged_model_of_a_finished_run_is_made_again(make_config, caplog):
    run = fit(make_config(trainer={"max_epochs": 1}))
    weights, info = run.weights.read_bytes(), run.read_info()
    flipped = weights[:-1] + bytes([weights[-1] ^ 1])
    for content in (None, b"", weights[: len(weights) // 2], flipped):
        damage(run.weights, content)
        resume(run.path)
        assert "It is made again from the checkpoints" in caplog.text
        assert run.weights.read_bytes() == weights
    assert run.read_info() == info
    with pytest.raises(UsageError, match="is finished"):
        resume(run.path)


@pytest.mark.slow
def test_a_damaged_configuration_of_a_finished_run_is_restored(make_config, caplog):
    run = fit(make_config(trainer={"max_epochs": 1}))
    weights, config = run.weights.read_bytes(), run.config.read_text()
    for content in (None, b"", config[: len(config) // 2].encode(), b"{a: 1}", b"- 1"):
        damage(run.config, content)
        caplog.clear()
        resume(run.path)
        assert f"{run.config}: " in caplog.text
        assert "It is restored from the checkpoint." in caplog.text
        assert run.config.read_text() == config
        assert run.weights.read_bytes() == weights
    with pytest.raises(UsageError, match="is finished"):
        resume(run.path)
    # of another version, which is no damage
    run.config.write_text(config.replace("optim:\n", "optim:\n  momentums: 1\n"))
    with pytest.raises(UsageError, match="is finished"):
        resume(run.path)


@pytest.mark.slow
def test_a_lost_best_epoch_is_copied_or_named(stopped, resumed, caplog):
    """The weights of another epoch are never taken for those of the best one."""
    best = int(read_checkpoint(stopped.last)["best"]["epoch"])
    damage(stopped.best, b"")
    run = copy(stopped, "copied")
    resumed(run.path)
    assert read_checkpoint(run.best)["epoch"] == best
    assert "the best so far" not in caplog.text
    # as if another epoch had been the best
    for path in (stopped.last, stopped.previous):
        state = read_checkpoint(path)
        state["best"]["epoch"] = 3
        torch.save(state, path)
    stopped.checksums.unlink()
    resumed(stopped.path)
    assert "the weights of epoch 3" in caplog.text
    assert "the best so far" in caplog.text


def run_main(capsys, config) -> tuple[int, str]:
    recipe = config.run_path().with_suffix(".yaml")
    recipe.write_text(config.to_yaml())
    code = main(["fit", "--config", str(recipe)])
    return code, capsys.readouterr().err


@pytest.fixture
def default_sigint():
    # a shell that starts the tests in the background has SIGINT ignored, and Python leaves it so
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_sigint")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["reading", "set-up", "finish"])
def test_a_signal_outside_of_the_steps_is_one_line(make_config, monkeypatch, capsys, number, where):
    config = make_config(trainer={"max_epochs": 1})
    place, line = {
        "reading": (
            "crossx.cli.fit._print_start",
            f"stopped by {'SIGTERM' if number == signal.SIGTERM else 'Ctrl-C'}.",
        ),
        "set-up": (
            "crossx.data.datamodule.DataModule.check_images",
            "stopped during set-up. Run it again.",
        ),
        "finish": (
            "crossx.training.finish.save_weights",
            f"stopped after 1 complete epoch. Continue with `crossx fit --resume {config.run_path()}`.",
        ),
    }[where]
    monkeypatch.setattr(place, lambda *args, **options: os.kill(os.getpid(), number))
    code, err = run_main(capsys, config)
    assert code == 130
    assert err.splitlines()[-1] == f"crossx fit: error: {line}"
    assert "Traceback" not in err
    assert config.run_path().exists() == (where == "finish")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_killed_loader_is_one_line_and_the_run_continues(make_config, monkeypatch, capsys):
    forward, seen = Task.forward, []

    def killing(self, *batch):
        seen.append(1)
        if len(seen) == 6:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
            # torch raises the error wherever this thread is when the signal comes. Raised in the `__exit__` of
            # `torch.no_grad`, it would leave the later tests without gradients.
            time.sleep(60)
        return forward(self, *batch)

    config = make_config(data={"num_workers": 1}, trainer={"max_epochs": 4})
    with monkeypatch.context() as patch:
        patch.setattr(Task, "forward", killing)
        code, err = run_main(capsys, config)
    last = err.splitlines()[-1]
    assert (code, "Traceback" in err) == (1, False)
    assert "a process that loads images was killed" in last
    assert f"Continue with `crossx fit --resume {config.run_path()}`" in last
    monkeypatch.setattr(DataModule, "num_workers", 0)
    assert resume(config.run_path()).read_info()["status"] == "finished"


@pytest.mark.slow
def test_events_of_a_training_that_starts_over_are_deleted(make_config, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(trainer={"logger": ["tensorboard"], "log_every_n_steps": 1, "max_epochs": 1})
    with monkeypatch.context() as patch:
        fail_at(patch, 3)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(config)
    folder = config.run_path() / "tensorboard"
    assert len(list(folder.iterdir())) == 1
    resume(config.run_path())
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss_step")] == [1, 2, 3, 4]


def test_a_full_disk_ends_tensorboard_in_one_line_and_not_the_training(make_config, monkeypatch, capsys):
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "append", full)
    monkeypatch.setattr(LocalFileSystem, "write", full)
    config = make_config(trainer={"logger": ["tensorboard"], "log_every_n_steps": 1, "max_epochs": 1})
    code, err = run_main(capsys, config)
    assert code == 0
    assert err.count("tensorboard: its files cannot be written (No space left on device)") == 1
    assert "Traceback" not in err


@pytest.mark.usefixtures("default_sigint")
def test_ctrl_c_while_a_batch_is_handed_over_prints_no_traceback(make_config, monkeypatch, capfd):
    """The worker's thread that shares tensors loses its connection in the middle of the handshake."""
    answer, seen, here = connection.answer_challenge, [], os.getpid()

    def interrupted(conn, key):
        seen.append(1)
        if len(seen) == 4 and os.getpid() == here:
            conn.close()
            raise KeyboardInterrupt
        return answer(conn, key)

    monkeypatch.setattr(connection, "answer_challenge", interrupted)
    code, err = run_main(capfd, make_config(data={"num_workers": 1}))
    assert code == 130
    assert len(seen) == 4
    assert "Traceback" not in err
    assert "stopped after 0 complete epochs" in err.splitlines()[-1]
