"""Winograd's 3x3 convolution against PyTorch's own on the CPU, forward and backward, over channels and places.

    python benchmarks/convolution.py

Shows where ``crossx.layers.winograd.convolve3x3`` should take which. The error is the largest difference from the
convolution in float64, over the largest output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from crossx.layers.winograd import winograd3x3
from harness import interleave, parser, ratios, table, write

# images, channels, side of the maps: ResNet-50 at 448 and 224 px in batches of several sizes, then narrower networks
SHAPES = (
    (1, 1024, 28),
    (2, 1024, 28),
    (4, 1024, 28),
    (8, 1024, 28),
    (4, 1024, 14),
    (8, 1024, 14),
    (32, 1024, 14),
    (8, 512, 14),
    (16, 512, 14),
    (8, 256, 28),
    (32, 256, 14),
    (32, 192, 10),
    (32, 64, 8),
)


def direct(maps: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(maps, kernel, padding=1)


CONVOLUTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch": direct, "winograd": winograd3x3}


def measure(images: int, channels: int, side: int, runs: int) -> dict[str, object]:
    torch.manual_seed(0)
    layout = torch.channels_last
    maps = torch.randn(images, channels, side, side).contiguous(memory_format=layout).requires_grad_()
    kernel = torch.randn(channels, channels, 3, 3) / (3 * channels**0.5)
    kernel = kernel.contiguous(memory_format=layout).requires_grad_()

    def step(convolve: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def forward_and_backward() -> None:
            maps.grad = kernel.grad = None
            convolve(maps, kernel).square().sum().backward()

        return forward_and_backward

    timings = interleave({name: step(convolve) for name, convolve in CONVOLUTIONS.items()}, runs, warmup=2)
    with torch.no_grad():
        exact = direct(maps[:1].double(), kernel.double())
        errors = {
            name: ((convolve(maps[:1], kernel) - exact).abs().max() / exact.abs().max()).item()
            for name, convolve in CONVOLUTIONS.items()
        }
    return {
        "images": images,
        "channels": channels,
        "side": side,
        "tiles": images * (-(-side // 4)) ** 2,
        **{name: timing.to_json() for name, timing in timings.items()},
        "ratio": ratios(timings, "torch")["winograd"],
        "errors": errors,
    }


def main() -> None:
    arguments = parser(__doc__, "convolution", runs=7).parse_args()
    found = [measure(*shape, arguments.runs) for shape in SHAPES]
    print(
        table(
            ["images", "channels", "side", "tiles", "winograd / torch", "error", "torch's"],
            [
                [
                    *(row[key] for key in ("images", "channels", "side", "tiles", "ratio")),
                    *(f"{row['errors'][name]:.1e}" for name in ("winograd", "torch")),  # type: ignore[index]
                ]
                for row in found
            ],
        )
    )
    write(arguments.output, {"shapes": [{**row, "ratio": vars(row["ratio"])} for row in found]})


if __name__ == "__main__":
    main()
