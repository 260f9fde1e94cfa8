"""Rejection by exported files: how many images of the classes they keep, and how many others they reject.

    OMP_NUM_THREADS=1 python benchmarks/exported_rejection.py RUN... --others flowers=$FLOWERS/test

`crossx export` writes each run, which rejects by class means, for ONNX Runtime and OpenVINO in float32, fp16 and int8.
`int8, means too` is int8 with the way from the features to the similarities in int8 as well; in `int8`, it is in float.
The threshold is that of the run. For the test images and for each folder of images of none of the classes: the share
above the threshold, and the images that the file and eager float32 both keep or both reject; top-1 on the test images;
AUROC of the score; the root mean square and largest difference of the similarities. Time is processor time of one
thread per image at batch 1, in turn. What is in the JSON file already is not measured again.
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from crossx.evaluation.intervals import matched_interval
from crossx.evaluation.network import Network
from crossx.evaluation.open_set import apply_threshold, unknown_data
from crossx.evaluation.subject import Subject
from crossx.evaluation.unknowns import ViewScores, separation
from crossx.export import quantize
from crossx.export.export import export_run
from crossx.export.verify import MIN_QUANTIZED, join_batches, prepared_batches
from crossx.predict.exported import SUFFIXES, ExportedModel
from harness import interleave, parser, table, write

FORMATS = ("onnx", "openvino")
EVERYTHING = "int8, means too"
PRECISIONS = ("fp32", "fp16", EVERYTHING, "int8")
BATCH = 16
UNLIMITED = 1.0
"""Tolerance with which every file is written."""
REPEATS = 5
TEST = "test"


def outputs(network: Network, images: Tensor) -> ViewScores:
    """Return what scores are computed from, for images, uint8 (N, 3, S, S)."""
    return join_batches(
        [ViewScores.compute(network, [part], similarities=True) for part in images.split(BATCH)]
    )


def export(run: Path, file: Path, precision: str) -> ExportedModel:
    """Export a run and open the file."""
    everything = mock.patch.object(quantize._Wiring, "only_for", return_value=[])
    int8 = precision.startswith("int8")
    with everything if precision == EVERYTHING else nullcontext():
        export_run(
            run, file, precision=precision.split(",")[0], tolerance=UNLIMITED,
            accuracy_images=MIN_QUANTIZED if int8 else None,
        )  # fmt: skip
    return ExportedModel.load(file)


def describe(
    subject: Subject, targets: Tensor, found: dict[str, ViewScores], expected: dict[str, ViewScores]
) -> dict[str, Any]:
    """Compare the outputs of a file with those of eager float32, on the test images and on each folder."""
    rejection = subject.spec.rejection
    assert rejection is not None

    def kept_images(outputs: dict[str, ViewScores]) -> dict[str, Tensor]:
        applied = {name: apply_threshold(subject.spec, part) for name, part in outputs.items()}
        return {name: one[1] for name, one in applied.items() if one is not None}

    own, before = kept_images(found), kept_images(expected)
    scores = {
        name: part.double().score(rejection.score, rejection.weight).numpy() for name, part in found.items()
    }
    correct = (found[TEST].logits[0].argmax(1) == targets).numpy()
    result: dict[str, Any] = {"top1": float(correct.mean())}
    for name, kept in own.items():
        reference = before[name]
        assert found[name].similarities is not None
        assert expected[name].similarities is not None
        cosines = found[name].similarities[0] - expected[name].similarities[0]
        result[name] = {
            "kept": float(kept.double().mean()),
            "lost": matched_interval(reference.numpy(), kept.numpy()),
            "alike": int((kept == reference).sum()),
            "similarity_rms": float(cosines.square().mean().sqrt()),
            "similarity_max": float(cosines.abs().max()),
        }
        if name != TEST:
            result[name]["auroc"] = separation(scores[TEST], scores[name], correct)["auroc"]
    return result


def measure(run: Path, folders: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Export one run in all formats and precisions, and compare the files."""
    subject = Subject.open(run, split=TEST, device="cpu")
    preprocessing, records = subject.spec.preprocessing, subject.data.index.split(TEST)
    paths = {TEST: [record.path for record in records]}
    paths |= {
        name: [record.path for record in unknown_data(subject, folder).index.records]
        for name, folder in folders.items()
    }
    images = {name: torch.cat([*prepared_batches(own, preprocessing)]) for name, own in paths.items()}
    targets = torch.tensor([record.label for record in records])
    expected = {name: outputs(subject.network, own) for name, own in images.items()}
    rejection = subject.spec.rejection
    assert rejection is not None
    entry: dict[str, Any] = {
        "images": {name: len(own) for name, own in images.items()},
        "score": rejection.score,
        "keep": rejection.keep,
        "calibration_images": rejection.images,
        "files": {"eager": {"fp32": describe(subject, targets, expected, expected)}},
    }
    with tempfile.TemporaryDirectory() as folder:
        for format_ in FORMATS:
            models = {
                precision: export(run, Path(folder) / f"{number}{SUFFIXES[format_]}", precision)
                for number, precision in enumerate(PRECISIONS)
            }
            image = images[TEST][:1]
            timings = interleave(
                {precision: partial(model.logits, image) for precision, model in models.items()},
                rounds, warmup=3, clock=time.process_time, repeats=REPEATS,
            )  # fmt: skip
            entry["files"][format_] = {
                precision: {
                    **describe(
                        subject, targets, {name: outputs(model, own) for name, own in images.items()}, expected
                    ),
                    "time": timings[precision].to_json(),
                }
                for precision, model in models.items()
            }  # fmt: skip
    return entry


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"runs": {}}
    return found["runs"]


def rows(entry: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of a run."""
    images = entry["images"]
    shown = []
    for format_, files in entry["files"].items():
        for precision, own in files.items():
            kept = own[TEST]
            cells = [f"{own['top1']:.2%}", f"{kept['kept']:.2%}", f"{images[TEST] - kept['alike']}"]
            for name in images:
                if name != TEST:
                    cells += [
                        f"{1 - own[name]['kept']:.2%}", f"{images[name] - own[name]['alike']}",
                        f"{own[name]['auroc']:.2%}",
                    ]  # fmt: skip
            cells.append(f"{kept['similarity_rms']:.5f}")
            cells.append(f"{own['time']['median_s'] * 1e3:.2f}" if "time" in own else "")
            shown.append([format_, precision, *cells])
    return shown


def main() -> None:
    """Measure what is missing, print and write."""
    options = parser(__doc__, "exported_rejection", runs=15)
    options.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="a run folder")
    options.add_argument(
        "--others", nargs="+", default=[], metavar="NAME=DIR", help="images of none of the classes"
    )
    arguments = options.parse_args()
    torch.set_num_threads(1)
    others = {name: Path(path) for name, path in (word.split("=", 1) for word in arguments.others)}
    for run in arguments.folders:
        if run.name not in load(arguments.output):
            entry = measure(run, others, arguments.runs)
            runs = {**load(arguments.output), run.name: entry}
            write(arguments.output, {"clock": "process_time", "runs": runs})
    for name, entry in load(arguments.output).items():
        headers = ["file", "precision", "top-1", "test kept", "changed"]
        for folder in entry["images"]:
            if folder != TEST:
                headers += [f"{folder} rejected", "changed", "AUROC"]
        print(f"\n{name}")
        print(table([*headers, "cosine, RMS", "ms"], rows(entry)))


if __name__ == "__main__":
    main()
