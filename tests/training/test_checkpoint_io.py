import errno
import os
import pickle
import resource

import pytest
import torch

from crossx.errors import CrossXError
from crossx.training.checkpoint_io import AtomicCheckpointIO, read_checkpoint


def checkpoint(value, size=4):
    return {"state_dict": {"method.w": torch.full((size,), float(value))}, "epoch": value}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoints" / "last.ckpt"


def test_round_trip(path):
    AtomicCheckpointIO().save_checkpoint(checkpoint(2), path)
    read = AtomicCheckpointIO().load_checkpoint(path)
    assert read["epoch"] == 2
    assert torch.equal(read["state_dict"]["method.w"], torch.full((4,), 2.0))
    assert os.listdir(path.parent) == [path.name]


def test_full_disk_keeps_the_last_good_checkpoint(path):
    io = AtomicCheckpointIO()
    io.save_checkpoint(checkpoint(1), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CrossXError, match=r"last\.ckpt: .*File too large"):
            io.save_checkpoint(checkpoint(2, size=1_000_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_checkpoint(path)["epoch"] == 1
    assert os.listdir(path.parent) == [path.name]


def test_no_space_says_so(path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    AtomicCheckpointIO().save_checkpoint(checkpoint(1), path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CrossXError, match="no space left on the disk"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(2), path)
    assert read_checkpoint(path)["epoch"] == 1


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 half of it", pickle.dumps({"state_dict": os.system}, 2)]
)
def test_damaged_or_foreign_files_are_one_line(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(CrossXError, match=r"last\.ckpt: damaged") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_missing_or_other_checkpoint(path):
    with pytest.raises(CrossXError, match="No such file"):
        read_checkpoint(path)
    path.parent.mkdir()
    torch.save([1, 2], path)
    with pytest.raises(CrossXError, match="not a training checkpoint"):
        read_checkpoint(path)
