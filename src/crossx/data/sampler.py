"""Order of the images, a pure function of seed and epoch: the same for any number of workers and after a resume."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from crossx.data.config import Sampling
from crossx.distributed import rank, world_size
from crossx.errors import UsageError


@dataclass(frozen=True, slots=True)
class Draw:
    """One image drawn for training; with the seed, all that its augmentation may depend on.

    Attributes:
        epoch: Counted from 0.
        index: The record's position in the dataset.
        repeat: How often the image was already drawn in this epoch, so that every copy is augmented differently.
    """

    epoch: int
    index: int
    repeat: int = 0


def derive_seed(*parts: object) -> int:
    """Hash ``parts`` to a 63-bit seed: the same on every machine, unrelated for similar values."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class EpochSampler(Sampler[Draw]):
    """Draws the training images of an epoch, one by one or in pairs.

    Several ranks take turns with the draws (or pairs), so that the ranks' n-th batches together are the n-th batch of
    one process with the total batch size. In the last batch a rank may have one image (or pair) fewer than another.
    Unless it is the only batch, it is dropped if a rank would have fewer than two images, too few for the variance of
    batch norm.

    With ``pairs``, every image comes once, next to another of its class. In a class with an odd number of images, one
    comes twice, augmented differently; a single image is its own partner. The pairs of a batch (of all ranks together)
    are from different classes as far as possible, chosen at random in proportion to the pairs left in each class.

    Args:
        labels: Class index of each image.
        seed: The run's seed.
        sampling: ``uniform``: each image once. ``balanced``: with replacement, every class with the same probability,
            then every image of the class. ``pairs``: pairs of images of one class, see above.
        batch_size: Images per batch and rank; even for pairs.
        dealt: Distribute the draws over the ranks; False gives every rank all of them.
    """

    def __init__(
        self,
        labels: Sequence[int],
        seed: int,
        sampling: Sampling = "uniform",
        batch_size: int = 1,
        dealt: bool = True,
    ) -> None:
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.seed = seed
        self.sampling = sampling
        self.batch_size = batch_size
        self.dealt = dealt
        self.unit = 2 if sampling == "pairs" else 1
        """Number of consecutive draws that stay on the same rank."""
        self.epoch = 0
        self.first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Set the epoch of the next iteration and the batch to start with."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return self.unit * len(self._own())

    def __iter__(self) -> Iterator[Draw]:
        own = self._own()
        draws = _count_repeats(self.epoch, self._order())
        dealt = [draws[turn * self.unit + offset] for turn in own for offset in range(self.unit)]
        return iter(dealt[self.first_batch * self.batch_size :])

    def _ranks(self) -> tuple[int, int]:
        """Return the rank and the number of ranks that share the draws."""
        return (rank(), world_size()) if self.dealt else (0, 1)

    def _own(self) -> range:
        """Return the positions of this rank's draws (or pairs) in the epoch."""
        own, ranks = self._ranks()
        count = len(self.labels)
        if self.sampling == "pairs":
            count = int(_count_pairs(self.labels).sum())
        if count < ranks:
            drawn = "training images" if self.unit == 1 else "pairs of training images"
            raise UsageError(f"{count} {drawn} are too few for {ranks} processes: lower --trainer.devices.")
        rest = count % (ranks * self.batch_size // self.unit)
        least = ranks * 2 // self.unit
        kept = count - rest if rest < least and rest < count else count
        return range(own, kept, ranks)

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        count = len(self.labels)
        if self.sampling == "pairs":
            return _pair_order(self.labels, self._ranks()[1] * self.batch_size // 2, generator)
        if self.sampling == "balanced" and count:
            weights = 1 / torch.bincount(self.labels)[self.labels].double()
            drawn = torch.multinomial(weights, count, replacement=True, generator=generator)
        else:
            drawn = torch.randperm(count, generator=generator)
        order: list[int] = drawn.tolist()
        return order


class EvaluationSampler(Sampler[int]):
    """Yields the indices 0, 1, 2, ... in order; several ranks take turns.

    Each image comes exactly once over all ranks, so ranks may differ by one image. With fewer images than ranks every
    rank gets all of them: means stay the same and no rank is without a batch.

    Args:
        count: Number of images.
        dealt: Distribute the indices over the ranks; False gives the calling rank all of them.
    """

    def __init__(self, count: int, dealt: bool = True) -> None:
        self.count = count
        self.dealt = dealt

    def __len__(self) -> int:
        return len(self._indices())

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices())

    def _indices(self) -> range:
        # asked at each use: samplers may be made before there is a process group
        whole = not self.dealt or self.count < world_size()
        return range(self.count) if whole else range(rank(), self.count, world_size())


def _count_pairs(labels: Tensor) -> Tensor:
    """Return the number of pairs per class in an epoch."""
    return (torch.bincount(labels) + 1) // 2


def _pair_order(labels: Tensor, pairs_per_batch: int, generator: torch.Generator) -> list[int]:
    """Return an epoch's images in pairs of one class, with different classes in a batch if possible."""
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)].split(torch.bincount(labels).tolist())
    # an odd class repeats its first image: (N,) -> (N + N % 2,) -> (pairs, 2)
    pairs = [iter(torch.cat((images, images[: len(images) % 2])).view(-1, 2).tolist()) for images in by_class]
    left = _count_pairs(labels)
    order: list[int] = []
    free = pairs_per_batch
    while present := int(left.count_nonzero()):
        chosen = torch.multinomial(left.double(), min(free, present), generator=generator)
        for label in chosen.tolist():
            order += next(pairs[label])
        left[chosen] -= 1
        free = free - len(chosen) or pairs_per_batch
    return order


def _count_repeats(epoch: int, order: list[int]) -> list[Draw]:
    drawn: Counter[int] = Counter()
    draws = []
    for index in order:
        draws.append(Draw(epoch, index, drawn[index]))
        drawn[index] += 1
    return draws
