"""Nearest vectors: exact, in blocks, or with usearch's graph for very many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from crossx.extras import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EXACT_UP_TO = 1_000_000
"""Vectors up to which the search is exact by default."""
BLOCK = 2**26
"""Similarities that are held in memory at a time (256 MiB)."""


class VectorIndex(Protocol):
    """Finds the vectors of a collection that are nearest to others."""

    def search(self, queries: NDArray[np.float32], top: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return cosine similarities (Q, k), best first, and positions (Q, k), for ``min(top, N)`` neighbours."""


@torch.inference_mode()
def nearest_vectors(queries: Tensor, vectors: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Find the largest inner products, exactly.

    Equal products are in the order of the vectors.

    Args:
        queries: float32 (Q, D).
        vectors: float32 (N, D).
        top: Neighbours per query, at most N.

    Returns:
        Products float32 (Q, k), largest first, and positions int64 (Q, k), with k = min(top, N).
    """
    count = min(top, len(vectors))
    rows = max(1, BLOCK // max(len(vectors), 1))
    found = [_largest(block @ vectors.T, count) for block in queries.split(rows)]
    if not found:
        return queries.new_zeros(0, count), torch.zeros(0, count, dtype=torch.int64)
    products, positions = (torch.cat(parts) for parts in zip(*found, strict=True))
    return products, positions


def _largest(products: Tensor, count: int) -> tuple[Tensor, Tensor]:
    # topk leaves the order of equal values open
    values, positions = products.topk(count)
    order = positions.argsort(dim=1)
    values, positions = values.gather(1, order), positions.gather(1, order)
    order = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order), positions.gather(1, order)


class ExactIndex:
    """Compares each query with every vector.

    Args:
        vectors: float32 (N, D), of length 1.
    """

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        self._vectors = torch.from_numpy(vectors)

    def search(self, queries: NDArray[np.float32], top: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return similarities and positions, see ``VectorIndex``."""
        products, positions = nearest_vectors(torch.from_numpy(queries), self._vectors, top)
        return products.numpy(), positions.numpy()


class ApproximateIndex:
    """usearch's graph (HNSW): sublinear in the number of vectors, and may miss a neighbour.

    Args:
        vectors: float32 (N, D), of length 1.

    Raises:
        UsageError: If usearch is not installed.
    """

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        import numpy as np

        require("a search for approximate neighbours", "usearch", extra="neighbors")
        from usearch.index import Index

        self._size = len(vectors)
        self._index: Any = Index(ndim=vectors.shape[1], metric="cos", dtype="f32")
        # one thread: with several the graph differs from run to run
        self._index.add(np.arange(self._size), vectors, threads=1)

    def search(self, queries: NDArray[np.float32], top: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return similarities and positions, see ``VectorIndex``."""
        import numpy as np

        count = min(top, self._size)
        found = self._index.search(np.atleast_2d(queries), count, threads=1)
        keys = np.asarray(found.keys).reshape(len(queries), -1)
        distances = np.asarray(found.distances).reshape(len(queries), -1)
        return (1 - distances).astype(np.float32), keys.astype(np.int64)


def make_index(vectors: NDArray[np.float32], approximate: bool | None = None) -> VectorIndex:
    """Return an index: exact up to ``EXACT_UP_TO`` vectors, unless ``approximate`` says otherwise.

    Raises:
        UsageError: If usearch is needed and not installed.
    """
    chosen = len(vectors) > EXACT_UP_TO if approximate is None else approximate
    return ApproximateIndex(vectors) if chosen else ExactIndex(vectors)
