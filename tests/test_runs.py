import errno
import fcntl
import json
import os
import platform
import signal
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossx.errors import CrossXError
from crossx.hub import HubModel
from crossx.runs import (
    ModelSpec,
    Preprocessing,
    Run,
    atomic_path,
    check_output_file,
    environment,
    lock_holder,
    locked_folder,
    open_run,
    read_json,
    stop_holder,
    storage_error,
    user_path,
    write_json,
    write_text,
)
from crossx.runs.nearby import nearest_run
from refusals import refusal

SPEC = ModelSpec(
    method="crossx",
    options={"num_parts": 2, "c3s_weights": [0.5, 0.25, 0.5]},
    backbone="resnet18",
    backbone_args={},
    classes=("ani", "auklet"),
    preprocessing=Preprocessing(448, 600, "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 20),
    dataset="cub",
    levels={"family": ("Cuculidae", "Alcidae")},
)


def make_run(folder: Path, *files: str) -> Run:
    run = Run(folder)
    write_json(run.spec, SPEC.to_json())
    for name in files:
        write_text(folder / name, "weights")
    return run


@given(
    classes=st.lists(st.text().filter(lambda text: text.strip(" ")), min_size=1, max_size=5, unique=True),
    size=st.integers(32, 2000),
)
def test_spec_survives_json(classes: list[str], size: int) -> None:
    preprocessing = replace(SPEC.preprocessing, image_size=size, resize_size=size + 64)
    spec = replace(SPEC, classes=tuple(classes), levels={"rank": tuple(classes)}, preprocessing=preprocessing)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json())), Path("model.json")) == spec


def test_spec_of_another_version_or_kind() -> None:
    with pytest.raises(CrossXError, match="schema 3, this version of crossx reads 1 to 2: upgrade"):
        ModelSpec.from_json({**SPEC.to_json(), "schema": 3}, Path("model.json"))
    values = SPEC.to_json()
    del values["classes"]
    with pytest.raises(CrossXError, match=r"not a model description of crossx .classes: is missing"):
        ModelSpec.from_json(values, Path("model.json"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"backbone": "hf-hub:evil/model"}, "backbone: is no plain name"),
        ({"backbone": ["resnet18"]}, "backbone: should be a valid string"),
        ({"classes": "abc"}, "classes: should be a list"),
        ({"classes": [1, 2]}, "classes.0: should be a valid string"),
        ({"classes": []}, "classes: list should have at least 1 item"),
        ({"classes": ["ani", "auklet", "ani"]}, "(classes: 'ani' is given twice)"),
        ({"classes": ["ani", ""]}, "(classes: class 1 has no name)"),
        ({"classes": ["  ", "ani"]}, "(classes: class 0 has no name)"),
        ({"options": [1]}, "options: should be a mapping"),
        ({"levels": ["family"]}, "levels: should be a mapping"),
        ({"levels": {"family": ["Alcidae"]}}, "level family names 1 groups for 2 classes"),
        (
            {"preprocessing": {**SPEC.to_json()["preprocessing"], "crop": 3}},
            "preprocessing.crop: is not known here",
        ),
        ({"preprocessing": {}}, "preprocessing.image_size: is missing"),
    ],
)
def test_spec_of_a_stranger_is_checked(change: dict[str, object], reason: str) -> None:
    line = refusal(ModelSpec.from_json, {**SPEC.to_json(), **change}, Path("model.json"))
    assert line.startswith("model.json: not a model description of crossx (")
    assert reason in line


def test_results_are_those_of_the_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path, "model.safetensors", "checkpoints/best.ckpt")
    assert run.read_results(run.weights) == {}
    results = {"weights": "model.safetensors", "top1": 0.5}
    write_json(tmp_path / "test.json", results)
    assert run.read_results(run.weights) == results
    assert run.read_results(run.weights, "val") == run.read_results(run.best) == {}
    later = (tmp_path / "test.json").stat().st_mtime + 1
    os.utime(run.weights, (later, later))
    assert run.read_results(run.weights) == {}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("model.safetensors", "checkpoints/best.ckpt", "checkpoints/last.ckpt"), "model.safetensors"),
        (("checkpoints/best.ckpt", "checkpoints/last.ckpt"), "checkpoints/best.ckpt"),
        (("checkpoints/last.ckpt",), "checkpoints/last.ckpt"),
    ],
)
@pytest.mark.parametrize("status", ["running", "stopped", "failed"])
def test_run_folder_gives_its_best_weights(
    tmp_path: Path, files: tuple[str, ...], expected: str, status: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path, *files)
    write_json(run.info, {"status": status})
    for _ in range(2):
        assert open_run(tmp_path) == (run, tmp_path / expected)
    # once, however often it is opened
    warned = [message for message in caplog.messages if f"not finished ({status}): these are" in message]
    assert len(warned) == (expected != "model.safetensors")
    assert all(f"weights of {expected}. `crossx fit --resume " in message for message in warned)
    for file in files:
        assert open_run(tmp_path / file) == (run, tmp_path / file)


@pytest.mark.parametrize("status", ["finished", "imported", None])
@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        (("checkpoints/best.ckpt", "checkpoints/last.ckpt"), "`crossx fit --resume {run}` restores it"),
        (("checkpoints/last.ckpt",), "`crossx fit --resume {run}` restores it"),
        (("checkpoints/best.ckpt",), "Put back a copy of it, or give {run}/checkpoints/best.ckpt"),
    ],
)
def test_a_checkpoint_is_not_taken_for_the_model_of_a_finished_run(
    tmp_path: Path, files: tuple[str, ...], remedy: str, status: str | None
) -> None:
    run = make_run(tmp_path, *files)
    if status:
        write_json(run.info, {"status": status})
    message = refusal(open_run, tmp_path)
    why = "the run is finished." if status else "there is no run.json either."
    assert message.startswith(f"{run.weights}: no such file, and {why}")
    assert remedy.format(run=tmp_path) in message
    for file in files:
        assert open_run(tmp_path / file) == (run, tmp_path / file)
    write_json(run.info, {"seed": 0})
    assert "no such file, and run.json has no status." in refusal(open_run, tmp_path)
    write_text(run.weights, "weights")
    assert open_run(tmp_path) == (run, run.weights)


@pytest.mark.parametrize("content", [None, "", "{", '{"a": 1}'])
def test_a_damaged_file_of_a_run_is_restored_by_resuming(tmp_path: Path, content: str | None) -> None:
    for folder, remedy in (("trained", True), ("shared", False)):
        run = make_run(tmp_path / folder, "model.safetensors", *(["checkpoints/last.ckpt"] if remedy else []))
        write_text(run.info, '{"seed": "one"}' if content == '{"a": 1}' else "{")
        write_text(run.config, "model: [")
        run.spec.unlink()
        if content is not None:
            write_text(run.spec, content)

        def read_spec(run: Run = run) -> object:
            return open_run(run.path)[0].read_spec()

        for read in (read_spec, run.read_info, run.read_config):
            with pytest.raises(CrossXError) as caught:
                read()
            said = f"`crossx fit --resume {run.path}` restores it from a checkpoint." in str(caught.value)
            assert said == remedy
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "run.json"])
def test_a_folder_in_the_place_of_a_file_of_a_run_is_named(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, "model.safetensors", "checkpoints/best.ckpt", "checkpoints/last.ckpt")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    message = f"{tmp_path / name}: a folder where the run has a file. Move it away."
    assert refusal(open_run, run.path) == message


def test_damaged_results_name_the_command_that_writes_them_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my run", "model.safetensors")
    for split in ("test", "val", "train"):
        path = run.path / f"{split}.json"
        again = f"`crossx test '{run.path}' --split {split}`."
        for content in ("", "{", "[]", '{"top1": "high"}', '{"top1": 0.5}'):
            write_text(path, content)
            assert refusal(run.require_results, split, ["n"]).endswith(again)
        path.unlink()
        path.mkdir()
        assert refusal(run.require_results, split, ["n"]) == (
            f"{path}: a folder where the run has a file. Move it away."
        )


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CrossXError, match="no such run folder or checkpoint"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(CrossXError, match="not a run folder"):
        open_run(tmp_path)
    (tmp_path / "stray.ckpt").touch()
    with pytest.raises(CrossXError, match=r"no model\.json next to it"):
        open_run(tmp_path / "stray.ckpt")
    make_run(tmp_path / "run")
    with pytest.raises(
        CrossXError, match=r"a shared model without its weights \(model.safetensors\): copy or"
    ):
        open_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(CrossXError, match="has no weights yet"):
        open_run(tmp_path / "run")


def test_a_folder_around_or_in_a_run_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To train into it would be refused."""
    monkeypatch.chdir(tmp_path)
    for folder in ("one/a", "several/a", "several/b"):
        make_run(Path(folder), "model.safetensors", "checkpoints/last.ckpt")
    for folder in ("one/a/test/deeper", "photos/robin", "empty"):
        Path(folder).mkdir(parents=True)
    of_one = "It is in the run one/a: give that, or a checkpoint in it."
    expected = {
        "one": "It holds 1 run: give one/a.",
        "several": "It holds 2 runs: give one, such as several/a.",
        "one/a/checkpoints": of_one,
        "one/a/test": of_one,
        "one/a/test/deeper": of_one,
        "photos": "Give a folder that `crossx fit` wrote.",
        "empty": "`crossx fit --output empty` makes one.",
    }
    for folder, remedy in expected.items():
        assert refusal(open_run, folder) == f"{folder}: not a run folder (no model.json). {remedy}"
    monkeypatch.chdir("one/a/test")
    assert refusal(open_run, ".").endswith("It is in the run ..: give that, or a checkpoint in it.")


@pytest.mark.parametrize("name", ["model.json", "run.json", "config.yaml", "test/report.html", "METRICS.CSV"])
def test_a_file_without_weights_names_its_run(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "run", "model.safetensors")
    path = tmp_path / "run" / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    expected = f"{path}: a file without weights. Give its run, {tmp_path / 'run'}, or a checkpoint."
    assert refusal(open_run, path) == expected


@pytest.mark.parametrize(
    ("slip", "near"),
    [
        ("mien", "runs/mine"),
        ("alone2", "alone"),
        ("runs/mien", "runs/mine"),
        ("runs/Birds2", "runs/birds-s0"),
        # slips in the folder's name; one that the Hub cannot have, and one that it may have
        ("my run/a", "my runs/a"),
        ("rnus/mine", "runs/mine"),
        ("runs/mine/checkpoints/bst.ckpt", "runs/mine/checkpoints/best.ckpt"),
        ("runs/mine/chekpoints/best.ckpt", "runs/mine/checkpoints/best.ckpt"),
        ("runs/mine/best.ckpt", "runs/mine/checkpoints/best.ckpt"),
        ("photos2", None),
        ("elsewhere/mine", None),
        ("runs/zebra", None),
        ("/", None),
    ],
)
def test_a_slip_in_the_path_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slip: str, near: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("alone", "runs/mine", "runs/birds-s0", "my runs/a"):
        make_run(tmp_path / folder, "checkpoints/best.ckpt", "checkpoints/last.ckpt")
    (tmp_path / "photos").mkdir()
    assert nearest_run(Path(slip)) == (f" Did you mean '{near}'?" if near else "")
    if near:
        # also from elsewhere, by the whole path
        assert nearest_run(tmp_path / slip).endswith(f"{near}'?") or "/" not in slip
        monkeypatch.setattr("crossx.runs.folder.download_model", refuse_download)
        assert refusal(open_run, slip).endswith(f". Did you mean {near!r}?")


def test_a_folder_that_may_not_be_read_is_no_run_that_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("runs/locked", "runs/lock", "locks"):
        make_run(tmp_path / folder)
    read = os.stat

    def deny(path: str | Path, **options: Any) -> os.stat_result:
        if {"locked", "locks"} & set(Path(path).parts[:-1]):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path, **options)

    monkeypatch.setattr(os, "stat", deny)
    assert refusal(open_run, tmp_path / "runs/lockd").endswith("runs/lock'?")
    assert refusal(open_run, tmp_path / "lock").endswith(": no such run folder or checkpoint file.")


def refuse_download(model: HubModel) -> Path:
    assert str(model) == "rnus/mine"
    raise CrossXError(f"{model}: no such model on the Hub.")


def test_a_failure_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old")

    def half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CrossXError, match="no space left on the disk"):
        half()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_text(tmp_path / "file.txt", "x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "name",
    [
        *("config.yaml", "model.json", "run.json", "metrics.csv", "images.npy", "neighbors.npz", ".lock"),
        *("checkpoints", "checkpoints/last.ckpt", "tensorboard/events", "test.json", "val_parts.json"),
        *("test_against_other run.json", "test", "test/predictions.npz", "train/confusion.png"),
    ],
)
def test_what_a_run_writes_itself_has_no_other_output(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "run")
    for number, own, other in (
        (errno.EACCES, "Copy the run to a folder of your own.", "Choose another --output."),
        (errno.ENOTDIR, "Move it away.", "Choose another --output."),
    ):
        error = OSError(number, os.strerror(number))
        assert str(storage_error(tmp_path / "run" / name, error)).endswith(own)
        # where there is no run
        assert str(storage_error(tmp_path / "out" / name, error)).endswith(other)


@pytest.mark.parametrize(
    "name",
    [
        "run",
        "run/mine.onnx",
        "run/exports",
        "run/test/mine.csv",
        "run/test/report.html",
        "run/pages/a/b.html",
    ],
)
def test_what_is_written_into_a_run_by_choice_may_go_elsewhere(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "run")
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    assert str(storage_error(tmp_path / name, error)).endswith("to write there. Choose another --output.")
    line = str(storage_error(tmp_path / "run", error, tmp_path / name, "--features"))
    assert line == f"{tmp_path / 'run'}: no permission to write there. Choose another --features."


def test_the_remedy_is_that_of_the_file_not_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(**_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    run = make_run(tmp_path / "run")
    monkeypatch.setattr(tempfile, "TemporaryFile", deny)
    assert "Copy the run" in refusal(check_output_file, run.path / "test.json")
    assert "another --output" in refusal(check_output_file, run.path / "mine.onnx")
    assert "another --features" in refusal(check_output_file, run.path / "f.parquet", "--features")
    with pytest.raises(CrossXError, match="Copy the run"), locked_folder(run.path, "training in it"):
        pass


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CrossXError, match="there is a file where a folder is needed"):
        write_text(tmp_path / "file" / "run.json", "x")


def test_json_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"top1": float("nan")})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    for name, message in (
        ("list", "not a JSON object"),
        ("broken", "not valid JSON"),
        ("none", "no such file"),
    ):
        with pytest.raises(CrossXError, match=message):
            read_json(tmp_path / f"{name}.json")


def test_environment_names_versions() -> None:
    found = environment()
    assert {"crossx", "torch", "timm", "lightning"} <= found["versions"].keys()
    json.dumps(found)


def test_a_spec_without_temperature_has_1(tmp_path: Path) -> None:
    values = SPEC.to_json()
    del values["temperature"]
    assert ModelSpec.from_json(values, tmp_path).temperature == 1
    assert ModelSpec.from_json({**values, "temperature": 1.5}, tmp_path).temperature == 1.5


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "warm", None])
def test_temperatures_that_cannot_be_are_refused(temperature: object) -> None:
    with pytest.raises(CrossXError, match=r"model\.json: not a model description of crossx"):
        ModelSpec.from_json({**SPEC.to_json(), "temperature": temperature}, Path("model.json"))


HOLD = """
import pathlib, sys
from crossx.runs import locked_folder
with locked_folder(pathlib.Path(sys.argv[1]), "working in it"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_locked_until_its_process_ends_also_after_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        line = refusal(enter, folder)
        assert line.startswith(f"{folder}: another process is waiting here (process {process.pid} on ")
        assert platform.node() in line
        process.kill()
    assert [file.name for file in folder.iterdir()] == [".lock"]
    enter(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/locks").is_file(), reason="only Linux tells which process has a lock")
def test_the_process_that_has_a_lock_can_be_asked_to_end(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert not stop_holder(folder)
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        lock = folder / ".lock"
        written = lock.read_text()
        # of another machine, of another process, and not written yet
        for other in (
            written.replace(platform.node(), "elsewhere"),
            f"process 1 on {platform.node()}, since",
            "",
        ):
            lock.write_text(other)
            assert not stop_holder(folder)
        assert process.poll() is None
        lock.write_text(written)
        assert stop_holder(folder)
        assert process.wait() == -signal.SIGTERM
    # what a killed process leaves
    assert lock.read_text() == written
    assert not stop_holder(folder)


FORK = """
import fcntl, os, platform, sys
with open(sys.argv[1], "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write(f"process {os.getpid()} on {platform.node()}, since")
    lock.flush()
    if os.fork():
        os._exit(0)
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/locks").is_file(), reason="only Linux tells which process has a lock")
def test_the_number_of_a_dead_process_is_not_asked_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    command = [sys.executable, "-c", FORK, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        process.wait()
        # its child has inherited the lock; the number may be another process's by now
        assert f"process {process.pid} on" in (lock_holder(tmp_path) or "")
        monkeypatch.setattr(os, "kill", lambda *found: asked.append(found))
        assert not stop_holder(tmp_path)
    assert asked == []


def enter(folder: Path) -> None:
    with locked_folder(folder, "waiting here"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_does_not_stop_the_work(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_folder(tmp_path, "waiting here"):
        enter(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert f"{tmp_path}: cannot be locked here" in caplog.text


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "there is a file where a folder is needed" in refusal(enter, tmp_path / "file")
    assert "cannot be written" in refusal(enter, Path("/proc/folder"))


def test_names_that_are_not_utf8_are_written_with_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "a.json", {name: [name, {"path": (name,)}], "n": 1})
    assert read_json(tmp_path / "a.json") == {"caf\\xe9": ["caf\\xe9", {"path": ["caf\\xe9"]}], "n": 1}
    write_text(tmp_path / "a.html", f"{name}\u00e9")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == "caf\\xe9\u00e9"


def test_a_leading_home_is_expanded_unless_there_is_such_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    assert user_path("~/images") == Path("/home/me/images")
    assert user_path("~") == Path("~")
    (tmp_path / "~" / "images").mkdir(parents=True)
    assert user_path("~/images") == Path("~/images")


def test_a_library_with_an_error_of_its_own_for_a_full_disk(tmp_path: Path) -> None:
    def write(message: str) -> None:
        with atomic_path(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"half")
            raise ValueError(message)

    message = refusal(write, "I/O error: No space left on device (os error 28)")
    assert message.startswith(f"{tmp_path}/a.bin: no space left on the disk.")
    with pytest.raises(ValueError, match="other"):
        write("other")
    assert not list(tmp_path.iterdir())


def test_a_lock_is_freed_although_a_signal_handler_raises_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, raised = filelock.FileLock._release, []

    def interrupted(self: filelock.FileLock) -> None:
        if not raised:
            raised.append(1)
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        release(self)

    monkeypatch.setattr(filelock.FileLock, "_release", interrupted)
    with locked_folder(tmp_path, "training in it"):
        pass
    assert raised
    with locked_folder(tmp_path, "training in it"):
        pass
