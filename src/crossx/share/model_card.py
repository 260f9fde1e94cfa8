"""Write the model card of a shared model.

A number appears in it only if ``crossx test`` measured it; no path of the training machine does. The text is in
``templates/model_card.md``. Metadata: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from crossx.commands import command
from crossx.data.catalog import DATASETS, OWN_DATA
from crossx.errors import CrossXError, UsageError, counted
from crossx.evaluation.metrics import ClassRow, worst_first
from crossx.evaluation.notices import result_notices
from crossx.methods.base import Method
from crossx.methods.registry import published_name
from crossx.recipes import model_name
from crossx.report.tables import Table, percent
from crossx.runs import ModelSpec, Run
from crossx.runs.spreadsheet import unescape_formula
from crossx.schema.run import require
from crossx.training.config import Config
from crossx.yaml import dump_yaml

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
TASK = "image-classification"
TRAINER_OPTIONS = ("max_epochs", "precision", "gradient_clip_val", "accumulate_grad_batches")
"""Options of the section `trainer` that the card shows; the others are about the machine."""
WORST_CLASSES = 10
CONFUSED_PAIRS = 5
REQUIRED_RESULTS = ("split", "n", "top1", "class_mean", "dataset")


@dataclass(frozen=True)
class CardData:
    """What is known about a model.

    Attributes:
        method: The network.
        spec: Its description.
        info: ``run.json`` of its training; may be empty.
        config: ``config.yaml`` of its training; may be empty.
        results: ``test.json``; empty if these weights were not tested.
        classes: Accuracy of each class on the test images; may be empty.
    """

    method: Method
    spec: ModelSpec
    info: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[ClassRow] = ()

    @classmethod
    def read(cls, method: Method, spec: ModelSpec, run: Run, results: Mapping[str, Any]) -> CardData:
        """Read the run folder of a network.

        Raises:
            CrossXError: If one of its files is damaged, or its configuration has an unknown option.
        """
        if config := run.read_config():
            Config.from_yaml(run.config)
        if results:
            require(results, REQUIRED_RESULTS, run.path / f"{results.get('split') or 'test'}.json")
        table = run.path / "test" / "per_class.csv"
        classes = []
        if results and table.is_file():
            try:
                with table.open(newline="", encoding="utf-8") as file:
                    classes = [
                        ClassRow(
                            unescape_formula(name),
                            int(n),
                            float(accuracy),
                            unescape_formula(confused) or None,
                        )
                        for name, n, accuracy, confused in list(csv.reader(file))[1:]
                        if int(n)
                    ]
            except (ValueError, csv.Error) as error:
                again = command("test", run.path)
                raise CrossXError(f"{table}: damaged: write it again with `{again}`.") from error
        return cls(method, spec, run.read_info(), config, results, classes)

    @property
    def name(self) -> str:
        """The timm-style name of the model, a good name for its repository."""
        spec = self.spec
        network = published_name(spec.method, spec.options)
        return model_name(network, spec.backbone, spec.dataset, spec.preprocessing.image_size)

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error of the probabilities that the model gives; None if it was not measured."""
        if self.results.get("temperature", 1.0) != self.spec.temperature:
            return None
        return self.results.get("ece" if self.spec.temperature == 1 else "ece_calibrated")


class CardFigure(NamedTuple):
    """An image file next to the card, and what it shows."""

    file: str
    text: str


def write_card(
    card: CardData,
    *,
    repository: str | None = None,
    license: str | None = None,
    figures: Sequence[CardFigure] = (),
) -> str:
    """Return a model card: Markdown with YAML metadata.

    Args:
        card: What is known.
        repository: ``user/name`` on the Hub, if it is known.
        license: The Hub's identifier of the licence of the weights; None leaves it open.
        figures: Image files next to the card.

    Raises:
        UsageError: If ``license`` is not a valid identifier.
    """
    check_license(license)
    spec, title = card.spec, repository.partition("/")[2] if repository else card.name
    dataset = None if spec.dataset in OWN_DATA else DATASETS.get(spec.dataset)
    rendered = ModelCard.from_template(
        ModelCardData(
            license=license,
            library_name="crossx",
            pipeline_tag=TASK,
            tags=[TASK, "fine-grained-visual-categorization", "pytorch", spec.method],
            datasets=[spec.dataset] if dataset else None,
            metrics=["accuracy"] if card.results else None,
            base_model=_base_model(card.info),
            model_name=title if card.results else None,
            eval_results=_eval_results(card) or None,
        ),
        template_path=str(TEMPLATE),
        card=card,
        counted=counted,
        spec=spec,
        info=card.info,
        results=card.results,
        name=title,
        address=repository or f"USER/{card.name}",
        description=_summary(card.method),
        parameters=sum(parameter.numel() for parameter in card.method.parameters()),
        version=metadata.version("crossx"),
        figures=figures,
        dataset=dataset,
        table=_results_table(card) if card.results else "",
        notices=_notices(card),
        worst=_worst_table(card.classes),
        confused=_confusions_table(card.results.get("confused_pairs") or []),
        training=_training(card.config, spec),
    )
    return f"{rendered.content}\n"


def check_license(license: str | None) -> None:
    """Check that a licence can be an identifier of the Hub (``apache-2.0``, ``cc-by-nc-4.0``, ``other``).

    Raises:
        UsageError: If it cannot.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise UsageError(
            f"license {license!r} is not a licence identifier of the Hub. Choose one of "
            "https://huggingface.co/docs/hub/repositories-licenses, such as apache-2.0 or cc-by-nc-4.0."
        )


def _eval_results(card: CardData) -> list[EvalResult]:
    """Return the Hub's ``model-index``: accuracies as fractions."""
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
        if _is_informative(key, card)
    ]


def _is_informative(key: str, card: CardData) -> bool:
    """Return whether an accuracy was measured; top-5 of five classes or fewer is always 100%."""
    return card.results.get(key) is not None and (key != "top5" or len(card.spec.classes) > 5)


def _base_model(info: Mapping[str, Any]) -> str | None:
    """Return the Hub's name of the pretrained weights, if they have one."""
    backbone = str(info.get("backbone") or "")
    if hub := (info.get("init") or {}).get("hub"):
        return str(hub).partition("@")[0]
    if not info.get("pretrained") or info.get("backbone_weights"):
        return None
    if backbone.startswith("hf-hub:"):
        return backbone.removeprefix("hf-hub:").partition("@")[0]
    return f"timm/{backbone}" if "." in backbone and ":" not in backbone else None


def _summary(method: Method) -> str:
    """Return the first line of a method's docstring as part of a sentence."""
    line = (type(method).__doc__ or method.name).strip().splitlines()[0].rstrip(".")
    return re.sub(r"^(A|An|The) ", lambda article: article[0].lower(), line)


def _results_table(card: CardData) -> str:
    results = card.results
    intervals, heads = results.get("intervals") or {}, results.get("heads") or {}
    names = {"top1": "top-1 accuracy, %", "class_mean": "class-mean accuracy, %", "top5": "top-5 accuracy, %"}
    rows = [
        (name, percent(results[key], intervals.get(key)))
        for key, name in names.items()
        if key != "top5" or _is_informative(key, card)
    ]
    rows += [(f"head `{name}` alone, %", percent(value)) for name, value in heads.items() if len(heads) > 1]
    rows += [(f"level {_code(name)}, %", percent(v)) for name, v in (results.get("levels") or {}).items()]
    if (error := card.calibration_error) is not None:
        rows.append(("expected calibration error", f"{error:.4f}"))
    confidence = f" ({100 * intervals['confidence']:.0f}% interval)" if "confidence" in intervals else ""
    return Table(("measure", f"value{confidence}"), rows).to_markdown()


def _notices(card: CardData) -> list[str]:
    notices = result_notices(card.results)
    if card.results and card.results.get("dataset") != card.spec.dataset:
        notices.append(f"The test images are those of another dataset ({card.results.get('dataset')}).")
    return notices


def _worst_table(classes: Sequence[ClassRow]) -> str:
    cells = [
        (_code(row.name), percent(row.accuracy), str(row.n), _code(row.most_confused_with or "") or "–")
        for row in [row for row in worst_first(classes) if row.accuracy != 1][:WORST_CLASSES]
    ]
    columns = ("class", "accuracy, %", "test images", "most often confused with")
    return Table(columns, cells).to_markdown() if cells else ""


def _confusions_table(pairs: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        (_code(pair["target"]), _code(pair["prediction"]), str(pair["n"]), percent(pair["fraction"]))
        for pair in pairs[:CONFUSED_PAIRS]
    ]
    columns = ("class", "predicted class", "images", "of the class, %")
    return Table(columns, cells).to_markdown() if cells else ""


def _training(config: Mapping[str, Any], spec: ModelSpec) -> str:
    """Return the configuration as YAML, without paths of the training machine."""
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


def _code(name: str) -> str:
    """Return a class name as Markdown code; empty for an empty name."""
    text = " ".join(name.split()).replace("`", "'")
    return f"`{text}`" if text else ""
