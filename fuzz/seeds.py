"""Write the valid files that are mutated, into an empty folder."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import layouts


def write_text(name: str, text: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(text)


def write_recipe(path: Path) -> None:
    from crossx.recipes import load_recipe

    recipe = load_recipe("finetune").to_yaml()
    (path / "recipe.yaml").write_text(f"base: plain_cub_resnet50\n{recipe}")


def write_config(path: Path) -> None:
    from crossx.training.config import Config

    (path / "config.yaml").write_text(Config.from_recipe("crossx_cub_resnet50").to_yaml())


def write_run_files(path: Path) -> None:
    layouts.write_run(path)
    (path / "run.json").write_text(
        json.dumps(
            {
                "id": "a",
                "status": "finished",
                "method": "crossx",
                "pretrained": False,
                "seed": 0,
                "images": {"train": 3},
                "skipped": [],
                "data": {"dataset": "folder", "root": "x", "seed": 1},
                "selection": {"how": "best", "epoch": 1, "value": 0.5},
                "environment": {
                    "python": "3.12",
                    "versions": {"torch": "2"},
                    "git": {"commit": "a", "dirty": False},
                },
            }
        )
    )
    (path / "metrics.json").write_text(
        json.dumps({"epochs": [{"epoch": 1, "train_loss": 0.5, "val_top1": 0.25}]})
    )
    (path / "test.json").write_text(
        json.dumps(
            {
                "method": "crossx",
                "backbone": "test_resnet",
                "dataset": "folder",
                "preprocessing": {"image_size": 64},
                "n": 3,
                "num_classes": 3,
                "top1": 0.5,
                "top5": 1.0,
                "class_mean": 0.5,
                "ece": 0.1,
                "heads": {"a": 0.5},
                "levels": {},
                "intervals": {
                    "top1": [0.1, 0.9],
                    "class_mean": [0.1, 0.9],
                    "confidence": 0.95,
                    "resamples": 10,
                },
                "confused_pairs": [{"target": "a", "prediction": "b", "n": 1, "fraction": 0.5}],
                "temperature": 1.5,
            }
        )
    )


def write_weights(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    state = {"a.weight": torch.ones(3, 2), "b": torch.zeros(1, dtype=torch.int64)}
    save_file(state, path / "model.safetensors")
    torch.save({"state_dict": state}, path / "weights.pt")


def write_checkpoint(path: Path) -> None:
    import torch

    state = {"format": 2, "state_dict": {"a": torch.ones(2)}, "epoch": 3, "rng": [1, 2.5, "x", None, (True,)]}
    torch.save(state, path / "last.ckpt")


def write_predictions(path: Path) -> None:
    import numpy as np

    arrays = {"logits": np.zeros((3, 2), np.float32), "targets": np.array([0, 1, 1]), "paths": np.array(["a", "b", "c"]), "classes": np.array(["x", "y"])}  # fmt: skip
    np.savez(path / "test_predictions.npz", **arrays)


def write_jsonl(path: Path) -> None:
    table = layouts.write_table(path, 2, 4)
    lines = [line.split(",") for line in table.read_text().splitlines()]
    rows = [dict(zip(lines[0], fields, strict=True)) for fields in lines[1:]]
    (path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gzip(path: Path) -> None:
    write_jsonl(path)
    for name in ("table.csv", "table.jsonl"):
        (path / f"{name}.gz").write_bytes(gzip.compress((path / name).read_bytes(), mtime=0))


LISTS = ("list.txt", "utf16.lst", "zeros.list")


def write_lists(path: Path) -> None:
    layouts.write_table(path, 2, 4)
    names = [f"images/{label}_{number:03d}.jpg" for label in range(2) for number in range(4)]
    (path / "list.txt").write_text("# birds\n'" + names[0] + "'\nfile:///x.jpg\n" + "\n".join(names))
    (path / "utf16.lst").write_text("\r\n".join(names), encoding="utf-16")
    (path / "zeros.list").write_text("\0".join(names))


PICTURES = (
    "plain.jpg", "progressive.jpg", "cmyk.jpg", "grey.png", "palette.png", "deep.png", "a.webp", "a.gif", "a.bmp", "lzw.tif", "deep.tif", "a.jp2",
    "a.ppm", "deep.pgm", "a.avif",
)  # fmt: skip


def write_pictures(path: Path) -> None:
    import numpy as np
    from PIL import Image

    layouts.write_run(path.parent / "run")
    values = np.random.default_rng(0).integers(0, 256, (24, 32, 4), np.uint8)
    colours, deep = Image.fromarray(values[..., :3]), Image.fromarray(values[..., 0].astype(np.uint16) * 16)
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><a tiff:Orientation='3'/></x:xmpmeta>"
    for name, image, options in (
        ("plain.jpg", colours, {"xmp": xmp}),
        ("progressive.jpg", colours, {"progressive": True, "exif": exif}),
        ("cmyk.jpg", colours.convert("CMYK"), {}),
        ("grey.png", colours.convert("LA"), {"exif": exif}),
        ("palette.png", colours.quantize(16), {"transparency": 3}),
        ("deep.png", deep, {}),
        ("a.webp", Image.fromarray(values), {"exif": exif}),
        ("a.gif", colours.quantize(8), {"save_all": True, "append_images": [colours.quantize(4)]}),
        ("a.bmp", colours, {}),
        ("lzw.tif", colours, {"compression": "tiff_lzw", "exif": exif}),
        ("deep.tif", deep, {"compression": "tiff_adobe_deflate"}),
        ("a.jp2", colours, {}),
        ("a.ppm", colours, {}),
        ("deep.pgm", deep, {}),
        ("a.avif", colours, {"exif": exif}),
    ):
        image.save(path / name, **options)


REQUESTS = ("files", "json", "raw", "explain", "maps")


def write_requests(path: Path) -> None:
    layouts.write_run(path.parent / "run")
    layouts.write_image(path.parent / "image.jpg", 0, 0, (24, 20))
    image = (path.parent / "image.jpg").read_bytes()
    encoded = base64.b64encode(image)

    def form(name: str) -> bytes:
        return (
            b'--x\r\nContent-Disposition: form-data; name="images"; filename="%s"\r\nContent-Type: image/jpeg\r\n\r\n%s\r\n'
            % (name.encode(), image)
        )

    head = b"POST /predict?top=2\nContent-Type: "
    forms = (
        form("a.jpg")
        + form("b/\u00e9.jpg")
        + b'--x\r\nContent-Disposition: form-data; name="top"\r\n\r\n1\r\n--x--\r\n'
    )
    several = b'{"images": ["%s", "data:image/jpeg;base64,%s"], "top": 3}' % (encoded, encoded)
    for name, request in {
        "files": head + b"multipart/form-data; boundary=x\n\n" + forms,
        "json": head + b"application/json\n\n" + several,
        "raw": head + b"image/jpeg\n\n" + image,
        "explain": b"POST /explain?maps=class&target=wren&format=json\nContent-Type: image/jpeg\n\n" + image,
        "maps": b"POST /explain\nContent-Type: application/json\nX-Request-ID: a1\n\n" + several.replace(b', "data', b'], "x": ["data'),
    }.items():  # fmt: skip
        (path / name).write_bytes(request)


OUTPUTS = ("top.csv", "one.csv", "top.jsonl", "one.jsonl", "top.parquet", "one.parquet")


def write_outputs(path: Path) -> None:
    from crossx.predict.outputs import Columns, write_predictions
    from crossx.predict.results import Prediction

    best = (("=wren", 0.75), ("robin, \u00e9", 0.25))
    rows = [Prediction(path / f"{n}.jpg", *best[0], top=best) for n in range(4)]
    rows[1] = Prediction(path / "-x.jpg", error="is empty (0 bytes)")
    for name in OUTPUTS:
        write_predictions(path / name, rows, Columns(2 if name.startswith("top") else 1))


def write_class_table(path: Path) -> None:
    from crossx.evaluation.tables import write_table

    write_run_files(path)
    (path / "test").mkdir()
    rows = [["wren", 2, 0.5, "=robin"], ["robin, red", 1, 1.0, ""], ["'x", 0, "", ""]]
    write_table(path / "test/per_class.csv", ["class", "n", "accuracy", "most_confused_with"], rows)


EMBEDDED = ("bytes.parquet", "struct.parquet")


def write_embedded(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    layouts.write_image(path.parent / "image.jpg", 0, 0, (24, 20))
    image = (path.parent / "image.jpg").read_bytes()
    labels = ["wren", "robin"] * 3
    structs = [{"bytes": image + bytes([n]), "path": f"{n}.jpg"} for n in range(6)]
    features = {"info": {"features": {"label": {"names": ["wren", "robin"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": structs, "label": [0, 1] * 3}).replace_schema_metadata(
        {"huggingface": json.dumps(features)}
    )
    pq.write_table(table, path / "struct.parquet", compression="zstd", row_group_size=2)
    pq.write_table(
        pa.table({"bytes": [image] * 6, "label": labels, "id": list("abcdef")}), path / "bytes.parquet"
    )


SHARDS = ("train-000.tar", "test-000.tar", "classnames.txt")


def write_shards(path: Path) -> None:
    import io
    import tarfile

    layouts.write_image(path.parent / "image.jpg", 0, 0, (24, 20))
    image = (path.parent / "image.jpg").read_bytes()
    (path / "classnames.txt").write_text("wren\nrobin\n")
    for name, form in zip(SHARDS, (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT), strict=False):
        with tarfile.open(path / name, "w", format=form) as archive:
            for number in range(4):
                # the longest has a header of its own
                key = f"{number:03d}" if number else f"{'long/' * 30}\u00e9"
                label = {"cls": b"1", "txt": b"wren", "json": b'{"label": 0}'}
                kind = ("cls", "txt", "json", "cls")[number]
                for extension, content in (("jpg", image), (kind, label[kind])):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def sum_headers(content: bytes) -> bytes:
    """Return a tar file whose headers have their checksums."""
    result = bytearray(content)
    for start in range(0, len(result) - 511, 512):
        if result[start + 257 : start + 262] == b"ustar":
            result[start + 148 : start + 156] = b" " * 8
            total = sum(result[start : start + 512])
            result[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(result)


SAVED = (
    "dataset_dict.json", "train/state.json", "train/dataset_info.json", "train/data-00000-of-00001.arrow",
)  # fmt: skip


def write_saved(path: Path) -> None:
    import datasets

    layouts.write_image(path.parent / "image.jpg", 0, 0, (24, 20))
    image = (path.parent / "image.jpg").read_bytes()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["wren", "robin"])}
    )
    rows = {
        "image": [{"bytes": image + bytes([n]), "path": f"{n}.jpg"} for n in range(6)],
        "label": [0, 1] * 3,
    }
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(path))


def write_loadable(path: Path) -> None:
    (path / "data").mkdir()
    write_embedded(path / "data")
    (path / "data/bytes.parquet").unlink()
    (path / "data/struct.parquet").rename(path / "data/train.parquet")
