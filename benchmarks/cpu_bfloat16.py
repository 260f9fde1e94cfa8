"""Bfloat16 compared with float32 in training on a CPU: single convolutions, and steps of MobileNetV2 0.35 at 160 px.

    python benchmarks/cpu_bfloat16.py

CPU time of one thread, so that other work on the machine matters less; channels last, autocast. The convolutions are
those of ResNet-50 and MobileNetV2, forward and backward, four images. DNNL_VERBOSE=1 shows the kernel of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from crossx.methods import create_method
from harness import interleave, parser, ratios, table, write
from training_step import step_of

CONVOLUTIONS = {
    "3x3, 128 channels, 56 x 56": (128, 128, 3, 1, 56, 1),
    "1x1, 512 to 128 channels, 56 x 56": (512, 128, 1, 1, 56, 1),
    "1x1, 8 to 48 channels, 80 x 80": (8, 48, 1, 1, 80, 1),
    "depthwise 3x3, 48 channels, 80 x 80": (48, 48, 3, 1, 80, 48),
    "depthwise 3x3 with stride 2, 48 channels, 80 x 80": (48, 48, 3, 2, 80, 48),
}
"""Name -> channels in and out, kernel, stride, side of the map, groups."""
LAYOUT = torch.channels_last
Step = Callable[[], object]


def convolution(
    channels: int, out: int, kernel: int, stride: int, side: int, groups: int, bf16: bool
) -> Step:
    layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    layer.to(memory_format=LAYOUT)  # type: ignore[call-overload]
    images = torch.randn(4, channels, side, side).to(memory_format=LAYOUT).requires_grad_()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            result = layer(images)
        result.backward(torch.ones_like(result))

    return step


def training(method: str, batch: int, bf16: bool) -> Step:
    network = create_method(method, backbone="mobilenetv2_035", num_classes=80)
    images, targets = torch.randn(batch, 3, 160, 160), torch.arange(batch)
    return step_of(network, images, targets, bf16=bf16)


def main() -> None:
    options = parser(__doc__, "cpu_bfloat16", runs=7)
    options.add_argument("--batch-size", type=int, default=32, help="of the steps (default: %(default)s)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = {name: partial(convolution, *shape) for name, shape in CONVOLUTIONS.items()}
    for method in ("plain", "crossx"):
        work[f"step, {method}"] = partial(training, method, arguments.batch_size)
    rows, results = [], {}
    for name, build in work.items():
        steps = {"fp32": build(bf16=False), "bf16": build(bf16=True)}
        timings = interleave(steps, arguments.runs, warmup=2, clock=time.process_time)
        ratio = ratios(timings, "fp32")["bf16"]
        results[name] = {**{key: own.to_json() for key, own in timings.items()}, "ratio": vars(ratio)}
        rows.append([name, *(f"{timings[key].median * 1e3:.1f}" for key in steps), ratio])
    print(table(["what", "fp32, ms", "bf16, ms", "ratio"], rows))
    write(arguments.output, {"clock": "process_time", "batch_size": arguments.batch_size, "results": results})


if __name__ == "__main__":
    main()
