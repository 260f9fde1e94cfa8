"""Predict shards in several processes, on one or many machines, with Ray Data.

The calling process starts Ray, or joins the cluster of ``RAY_ADDRESS``, loads the weights once and sends them through
Ray's object store, so that all workers have the same weights even while the run is still training. Workers read the
images themselves, which must be at the same path on each machine, and return each shard as it is finished.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossx.errors import CrossXError, UsageError, first_line
from crossx.extras import require
from crossx.methods.registry import import_methods, imported_methods
from crossx.methods.weights import build_method, load_method
from crossx.predict.attempt_counter import AttemptCounter
from crossx.predict.predictor import Predictor
from crossx.predict.shards import Shard, predict_shard
from crossx.runs import ModelSpec

if TYPE_CHECKING:
    import pyarrow as pa
    from ray import ObjectRef
    from ray.actor import ActorHandle

CORES_PER_WORKER = 4
"""CPU cores per worker without a GPU, if the number of workers is not given."""
MAX_ATTEMPTS = 3
"""Workers that may die during one shard before the prediction fails."""


def predict_shards(
    run: str | Path,
    shards: Mapping[int, Shard],
    workers: int | None,
    device: str,
    top: int,
    batch_size: int,
    options: Mapping[str, Any],
) -> Generator[tuple[int, bytes], None, None]:
    """Predict shards in several processes.

    Args:
        run: A run folder or a checkpoint file in one; only this process reads it.
        shards: The shards by number.
        workers: Number of workers; None for one per GPU, or per ``CORES_PER_WORKER`` CPU cores.
        device: ``auto`` (GPUs if the cluster has any), ``cpu`` or ``cuda``. A worker has one GPU.
        top: Classes per image.
        batch_size: Images per batch.
        options: ``precision``, and the ``PredictorOptions``.

    Yields:
        The number and the Parquet file of each shard, see ``predict_shard``, as they are finished.

    Raises:
        UsageError: If Ray is not installed, or the cluster is too small for so many workers.
        CrossXError: If the run cannot be loaded, the cluster cannot be joined, or a worker fails.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device}: Ray gives each worker its GPU. Choose from: auto, cpu, cuda.")
    method, spec = load_method(run)
    with ray_session():
        import pyarrow as pa
        import ray
        from ray.exceptions import RayError, RayTaskError

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        on_gpu = device == "cuda" or (device == "auto" and any(node.get("GPU") for node in nodes))
        workers, cores = divide_cluster(nodes, workers, len(shards), on_gpu=on_gpu)
        weights = ray.put(method.state_dict())
        attempts = ray.remote(AttemptCounter).options(num_cpus=0).remote()
        # one shard per block, since Ray returns whole blocks
        blocks = [pa.table({"number": [n], "shard": [pickle.dumps(shard)]}) for n, shard in shards.items()]
        finished = ray.data.from_arrow(blocks).map_batches(
            Worker,
            fn_constructor_args=(
                spec,
                [weights],
                attempts,
                device,
                top,
                batch_size,
                options,
                imported_methods(),
            ),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cores,
            num_gpus=1 if on_gpu else 0,
        )
        try:
            for batch in finished.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
                for row in batch.to_pylist():
                    if row["error"] is not None:
                        raise CrossXError(row["error"])
                    yield row["number"], row["part"]
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            raise CrossXError(f"Ray: {first_line(error)}.") from error


class Worker:
    """Ray Data's callable in each process; errors that a user can fix are returned as results."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Sequence[ObjectRef],
        attempts: ActorHandle,
        device: str,
        top: int,
        batch_size: int,
        options: Mapping[str, Any],
        imports: Sequence[str] = (),
    ) -> None:
        # of the user's own method, which is at the same path here, as the images are
        import_methods(imports)
        # in a list, so that Ray does not resolve the reference
        (self.weights,) = weights
        self.spec, self.attempts = spec, attempts
        self.device, self.top, self.batch_size, self.options = device, top, batch_size, options

    @cached_property
    def predictor(self) -> Predictor:
        """The network in this process."""
        import ray

        method = build_method(self.spec)
        method.load_state_dict(ray.get(self.weights))
        return Predictor.from_method(method, self.spec, self.device, **self.options)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Predict the shard of a batch of one row with the columns ``number`` and ``shard``."""
        import pyarrow as pa

        ((number, shard),) = (row.values() for row in batch.to_pylist())
        part, error = None, None
        try:
            part = self._predict(number, pickle.loads(shard))
        except CrossXError as failure:
            error = str(failure)
        answer = pa.schema([("number", pa.int64()), ("part", pa.large_binary()), ("error", pa.string())])
        return pa.table([[number], [part], [error]], answer)

    def _predict(self, number: int, shard: Shard) -> bytes:
        import ray

        if ray.get(self.attempts.begin.remote(number)) > MAX_ATTEMPTS:
            raise CrossXError(
                f"{MAX_ATTEMPTS} workers died while predicting {shard}: out of memory, or a bug in a decoder. "
                "Lower --data.batch_size or --workers, or see what happens with --engine local."
            )
        return predict_shard(self.predictor, shard, self.top, self.batch_size)


def divide_cluster(
    nodes: Sequence[Mapping[str, float]], workers: int | None, shards: int, *, on_gpu: bool
) -> tuple[int, int]:
    """Divide a cluster among workers.

    Args:
        nodes: Ray's ``CPU`` and ``GPU`` of each machine.
        workers: Number of workers, or None to choose it.
        shards: Number of shards, an upper bound on the workers.
        on_gpu: Whether each worker needs a GPU.

    Returns:
        The number of workers, and the CPU cores per worker.

    Raises:
        UsageError: If the cluster is too small for so many workers.
    """

    def room(cores: int) -> int:
        counts = [int(node.get("CPU", 0)) // cores for node in nodes]
        if on_gpu:
            counts = [min(n, int(node.get("GPU", 0))) for n, node in zip(counts, nodes, strict=True)]
        return sum(counts)

    most = room(1)
    if most < (workers or 1):
        asked = f"--workers {workers}: " if workers else ""
        what = "GPUs" if on_gpu else "CPU cores"
        raise UsageError(f"{asked}Ray has {most or 'no'} {what}. Ask for fewer, or use --device cpu.")
    chosen = min(workers or (most if on_gpu else max(1, room(CORES_PER_WORKER))), shards)
    cores = int(max(node.get("CPU", 0) for node in nodes))
    while room(cores) < chosen:
        cores -= 1
    return chosen, cores


@contextmanager
def ray_session() -> Iterator[None]:
    """Start Ray or join the cluster of ``RAY_ADDRESS``, and leave it at the end; a running session is kept.

    Ray runs quietly, without a dashboard or usage reports; started here it listens only on the loopback interface.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if address == "local":
        # 0 makes Ray use 127.0.0.1 as the machine's address
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    require("--engine ray", "ray", extra="ray")
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    # dying workers are counted instead; a shard may take long
    context.execution_no_progress_timeout_s = -1
    if ray.is_initialized():
        yield
        return
    try:
        _require_answer(address)
        with _muted_stderr(), _restored_handler(signal.SIGTERM):
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, RuntimeError, ValueError) as error:
        where = "started" if address == "local" else f"joined at RAY_ADDRESS={address}"
        raise CrossXError(f"Ray cannot be {where} ({first_line(error)}).") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _restored_handler(number: signal.Signals) -> Iterator[None]:
    """Restore a signal's handler: with Ray's own for SIGTERM the process aborts."""
    handler = signal.getsignal(number)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)


def _require_answer(address: str) -> None:
    """Raise ``OSError`` if nothing listens at an address; Ray itself retries for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _muted_stderr() -> Iterator[None]:
    """Discard what C++ libraries write to stderr, which announce even ``RAY_BACKEND_LOG_LEVEL`` there."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
