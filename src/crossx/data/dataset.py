"""Load records as samples and batches, with augmentation that does not depend on the workers."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crossx.data.images import read_image, read_size
from crossx.data.index import Record
from crossx.data.parts import PartPoints
from crossx.data.sampler import Draw, derive_seed
from crossx.data.transforms import batch_images
from crossx.errors import CrossXError, lost_worker

Sample: TypeAlias = tuple[Tensor, int] | tuple[Tensor, int, Tensor]
"""Image (3, S, S), class index and, if asked for, parts (N, 3)."""
Batch: TypeAlias = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""Images (B, 3, S, S), class indices (B,) int64 and, if asked for, parts (B, N, 3)."""


class ImageDataset(Dataset[Sample]):
    """Read and transform the images of some records.

    The transform's randomness depends on the seed and the draw (epoch, index, repeat) only: the images are the same for
    any number of workers, with persistent workers, and after a resume.

    Args:
        records: The images.
        transform: Maps uint8 (3, H, W) to uint8 (3, S, S), without modifying its input.
        seed: The run's seed.
        read: Decodes an image.
        parts: Names of N parts that samples have; with them, ``transform`` also gets the image's ``PartPoints``.
    """

    def __init__(
        self,
        records: Sequence[Record],
        transform: Callable[..., Tensor],
        seed: int = 0,
        read: Callable[[Path], Tensor] = read_image,
        parts: Sequence[str] = (),
    ) -> None:
        self.records = records
        self.transform = transform
        self.seed = seed
        self.read = read
        self.parts = tuple(parts)
        self._full_sizes: dict[Path, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, draw: Draw | int) -> Sample:
        """Return image (3, S, S), class index and, with ``parts``, (N, 3): x, y in pixels and visible (1 or 0).

        A plain index means its draw in epoch 0.

        Raises:
            CrossXError: If the image cannot be read or prepared; the message starts with its path.
        """
        if isinstance(draw, int):
            draw = Draw(epoch=0, index=draw)
        record = self.records[draw.index]
        image = self.read(record.path)
        try:
            with _seeded(derive_seed(self.seed, draw.epoch, draw.index, draw.repeat)):
                if not self.parts:
                    return self.transform(image), record.label
                height, width = image.shape[-2:]
                points = PartPoints(record, self.parts, self._full_size(record.path), (height, width))
                return self.transform(image, points), record.label, points.stacked()
        except CrossXError as error:
            raise CrossXError(f"{record.path}: {error}") from error

    def _full_size(self, path: Path) -> tuple[int, int]:
        # the image may have been decoded at a fraction of its size
        if path not in self._full_sizes:
            self._full_sizes[path] = read_size(path)
        return self._full_sizes[path]


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples to images (B, 3, S, S), channels last in memory, class indices (B,) int64, and parts (B, N, 3)."""
    images, labels, *parts = zip(*samples, strict=True)
    batch = batch_images(images), torch.tensor(labels)
    return (*batch, torch.stack(parts[0])) if parts else batch


def quiet_worker(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the training process, which ends its workers: a ``worker_init_fn``.

    A terminal, and whatever ends all processes of a job, sends them to both. The worker's thread that hands out its
    tensors would print a traceback when the other end of a connection is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        threading.Thread(target=_obey_parent, daemon=True).start()
    report = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, ConnectionError | EOFError):
            report(kind, error, trace)

    sys.excepthook = hook


_STOPPING = {signal.SIGINT, signal.SIGTERM}


def _obey_parent() -> None:
    """End the process on SIGTERM from its parent, also while another thread waits for a file."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    # as torch's own handler does
    os._exit(0)


@contextmanager
def _holding_signals() -> Iterator[None]:
    """Deliver signals that stop the program only after the block, and not to processes that are started in it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ImageLoader(DataLoader[Sample]):
    """A ``DataLoader`` that starts lazily and whose errors are the same with and without workers.

    torch re-raises a worker's exception with the worker's whole traceback as the message; here a ``CrossXError``
    keeps its one line. Workers start when the first batch is requested, so an unused loader starts none.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.worker_init_fn = quiet_worker

    # with `parts`, batches are triples, which only training asks for
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        try:
            yield from self._start()
        except Exception as error:
            if not self.num_workers:
                raise
            # torch's frames and the exception form a reference cycle. Workers that are garbage-collected in it are
            # never told to stop, and torch waits 5 seconds for each.
            error.__traceback__ = None
            if isinstance(error, CrossXError):
                raise type(error)(_last_line(error)) from None
            if limit := _limit_reached(error):
                raise CrossXError(
                    f"{limit.format(self.num_workers)}, or load the images without processes: --data.num_workers 0."
                ) from None
            if (lost := lost_worker(error)) is not None:
                raise lost from None
            raise

    def _start(self) -> Iterator[Any]:
        # until `quiet_worker`, workers would react to signals as this process does
        starts_workers = self.num_workers > 0 and self._iterator is None
        with _holding_signals() if starts_workers else nullcontext():
            return super().__iter__()


_LIMITS = {
    (
        "Too many open files",
        "items of ancdata",
    ): "too many open files for --data.num_workers {}: raise the limit (ulimit -n 65536)",
    (
        "Bus error",
        "shared memory",
        "</torch_",
        "/dev/shm",
        "Function not implemented",
    ): "too little shared memory (/dev/shm) for --data.num_workers {}: give more (docker run --shm-size 2g)",
    (
        "Resource temporarily unavailable",
        "Cannot allocate memory",
    ): "the processes of --data.num_workers {} cannot be started: give fewer",
}
"""Words in the errors of torch and of the operating system -> the limit that was reached, and what to do."""


def _limit_reached(error: Exception) -> str | None:
    """Return the limit of the machine that processes that load images have reached, None for another error."""
    if not isinstance(error, OSError | RuntimeError):
        return None
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOENT, errno.EACCES, errno.ENOSYS):
        # a semaphore is a file there
        text = "/dev/shm"
    return next((limit for words, limit in _LIMITS.items() if any(word in text for word in words)), None)


def _last_line(error: CrossXError) -> str:
    # a formatted traceback ends with "package.module.Class: message", and our messages are one line
    name = f"{type(error).__module__}.{type(error).__qualname__}: "
    return str(error.args[0]).rstrip("\n").rsplit("\n", 1)[-1].removeprefix(name)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # torch.manual_seed would also seed the GPU's generators, and with them the dropout of the next step
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
