"""Near-duplicates: candidates by embedding and perceptual hash, verified by their aligned detail."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from crossx.audit.alignment import detail_correlation
from crossx.predict.search import nearest_vectors

NEIGHBOURS = 3
"""Nearest images, by embedding and by hash, that are compared with each image."""
HASH_AGREEMENT = 0.35
"""Correlation of two hashes from which images are compared: four standard deviations of independent bits."""
HASH_SIDE = 12
"""Frequencies of the perceptual hash along each side."""
LEAST, MOST = 0.8, 0.93
"""Bounds of the correlation from which two images are one picture."""
DEVIATIONS = 6.0
"""How far above that of other pairs the correlation must be, in robust standard deviations of Fisher's z."""
SAMPLE = 400
"""Pairs of different images from which that distribution is estimated."""
SEED = 0
LOST = 0.5
"""Share of a class that is more than there are copies in it: what looks alike there are different photographs."""
ENOUGH = 20
"""Pairs of images that look alike from which their distribution is estimated."""


@dataclass(frozen=True)
class Pair:
    """Two images that show the same picture.

    Attributes:
        first: Number of an image.
        second: Number of a later image.
        correlation: Of their aligned detail; 1 for identical files.
    """

    first: int
    second: int
    correlation: float


@dataclass(frozen=True)
class Duplicates:
    """Near-duplicates of a dataset.

    Attributes:
        pairs: Verified pairs, in the order of their images.
        groups: Images connected by pairs, each group sorted.
        alike: Groups of different photographs that look alike, as those of products in one pose; identical files once.
        threshold: Correlation from which a pair counts.
        candidates: Number of pairs that were compared.
        usual: Median correlation of pairs of different images; None if there were too few to tell.
    """

    pairs: tuple[Pair, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    alike: tuple[tuple[int, ...], ...] = ()
    threshold: float = LEAST
    candidates: int = 0
    usual: float | None = None


def find_duplicates(
    digests: Sequence[bytes],
    thumbnails: NDArray[np.uint8],
    vectors: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Duplicates:
    """Find images that show one picture: recompressed, resized, slightly cropped, mirrored or of another brightness.

    A pair counts if the correlation of its aligned detail is at least ``LEAST`` (two thirds of the detail's variance in
    common) and ``DEVIATIONS`` above that of pairs drawn at random from the dataset, but ``MOST`` is always enough.
    Where a class would lose more than ``LOST`` of its images as copies, they are ``alike`` instead: there, the
    correlation must be ``DEVIATIONS`` above that of other images that are alike.

    Args:
        digests: Checksum of each of N files.
        thumbnails: uint8 (N, SIDE, SIDE), grey, see ``alignment``.
        vectors: float32 (N, D), embeddings of length 1.
        labels: int64 (N,).
        progress: Called with the number of pairs compared and the total.
    """
    identical = _identical(digests)
    # copies of a file need no comparison of their own
    unique = np.array([number for number in range(len(digests)) if number not in identical], dtype=np.int64)
    threshold, usual = _threshold(thumbnails[unique])
    compared = unique[_candidates(thumbnails[unique], vectors[unique])]
    scores = detail_correlation(
        torch.from_numpy(thumbnails[compared[:, 0]]),
        torch.from_numpy(thumbnails[compared[:, 1]]),
        progress=None if progress is None else lambda done: progress(done, len(compared)),
    ).numpy()
    found = scores >= threshold
    alike = _alike(_groups(compared[found], len(digests)), labels, Counter(labels[unique].tolist()))
    of_alike = np.isin(compared[:, 0], [number for group in alike for number in group]) & found
    copies = found & (~of_alike | (scores >= _outstanding(scores[of_alike])))
    pairs = sorted(
        [Pair(first, copy, 1.0) for copy, first in identical.items()]
        + [
            Pair(int(first), int(second), round(float(score), 4))
            for (first, second), score in zip(compared[copies], scores[copies], strict=True)
        ],
        key=lambda pair: (pair.first, pair.second),
    )
    groups = _groups(np.array([(pair.first, pair.second) for pair in pairs]).reshape(-1, 2), len(digests))
    return Duplicates(tuple(pairs), groups, alike, threshold, len(compared), usual)


def perceptual_hash(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the signs of the low frequencies relative to their median (pHash), float32 (N, HASH_SIDE**2 - 1) of ±1."""
    frequencies = dctn(thumbnails.astype(np.float32), axes=(1, 2), norm="ortho")
    low = frequencies[:, :HASH_SIDE, :HASH_SIDE].reshape(len(thumbnails), -1)[:, 1:]  # without the mean
    return np.where(low > np.median(low, axis=1, keepdims=True), 1, -1).astype(np.float32)


def _identical(digests: Sequence[bytes]) -> dict[int, int]:
    """Return copy -> the first image with the same bytes."""
    first: dict[bytes, int] = {}
    return {
        number: first[digest]
        for number, digest in enumerate(digests)
        if first.setdefault(digest, number) != number
    }


def _candidates(thumbnails: NDArray[np.uint8], vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return pairs (M, 2) of nearest neighbours, the smaller number first, sorted."""
    if len(thumbnails) < 2:
        return np.zeros((0, 2), dtype=np.int64)
    hashes = torch.from_numpy(perceptual_hash(thumbnails))
    mirrored = torch.from_numpy(perceptual_hash(thumbnails[:, :, ::-1]))
    embedded = torch.from_numpy(vectors)
    found = []
    least = HASH_AGREEMENT * hashes.shape[1]
    for queries, keys, limit in (
        (embedded, embedded, -2.0),
        (hashes, hashes, least),
        (mirrored, hashes, least),
    ):
        # one more, since an image is its own neighbour
        products, positions = nearest_vectors(queries, keys, NEIGHBOURS + 1)
        own = torch.arange(len(positions))[:, None].expand_as(positions)
        found.append(torch.stack([own, positions], -1)[products > limit])  # (N, k, 2) -> (M, 2)
    pairs: NDArray[np.int64] = torch.cat(found).sort(dim=1).values.numpy()
    different: NDArray[np.int64] = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
    return different


def _threshold(thumbnails: NDArray[np.uint8]) -> tuple[float, float | None]:
    """Return the correlation from which a pair counts, and the median of pairs drawn at random."""
    if len(thumbnails) < 20:
        return LEAST, None
    generator = np.random.default_rng(SEED)
    number = min(SAMPLE, 4 * len(thumbnails))
    first = generator.integers(0, len(thumbnails), number)
    second = (first + generator.integers(1, len(thumbnails), number)) % len(thumbnails)
    scores = detail_correlation(
        torch.from_numpy(thumbnails[first]), torch.from_numpy(thumbnails[second]), all_levels=True
    )
    z = torch.atanh(scores.clamp(max=0.999)).numpy()
    return round(min(max(LEAST, _above(z)), MOST), 4), round(float(np.tanh(np.median(z))), 4)


def _groups(pairs: NDArray[np.int64], count: int) -> tuple[tuple[int, ...], ...]:
    """Return the connected components of several of ``count`` images, by their first image; pairs (M, 2)."""
    graph = coo_array((np.ones(len(pairs), dtype=np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    members: dict[int, list[int]] = defaultdict(list)
    for image, component in enumerate(connected_components(graph, directed=False)[1].tolist()):
        members[component].append(image)
    return tuple(tuple(group) for group in members.values() if len(group) > 1)


def _alike(
    groups: Sequence[tuple[int, ...]], labels: NDArray[np.int64], sizes: Mapping[int, int]
) -> tuple[tuple[int, ...], ...]:
    """Return the groups of which at least half is of classes that would lose too much without copies.

    If most classes with groups are of this kind, all groups are.
    """
    lost: Counter[int] = Counter()
    for group in groups:
        members = Counter(labels[list(group)].tolist())
        # of copies under several labels, none is kept
        lost += (
            members if len(members) > 1 else Counter({label: count - 1 for label, count in members.items()})
        )
    alike = [label for label, count in lost.items() if count > LOST * sizes[label]]
    if 2 * len(alike) > len(lost):
        return tuple(groups)
    return tuple(group for group in groups if 2 * np.isin(labels[list(group)], alike).sum() >= len(group))


def _outstanding(scores: NDArray[np.float32]) -> float:
    """Return the correlation from which a pair stands out among those of images that are alike."""
    return _above(np.arctanh(scores.clip(max=0.99999))) if len(scores) >= ENOUGH else math.inf


def _above(z: NDArray[np.float32]) -> float:
    """Return the correlation that is ``DEVIATIONS`` above the median of others, given as Fisher's z."""
    middle = float(np.median(z))
    spread = 1.4826 * float(np.median(np.abs(z - middle)))
    return float(np.tanh(middle + DEVIATIONS * spread))
