"""Images of none of the classes, and prediction sets: compare scores and kinds of sets on trained runs.

    python benchmarks/unknowns.py --prepare $CROSSX_DATA/cub80 --output out/open
    crossx fit --config plain_mobilenetv2_160 --data.dataset table --data.root out/open/known.csv \\
      --model.backbone local-dir:$CROSSX_DATA/weights/mobilenetv2_035 --output out/runs/plain-50
    python benchmarks/unknowns.py out/runs/plain-50 --near out/open/near --far out/open/far/images
    python benchmarks/unknowns.py out/runs/crossx-80 --output benchmarks/results/prediction_sets.json
    python benchmarks/unknowns.py out/runs/fast-192 --others flowers=$FLOWERS/test pets=$PETS \\
      --output benchmarks/results/unknown_photographs.json
    python benchmarks/unknowns.py out/runs/plain-35 out/runs/fast-35 --near out/open/choice_near \\
      --others insects=$INSECTS --output benchmarks/results/unknown_choice.json

``--prepare`` draws 50 of the species of a folder in the layout of CUB-200-2011 (seed 0): ``known.csv`` lists their
images for ``--data.dataset table``, ``near`` has links to the test images of the others, and ``far`` drawn birds. To
choose a score without these, ``choice.csv`` lists the images of 35 of the 50, and ``choice_near`` has links to the test
images of the other 15.

For each score of ``crossx.evaluation.unknowns``, combinations of two of them, the distance to the k-th nearest
training image, Mahalanobis distances and ViM: AUROC, FPR95 and OSCR of the run's test images against
each folder, and the shares of each that are kept by the threshold that keeps 95% of the validation images. For each
kind of prediction set: coverage and size on the test images for a coverage of 90%, calibrated on the validation images;
and the mean and standard deviation over 500 random calibrations on as many test images, measured on the others. Logits
and features are kept in RUN/unknowns.pt.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.covariance import ShrunkCovariance, ledoit_wolf_shrinkage
from torch import Tensor
from torch.nn.functional import normalize

from crossx.data.drawn.synthetic import read_synthetic
from crossx.evaluation.calibration import choose_temperature
from crossx.evaluation.open_set import unknown_data
from crossx.evaluation.subject import Subject
from crossx.evaluation.unknowns import (
    FEATURE_SCORES,
    SCORES,
    ClassMeansSum,
    ViewScores,
    keeping_threshold,
    separation,
    similarity,
)
from crossx.methods.weights import load_method
from harness import RESULTS, table, write

KNOWN, CHOICE = 50, 35
NEIGHBORS = (1, 5, 20)
COMBINED = (("max_probability", "energy"), ("max_logit", "similarity"))
PRINCIPAL = 512
"""Dimensions of ViM's principal space, at most half of the features."""
LARGEST = 2048
"""Features from which on no covariance is estimated: its matrices would be larger than the network."""
COVERAGE = 0.9
REPEATS = 500
RAPS_FREE, RAPS_PENALTY = 2, 0.01
Array = NDArray[np.float64]


def prepare(root: Path, output: Path) -> None:
    """Write the table of known species and the folders of unknown images."""
    names, images, labels, train = (
        dict(line.split(maxsplit=1) for line in (root / file).read_text(encoding="utf-8").splitlines())
        for file in ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    known = set(random.Random(0).sample(sorted(names, key=int), KNOWN))
    inner = set(random.Random(0).sample(sorted(names[label] for label in known), CHOICE))
    chosen = {label for label in known if names[label] in inner}
    output.mkdir(parents=True)
    for table_name, kept, candidates, folder in (
        ("known", known, {*labels.values()}, "near"), ("choice", chosen, known, "choice_near")
    ):  # fmt: skip
        with (output / f"{table_name}.csv").open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "label", "split"])
            for number, path in images.items():
                image, label = (root / "images" / path).resolve(), labels[number]
                if label in kept:
                    rows.writerow([image, names[label], "train" if train[number] == "1" else "test"])
                elif label in candidates and train[number] == "0":
                    link = output / folder / path
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(image)
    read_synthetic(output / "far", num_classes=24, images_per_class=12, seed=0, image_size=227)


@torch.inference_mode()
def compute(run: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """Return logits, features and targets of each split and folder, from RUN/unknowns.pt where they are there."""
    cache = run / "unknowns.pt"
    found: dict[str, Any] = torch.load(cache, weights_only=True) if cache.is_file() else {}
    if {"train", "val", "test", *folders} <= {*found}:
        return found
    subject = Subject.open(run, split="test")
    network = subject.network
    loaders = {split: subject.data.eval_loader(split) for split in ("train", "val", "test")}
    loaders |= {name: unknown_data(subject, path).eval_loader("test") for name, path in folders.items()}
    for name, loader in loaders.items():
        if name in found:
            continue
        logits, features, targets = [], [], []
        for images, labels in loader:
            inputs = network.inputs(images)
            logits.append(network.method(inputs))
            features.append(normalize(network.method.embeddings(inputs)))
            targets.append(labels)
        found[name] = {
            "logits": torch.cat(logits), "features": torch.cat(features), "targets": torch.cat(targets)
        }  # fmt: skip
        torch.save(found, cache)
    return found


def neighbor_scores(features: Tensor, known: Tensor, neighbors: int) -> Tensor:
    """Return the negative distance of each image to its k-th nearest training image, (B,): Sun et al. 2022.

    Args:
        features: (B, D), L2-normalised.
        known: (N, D), those of the training images.
        neighbors: k, at most N; of exactly so many training images one is the k-th nearest.
    """
    similarity = (features @ known.T).topk(neighbors).values[:, -1]  # (B, D) @ (D, N) -> (B, N) -> (B,)
    return -(2 - 2 * similarity).clamp(min=0).sqrt()


def mahalanobis_scores(
    known: Array, labels: NDArray[np.int64], *, relative: bool
) -> Callable[[Array], Array]:
    """Return a function from features (B, D) to the negative squared Mahalanobis distance to the nearest class, (B,).

    The covariance is shared by the classes (Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution
    Samples and Adversarial Attacks", 2018, https://arxiv.org/abs/1807.03888), shrunk as by Ledoit and Wolf, since there
    are hardly more images than features. Of features of length 1 as by Mueller and Hein ("Mahalanobis++", 2025,
    https://arxiv.org/abs/2505.18032).

    Args:
        known: (N, D), features of the training images, L2-normalised.
        labels: (N,), their classes, from 0.
        relative: Whether to subtract the distance to the mean of all images, with their own covariance (Ren et al., "A
            Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", 2021,
            https://arxiv.org/abs/2106.09022).
    """

    def distances(centres: Array, residuals: Array) -> Callable[[Array], Array]:
        fitted = ShrunkCovariance(shrinkage=shrinkage, assume_centered=True).fit(residuals)
        root = np.linalg.cholesky(fitted.precision_)
        moved = centres @ root

        def nearest(features: Array) -> Array:
            values = features @ root
            squares = (values**2).sum(1, keepdims=True) - 2 * values @ moved.T + (moved**2).sum(1)
            found: Array = squares.min(1)
            return found

        return nearest

    means = np.stack([known[labels == label].mean(0) for label in range(labels.max() + 1)])
    mean, within = known.mean(0, keepdims=True), known - means[labels]
    # the same for both: with less of it, the distance to the mean is far larger where there are no features
    shrinkage = ledoit_wolf_shrinkage(within, assume_centered=True)
    to_class = distances(means, within)
    if not relative:
        return lambda features: -to_class(features)
    to_all = distances(mean, known - mean)
    return lambda features: to_all(features) - to_class(features)


def vim_scores(known: Array, logits: Array) -> Callable[[Array, Array], Array]:
    """Return a function from features (B, D) and logits (B, K) to ViM's score, (B,).

    Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", 2022, https://arxiv.org/abs/2203.10807, with
    the mean of the features as origin.

    Args:
        known: (N, D), features of the training images.
        logits: (N, K), their logits.
    """
    mean = known.mean(0)
    vectors = np.linalg.eigh(np.cov(known.T, bias=True))[1]  # by ascending variance
    rest = vectors[:, : -min(PRINCIPAL, len(vectors) // 2)]

    def residual(features: Array) -> Array:
        length: Array = np.linalg.norm((features - mean) @ rest, axis=1)
        return length

    scale = logits.max(1).mean() / residual(known).mean()
    return lambda features, values: logsumexp(values, 1) - scale * residual(features)


def combined_scores(references: list[Array], scores: list[Array]) -> Array:
    """Return Fisher's combination of several scores, the sum of the logarithms of their p-values, (B,).

    The p-value of a score is the share of the validation images that have no higher one; see Magesh et al.,
    "Multiple Testing Framework for Out-of-Distribution Detection", 2022, https://arxiv.org/abs/2206.09522.

    Args:
        references: Of each score, those of the validation images, (n,).
        scores: Of each score, those of the images, (B,).
    """
    total = np.zeros(len(scores[0]))
    for reference, values in zip(references, scores, strict=True):
        below = np.searchsorted(np.sort(reference), values, "right")
        total += np.log((below + 1) / (len(reference) + 1))
    return total


def either_scores(references: list[Array], scores: list[Array]) -> Array:
    """Return the least p-value of several scores, (B,): an image is rejected if any of them is low enough.

    Arguments as of ``combined_scores``; ties are broken by the last score.
    """
    values = [
        (np.searchsorted(np.sort(reference), score, "right") + 1) / (len(reference) + 1)
        for reference, score in zip(references, scores, strict=True)
    ]
    least: Array = np.minimum.reduce(values) + 1e-9 * scores[-1]
    return least


def columns_of_class_means(run: Path) -> slice:
    """Return the features that class means are taken of, see ``Method.heads_and_features``."""
    widths = {name: layer.weight.shape[-1] for name, layer in load_method(run)[0].linear_heads().items()}
    ends = np.cumsum([*widths.values()])
    place = [*widths].index("last") if "last" in widths else None
    return slice(None) if place is None else slice(int(ends[place] - widths["last"]), int(ends[place]))


def all_scores(found: dict[str, Any], columns: slice) -> dict[str, Callable[[str], Array]]:
    """Return name -> scores of a split or folder; see ``columns_of_class_means``."""

    def of_neighbors(k: int) -> Callable[[str], Array]:
        known = found["train"]["features"]
        return lambda name: neighbor_scores(found[name]["features"], known, k).double().numpy()

    def of_crossx(score: str) -> Callable[[str], Array]:
        return lambda name: views(name).score(score, weight).numpy()

    def views(name: str) -> ViewScores:
        return ViewScores([found[name]["logits"].double()], [similarity(features[name], means).double()])

    def combination(*names: str) -> Callable[[str], Array]:
        return lambda name: combined_scores(
            [scores[part]("val") for part in names], [scores[part](name) for part in names]
        )

    def either(*names: str) -> Callable[[str], Array]:
        return lambda name: either_scores(
            [scores[part]("val") for part in names], [scores[part](name) for part in names]
        )

    features = {name: part["features"][:, columns] for name, part in found.items()}
    train = found["train"]
    total = ClassMeansSum(train["logits"].shape[1], len(train["targets"]))
    total.add(train["logits"], features["train"], train["targets"])
    means, weight = total.finish()
    scores = {name: of_crossx(name) for name in (*SCORES, *FEATURE_SCORES)}
    scores |= {" and ".join(names): combination(*names) for names in COMBINED}
    scores["max_logit or similarity"] = either("max_logit", "similarity")
    scores["max_logit times similarity"] = lambda name: scores["max_logit"](name) * scores["similarity"](name)
    scores |= {f"neighbors, k = {k}": of_neighbors(k) for k in NEIGHBORS}
    if features["train"].shape[1] <= LARGEST:
        unit = {name: normalize(part).double().numpy() for name, part in features.items()}
        logits = {name: part["logits"].double().numpy() for name, part in found.items()}
        labels = train["targets"].numpy()
        distance, relative = (mahalanobis_scores(unit["train"], labels, relative=r) for r in (False, True))
        vim = vim_scores(unit["train"], logits["train"])
        scores["Mahalanobis distance"] = lambda name: distance(unit[name])
        scores["relative Mahalanobis distance"] = lambda name: relative(unit[name])
        scores["ViM"] = lambda name: vim(unit[name], logits[name])
    return scores


def compare_scores(found: dict[str, Any], folders: list[str], columns: slice) -> dict[str, Any]:
    test = found["test"]
    correct = (test["logits"].argmax(1) == test["targets"]).numpy()
    results: dict[str, Any] = {}
    for name, score in all_scores(found, columns).items():
        threshold = keeping_threshold(score("val"))
        own = score("test")
        results[name] = {"kept": {"test": float((own >= threshold).mean())}}
        for folder in folders:
            others = score(folder)
            results[name][folder] = separation(own, others, correct)
            results[name]["kept"][folder] = float((others >= threshold).mean())
    return results


def lac(probabilities: Array) -> Array:
    """1 - p: Sadinle et al. 2019."""
    return 1 - probabilities


def lac_not_empty(probabilities: Array) -> Array:
    """The same, with the most probable class always in the set, as crossx has it."""
    scores = 1 - probabilities
    scores[np.arange(len(scores)), probabilities.argmax(1)] = 0
    return scores


def aps(probabilities: Array, penalty: float = 0, free: int = 0) -> Array:
    """Sum of the probabilities down to the class, without a random part: Romano et al. 2020."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    sums = np.cumsum(np.take_along_axis(probabilities, order, 1), axis=1)
    sums += penalty * np.maximum(np.arange(1, probabilities.shape[1] + 1) - free, 0)
    scores = np.empty_like(sums)
    np.put_along_axis(scores, order, sums, 1)
    return scores


def raps(probabilities: Array) -> Array:
    """The same with a penalty for large sets: Angelopoulos et al. 2021."""
    return aps(probabilities, RAPS_PENALTY, RAPS_FREE)


def quantile(scores: Array) -> float:
    rank = -(-(len(scores) + 1) * round(100 * COVERAGE) // 100)
    return float(np.partition(scores, rank - 1)[rank - 1])


def compare_sets(found: dict[str, Any]) -> dict[str, Any]:
    val, test = found["val"], found["test"]
    temperature = choose_temperature(val["logits"], val["targets"]).value
    shares = {
        name: (part["logits"].double() / temperature).softmax(1).numpy()
        for name, part in (("val", val), ("test", test))
    }
    labels = {name: found[name]["targets"].numpy() for name in shares}
    generator = np.random.default_rng(0)
    shuffles = [generator.permutation(len(labels["test"])) for _ in range(REPEATS)]
    calibration = len(labels["val"])
    results: dict[str, Any] = {"calibration_images": calibration, "test_images": len(labels["test"])}
    for kind in (lac, lac_not_empty, aps, raps):
        scores = {name: kind(values.copy()) for name, values in shares.items()}
        own = {name: scores[name][np.arange(len(scores[name])), labels[name]] for name in scores}
        limit = quantile(own["val"])
        sizes = (scores["test"] <= limit).sum(1)
        repeated = [
            float((own["test"][order[calibration:]] <= quantile(own["test"][order[:calibration]])).mean())
            for order in shuffles
        ]
        per_class = [
            float((own["test"][labels["test"] == label] <= limit).mean())
            for label in np.unique(labels["test"])
        ]
        results[kind.__name__] = {
            "coverage": float((own["test"] <= limit).mean()),
            "mean_size": float(sizes.mean()),
            "largest": int(sizes.max()),
            "empty": float((sizes == 0).mean()),
            "single": float((sizes == 1).mean()),
            "worst_class": min(per_class),
            "mean_of_random_calibrations": float(np.mean(repeated)),
            "deviation_of_random_calibrations": float(np.std(repeated)),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="dataset in the layout of CUB-200-2011")
    parser.add_argument("--near", type=Path, metavar="DIR", help="images of similar classes")
    parser.add_argument("--far", type=Path, metavar="DIR", help="images of something else")
    parser.add_argument(
        "--others", nargs="+", default=[], metavar="NAME=DIR", help="further images of none of the classes"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "unknowns.json")
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare, arguments.output)
        return
    folders = {name: path for name in ("near", "far") if (path := getattr(arguments, name))}
    folders |= {name: Path(path) for name, path in (word.split("=", 1) for word in arguments.others)}
    runs: dict[str, Any] = {}
    for run in arguments.runs:
        found = compute(run, folders)
        test = found["test"]
        runs[run.name] = {
            "images": {name: len(part["targets"]) for name, part in found.items()},
            "classes": test["logits"].shape[1],
            "top1": float((test["logits"].argmax(1) == test["targets"]).float().mean()),
            "scores": compare_scores(found, list(folders), columns_of_class_means(run)),
            "sets": compare_sets(found),
        }
        for folder in folders:
            rows = [
                [name, *(f"{100 * values[folder][key]:.1f}" for key in ("auroc", "fpr95", "oscr")),
                 f"{100 * values['kept']['test']:.1f}", f"{100 * (1 - values['kept'][folder]):.1f}"]
                for name, values in runs[run.name]["scores"].items()
            ]  # fmt: skip
            print(f"\n{run.name}, {folder}, top-1 {100 * runs[run.name]['top1']:.2f}")
            print(table(["score", "AUROC", "FPR95", "OSCR", "test kept", f"{folder} rejected"], rows))
        rows = [
            [name, *(f"{100 * values[key]:.2f}" for key in ("coverage", "single", "empty", "worst_class")),
             f"{values['mean_size']:.2f}", values["largest"],
             f"{100 * values['mean_of_random_calibrations']:.2f} ± "
             f"{100 * values['deviation_of_random_calibrations']:.2f}"]
            for name, values in runs[run.name]["sets"].items() if isinstance(values, dict)
        ]  # fmt: skip
        print(f"\n{run.name}, {runs[run.name]['sets']['calibration_images']} calibration images")
        print(
            table(
                [
                    "sets",
                    "coverage",
                    "one class",
                    "none",
                    "worst class",
                    "size",
                    "largest",
                    "random calibrations",
                ],
                rows,
            )
        )
    write(arguments.output, {"coverage": COVERAGE, "runs": runs})


if __name__ == "__main__":
    main()
