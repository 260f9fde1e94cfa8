"""Training steps fed by the input pipeline, compared with the same steps on one batch that is already on the device.

    python benchmarks/fed_training.py --root CUB_200_2011

The workers of `crossx fit` decode, crop and flip images, the device normalises them, and a plain ResNet-50 trains on
them at 448 px, in bfloat16 on a GPU. Images per second of the pipeline, of the step, and of both together, in turn; if
the pipeline is the slowest, more workers or ``--cache ram`` help. The first batches of a loader, which include the
start of its workers, are not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, count
from pathlib import Path
from statistics import median
from typing import Any

import torch

from crossx.data.catalog import read_configured
from crossx.data.config import DataConfig
from crossx.data.datamodule import DataModule
from crossx.data.transforms import preprocessing_for
from crossx.methods import create_method
from harness import parser, synchronize, table, write
from training_step import step_on

SKIPPED = 3


def batches(data: DataModule, device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield batches on the device without end, epoch after epoch."""
    loader: Any = data.train_dataloader()

    def epoch(number: int) -> Any:
        loader.sampler.set_epoch(number)
        return loader

    for batch in chain.from_iterable(epoch(number) for number in count()):
        yield data.to_device(batch, device)


def rate(work: Callable[[], int], steps: int) -> float:
    """Return images per second of ``steps`` calls of ``work``, which returns its number of images."""
    synchronize()
    start = time.perf_counter()
    images = sum(work() for _ in range(steps))
    synchronize()
    return images / (time.perf_counter() - start)


def main() -> None:
    options = parser(__doc__, "fed_training", runs=3)
    on_gpu = torch.cuda.is_available()
    options.add_argument("--dataset", default="cub", help="default: %(default)s")
    options.add_argument("--root", type=Path, help="its folder; synthetic needs none")
    options.add_argument("--backbone", default="resnet50", help="default: %(default)s")
    options.add_argument("--size", type=int, default=448, help="pixels (default: %(default)s)")
    options.add_argument("--batch-size", type=int, default=64 if on_gpu else 8)
    options.add_argument("--steps", type=int, default=20, help="per round (default: %(default)s)")
    options.add_argument("--workers", type=int, help="default: that of `crossx fit`")
    options.add_argument("--cache", choices=("none", "ram"), default="none", help="default: %(default)s")
    arguments = options.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    config = DataConfig(
        dataset=arguments.dataset,
        root=arguments.root,
        image_size=arguments.size,
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        cache=arguments.cache,
    )
    index = read_configured(config)
    network = create_method("plain", backbone=arguments.backbone, num_classes=len(index.classes))
    data = DataModule(index, preprocessing_for(config, network.backbone.data_config), config, seed=0)
    data.open_caches()
    step = step_on(network, device)
    loaded = batches(data, device)
    fixed = next(loaded)

    def load() -> int:
        return len(next(loaded)[1])

    def train(source: Callable[[], tuple[torch.Tensor, ...]]) -> int:
        images, targets = source()
        step(images, targets)
        return len(targets)

    work = {
        "pipeline": load,
        "step": partial(train, lambda: fixed),
        "step, fed": partial(train, partial(next, loaded)),
    }
    for one in work.values():
        for _ in range(SKIPPED):
            one()
    rounds = [{name: rate(one, arguments.steps) for name, one in work.items()} for _ in range(arguments.runs)]
    found = {name: median(each[name] for each in rounds) for name in work}
    print(
        table(
            ["what", "images/s", "min", "max"],
            [
                [name, f"{value:.0f}", *(f"{end(each[name] for each in rounds):.0f}" for end in (min, max))]
                for name, value in found.items()
            ],
        )
    )
    settings = {
        key: getattr(arguments, key) for key in ("dataset", "backbone", "size", "batch_size", "cache")
    }
    write(
        arguments.output,
        {
            "device": device.type,
            **settings,
            "workers": data.num_workers,
            "images_per_second": found,
            "rounds": rounds,
        },
    )


if __name__ == "__main__":
    main()
