"""The parsers that are fuzzed: what writes their files, what reads them, and what is inserted into the files."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import layouts
from parsers import (
    Read,
    all_of,
    archive,
    asked,
    cached,
    checkpoint,
    class_table,
    config,
    embedded,
    fit,
    listed,
    loadable,
    network,
    outputs,
    pictured,
    predictions,
    read_tables,
    recipe,
    run_files,
    separate,
    suite,
    table,
    weights,
    words,
)
from seeds import (
    EMBEDDED,
    LISTS,
    OUTPUTS,
    PICTURES,
    REQUESTS,
    SAVED,
    SHARDS,
    sum_headers,
    write_checkpoint,
    write_class_table,
    write_config,
    write_embedded,
    write_gzip,
    write_jsonl,
    write_lists,
    write_loadable,
    write_outputs,
    write_pictures,
    write_predictions,
    write_recipe,
    write_requests,
    write_run_files,
    write_saved,
    write_shards,
    write_text,
    write_weights,
)
from tokens import ARCHIVE, ARROW, CSV, HTTP, IMAGE, JSON, MAT, PARQUET, TAR, TEXT, YAML


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        write: Writes a valid layout into an empty folder.
        files: The files that are mutated, relative to it.
        read: Reads the layout in a folder.
        tokens: What is inserted into the files.
        tail: Whether most mutations hit the end of a file, where its index is.
        repair: Makes checksums right again, in most mutants.
    """

    write: Callable[[Path], object]
    files: tuple[str, ...]
    read: Read
    tokens: tuple[bytes, ...] = ()
    tail: bool = False
    repair: Callable[[bytes], bytes] | None = None


CUB = (
    "classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt", "parts/parts.txt", "parts/part_locs.txt",
)  # fmt: skip
AIRCRAFT = ("variants.txt", "families.txt", "images_box.txt", "images_variant_train.txt", "images_family_test.txt", "images_manufacturer_val.txt")  # fmt: skip
SUITE = "title: x\nvariants:\n  plain: {model: {method: plain}}\n  crossx: {model: {method: crossx, num_parts: 2}}\ntune:\n- {optim: {lr: 0.1}}\n"  # fmt: skip
VALUE = "model.backbone_args={channels: [4, 8], drop_rate: 0.5}"
TARGETS = {
    "recipe": Target(write_recipe, ("recipe.yaml",), recipe, YAML),
    "config": Target(write_config, ("config.yaml",), config, YAML),
    "suite": Target(write_text("suite.yaml", SUITE), ("suite.yaml",), suite, YAML),
    "fit": Target(write_recipe, ("recipe.yaml",), fit, YAML),
    "words": Target(write_text("value", VALUE), ("value",), words, (*YAML, b"optim.milestones=", b"data.root=", b"trainer.max_time=", b"model.taps=")),
    "csv": Target(lambda path: layouts.write_table(path, 2, 4), ("table.csv",), table("table.csv"), CSV),
    "parquet": Target(
        lambda path: layouts.write_table(path, 2, 4, suffix=".parquet"), ("table.parquet",), table("table.parquet"), PARQUET, tail=True
    ),
    "cub": Target(lambda path: layouts.write_cub(path, 2, 2), CUB, archive("cub"), TEXT),
    "nabirds": Target(lambda path: layouts.write_nabirds(path, 4, 2), (*CUB, "hierarchy.txt"), archive("nabirds"), TEXT),
    "aircraft": Target(
        lambda path: layouts.write_aircraft(path, 2, 3),
        tuple(f"fgvc-aircraft-2013b/data/{name}" for name in AIRCRAFT), archive("aircraft"), TEXT,
    ),
    "cars": Target(lambda path: layouts.write_cars(path, 2, 2, layout="joint"), ("cars_annos.mat",), archive("cars"), MAT),
    "dogs": Target(lambda path: layouts.write_dogs(path, 2, 2), ("train_list.mat", "test_list.mat"), archive("dogs"), MAT),
    "run": Target(write_run_files, ("model.json", "run.json", "metrics.json", "test.json"), run_files, JSON),
    "network": Target(write_run_files, ("model.json",), network, JSON),
    "weights": Target(write_weights, ("model.safetensors", "weights.pt"), weights, ARCHIVE),
    "checkpoint": Target(write_checkpoint, ("last.ckpt",), checkpoint, ARCHIVE),
    "predictions": Target(write_predictions, ("test_predictions.npz",), predictions, ARCHIVE),
    "jsonl": Target(write_jsonl, ("table.jsonl",), table("table.jsonl"), JSON),
    "gzip": Target(
        write_gzip, ("table.csv.gz", "table.jsonl.gz"),
        lambda path: all_of(lambda: read_tables(path / "table.csv.gz"), lambda: read_tables(path / "table.jsonl.gz")), PARQUET,
    ),
    "lists": Target(write_lists, LISTS, lambda path: all_of(*(functools.partial(listed, path / name) for name in LISTS)), TEXT),
    "embedded": Target(write_embedded, EMBEDDED, separate(embedded), PARQUET, tail=True),
    "webdataset": Target(write_shards, SHARDS, cached("webdataset"), TAR, repair=sum_headers),
    "huggingface": Target(write_saved, SAVED, cached("huggingface"), ARROW),
    "loadable": Target(write_loadable, ("data/train.parquet",), loadable, PARQUET, tail=True),
    "outputs": Target(write_outputs, OUTPUTS, separate(outputs), (*CSV, *JSON, *PARQUET)),
    "classes": Target(write_class_table, ("test/per_class.csv",), class_table, CSV),
    "images": Target(write_pictures, PICTURES, separate(pictured), IMAGE),
    "requests": Target(write_requests, REQUESTS, separate(asked), HTTP),
}  # fmt: skip
