"""Cost of each method compared with the plain backbone: parameters, FLOPs, times of inference and a training step.

    python benchmarks/methods.py
    python benchmarks/methods.py --suite methods_sgd --output benchmarks/results/methods_sgd.json
    python benchmarks/methods.py --suite methods_sgd --backbone resnet50 --size 448 --classes 200 --batch-size 2 \\
      --runs 0 --recipes mamc_cub_resnet50 kernel_pooling_cub_resnet50 --output benchmarks/results/methods_448.json

The variants are those of a suite, with its options for the small trunk; ``--recipes`` adds networks with the options of
recipes. All use the same batch size, even if the suite trains with another. A variant that crops from larger images
gets them: resizing and cropping is part of its cost. Weights are random. A training step consists of objective,
backward pass and optimiser step; of a method with phases, it is one of the phase of most epochs of ten. FLOPs are those
of torch's counter for inference on one image, two per multiply-add: convolutions and matrix products, but not the FFT
of kernel pooling. ``--runs 0`` counts without timing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from crossx.ablation.suite import load_suite
from crossx.methods import Method, create_method
from crossx.methods.base import Phase
from crossx.training.config import Config
from harness import Timing, interleave, parser, ratios, table, write
from training_step import step_of

RECIPE = "crossx_mobilenetv2_160"
SIZE = 160
"""Image size in pixels that the options of the suites are meant for."""
IN_PIXELS = ("view_size", "glimpse_size", "crop_size")
EPOCHS = 10


def build(config: Config, backbone: str, classes: int) -> Method:
    torch.manual_seed(0)
    return create_method(
        config.model.method,
        backbone=backbone,
        num_classes=classes,
        image_size=config.data.image_size,
        **config.model.options,
    )


def variants(suite: str, size: int, recipes: Sequence[str]) -> dict[str, Config]:
    """Return name -> configuration of each variant of the suite, untuned, and of each recipe, for images of a size."""
    base = Config.from_recipe(RECIPE)
    found = {
        name: scale(configs[0], size / SIZE) for name, configs in load_suite(suite).configure(base).items()
    }
    return found | {name: replace_size(Config.from_recipe(name), size) for name in recipes}


def replace_size(config: Config, size: int) -> Config:
    return replace(config, data=replace(config.data, image_size=size))


def scale(config: Config, factor: float) -> Config:
    """Scale the sizes in pixels, rounded to whole pixels."""
    options: Mapping[str, Any] = {
        name: round(factor * value) if name in IN_PIXELS and value else value
        for name, value in config.model.options.items()
    }
    model = replace(config.model, options=dict(options))
    return replace(replace_size(config, round(factor * config.data.image_size)), model=model)


def phase_of_most_epochs(method: Method) -> Phase:
    phases = [method.phase_at(epoch, EPOCHS) for epoch in range(EPOCHS)]
    (name, _), *_ = Counter(phase.name for phase in phases).most_common(1)
    return next(phase for phase in phases if phase.name == name)


def train_step(network: Method, images: torch.Tensor, targets: torch.Tensor) -> Any:
    network.phase = phase_of_most_epochs(network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name.startswith(network.phase.trains))
    return step_of(network, images, targets)


def infer(network: Method, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return network(images)  # type: ignore[no-any-return]


def count_flops(network: Method, image: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        infer(network, image)
    return counter.get_total_flops()


def main() -> None:
    options = parser(__doc__, "methods", runs=9)
    options.add_argument("--suite", default="methods", help="default: %(default)s")
    options.add_argument("--backbone", default="mobilenetv2_035", help="default: %(default)s")
    options.add_argument("--size", type=int, default=160, help="pixels (default: %(default)s)")
    options.add_argument("--classes", type=int, default=80, help="default: %(default)s")
    options.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    options.add_argument("--recipes", nargs="*", default=[], help="further recipes to measure")
    arguments = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    configs = variants(arguments.suite, arguments.size, arguments.recipes)
    images = {
        size: torch.randn(arguments.batch_size, 3, size, size, device=device).contiguous(
            memory_format=torch.channels_last
        )
        for size in sorted({config.data.image_size for config in configs.values()})
    }
    seen = {name: images[config.data.image_size] for name, config in configs.items()}
    # two images per class, for MAMC
    targets = torch.arange(arguments.batch_size, device=device) // 2 % arguments.classes

    networks = {
        name: build(config, arguments.backbone, arguments.classes)
        .to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        .eval()
        for name, config in configs.items()
    }
    costs: dict[str, dict[str, Any]] = {
        name: {
            "options": config.model.options,
            "image_size": config.data.image_size,
            "phase": phase_of_most_epochs(network).name,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "flops": count_flops(network, seen[name][:1]),
        }
        for (name, network), config in zip(networks.items(), configs.values(), strict=True)
    }
    timings: dict[str, dict[str, Timing]] = {}
    if arguments.runs:
        # inference first: a training step leaves a network in training mode
        inference = {name: partial(infer, network, seen[name]) for name, network in networks.items()}
        timings["inference"] = interleave(inference, arguments.runs)
        steps = {
            name: train_step(network, seen[name], targets)
            for name, network in networks.items()
            if configs[name].trainer.max_epochs
        }
        timings["training step"] = interleave(steps, arguments.runs)
    relative = {kind: ratios(timing, "plain") for kind, timing in timings.items()}
    for kind, found in relative.items():
        for name, ratio in found.items():
            costs[name][kind] = {**timings[kind][name].to_json(), "ratio": vars(ratio)}

    rows = [
        [
            name,
            f"{cost['parameters'] / 1e6:.2f}",
            f"{cost['flops'] / 1e9:.3f}",
            *(of.get(name, "") for of in relative.values()),
        ]
        for name, cost in costs.items()
    ]
    print(table(["variant", "parameters, M", "GFLOP", *(f"{kind} / plain" for kind in relative)], rows))
    settings = {
        key: getattr(arguments, key) for key in ("suite", "backbone", "size", "classes", "batch_size")
    }
    write(arguments.output, {**settings, "variants": costs})


if __name__ == "__main__":
    main()
