"""Cost of each method compared with the plain backbone: parameters, FLOPs, times of inference and a training step.

    python benchmarks/methods.py
    python benchmarks/methods.py --backbone resnet50 --size 448 --classes 200 --batch-size 2 --runs 0 \\
      --recipes mamc_cub_resnet50 kernel_pooling_cub_resnet50 --output benchmarks/results/methods_448.json

The variants are those of the suite ``methods_sgd``, with its options for the small trunk; ``--recipes`` adds
networks with the options of recipes. All use the same batch size, even if the suite trains with another. Weights are
random. A training step consists of objective, backward pass and optimiser step. FLOPs are those of torch's counter for
inference on one image, two per multiply-add: convolutions and matrix products, but not the FFT of kernel pooling.
``--runs 0`` counts without timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from crossx.ablation.suite import load_suite
from crossx.methods import Method, create_method
from crossx.training.config import Config
from harness import Timing, interleave, parser, ratios, table, write
from training_step import step_of

RECIPE = "crossx_mobilenetv2_160"


def build(config: Config, backbone: str, size: int, classes: int) -> Method:
    torch.manual_seed(0)
    return create_method(
        config.model.method, backbone=backbone, num_classes=classes, image_size=size, **config.model.options
    )


def variants(recipes: Sequence[str]) -> dict[str, Config]:
    """Return name -> configuration of each variant of the suite, untuned, and of each recipe."""
    base = Config.from_recipe(RECIPE)
    suite = {name: configs[0] for name, configs in load_suite("methods_sgd").configure(base).items()}
    return suite | {name: Config.from_recipe(name) for name in recipes}


def infer(network: Method, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return network(images)  # type: ignore[no-any-return]


def count_flops(network: Method, image: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        infer(network, image)
    return counter.get_total_flops()


def main() -> None:
    options = parser(__doc__, "methods", runs=9)
    options.add_argument("--backbone", default="mobilenetv2_035", help="default: %(default)s")
    options.add_argument("--size", type=int, default=160, help="pixels (default: %(default)s)")
    options.add_argument("--classes", type=int, default=80, help="default: %(default)s")
    options.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    options.add_argument("--recipes", nargs="*", default=[], help="further recipes to measure")
    arguments = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(arguments.batch_size, 3, arguments.size, arguments.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    # two images per class, for MAMC
    targets = torch.arange(arguments.batch_size, device=device) // 2 % arguments.classes

    configs = variants(arguments.recipes)
    networks = {
        name: build(config, arguments.backbone, arguments.size, arguments.classes)
        .to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        .eval()
        for name, config in configs.items()
    }
    costs: dict[str, dict[str, Any]] = {
        name: {
            "options": config.model.options,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "flops": count_flops(network, images[:1]),
        }
        for (name, network), config in zip(networks.items(), configs.values(), strict=True)
    }
    timings: dict[str, dict[str, Timing]] = {}
    if arguments.runs:
        # inference first: a training step leaves a network in training mode
        inference = {name: partial(infer, network, images) for name, network in networks.items()}
        timings["inference"] = interleave(inference, arguments.runs)
        steps = {name: step_of(network, images, targets) for name, network in networks.items()}
        timings["training step"] = interleave(steps, arguments.runs)
    for kind, timing in timings.items():
        for name, ratio in ratios(timing, "plain").items():
            costs[name][kind] = {**timing[name].to_json(), "ratio": vars(ratio)}

    rows = [
        [
            name,
            f"{cost['parameters'] / 1e6:.2f}",
            f"{cost['flops'] / 1e9:.3f}",
            *(ratios(found, "plain")[name] for found in timings.values()),
        ]
        for name, cost in costs.items()
    ]
    print(table(["variant", "parameters, M", "GFLOP", *(f"{kind} / plain" for kind in timings)], rows))
    settings = {key: getattr(arguments, key) for key in ("backbone", "size", "classes", "batch_size")}
    write(arguments.output, {**settings, "variants": costs})


if __name__ == "__main__":
    main()
