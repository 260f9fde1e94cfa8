"""Two processes on this machine that exchange tensors as the ranks of a training would."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed


def run_on_two_ranks(function: Callable[[int, Path], None], folder: Path, backend: str = "gloo") -> None:
    """Run ``function(rank, folder)`` in two processes; it must be importable. Fails unless both succeed.

    With the backend ``nccl`` each process has a GPU of its own as its current device.
    """
    meeting = f"file://{folder.resolve() / 'ranks'}"
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(function, rank, meeting, folder, backend)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(1800)
    hanging = [process for process in ranks if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert not hanging
    assert [process.exitcode for process in ranks] == [0, 0]


def _rank(function: Callable[[int, Path], None], rank: int, meeting: str, folder: Path, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=2)
    function(rank, folder)
    distributed.destroy_process_group()
