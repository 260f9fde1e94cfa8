"""Images per second that one core prepares, compared with the released transforms and with decoding only.

    OMP_NUM_THREADS=1 CROSSX_DATA=DIR python benchmarks/input_pipeline.py

The images are generated 500 x 375 JPEGs: mosaics of the photographs in ``$CROSSX_DATA/cub80``, which have the detail of
photographs at this size (without CROSSX_DATA: synthetic images). Candidates, all with files in memory:

- ``released``: the transforms of the released code: Pillow, Resize((600, 600)), RandomCrop(448), flip, ToTensor,
  Normalize;
- ``fast``, ``strict``: the work of a crossx data worker per image, without normalisation, which is done on the device;
- ``fast, cache decoded``, ``fast, cache resized``: the same with all images in ``data.cache``, in each form;
- ``decode: ...``: only decoding to uint8 RGB, with each installed library.

These, normalisation and photographs of 12 megapixels are measured in CPU time, so that other programs on the machine
matter less; a DataLoader with two workers, and reading files that are not in the page cache, in time on the clock. The
script also measures the differences between ``fast`` and ``strict``.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from crossx.data.cache import PixelCache
from crossx.data.dataset import ImageDataset, collate
from crossx.data.drawn.synthetic import read_synthetic
from crossx.data.images import read_image
from crossx.data.index import Record
from crossx.data.transforms import Normalize, Transform, eval_transform, train_transform
from crossx.runs import Preprocessing
from harness import Ratio, Timing, interleave, parser, ratios, synchronize, table, write

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FAST = Preprocessing(448, 600, "bilinear", MEAN, STD)
STRICT = replace(FAST, pipeline="strict")
SIZE = (500, 375)
LARGE = (4000, 3000)
PHOTOGRAPHS = Preprocessing(384, None, "bilinear", MEAN, STD)
"""As in the recipe ``finetune``."""
BATCH = 32


class Released(Dataset[tuple[Tensor, int]]):
    """The released code's processing of a training image of CUB-200-2011."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize((600, 600)),
                transforms.RandomCrop((448, 448)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with self.paths[index].open("rb") as file:
            image = Image.open(file).convert("RGB")
        return self.transform(image), 0


def main() -> None:
    """Measure, print and write."""
    options = parser(__doc__, "input_pipeline", runs=9)
    options.add_argument("--images", type=int, default=64, help="images per round (default: 64)")
    options.add_argument(
        "--qualities", type=int, nargs="+", default=[75, 90], help="JPEG qualities (default: 75 90)"
    )
    options.add_argument(
        "--loader-runs", type=int, default=5, help="rounds with workers, 0 for none (default: 5)"
    )
    options.add_argument("--differences", type=int, default=400, help="images to compare (default: 400)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        photographs, source = find_photographs(Path(folder) / "drawn")
        results: dict[str, Any] = {"source": source, "size": SIZE, "images": arguments.images}
        print(f"images: {source}")
        for quality in arguments.qualities:
            paths = write_mosaics(
                photographs, Path(folder) / f"quality{quality}", arguments.images, quality, SIZE
            )
            results[f"quality {quality}"] = measure_speed(paths, quality, arguments)
        results["normalize"] = measure_normalize(arguments.runs)
        results["differences"] = measure_differences(
            photographs[:: max(1, len(photographs) // arguments.differences)]
        )
        results["large"] = measure_large(photographs, Path(folder) / "large", arguments.runs)
        results["shards"] = measure_shards(photographs, arguments.runs)
    write(arguments.output, results)


def find_photographs(drawn: Path) -> tuple[list[Path], str]:
    """Return the images for the JPEGs, and a description of them."""
    root = os.environ.get("CROSSX_DATA")
    if root:
        return sorted(Path(root, "cub80", "images").rglob("*.jpg")), "mosaics of cub80"
    index = read_synthetic(drawn, num_classes=4, images_per_class=40, image_size=256)
    return sorted(
        record.path for record in index.records
    ), "mosaics of the drawn set (CROSSX_DATA is not set)"


def write_mosaics(
    photographs: Sequence[Path], folder: Path, count: int, quality: int, size: tuple[int, int]
) -> list[Path]:
    """Write JPEGs of ``size``, each a mosaic of photographs at their original size."""
    folder.mkdir()
    order = np.random.default_rng(0)
    paths = []
    for number in range(count):
        mosaic = Image.new("RGB", size)
        tile = Image.open(photographs[0]).size
        for left in range(0, size[0], tile[0]):
            for top in range(0, size[1], tile[1]):
                chosen = photographs[int(order.integers(len(photographs)))]
                mosaic.paste(Image.open(chosen).convert("RGB"), (left, top))
        paths.append(folder / f"{number}.jpg")
        mosaic.save(paths[-1], quality=quality)
    return paths


def decoders() -> dict[str, Callable[[Path], object]]:
    """Return functions that decode a JPEG file to uint8 RGB."""
    found: dict[str, Callable[[Path], object]] = {
        "simplejpeg": lambda path: simplejpeg.decode_jpeg(path.read_bytes()),
        "Pillow": lambda path: np.asarray(Image.open(path)),
    }
    try:
        import cv2
    except ImportError:
        pass
    else:
        cv2.setNumThreads(1)
        found["OpenCV"] = lambda path: cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    try:
        from torchvision.io import decode_jpeg
    except ImportError:
        return found
    found["torchvision"] = lambda path: decode_jpeg(
        torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    )
    return found


def datasets(paths: Sequence[Path]) -> dict[str, Dataset[tuple[Tensor, int]]]:
    """Return name -> pipeline, all with random crops and flips."""
    records = [Record(path, 0, "train") for path in paths]
    fast, strict = (train_transform(preprocessing, "crop") for preprocessing in (FAST, STRICT))
    return {
        "released": Released(paths),
        "fast": ImageDataset(records, fast, 0, fast.read),
        "strict": ImageDataset(records, strict, 0, strict.read),
        **{f"fast, cache {form}": dataset for form, dataset in cached(paths, fast).items()},
    }


def cached(paths: Sequence[Path], transform: Transform) -> dict[str, ImageDataset]:
    """Return name -> images that are read from a cache in memory, for each form."""
    records, found = [Record(path, 0, "train") for path in paths], {}
    for form in transform.forms():
        cache = PixelCache({path: form.size(transform.size(path)) for path in paths})
        found[form.name] = ImageDataset(records, form.then, 0, partial(cache.read, prepare=form.read))
    return found


def measure_speed(paths: Sequence[Path], quality: int, arguments: Any) -> dict[str, Any]:
    """Measure the CPU time of one core, then a DataLoader with two workers."""
    count = len(paths)
    pipelines = datasets(paths)
    candidates: dict[str, Callable[[], object]] = {
        name: partial(_read_all, pipeline, count) for name, pipeline in pipelines.items()
    }
    for name, decode in decoders().items():
        candidates[f"decode: {name}"] = partial(_decode_all, decode, paths)
    timings = interleave(candidates, arguments.runs, clock=time.process_time)
    fastest = min(
        (name for name in timings if name.startswith("decode")), key=lambda name: timings[name].median
    )
    size = sum(path.stat().st_size for path in paths) / count
    print(f"\nJPEG quality {quality}, {size / 1000:.0f} kB per image; one core; fastest decoder: {fastest}\n")
    against_released, against_decoding = ratios(timings, "released"), ratios(timings, fastest)
    rows = [
        [
            name,
            f"{1000 * timing.median / count:.3f}",
            f"{count / timing.median:,.0f}",
            f"{1 / against_released[name].median:.2f}",
            f"{1 / against_decoding[name].median:.2f}",
        ]
        for name, timing in timings.items()
    ]
    print(table(["", "ms per image", "images/s", "speed / released", "decoding time / its time"], rows))
    one_core = _described(timings, against_released, against_decoding, count)
    found = {"bytes_an_image": size, "fastest_decoder": fastest, "one_core": one_core}
    return found | measure_loaders(pipelines, count, arguments.loader_runs)


def measure_loaders(
    pipelines: dict[str, Dataset[tuple[Tensor, int]]], count: int, runs: int
) -> dict[str, Any]:
    """Time a DataLoader with two workers; nothing without ``runs``."""
    if not runs:
        return {}
    loaders = {
        name: DataLoader(
            pipeline,
            BATCH,
            num_workers=2,
            persistent_workers=True,
            collate_fn=None if name == "released" else collate,
        )
        for name, pipeline in pipelines.items()
    }
    by_workers = interleave({name: partial(_exhaust, loader) for name, loader in loaders.items()}, runs)
    speedups = ratios(by_workers, "released")
    rows = [
        [name, f"{count / timing.median:,.0f}", f"{1 / speedups[name].median:.2f}"]
        for name, timing in by_workers.items()
    ]
    print(f"\nDataLoader, 2 workers, batches of {BATCH}, {count} images per epoch\n")
    print(table(["", "images/s", "speed / released"], rows))
    return {"two_workers": _described(by_workers, speedups, None, count)}


def measure_normalize(runs: int) -> dict[str, Any]:
    """Time normalisation per image in the worker, and per batch on the device."""
    images = [torch.randint(0, 256, (448, 448, 3), dtype=torch.uint8).permute(2, 0, 1) for _ in range(BATCH)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = torch.stack(images).to(device, memory_format=torch.channels_last)
    in_worker = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD, inplace=True)])
    normalize = Normalize(FAST)

    def on_device() -> None:
        normalize(batch)
        synchronize()

    timings = interleave(
        {
            "in the worker (torchvision)": lambda: [in_worker(image) for image in images],
            f"on the device ({device})": on_device,
        },
        runs,
        clock=time.process_time if device == "cpu" else time.perf_counter,
    )
    print("\nNormalisation, ms per image\n")
    rows = [[name, f"{1000 * timing.median / BATCH:.4f}"] for name, timing in timings.items()]
    print(table(["", "ms per image"], rows))
    return {name: timing.to_json() for name, timing in timings.items()} | {"images": BATCH}


def measure_differences(photographs: Sequence[Path]) -> dict[str, Any]:
    """Compare the bytes of ``fast`` and ``strict`` in evaluation, in grey levels."""
    found: dict[str, Any] = {"images": len(photographs)}
    rows = []
    for interpolation in ("bilinear", "bicubic"):
        fast, strict = (
            eval_transform(replace(preprocessing, interpolation=interpolation))
            for preprocessing in (FAST, STRICT)
        )
        found[interpolation] = _differences(fast, strict, photographs)
        rows.append([interpolation, *(f"{value:.2g}" for value in found[interpolation].values())])
    equal = sum(torch.equal(read_image(path), read_image(path, pillow=True)) for path in photographs)
    found["decoded_equal"] = equal
    print(f"\nfast against strict, {len(photographs)} images, in grey levels of 255\n")
    print(table(["", "largest", "mean", "99th percentile"], rows))
    print(f"\ndecoded to the same pixels as with Pillow: {equal} of {len(photographs)}")
    return found


def measure_large(photographs: Sequence[Path], folder: Path, runs: int) -> dict[str, Any]:
    """Measure what decoding large JPEGs at reduced size and keeping them in a cache gain, and the differences."""
    paths = write_mosaics(photographs, folder, 8, 90, LARGE)
    records = [Record(path, 0, "train") for path in paths]
    transforms = {name: train_transform(PHOTOGRAPHS, name) for name in ("crop", "resized_crop")}
    candidates: dict[str, ImageDataset] = {}
    for name, used in transforms.items():
        for variant, one in ((name, used), (f"{name}, at full size", replace(used, min_side=None))):
            candidates[variant] = ImageDataset(records, one, 0, one.read)
        candidates |= {f"{name}, cache {form}": dataset for form, dataset in cached(paths, used).items()}
    small = replace(PHOTOGRAPHS, image_size=160)
    used = train_transform(small, "resized_crop")
    for variant, one in (
        ("at 160 pixels", used),
        ("at 160 pixels, at full size", replace(used, min_side=None)),
    ):
        candidates[f"resized_crop {variant}"] = ImageDataset(records, one, 0, one.read)
    exact = train_transform(replace(PHOTOGRAPHS, pipeline="strict"), "crop")
    candidates["strict"] = ImageDataset(records, exact, 0, exact.read)
    timings = interleave(
        {name: partial(_read_all, dataset, len(paths)) for name, dataset in candidates.items()},
        runs,
        clock=time.process_time,
    )
    fast, strict = (eval_transform(replace(PHOTOGRAPHS, pipeline=name)) for name in ("fast", "strict"))
    differences = _differences(fast, strict, paths)
    sizes = {
        "crop": fast.size(paths[0])[::-1],
        "resized_crop": transforms["resized_crop"].size(paths[0])[::-1],
        "resized_crop at 160 pixels": used.size(paths[0])[::-1],
    }
    print(f"\n{LARGE[0]} x {LARGE[1]} pixels, decoded at {sizes}; one core\n")
    rows = [[name, f"{1000 * timing.median / len(paths):.2f}"] for name, timing in timings.items()]
    print(table(["", "ms per image"], rows))
    print("\n" + table(list(differences), [[f"{value:.2g}" for value in differences.values()]]))
    return {
        "size": LARGE,
        "images": len(paths),
        "decoded_sizes": sizes,
        "timings": {name: timing.to_json() for name, timing in timings.items()},
        "differences": differences,
    }


def measure_shards(photographs: Sequence[Path], runs: int) -> dict[str, Any]:
    """Time reading what is not in the page cache: a shard from start to end, and the same files in random order."""
    count = min(2000, len(photographs))
    seconds: dict[str, list[float]] = {"shard from start to end": [], "files in random order": []}
    # not in memory
    with tempfile.TemporaryDirectory(dir=".") as name:
        shard, files = Path(name) / "0.tar", [Path(name) / f"{number}.jpg" for number in range(count)]
        with tarfile.open(shard, "w") as archive:
            for path, file in zip(photographs, files, strict=False):
                archive.add(path, file.name)
                file.write_bytes(path.read_bytes())
        for number in range(runs):
            order = np.random.default_rng(number).permutation(count)
            _evict([shard, *files])
            start = time.perf_counter()
            with tarfile.open(shard) as archive:
                for member in archive:
                    content = archive.extractfile(member)
                    assert content is not None
                    content.read()
            between = time.perf_counter()
            for index in order:
                files[index].read_bytes()
            seconds["shard from start to end"].append(between - start)
            seconds["files in random order"].append(time.perf_counter() - between)
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
    print(f"\nReading {count} files of cub80 from the disk\n")
    rows = [[name, f"{1000 * timing.median / count:.3f}"] for name, timing in timings.items()]
    print(table(["", "ms per image"], rows))
    return {"images": count, **{name: timing.to_json() for name, timing in timings.items()}}


def _evict(paths: Sequence[Path]) -> None:
    """Remove files from the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _differences(one: Transform, other: Transform, paths: Sequence[Path]) -> dict[str, float]:
    distances = [(one(one.read(path)).int() - other(other.read(path)).int()).abs() for path in paths]
    return {
        "largest": float(max(distance.max() for distance in distances)),
        "mean": float(np.mean([distance.float().mean() for distance in distances])),
        "p99": float(np.mean([np.percentile(distance.numpy(), 99) for distance in distances])),
    }


def _read_all(dataset: Dataset[tuple[Tensor, int]], count: int) -> None:
    for index in range(count):
        dataset[index]


def _decode_all(decode: Callable[[Path], object], paths: Sequence[Path]) -> None:
    for path in paths:
        decode(path)


def _exhaust(loader: DataLoader[tuple[Tensor, int]]) -> None:
    for _ in loader:
        pass


def _described(
    timings: dict[str, Timing],
    against_released: dict[str, Ratio],
    against_decoding: dict[str, Ratio] | None,
    count: int,
) -> dict[str, Any]:
    """Return timings with images per second and ratios."""
    return {
        name: {
            **timing.to_json(),
            "images_a_second": count / timing.median,
            "time_over_released": vars(against_released[name]),
            **({"time_over_decoding": vars(against_decoding[name])} if against_decoding else {}),
        }
        for name, timing in timings.items()
    }


if __name__ == "__main__":
    main()
