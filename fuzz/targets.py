"""The parsers that are fuzzed: what writes their files, what reads them, and what is inserted into the files."""

from __future__ import annotations

import base64
import functools
import gzip
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import layouts
from crossx.errors import CrossXError

Read = Callable[[Path], object]


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


NUMBERS = tuple(
    text.encode()
    for text in (
        "-1", "0", "1e400", "-1e400", "nan", "inf", ".inf", ".nan", "1e-400", "4294967296", "9223372036854775808", "0x" + "f" * 40,
        "1" * 400, "9" * 4301, "1_000", "0o17", "1.5", "-0", "99999999999",
    )
)  # fmt: skip
TEXT = (
    *NUMBERS, b"\0", b"\r", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f\x90\xa6", b"\x1b[31m", b"\xe2\x80\xa8",
    b"\x85", b"../", b"../../../../etc/passwd", b"/etc/passwd", b"//", b"x" * 5000, b" ", b"\t", b"'", b'"', b"\\", b"%s", b"{0}",
)  # fmt: skip
YAML = (
    *TEXT, b"!!int ", b"!!float ", b"!!bool ", b"!!timestamp ", b"!!binary ", b"!!set ", b"!!omap ", b"!!str ", b"!!null ", b"!!map ", b"!!seq ",
    b"!own ", b"!!python/object/apply:os.system ", b"&a ", b"*a", b"<<: ", b"<<: *a", b"[", b"]", b"{", b"}", b"- ", b"? ", b": ", b"# ", b"---\n",
    b"...\n", b"%YAML 1.1\n", b"%TAG ! x\n", b"|", b">", b"null", b"~", b"true", b"yes", b"2001-12-14", b"2001-99-99", b"[" * 300, b"{" * 300,
    b"- " * 300, b"1:2:3", b'"\\x00"', b'"\\ud800"', b'"\\UFFFFFFFF"', b"base: ", b"base: finetune\n", b"seed: ", b"model: ", b"data: ", b"optim: ",
    b"trainer: ", b"backbone_args: ", b"variants: ", b"tune: ", b"options: ",
)  # fmt: skip
JSON = (
    *TEXT, b"{}", b"[]", b"null", b"true", b"NaN", b"Infinity", b"{" * 2000, b"[" * 2000, b'{"a":' * 2000, b'"\\u0000"', b'"\\ud800"', b"-", b",", b":",
    b'"schema": 2', b'"../x"', b'{"a": 1, "a": 2}',
)  # fmt: skip
CSV = (*TEXT, b"path", b"label", b"split", b"train", b"test", b"val", b",", b";", b'""', b"sep=;\n", b'"\n')
PARQUET = (
    b"PAR1",
    b"PARE",
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x7f" * 5,
    b"\x80" * 9,
    b"\0" * 4,
    struct.pack("<i", -1),
    struct.pack("<q", 2**62),
)
TAR = (
    *TEXT, b"\0" * 100, b"\0" * 512, b"\x80" + b"\0" * 11, b"\xff" * 12, b"77777777777\0", b"00000000000\0", b"0000000-001\0", b"ustar\0" b"00", b"ustar  \0",
    b"././@LongLink", b"././@PaxHeader", b"25 GNU.sparse.major=1\n", b"26 GNU.sparse.map=0,9,0,1\n", b"18 path=../../a.jpg\n", b"13 size=999\n", b"16 size=1e400999\n",
    b"9999 path=x\n", b"0 path=x\n", b"22 hdrcharset=BINARY\n", b".jpg", b".cls", b".json", b".txt", b"LKSxgX0123456", b"/", b"..",
)  # fmt: skip
ARROW = (
    *JSON, *PARQUET, b"ARROW1", struct.pack("<i", 2**31 - 1), struct.pack("<q", -1), struct.pack("<q", 2**40), struct.pack("<h", -1), b'"../../x"', b'"fingerprint"',
    b"ClassLabel", b"Image", b"Value", b"List", b"Sequence", b"string", b"int64", b"data-00000-of-00001.arrow", b'{"_type": "Image"}', b'{"dtype": "string", "_type": "Value"}',
)  # fmt: skip
MAT = (
    b"\xff" * 4,
    b"\x7f" * 4,
    b"\0" * 4,
    *(struct.pack("<I", value) for value in (0, 1, 2, 5, 6, 9, 14, 15, 17, 2**31, 2**32 - 1, 65536)),
)
BIG = tuple(struct.pack(">I", value) for value in (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1))
IMAGE = (
    *MAT, *BIG, b"\xff\xd8\xff", b"\xff\xd9", b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xdb", b"\xff\xdd\0\4", b"\xff\xe1",
    b"Exif\0\0II*\0", b"Exif\0\0MM\0*", b"http://ns.adobe.com/xap/1.0/\0", b"tiff:Orientation='6'", b"tiff:Orientation='99'", b"ICC_PROFILE\0",
    b"Adobe", b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"iCCP", b"zTXt", b"eXIf", b"acTL", b"RIFF", b"WEBP", b"VP8 ", b"VP8L", b"VP8X", b"ALPH",
    b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"ftypavif", b"ispe", b"\xffO\xffQ", b"jP  ", b"P3\n", b"P5\n", b"P6\n", b"65535", b"# x\n",
)  # fmt: skip
HTTP = (
    *JSON, b"\r\n\r\n", b"--x", b"--x--", b"--x\r\n", b"Content-Disposition: form-data; name=\"images\"; filename=\"a.jpg\"", b'name="images"', b'filename="',
    b"filename*=utf-8''%ff", b"; charset=undefined", b"; charset=utf-7", b"; boundary=", b"boundary=x", b"boundary=" + b"y" * 300, b'; boundary="', b"multipart/form-data",
    b"application/json", b"image/jpeg", b"application/octet-stream", b"Content-Encoding: gzip\n", b"Content-Type: ", b"Origin: http://x\n", b"Expect: 100-continue\n",
    b"X-Request-ID: \xff\n", b"Accept: */*\n", b"data:image/jpeg;base64,", b"data:,", b"%00", b"%ff", b"%2e%2e/", b"top=", b"&top=1", b"maps=class", b"&target=wren",
    b"format=json", b"/explain", b"/model", b"/docs", b"/page/", b"/metrics", b"GET ", b"HEAD ", b"OPTIONS ", b"Content-Transfer-Encoding: base64\r\n",
)  # fmt: skip
ARCHIVE = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\xff" * 4, b"\xff" * 8, b"\0" * 4, b"__metadata__", b"F32", b"F64", b"I64", b"BOOL", b"data_offsets", *NUMBERS[:12])  # fmt: skip


def recipe(path: Path) -> object:
    from crossx.recipes import load_recipe
    from crossx.training.config import Config

    loaded = load_recipe(path / "recipe.yaml")
    loaded.to_yaml()
    return Config.from_dict(loaded.to_dict())


def fit(path: Path) -> object:
    from crossx.cli.fit_options import parse_fit

    return parse_fit(["--config", str(path / "recipe.yaml"), "--print_config"]).config.to_yaml()


def words(path: Path) -> object:
    from crossx.cli.fit_options import parse_fit

    value = (path / "value").read_bytes().replace(b"\0", b"").decode(errors="surrogateescape")
    name, _, value = value.partition("=")
    return parse_fit([f"--{name}={value}", "--print_config"]).config.to_yaml()


def config(path: Path) -> object:
    from crossx.training.config import Config

    return Config.from_yaml(path / "config.yaml").to_yaml()


def suite(path: Path) -> object:
    from crossx.ablation.suite import load_suite
    from crossx.training.config import Config

    return load_suite(path / "suite.yaml").configure(Config())


def all_of(*reads: Callable[[], object]) -> None:
    """Call all, although some refuse."""
    refusals = []
    for read in reads:
        try:
            read()
        except CrossXError as error:
            refusals.append(error)
    raise_longest(refusals)


def raise_longest(refusals: Sequence[CrossXError]) -> None:
    """Raise the refusal that has most lines, if there is one."""
    if refusals:
        raise max(refusals, key=lambda error: (len(str(error).splitlines()), len(str(error))))


def separate(read: Callable[[Path], object]) -> Read:
    """Read files that have nothing to do with each other: those that were read before are not read again."""

    @functools.lru_cache(100)
    def refusal(path: Path, content: bytes) -> CrossXError | None:
        try:
            read(path)
        except CrossXError as error:
            return error
        return None

    def read_all(folder: Path) -> None:
        found = [refusal(path, path.read_bytes()) for path in sorted(folder.iterdir()) if path.is_file()]
        raise_longest([error for error in found if error])

    return read_all


def table(name: str) -> Read:
    return lambda path: read_tables(path / name)


def read_tables(path: Path) -> None:
    from crossx.data.readers.table import read_paths, read_table

    all_of(lambda: read_paths(path), lambda: read_table(path))


def listed(path: Path) -> object:
    from crossx.predict.inputs import expand_paths

    return expand_paths([path])


def pictured(path: Path) -> None:
    from crossx.data.images import FORMATS, inspect_image, read_image, read_size
    from crossx.predict.predictor import Predictor
    from crossx.serve.limits import Limits
    from crossx.serve.uploads import Upload

    predictor = tiny_predictor(path.parent / "run", os.getpid())
    assert isinstance(predictor, Predictor)
    content = path.read_bytes()
    all_of(
        # the check of fit, in both ways, and what it reads in training
        lambda: inspect_image(path),
        lambda: inspect_image(path, full=True),
        lambda: read_size(path, min_side=16),
        lambda: read_image(path, min_side=16),
        # predict
        lambda: predictor.prepare(path),
        # the service, with all formats allowed
        lambda: predictor.prepare(Upload("x", content).check(Limits(formats=FORMATS)).data),
    )


@functools.lru_cache(1)
def tiny_predictor(run: Path, process: int) -> object:
    from crossx.predict.predictor import Predictor

    return Predictor.load(run, device="cpu")


def collection(path: Path) -> None:
    from crossx.predict.shards import find_collection

    for shard in find_collection(path, 2).shards:
        list(shard.read())


def outputs(path: Path) -> None:
    from crossx.predict.shards import count_failed

    all_of(lambda: read_tables(path), lambda: listed(path))
    if path.suffix == ".parquet":
        count_failed(path)


def embedded(path: Path) -> None:
    cache = path.parent / "cache"
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(cache)):
        try:
            all_of(lambda: read_tables(path), lambda: collection(path))
        finally:
            shutil.rmtree(cache, ignore_errors=True)


def cached(name: str) -> Read:
    """Read a dataset whose images are unpacked into the cache, with a cache of its own."""

    def read(path: Path) -> None:
        cache = path.parent / "cache"
        with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(cache)):
            try:
                archive(name)(path)
            finally:
                shutil.rmtree(cache, ignore_errors=True)

    return read


def class_table(path: Path) -> object:
    from crossx.runs import Run
    from crossx.share.model_card import CardData

    results = {"split": "test", "n": 3, "top1": 0.5, "class_mean": 0.5, "dataset": "folder"}
    nothing: Any = None
    return CardData.read(nothing, nothing, Run(path), results)


def asked(path: Path) -> None:
    from service import ask

    ask(path.parent / "run", path.read_bytes())


def archive(name: str) -> Read:
    def read(path: Path) -> object:
        from crossx.data.catalog import read_dataset

        return read_dataset(name, str(path))

    return read


def run_files(path: Path) -> object:
    from crossx.report.results import NEEDED
    from crossx.runs import Run, read_history, read_results

    run = Run(path)
    run.read_spec()
    run.read_info()
    read_history(path / "metrics.json")
    return read_results(path / "test.json", NEEDED)


def weights(path: Path) -> object:
    from crossx.backbones import read_state_dict

    for name in ("model.safetensors", "weights.pt"):
        read_state_dict(path / name)
    return None


def network(path: Path) -> object:
    from crossx.methods.weights import load_method

    return load_method(path)


def checkpoint(path: Path) -> object:
    from crossx.training.checkpoints import read_checkpoint

    return read_checkpoint(path / "last.ckpt")


def predictions(path: Path) -> object:
    from crossx.evaluation.predictions import Predictions

    return Predictions.load(path / "test_predictions.npz", path, "test")


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


def loadable(path: Path) -> None:
    import datasets

    with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", path.parent / "cache" / "hub"):
        cached("huggingface")(path)


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
