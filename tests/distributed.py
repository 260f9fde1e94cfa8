"""Two processes on this machine that exchange tensors as the ranks of a training would."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed


def run_on_two_ranks(function: Callable[[int, Path], None], folder: Path) -> None:
    """Run ``function(rank, folder)`` in two gloo processes; it must be importable. Fails unless both succeed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(function, rank, port, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]


def _rank(function: Callable[[int, Path], None], rank: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    function(rank, folder)
    distributed.destroy_process_group()
