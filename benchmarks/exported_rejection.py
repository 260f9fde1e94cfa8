"""Rejection by exported files: how many images of the classes they keep, and how many others they reject.

    OMP_NUM_THREADS=1 python benchmarks/exported_rejection.py RUN... --others flowers=$FLOWERS/test

`crossx export` writes each run, which rejects by class means, for ONNX Runtime and OpenVINO in float32, fp16 and int8.
`int8, means too` is int8 with the way from the features to the similarities in int8 as well; in `int8`, it is in float.
The threshold is that of the file, which `crossx export` sets again for int8. For the test images and for each folder
of images of none of the classes: the share above the threshold, and the images that the file and eager float32 both
keep or both reject; for int8, the same at the threshold of float32 (`float32_threshold`); top-1 on the test images;
AUROC of the score; the root mean square and largest difference of the similarities. Time is processor time of one
thread per image at batch 1, in turn.

`random` is the mean and the standard deviation of the share kept over 500 random calibrations on as many of the
validation and test images as the run was calibrated on, measured on the others: in float32, with the file at the
threshold of float32, and at a threshold set again. `sets` is the coverage of prediction sets for 90% on the test
images, and `nll` the negative log-likelihood there, each with the thresholds or temperature of float32 and with those
set again. What is in the JSON file already is not measured again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from crossx.evaluation.calibration import choose_temperature
from crossx.evaluation.intervals import matched_interval
from crossx.evaluation.network import Network
from crossx.evaluation.open_set import apply_threshold, describe_sets, unknown_data
from crossx.evaluation.subject import Subject
from crossx.evaluation.unknowns import ViewScores, keeping_threshold, separation
from crossx.export import quantize
from crossx.export.export import export_run
from crossx.export.options import MIN_QUANTIZED
from crossx.export.verify import join_batches, prepared_batches
from crossx.predict.exported import ExportedModel
from crossx.runs import EXPORT_SUFFIXES, ModelSpec, Rejection
from harness import interleave, parser, table, write

FORMATS = ("onnx", "openvino")
EVERYTHING = "int8, means too"
PRECISIONS = ("fp32", "fp16", EVERYTHING, "int8")
BATCH = 16
UNLIMITED = 1.0
"""Tolerance with which every file is written."""
REPEATS = 5
VAL, TEST = "val", "test"
CALIBRATIONS = 500
COVERAGE = 0.9


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


def kept_images(spec: ModelSpec, outputs: ViewScores) -> Tensor:
    """Return whether each image is kept, (N,)."""
    applied = apply_threshold(spec, outputs)
    assert applied is not None
    return applied[1]


def compare_kept(reference: Tensor, kept: Tensor) -> dict[str, Any]:
    """Compare which images two networks keep, (N,) each."""
    return {
        "kept": float(kept.double().mean()),
        "lost": matched_interval(reference.numpy(), kept.numpy()),
        "alike": int((kept == reference).sum()),
    }


def scores_of(rejection: Rejection, outputs: Sequence[ViewScores]) -> NDArray[np.float64]:
    """Return the scores of the images of several outputs, one after the other."""
    return np.concatenate(
        [part.double().score(rejection.score, rejection.weight).numpy() for part in outputs]
    )


def random_calibrations(
    rejection: Rejection, found: dict[str, ViewScores], expected: dict[str, ViewScores]
) -> dict[str, list[float]]:
    """Return mean and standard deviation of the share kept over random calibrations."""
    own, before = (scores_of(rejection, [part[VAL], part[TEST]]) for part in (found, expected))
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(CALIBRATIONS):
        order = generator.permutation(len(own))
        drawn, others = order[: rejection.images], order[rejection.images :]
        old, again = (keeping_threshold(scores[drawn], rejection.keep) for scores in (before, own))
        shares.append(
            [(before[others] >= old).mean(), (own[others] >= old).mean(), (own[others] >= again).mean()]
        )
    columns = zip(("float32", "float32_threshold", "again"), np.array(shares).T, strict=True)
    return {name: [float(column.mean()), float(column.std())] for name, column in columns}


def describe(
    subject: Subject, spec: ModelSpec, labels: dict[str, Tensor], found: dict[str, ViewScores],
    expected: dict[str, ViewScores],
) -> dict[str, Any]:  # fmt: skip
    """Compare the outputs of a file, described by ``spec``, with those of eager float32, on each set of images."""
    rejection = subject.spec.rejection
    assert rejection is not None
    targets = labels[TEST]
    scores = {name: scores_of(rejection, [part]) for name, part in found.items()}
    correct = (found[TEST].logits[0].argmax(1) == targets).numpy()
    result: dict[str, Any] = {"top1": float(correct.mean())}
    for name, own in found.items():
        if name == VAL:
            continue
        reference = kept_images(subject.spec, expected[name])
        assert own.similarities is not None
        assert expected[name].similarities is not None
        cosines = own.similarities[0] - expected[name].similarities[0]
        result[name] = {
            **compare_kept(reference, kept_images(spec, own)),
            "similarity_rms": float(cosines.square().mean().sqrt()),
            "similarity_max": float(cosines.abs().max()),
        }
        if name != TEST:
            result[name]["auroc"] = separation(scores[TEST], scores[name], correct)["auroc"]
        if spec.rejection != rejection:
            result[name]["float32_threshold"] = compare_kept(reference, kept_images(subject.spec, own))
    if spec.rejection != rejection:
        result["random"] = random_calibrations(rejection, found, expected)
        logits = found[TEST].logits[0].double()
        again = choose_temperature(found[VAL].logits[0].double(), labels[VAL]).value
        result["nll"] = {
            name: float(cross_entropy(logits / temperature, targets))
            for name, temperature in (("float32_temperature", spec.temperature), ("again", again))
        }
        result["sets"] = {
            name: describe_sets(one, logits, targets, COVERAGE, subject.run.path)["covered"]
            for name, one in (("float32_thresholds", subject.spec), ("again", spec))
        }
    return result


def measure(run: Path, folders: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Export one run in all formats and precisions, and compare the files."""
    subject = Subject.open(run, split=TEST, device="cpu")
    preprocessing = subject.spec.preprocessing
    records = {split: subject.data.index.split(split) for split in (VAL, TEST)}
    labels = {split: torch.tensor([record.label for record in own]) for split, own in records.items()}
    paths = {split: [record.path for record in own] for split, own in records.items()}
    paths |= {
        name: [record.path for record in unknown_data(subject, folder).index.records]
        for name, folder in folders.items()
    }
    images = {name: torch.cat([*prepared_batches(own, preprocessing)]) for name, own in paths.items()}
    expected = {name: outputs(subject.network, own) for name, own in images.items()}
    rejection = subject.spec.rejection
    assert rejection is not None
    entry: dict[str, Any] = {
        "images": {name: len(own) for name, own in images.items()},
        "score": rejection.score,
        "keep": rejection.keep,
        "calibration_images": rejection.images,
        "files": {"eager": {"fp32": describe(subject, subject.spec, labels, expected, expected)}},
    }
    with tempfile.TemporaryDirectory() as folder:
        for format_ in FORMATS:
            models = {
                precision: export(run, Path(folder) / f"{number}{EXPORT_SUFFIXES[format_]}", precision)
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
                        subject, model.spec, labels,
                        {name: outputs(model, own) for name, own in images.items()}, expected,
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
                if name not in (VAL, TEST):
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
            if folder not in (VAL, TEST):
                headers += [f"{folder} rejected", "changed", "AUROC"]
        print(f"\n{name}")
        print(table([*headers, "cosine, RMS", "ms"], rows(entry)))


if __name__ == "__main__":
    main()
