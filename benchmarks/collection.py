"""Throughput of predicting a collection: one process compared with Ray workers on the same cores.

    CROSSX_DATA=DIR python benchmarks/collection.py

DIR contains `cub80/` (a folder of JPEGs) and `weights/mobilenetv2_035/` (a timm checkpoint folder); needs crossx[ray].
The network is Cross-X on MobileNetV2 0.35 at 160 x 160 with random heads; reading images is a large part of the work.

- ``table``: one process, all rows in one CSV file, as with `crossx predict --output FILE.csv`;
- ``folder, local``: one process, one Parquet file per shard, as with `--output DIR`;
- ``folder, ray, N workers``: as with `--engine ray --workers N`, with the cores shared among the workers.

Throughput is measured from the first finished shard to the last. The start-up before it (loading the network and, with
Ray, starting the workers) is reported separately, and so is the one-time start of Ray itself.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from crossx.data.image_files import find_images
from crossx.methods import create_method
from crossx.methods.weights import describe, save_weights
from crossx.predict.cluster import ray_session
from crossx.predict.collection import predict_collection
from crossx.predict.outputs import write_csv
from crossx.predict.predictor import Predictor
from crossx.runs import Preprocessing, Run, write_json
from harness import Timing, interleave, parser, ratios, table, write

SHARD_SIZE = 32
REFERENCE = "table"


def write_run(root: Path, backbone: Path) -> Path:
    torch.manual_seed(0)
    method = create_method("crossx", backbone=f"local-dir:{backbone}", num_classes=80, pretrained=True)
    preprocessing = Preprocessing(160, None, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    classes = [f"class {number}" for number in range(80)]
    spec = describe(method, classes=classes, preprocessing=preprocessing, dataset="cub80")
    run = Run(root)
    write_json(run.spec, spec.to_json())
    save_weights(method, run.weights)
    return root


class Clock:
    """Records the time of each call, and of the first one after ``SHARD_SIZE`` images.

    Attributes:
        paces: Images per second of each run, from the first finished shard on.
        start_ups: Seconds of each run before prediction.
    """

    def __init__(self, predict: Callable[[Callable[[int], None]], None], images: int) -> None:
        self.predict, self.images = predict, images
        self.paces: list[float] = []
        self.start_ups: list[float] = []
        self.first: tuple[int, float] | None = None

    def __call__(self) -> None:
        self.first = None
        start = time.perf_counter()
        self.predict(self.finished)
        end = time.perf_counter()
        assert self.first is not None
        done, then = self.first
        pace = (self.images - done) / (end - then)
        self.paces.append(pace)
        self.start_ups.append(end - start - self.images / pace)

    def finished(self, done: int) -> None:
        if self.first is None and done >= SHARD_SIZE:
            self.first = done, time.perf_counter()


def main() -> None:
    options = parser(__doc__, "collection", runs=3)
    options.add_argument("--images", type=int, default=1000, help="images per run (default: %(default)s)")
    options.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], help="numbers of Ray workers (default: 1 2)"
    )
    options.add_argument("--device", default="auto", help="auto, cpu or cuda")
    asked = options.parse_args()
    data = Path(os.environ["CROSSX_DATA"])
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        photos, output = place / "photos", place / "out"
        photos.mkdir()
        for number, path in enumerate(find_images(data / "cub80" / "images")[: asked.images]):
            (photos / f"{number:05d}.jpg").symlink_to(path.resolve())
        images = len(find_images(photos))
        run = write_run(place / "run", data / "weights" / "mobilenetv2_035")

        def to_table(finished: Callable[[int], None]) -> None:
            predictor = Predictor.load(run, asked.device)

            def counted():
                for done, prediction in enumerate(predictor.iter_predict(photos), 1):
                    finished(done)
                    yield prediction

            write_csv(place / "out.csv", counted())

        def to_folder(engine: str, workers: int | None) -> Callable[[Callable[[int], None]], None]:
            def predict(finished: Callable[[int], None]) -> None:
                shutil.rmtree(output, ignore_errors=True)
                predict_collection(
                    run,
                    photos,
                    output,
                    engine=engine,
                    workers=workers,
                    device=asked.device,
                    shard_size=SHARD_SIZE,
                    progress=lambda done, total: finished(done),
                )

            return predict

        clocks = {
            REFERENCE: Clock(to_table, images),
            "folder, local": Clock(to_folder("local", None), images),
        }
        for workers in asked.workers:
            clocks[f"folder, ray, {workers} workers"] = Clock(to_folder("ray", workers), images)
        start = time.perf_counter()
        with ray_session():
            ray_start = time.perf_counter() - start
            # one run first, so that the files are in memory
            to_table(lambda done: None)
            interleave(clocks, asked.runs, warmup=0)
    paces = {name: Timing(tuple(1 / pace for pace in clock.paces)) for name, clock in clocks.items()}
    start_ups = {name: Timing(tuple(clock.start_ups)) for name, clock in clocks.items()}
    against = ratios(paces, REFERENCE)
    print(f"{images} images of {photos.name}, {os.cpu_count()} cores; starting Ray: {ray_start:.1f} s\n")
    print(
        table(
            ["predicted by", "images per second", "time per image / table", "start-up, s"],
            [
                [name, f"{1 / pace.median:.0f}", against[name], f"{start_ups[name].median:.1f}"]
                for name, pace in paces.items()
            ],
        )
    )
    results = {
        name: {
            "images_a_second": 1 / pace.median,
            "seconds_an_image": pace.to_json(),
            "start_up": start_ups[name].to_json(),
            "ratio": vars(against[name]),
        }
        for name, pace in paces.items()
    }
    write(asked.output, {"images": images, "ray_start_s": ray_start, "results": results})


if __name__ == "__main__":
    main()
