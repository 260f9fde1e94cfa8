"""Embeddings of a dataset's images by a pretrained backbone or a run, kept for the next audit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crossx.data.config import DataConfig
from crossx.data.transforms import preprocessing_for
from crossx.errors import CrossXError, UsageError, first_line
from crossx.evaluation.device import select_device
from crossx.methods.registry import create_method
from crossx.methods.weights import describe
from crossx.predict.predictor import Predictor
from crossx.runs import atomic_path

BACKBONE = "resnet50.tv_in1k"
"""The default of `crossx fit`."""
CHUNK = 2048
"""Images between two writes of the cache."""


def load_backbone(name: str, device: str = "auto", image_size: int | None = None) -> Predictor:
    """Return a predictor whose features are those of a pretrained backbone.

    Args:
        name: See ``create_backbone``.
        device: See ``select_device``.
        image_size: Side of its input in pixels; by default that of its pretraining.

    Raises:
        UsageError: If there is no such backbone or device.
        CrossXError: If its weights cannot be loaded.
    """
    chosen = select_device(device)
    try:
        method = create_method("plain", backbone=name, num_classes=1, pretrained=True)
    except UsageError:
        raise
    except CrossXError as error:
        reason = first_line(error).partition(". Check the network")[0]
        raise CrossXError(
            f"{reason}. Check the network, or give --backbone local-dir:FOLDER with pretrained weights, or --run RUN."
        ) from error
    own = method.backbone.data_config
    size = image_size or int(own["input_size"][-1])
    method.check_image_size(size)
    preprocessing = preprocessing_for(DataConfig(image_size=size), own)
    spec = describe(method, classes=("image",), preprocessing=preprocessing, dataset="folder", levels={})
    return Predictor.from_method(method, spec, chosen)


def network_digest(predictor: Predictor) -> str:
    """Return a checksum of what the features depend on: parameters, buffers and preprocessing."""
    digest = hashlib.sha256(repr(sorted(asdict(predictor.spec.preprocessing).items())).encode())
    for name, tensor in sorted(predictor.method.state_dict().items()):
        if not name.startswith("classifier."):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def embed(
    predictor: Predictor,
    files: Sequence[Path],
    digests: Sequence[bytes],
    cache: Path | None = None,
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Return the features of images, float32 (N, D) of length 1, rounded to half precision.

    Args:
        predictor: The network.
        files: N readable images.
        digests: Checksum of each file; images with the same one are computed once.
        cache: File in which the features are kept, and from which those of the same network are taken.
        batch_size: Images per step.
        progress: Called with the number of images done and the total.

    Raises:
        CrossXError: If an image cannot be read, or the cache cannot be written.
    """
    key = network_digest(predictor)
    known = _read(cache, key) if cache is not None else {}
    todo = {
        digest: file for file, digest in zip(files, digests, strict=True) if digest not in known
    }  # the last of identical files
    pending = list(todo.items())
    done = len(files) - len(pending)
    for start in range(0, len(pending), CHUNK):
        part = pending[start : start + CHUNK]
        computed = predictor.iter_features([file for _, file in part], batch_size)
        for (digest, file), features in zip(part, computed, strict=True):
            if features.vector is None:
                raise CrossXError(f"{file}: {features.error}")
            known[digest] = features.vector.astype(np.float16)
            done += 1
            if progress is not None:
                progress(done, len(files))
        if cache is not None:
            _write(cache, key, known)
    width = predictor.feature_size
    return (
        np.stack([known[digest] for digest in digests]).astype(np.float32)
        if len(files)
        else np.zeros((0, width), dtype=np.float32)
    )


def _read(path: Path, key: str) -> dict[bytes, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["network"]) != key:
                return {}
            digests, vectors = arrays["digests"], arrays["vectors"]
            if digests.dtype != np.uint8 or vectors.dtype != np.float16 or not np.isfinite(vectors).all():
                return {}
            return {bytes(digest): vector for digest, vector in zip(digests, vectors, strict=True)}
    except Exception:  # missing or damaged; zipfile, zlib and numpy each raise their own
        return {}


def _write(path: Path, key: str, known: dict[bytes, NDArray[Any]]) -> None:
    digests = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(len(known), -1)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, network=np.array(key), digests=digests, vectors=np.stack(list(known.values())))
