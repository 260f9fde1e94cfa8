"""Embeddings of many images by one network, kept in a file for the next time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from crossx.errors import CrossXError
from crossx.methods.base import CLASS_MEANS
from crossx.runs import atomic_path

if TYPE_CHECKING:
    from crossx.predict.predictor import Predictor

CHUNK = 2048
"""Images between two writes of the file."""


def network_digest(predictor: Predictor) -> str:
    """Return a checksum of what features depend on: parameters, buffers, preprocessing and views."""
    settings = [*sorted(asdict(predictor.spec.preprocessing).items()), predictor.views]
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(predictor.method.state_dict().items()):
        if name == CLASS_MEANS:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def embed(
    predictor: Predictor,
    files: Sequence[Path],
    keys: Sequence[bytes],
    cache: Path | None = None,
    *,
    writable: bool = True,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
    unreadable: dict[bytes, str] | None = None,
) -> dict[bytes, NDArray[np.float16]]:
    """Compute the features of images that a file does not hold yet.

    Args:
        predictor: The network.
        files: N images.
        keys: What identifies the content of each; images with the same one are computed once. All have one length.
        cache: File in which the features are kept, with those of the same network that it has.
        writable: Whether to write it; else it is only read.
        batch_size: Images per step.
        progress: Called with the number of images done and the total.
        unreadable: If given, keys of images that cannot be read are added with the reason, instead of an error.

    Returns:
        Key -> features of length 1, float16 (D,), of these images.

    Raises:
        CrossXError: If an image cannot be read, or the file cannot be written.
    """
    network = network_digest(predictor)
    known = read_features(cache, network) if cache is not None else {}
    if known:
        # a file of unknown origin may have others
        shapes = {(len(key), predictor.feature_size) for key in keys}
        known = {key: vector for key, vector in known.items() if (len(key), *vector.shape) in shapes}
    pending = list({key: file for file, key in zip(files, keys, strict=True) if key not in known}.items())
    total = len({*keys})
    done = total - len(pending)
    for start in range(0, len(pending), CHUNK):
        part = pending[start : start + CHUNK]
        computed = predictor.iter_image_features([file for _, file in part], batch_size)
        for (key, file), features in zip(part, computed, strict=True):
            if features.vector is not None:
                known[key] = features.vector.astype(np.float16)
            elif unreadable is not None:
                unreadable[key] = features.error or ""
            else:
                raise CrossXError(f"{file}: {features.error}")
            done += 1
            if progress is not None:
                progress(done, total)
        if cache is not None and writable and known:
            write_features(cache, network, known)
    return {key: known[key] for key in keys if key in known}


def read_features(path: Path, network: str) -> dict[bytes, NDArray[np.float16]]:
    """Read what ``write_features`` wrote; empty if it is missing, damaged or of another network."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["network"]) != network:
                return {}
            keys, vectors = arrays["keys"], arrays["vectors"]
            if keys.dtype != np.uint8 or vectors.dtype != np.float16 or not np.isfinite(vectors).all():
                return {}
            return {bytes(key): vector for key, vector in zip(keys, vectors, strict=True)}
    except Exception:  # zipfile, zlib and numpy each raise their own
        return {}


def write_features(
    path: Path, network: str, known: dict[bytes, NDArray[np.float16]], **more: NDArray[Any]
) -> None:
    """Write features atomically, with further arrays that ``read_features`` ignores.

    Raises:
        CrossXError: If the file cannot be written.
    """
    keys = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(len(known), -1)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        arrays = {
            "network": np.array(network),
            "keys": keys,
            "vectors": np.stack(list(known.values())),
            **more,
        }
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its other option comes first
