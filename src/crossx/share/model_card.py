"""The model card of a shared model: what a reader of its page must know, as far as it is known.

A number stands in it only where ``crossx test`` measured it. Paths of the machine that trained the model do not.
Metadata as the Hugging Face Hub reads them: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from crossx.data.catalog import DATASETS, DatasetInfo
from crossx.errors import CrossXError, UsageError
from crossx.evaluation.metrics import ClassRow, worst_first
from crossx.evaluation.notices import result_notices
from crossx.methods.base import Method, published_name
from crossx.recipes import model_name
from crossx.report.tables import Table, percent
from crossx.runs import ModelSpec, Run, read_config
from crossx.schema import require
from crossx.yaml import dump_yaml

TASK = "image-classification"
OWN_DATA = ("folder", "table")
"""Datasets of the catalog that stand for the user's own images."""
TRAINER_OPTIONS = ("max_epochs", "precision", "gradient_clip_val", "accumulate_grad_batches")
"""What the card says of the section `trainer`; the rest is about the machine."""
WORST = 10
CONFUSED = 5
NEEDED = ("split", "n", "top1", "class_mean", "dataset")
"""What the results of a card cannot do without."""


@dataclass(frozen=True)
class CardData:
    """What is known about a model.

    Attributes:
        method: The network.
        spec: Its description.
        info: ``run.json`` of its training, empty where there is none.
        config: ``config.yaml`` of its training, likewise.
        results: ``test.json``, empty where these weights were not tested.
        classes: The accuracy of each class on the test images, likewise.
    """

    method: Method
    spec: ModelSpec
    info: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[ClassRow] = ()

    @classmethod
    def read(cls, method: Method, spec: ModelSpec, run: Run, results: Mapping[str, Any]) -> CardData:
        """Gather what a run folder holds beside the network.

        Raises:
            CrossXError: If one of its files is damaged.
        """
        config = read_config(run.config) if run.config.is_file() else {}
        if results:
            require(results, NEEDED, run.path / f"{results.get('split') or 'test'}.json")
        table = run.path / "test" / "per_class.csv"
        classes = []
        if results and table.is_file():
            try:
                with table.open(newline="", encoding="utf-8") as file:
                    classes = [
                        ClassRow(name, int(n), float(accuracy), confused or None)
                        for name, n, accuracy, confused in list(csv.reader(file))[1:]
                        if int(n)
                    ]
            except (ValueError, csv.Error) as error:
                raise CrossXError(f"{table}: damaged: write it again with `crossx test`.") from error
        return cls(method, spec, run.read_info(), config, results, classes)

    @property
    def name(self) -> str:
        """The timm-style name, the one to use as the name of a repository."""
        spec = self.spec
        network = published_name(spec.method, spec.options)
        return model_name(network, spec.backbone, spec.dataset, spec.preprocessing.image_size)


class CardFigure(NamedTuple):
    """A picture beside the card: its file and what it shows."""

    file: str
    text: str


def write_card(
    card: CardData,
    *,
    repository: str | None = None,
    license: str | None = None,
    figures: Sequence[CardFigure] = (),
) -> str:
    """Return a model card, Markdown below YAML metadata.

    Args:
        card: What is known.
        repository: ``user/name`` on the Hub, where it is known.
        license: The Hub's identifier of the licence of the weights; None leaves it open.
        figures: Pictures that lie beside the card.

    Raises:
        UsageError: If ``license`` cannot be an identifier.
    """
    spec, results = card.spec, card.results
    return (
        _environment()
        .get_template("model_card.md.j2")
        .render(
            metadata=_metadata(card, repository, license).to_yaml(),
            name=_title(card, repository),
            address=repository or f"USER/{card.name}",
            spec=spec,
            description=_summary(card.method),
            parameters=sum(parameter.numel() for parameter in card.method.parameters()),
            version=metadata.version("crossx"),
            figures=figures,
            data=_describe_data(spec),
            images=_number_of_images(card.info),
            backbone=_describe_pretraining(card.info),
            results=_results_table(card).to_markdown() if results else "",
            measured=_describe_measurement(results) if results else "",
            selected=_describe_selection(results.get("selection") or {}),
            notices=_notices(card),
            confidence=_describe_confidence(card),
            numbered=str(card.info.get("class_names", "")).startswith("numbered"),
            worst=_worst_table(card.classes),
            confused=_confusions_table(results.get("confused_pairs") or []),
            training=_training(card.config, spec),
            versions=_versions(card.info),
            citation=card.method.citation,
        )
    )


def check_license(license: str | None) -> None:
    """Check that a licence can be an identifier of the Hub (``apache-2.0``, ``cc-by-nc-4.0``, ``other``).

    Raises:
        UsageError: If it cannot.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise UsageError(
            f"license {license!r} is no identifier of the Hub. Choose one of "
            "https://huggingface.co/docs/hub/repositories-licenses, such as apache-2.0 or cc-by-nc-4.0."
        )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("crossx.share"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _title(card: CardData, repository: str | None) -> str:
    return repository.partition("/")[2] if repository else card.name


def _metadata(card: CardData, repository: str | None, license: str | None) -> ModelCardData:
    check_license(license)
    spec, results = card.spec, card.results
    public = spec.dataset in DATASETS and spec.dataset not in OWN_DATA
    return ModelCardData(
        license=license,
        library_name="crossx",
        pipeline_tag=TASK,
        tags=[TASK, "fine-grained-visual-categorization", "pytorch", spec.method],
        datasets=[spec.dataset] if public else None,
        metrics=["accuracy"] if results else None,
        base_model=_base_model(card.info),
        model_name=_title(card, repository) if results else None,
        eval_results=_eval_results(card) or None,
    )


def _eval_results(card: CardData) -> list[EvalResult]:
    """Return what was measured, as the Hub's ``model-index`` has it: accuracies as fractions."""
    spec, results = card.spec, card.results
    names = {"top1": "Top-1 accuracy", "class_mean": "Class-mean accuracy", "top5": "Top-5 accuracy"}
    title = DATASETS[spec.dataset].title if spec.dataset in DATASETS else spec.dataset
    return [
        EvalResult(
            task_type=TASK,
            task_name="Image classification",
            dataset_type=spec.dataset,
            dataset_name=f"{title}, {len(spec.classes)} classes",
            dataset_split=results["split"],
            metric_type="accuracy",
            metric_name=name,
            metric_value=results[key],
        )
        for key, name in names.items()
        if results.get(key) is not None
    ]


def _base_model(info: Mapping[str, Any]) -> str | None:
    """Return the Hub's name of the weights that the training started from, where it has one."""
    backbone = str(info.get("backbone") or "")
    if not info.get("pretrained") or info.get("backbone_weights"):
        return None
    if backbone.startswith("hf-hub:"):
        return backbone.removeprefix("hf-hub:").partition("@")[0]
    return f"timm/{backbone}" if "." in backbone and ":" not in backbone else None


def _summary(method: Method) -> str:
    """Return the first line of a method's docstring as part of a sentence."""
    line = (type(method).__doc__ or method.name).strip().splitlines()[0].rstrip(".")
    return re.sub(r"^(A|An|The) ", lambda article: article[0].lower(), line)


class _TrainingData(NamedTuple):
    """What the card says about the training data."""

    title: str
    homepage: str
    part: str
    terms: str
    defects: Sequence[str]


def _describe_data(spec: ModelSpec) -> _TrainingData:
    info = DATASETS.get(spec.dataset)
    if info is None or spec.dataset in OWN_DATA:
        return _TrainingData("the author's own images", "", "", "to be asked from the author", ())
    homepage = "" if info.homepage == "none" else info.homepage
    return _TrainingData(info.title, homepage, _describe_part(spec, info), info.licence, info.defects)


def _describe_part(spec: ModelSpec, info: DatasetInfo) -> str:
    count = len(spec.classes)
    if info.table1 is None or info.table1[0] == count:
        return f"all {count} classes" if info.table1 else f"{count} classes"
    return f"{count} classes, where the dataset has {info.table1[0]}"


def _number_of_images(info: Mapping[str, Any]) -> str:
    names = {"train": "trained on", "val": "held out for validation", "test": "for the test"}
    images = info.get("images") or {}
    return ", ".join(f"{images[key]:,} {what}" for key, what in names.items() if images.get(key))


def _describe_pretraining(info: Mapping[str, Any]) -> str:
    if not info:
        return ""
    backbone = str(info.get("backbone") or "")
    if info.get("backbone_weights") and info.get("status") != "imported":
        return "The backbone started from a file of weights of the author's."
    if not info.get("pretrained"):
        return "" if info.get("status") == "imported" else "The backbone was trained from scratch."
    if backbone.startswith("local-dir:"):
        return "The backbone started from pretrained weights in a local folder of the author's."
    return f"The backbone started from the pretrained weights `{backbone}` of timm."


def _results_table(card: CardData) -> Table:
    results = card.results
    intervals = results.get("intervals") or {}

    def row(name: str, key: str) -> tuple[str, str]:
        return name, percent(results[key], intervals.get(key))

    rows = [row("top-1 accuracy, %", "top1"), row("class-mean accuracy, %", "class_mean")]
    rows += [row("top-5 accuracy, %", "top5")] if results.get("top5") is not None else []
    heads = results.get("heads") or {}
    rows += [(f"head `{name}` alone, %", percent(value)) for name, value in heads.items() if len(heads) > 1]
    rows += [
        (f"level {_markdown_code(name)}, %", percent(v)) for name, v in (results.get("levels") or {}).items()
    ]
    error = _calibration_error(card)
    rows += [("expected calibration error", f"{error:.4f}")] if error is not None else []
    share = f" ({100 * intervals['confidence']:.0f}% interval)" if "confidence" in intervals else ""
    return Table(("measure", f"value{share}"), rows)


def _describe_measurement(results: Mapping[str, Any]) -> str:
    intervals, skipped = results.get("intervals") or {}, results.get("skipped") or []
    text = f"Measured by `crossx test` on {results['n']:,} images of the split `{results['split']}`."
    if "resamples" in intervals:
        text += f" Intervals: bootstrap over these images, {intervals['resamples']:,} resamples."
    if skipped:
        text += f" Left out as unreadable: {len(skipped)} images."
    return f"{text} Seed of the training: {results['seed']}." if results.get("seed") is not None else text


def _describe_selection(selection: Mapping[str, Any]) -> str:
    epoch, how = selection.get("epoch"), selection.get("how")
    if how == "last":
        return f"The weights are those after the last epoch{f' ({epoch})' if epoch else ''}: no measurement chose them."
    if how == "best" and epoch and selection.get("split"):
        return f"The weights are those of epoch {epoch}, the best on the images of the split `{selection['split']}`."
    if how == "best_on_test":
        return (
            "The weights are those of the epoch that was best on these very test images, as in the released code of "
            "Cross-X: the numbers are better than on new images."
        )
    return "How the weights were chosen among the epochs is not known."


def _notices(card: CardData) -> list[str]:
    notices = result_notices(card.results)
    if card.results and card.results.get("dataset") != card.spec.dataset:
        notices.append(f"The test images are those of another dataset ({card.results.get('dataset')}).")
    return notices


def _calibration_error(card: CardData) -> float | None:
    """Return the calibration error of the probabilities that the model gives; None where it was not measured."""
    results, temperature = card.results, card.spec.temperature
    if results.get("temperature", 1.0) != temperature:
        return None
    return results.get("ece" if temperature == 1 else "ece_calibrated")


def _describe_confidence(card: CardData) -> str:
    error, temperature = _calibration_error(card), card.spec.temperature
    scaled = (
        f"Its probabilities are calibrated: softmax(logits / {temperature:.4g}). " if temperature != 1 else ""
    )
    if error is None:
        return f"{scaled}How far its probabilities can be trusted was not measured."
    return (
        f"{scaled}Its probability is not the chance to be right: on the test images the two differ by "
        f"{100 * error:.1f} points on average (expected calibration error)."
    )


def _worst_table(classes: Sequence[ClassRow]) -> str:
    rows = [row for row in worst_first(classes) if row.accuracy != 1][:WORST]
    cells = [
        (
            _markdown_code(row.name),
            percent(row.accuracy),
            str(row.n),
            _markdown_code(row.most_confused_with) if row.most_confused_with else "–",
        )
        for row in rows
    ]
    return (
        Table(("class", "accuracy, %", "test images", "most often taken for"), cells).to_markdown()
        if rows
        else ""
    )


def _confusions_table(pairs: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        (
            _markdown_code(pair["target"]),
            _markdown_code(pair["prediction"]),
            str(pair["n"]),
            percent(pair["fraction"]),
        )
        for pair in pairs[:CONFUSED]
    ]
    columns = ("class", "taken for", "images", "of the class, %")
    return Table(columns, cells).to_markdown() if cells else ""


def _training(config: Mapping[str, Any], spec: ModelSpec) -> str:
    """Return the configuration as YAML, without paths of the machine that trained."""
    if not config:
        return ""
    sections = (config.get(section) for section in ("model", "data", "trainer"))
    model, data, trainer = (dict(each) if isinstance(each, Mapping) else {} for each in sections)
    model["backbone"] = spec.backbone
    for section, key in ((model, "backbone_weights"), (data, "root")):
        section.pop(key, None)
    kept = {
        "model": model,
        "data": data,
        "optim": config.get("optim") or {},
        "trainer": {key: trainer[key] for key in TRAINER_OPTIONS if key in trainer},
        "seed": config.get("seed"),
    }
    return dump_yaml(kept).rstrip()


def _versions(info: Mapping[str, Any]) -> str:
    environment = info.get("environment") or {}
    packages = ", ".join(f"{name} {version}" for name, version in (environment.get("versions") or {}).items())
    return f"Python {environment.get('python')}, {packages}" if packages else ""


def _markdown_code(name: str) -> str:
    """Return a class name as Markdown that shows it as it is."""
    text = " ".join(name.split()).replace("`", "'")
    return f"`{text}`"
