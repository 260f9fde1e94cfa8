"""A 3x3 convolution with a quarter of the multiplications, forward and backward, for float32 on a CPU.

Winograd's minimal filtering F(4x4, 3x3), Lavin & Gray 2016, https://arxiv.org/abs/1509.09308: a tile of 6 x 6 inputs
and the kernel are transformed by fixed matrices to 6 x 6 values each, multiplied there, and transformed back to 4 x 4
outputs. PyTorch's own convolution multiplies all nine taps on a CPU; on a GPU cuDNN chooses by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Matrix: TypeAlias = Sequence[Sequence[float]]

OUT, IN, TAPS = 4, 6, 3
"""Side of a tile of outputs, of the inputs that it sees, and of the kernel."""

# Points 0, 1, -1, 2, -2 and infinity.
INPUT_TRANSFORM: Matrix = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
KERNEL_TRANSFORM: Matrix = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUT_TRANSFORM: Matrix = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def convolve3x3(maps: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """Return ``F.conv2d(maps, kernel, stride=stride, padding=1)``, by ``winograd3x3`` where that is faster.

    Args:
        maps: (B, C, H, W).
        kernel: (K, C, 3, 3).
        stride: Distance of the outputs in places of the maps.
    """
    # Measured with benchmarks/convolution.py: transforming the kernel has to pay off over the tiles,
    # transforming the tiles over the channels.
    pays = (
        stride == 1
        and maps.device.type == "cpu"
        and maps.dtype == kernel.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and len(maps) * _tiles(maps.shape[2]) * _tiles(maps.shape[3]) >= 96
        and min(kernel.shape[:2]) >= 256
    )
    return winograd3x3(maps, kernel) if pays else F.conv2d(maps, kernel, stride=stride, padding=1)


def winograd3x3(maps: Tensor, kernel: Tensor) -> Tensor:
    """Return ``F.conv2d(maps, kernel, padding=1)``, differentiable once.

    In float32 rounding errors are about five times those of the direct convolution: 1e-5 to 2e-5 of the largest output.

    Args:
        maps: (B, C, H, W), best channels last.
        kernel: (K, C, 3, 3).

    Returns:
        (B, K, H, W), channels last.
    """
    convolved: Tensor = _Winograd3x3.apply(maps, kernel)
    return convolved


class _Winograd3x3(torch.autograd.Function):
    """Takes the six rows of the transformed tiles one after the other, so that what they fill is small and used again.

    It keeps the padded maps and the kernel alone: transforming them once more costs less than the memory.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, kernel: Tensor) -> Tensor:
        batch, _, height, width = maps.shape
        grid = batch, _tiles(height), _tiles(width)
        padded, taps = _pad(maps, 1), _taps(kernel)
        ctx.save_for_backward(padded, kernel)
        ctx.size = height, width
        tiles = maps.new_zeros(*grid[:2], OUT, grid[2], OUT, len(kernel))
        for row in range(IN):
            products = torch.bmm(_transformed_inputs(padded, row), _transformed_kernel(taps, row).mT)
            columns = _transform(OUTPUT_TRANSFORM, products).view(OUT, *grid, -1).permute(1, 2, 3, 0, 4)
            for out, weight in _nonzero(_column(OUTPUT_TRANSFORM, row)):
                tiles[:, :, out].add_(columns, alpha=weight)
        return _crop(tiles.flatten(3, 4).flatten(1, 2), 0, height, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        padded, kernel = ctx.saved_tensors
        batch, _, _, channels = padded.shape
        rows, cols = map(_tiles, ctx.size)
        taps = _taps(kernel)
        tiles = _pad(gradient, 0).view(batch, rows, OUT, cols, OUT, -1)
        of_padded, of_taps = torch.zeros_like(padded), torch.zeros_like(taps)
        for row in range(IN):
            columns = _sum(_column(OUTPUT_TRANSFORM, row), tiles.unbind(2)).permute(3, 0, 1, 2, 4)
            products = _transform(_transposed(OUTPUT_TRANSFORM), columns.reshape(OUT, -1, len(kernel)))

            of_inputs = _transform(
                _transposed(INPUT_TRANSFORM), torch.bmm(products, _transformed_kernel(taps, row))
            )
            of_rows = padded.new_zeros(batch, rows, cols * OUT + 2, channels)
            for column, of_column in enumerate(of_inputs.view(IN, batch, rows, cols, channels)):
                of_rows[:, :, column : column + cols * OUT : OUT] += of_column
            for source, weight in _nonzero(INPUT_TRANSFORM[row]):
                of_padded[:, source : source + rows * OUT : OUT].add_(of_rows, alpha=weight)

            of_kernel = torch.bmm(products.mT, _transformed_inputs(padded, row))
            of_kernel = _transform(_transposed(KERNEL_TRANSFORM), of_kernel)
            for tap, weight in _nonzero(KERNEL_TRANSFORM[row]):
                of_taps[tap].add_(of_kernel, alpha=weight)
        return _crop(of_padded, 1, *ctx.size), of_taps.permute(2, 3, 0, 1)


def _tiles(length: int) -> int:
    return -(-length // OUT)


def _taps(kernel: Tensor) -> Tensor:
    """Return (3, 3, K, C) of a kernel (K, C, 3, 3)."""
    return kernel.permute(2, 3, 0, 1)


def _pad(maps: Tensor, border: int) -> Tensor:
    """Return maps (B, C, H, W) channels last, with a border of zeros around whole tiles."""
    below, right = (_tiles(length) * OUT - length + border for length in maps.shape[2:])
    places = maps.permute(0, 2, 3, 1)
    # F.pad copies where there is nothing to pad
    if border == below == right == 0:
        return places.contiguous()
    return F.pad(places, (0, 0, border, right, border, below))


def _crop(padded: Tensor, border: int, height: int, width: int) -> Tensor:
    """Undo ``_pad``: return the (B, C, H, W) within."""
    return padded[:, border : border + height, border : border + width].permute(0, 3, 1, 2)


def _transformed_inputs(padded: Tensor, row: int) -> Tensor:
    """Return one row of the transformed tiles of inputs, (6, tiles, C)."""
    height = padded.shape[1] - 2
    rows = _sum(INPUT_TRANSFORM[row], [padded[:, source : source + height : OUT] for source in range(IN)])
    columns = rows.unfold(2, IN, OUT).permute(4, 0, 1, 2, 3)
    return _transform(INPUT_TRANSFORM, columns.reshape(IN, -1, padded.shape[3]))


def _transformed_kernel(taps: Tensor, row: int) -> Tensor:
    """Return one row of the transformed kernel, (6, K, C)."""
    return _transform(KERNEL_TRANSFORM, _sum(KERNEL_TRANSFORM[row], taps.unbind()))


def _transform(matrix: Matrix, values: Tensor) -> Tensor:
    """Multiply the first dimension of values (n, ..., C) by a matrix (m, n)."""
    return torch.mm(values.new_tensor(matrix), values.flatten(1)).view(-1, *values.shape[1:])


def _sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    (first, weight), *others = ((values[index], weight) for index, weight in _nonzero(weights))
    total = first * weight
    for value, weight in others:
        total.add_(value, alpha=weight)
    return total


def _nonzero(weights: Sequence[float]) -> Iterable[tuple[int, float]]:
    return ((index, weight) for index, weight in enumerate(weights) if weight)


def _column(matrix: Matrix, index: int) -> Sequence[float]:
    return [row[index] for row in matrix]


def _transposed(matrix: Matrix) -> Matrix:
    return [_column(matrix, index) for index in range(len(matrix[0]))]
