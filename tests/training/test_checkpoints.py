import errno
import hashlib
import itertools
import os
import pickle
import resource
import shutil
import subprocess

import pytest
import torch

from crossx.errors import CrossXError, UsageError
from crossx.runs import Run
from crossx.training import checkpoints
from crossx.training.checkpoints import FORMAT, read_checkpoint, read_newest, write_checkpoint
from refusals import refusal


def checkpoint(value, size=4):
    return {"format": FORMAT, "state_dict": {"method.w": torch.full((size,), float(value))}, "epoch": value}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def write(run, value, *, best=False, **options):
    write_checkpoint(run, checkpoint(value, **options), best=best)


def files(run):
    return sorted(os.listdir(run.checkpoints))


def test_round_trip(run):
    assert read_newest(run) is None
    write(run, 2)
    read = read_newest(run)
    assert read["epoch"] == 2
    assert torch.equal(read["state_dict"]["method.w"], torch.full((4,), 2.0))
    assert files(run) == ["SHA256SUMS", "last.ckpt"]


def test_two_generations_and_the_best_are_kept_with_checksums(run):
    for value in range(4):
        write(run, value, best=value == 1)
    kept = {path: read_checkpoint(path)["epoch"] for path in (run.last, run.previous, run.best)}
    assert list(kept.values()) == [3, 2, 1]
    assert files(run) == ["SHA256SUMS", "best.ckpt", "last.ckpt", "previous.ckpt"]
    assert run.last.stat().st_ino != run.previous.stat().st_ino
    checked = subprocess.run(
        ["sha256sum", "--check", run.checksums.name], cwd=run.checkpoints, capture_output=True, text=True
    )
    assert checked.stdout.splitlines() == ["last.ckpt: OK", "previous.ckpt: OK", "best.ckpt: OK"]
    write(run, 4, best=True)
    assert [read_checkpoint(path)["epoch"] for path in (run.last, run.previous, run.best)] == [4, 3, 4]
    assert len({path.stat().st_ino for path in (run.last, run.previous, run.best)}) == 3


@pytest.mark.parametrize("damage", ["a bit", "cut off", "missing"])
def test_a_damaged_newest_gives_way_to_the_one_before(run, caplog, damage):
    for value in range(3):
        write(run, value)
    content = bytearray(run.last.read_bytes())
    if damage == "a bit":
        # within the tensor, where torch itself does not notice
        content[content.index(torch.full((4,), 2.0).numpy().tobytes())] ^= 1
    run.last.write_bytes(content[: len(content) // 2] if damage == "cut off" else content)
    if damage == "missing":
        run.last.unlink()
    assert read_newest(run)["epoch"] == 1
    assert "last.ckpt" in caplog.text
    assert "continues from the previous checkpoint" in caplog.text
    # from here on as if it had been the newest
    assert read_newest(run)["epoch"] == 1
    write(run, 2)
    assert [read_checkpoint(path)["epoch"] for path in (run.last, run.previous)] == [2, 1]
    for path in (run.last, run.previous):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in run.checksums.read_text()


def spoil(path, damage):
    content = bytearray(path.read_bytes())
    match damage:
        case "empty":
            content = b""
        case "half":
            content = content[: len(content) // 2]
        case "garbage":
            content = bytes(range(256)) * 20
        case "a bit":
            # within a tensor, where torch itself does not notice, or a checksum
            content[content.index(b"\x40") if path.suffix else 10] ^= 1
    path.write_bytes(content)
    if damage == "missing":
        path.unlink()


@pytest.mark.parametrize("damage", ["empty", "half", "garbage", "a bit", "missing"])
def test_any_damage_leaves_the_newest_intact_one(tmp_path, damage):
    """Every set of damaged files; without one that is intact it is an error, never a start from scratch."""
    whole = Run(tmp_path / "whole")
    for value in (2, 3, 4):
        write(whole, value, best=value == 2)
    names = ("last.ckpt", "previous.ckpt", "best.ckpt", "SHA256SUMS")
    for size in range(1, 5):
        for damaged in itertools.combinations(names, size):
            run = Run(tmp_path / "-".join(damaged))
            shutil.copytree(whole.path, run.path)
            for name in damaged:
                spoil(run.checkpoints / name, damage)
            intact = [epoch for name, epoch in zip(names, (4, 3, 2), strict=False) if name not in damaged]
            if not intact and damage == "missing":
                assert read_newest(run) is None
            elif not intact:
                assert "--restart` starts over" in (line := refusal(read_newest, run))
                # starting over would delete the model
                assert "--init" not in line
                run.weights.touch()
                assert f"Its model can start a new run: --init {run.path}." in refusal(read_newest, run)
            elif damage == "a bit" and "SHA256SUMS" in damaged and "last.ckpt" not in damaged:
                # either may be the damaged one
                assert read_newest(run)["epoch"] == max(intact[1:], default=4)
            else:
                assert read_newest(run)["epoch"] == max(intact), damaged
            if intact:
                assert read_newest(run)["epoch"] in intact
                write(run, 5)
                checked = {
                    line.split()[1]: line.split()[0] for line in run.checksums.read_text().splitlines()
                }
                for name in ("last.ckpt", "previous.ckpt"):
                    content = (run.checkpoints / name).read_bytes()
                    assert checked[name] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("moment", ["write_text", "_link", "fsync"])
def test_a_kill_at_any_moment_leaves_a_whole_newest(run, monkeypatch, caplog, best, moment):
    """Each file operation in turn is the last."""

    class Killed(BaseException):
        pass

    for nth in range(1, 4):
        for value in range(3):
            write(run, value, best=best)
        owner, name = (os, moment) if moment == "fsync" else (checkpoints, moment)
        done, seen = getattr(owner, name), []

        def killed(*arguments, done=done, seen=seen, nth=nth):
            seen.append(1)
            if len(seen) == nth:
                raise Killed
            return done(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            try:
                write(run, 3, best=best)
            except Killed:
                assert len(seen) == nth
        assert read_newest(run)["epoch"] in ((3,) if len(seen) < nth else (2, 3))
        assert not caplog.text


def test_full_disk_keeps_the_last_good_checkpoint(run):
    write(run, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CrossXError, match=r"last\.ckpt: .*File too large"):
            write(run, 2, size=1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_newest(run)["epoch"] == 1
    assert files(run) == ["SHA256SUMS", "last.ckpt"]


def test_no_space_says_so(run, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    write(run, 1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CrossXError, match="no space left on the disk"):
        write(run, 2)
    assert read_newest(run)["epoch"] == 1


def test_where_files_cannot_be_linked_they_are_copied(run, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for value in range(3):
        write(run, value, best=True)
    assert [read_checkpoint(path)["epoch"] for path in (run.last, run.previous, run.best)] == [2, 1, 2]
    assert files(run) == ["SHA256SUMS", "best.ckpt", "last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 half of it", pickle.dumps({"state_dict": os.system}, 2)]
)
def test_damaged_or_foreign_files_are_one_line(run, content):
    run.checkpoints.mkdir()
    run.last.write_bytes(content)
    for read in (lambda: read_checkpoint(run.last), lambda: read_newest(run)):
        with pytest.raises(CrossXError, match=r"last\.ckpt: damaged") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_missing_or_other_checkpoint(run):
    with pytest.raises(CrossXError, match="No such file"):
        read_checkpoint(run.last)
    run.checkpoints.mkdir()
    torch.save([1, 2], run.last)
    with pytest.raises(CrossXError, match="not a training checkpoint"):
        read_checkpoint(run.last)
    torch.save({"state_dict": {}}, run.last)
    with pytest.raises(UsageError, match="written by another version of crossx"):
        read_newest(run)
