"""Save a trained network to share, and upload it to the Hugging Face Hub.

::

    FOLDER/
      README.md            the model card
      config.json          architecture and class names in timm's form, for the Hub and its tools
      model.json           ModelSpec: what ``crossx.load`` reads
      model.safetensors    the weights
      accuracy.png         accuracy of each class, if the network was tested
      activation_maps.png  where the network looks in the given images

huggingface_hub's ``PyTorchModelHubMixin`` is not used: its ``from_pretrained`` falls back on a pickle and builds the
model from an unchecked ``config.json``, and its ``push_to_hub`` creates the repository before the files are made.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from crossx.errors import CrossXError, UsageError, check_type
from crossx.explain.figures import figure
from crossx.explain.plotting import save_png
from crossx.hub import CONFIG, LIBRARY, SPEC, WEIGHTS, HubModel, upload_model
from crossx.methods.base import Method
from crossx.methods.registry import published_name
from crossx.methods.weights import load_method, save_weights
from crossx.predict.inputs import ImageInput, expand
from crossx.predict.predictor import Predictor
from crossx.recipes import architecture
from crossx.report.class_bars import plot_class_accuracy
from crossx.runs import (
    ModelSpec,
    check_writable,
    read_json,
    storage_error,
    write_json,
    write_text,
)
from crossx.share.model_card import CardData, CardFigure, check_license, write_card

log = logging.getLogger(__name__)

CARD, ACCURACY, MAPS = "README.md", "accuracy.png", "activation_maps.png"
FILES = (CONFIG, SPEC, WEIGHTS, CARD, ACCURACY, MAPS)


def save_pretrained(
    predictor: Predictor,
    folder: str | Path,
    *,
    license: str | None = None,
    images: Iterable[ImageInput] = (),
    repository: str | None = None,
) -> Path:
    """Save a network as safetensors, JSON, a model card and figures; ``crossx.load(folder)`` loads it again.

    The card has the results of ``crossx test`` if the network was loaded from a run that has them.

    Args:
        predictor: The network.
        folder: A new or empty folder, or one that this function wrote, which is overwritten.
        license: The Hub's identifier of the licence of the weights (``apache-2.0``); None leaves it open.
        images: Images whose activation maps the card shows. They are published: you need the right to do so.
        repository: ``user/name`` on the Hub, if it is known.

    Returns:
        The folder.

    Raises:
        UsageError: If the folder holds other files, or ``license`` is not a valid identifier.
        CrossXError: If an image cannot be read or the folder cannot be written.
    """
    check_type("save_pretrained", predictor, Predictor, "crossx.load(RUN) loads one")
    target = Path(folder)
    check_target(target)
    check_license(license)
    data = _read_card_data(predictor)
    check_writable(target)
    maps = None
    if given := expand(images):
        maps = figure(predictor.method, predictor.inputs(given), predictor.spec)
    # model.json is removed first and written last: without it nothing loads a half-written folder
    _remove(target, (SPEC, ACCURACY, MAPS))
    write_json(target / CONFIG, hub_config(predictor.spec))
    save_weights(predictor.method, target / WEIGHTS)
    figures = []
    if data.classes:
        title = f"Accuracy of each class on {data.results['n']:,} test images"
        plot_class_accuracy(data.classes, target / ACCURACY, title=title)
        figures.append(CardFigure(ACCURACY, "Accuracy of each class on the test images"))
    if maps is not None:
        save_png(maps, target / MAPS)
        figures.append(CardFigure(MAPS, "Where the network looks: activation maps of every stage and part"))
    card = write_card(data, repository=repository, license=license, figures=figures)
    write_text(target / CARD, card)
    write_json(target / SPEC, predictor.spec.to_json())
    return target


def push_to_hub(
    predictor: Predictor,
    name: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    images: Iterable[ImageInput] = (),
) -> str:
    """Upload the files of ``save_pretrained`` to the Hugging Face Hub.

    Args:
        predictor: The network.
        name: ``user/name``; created if it does not exist.
        private: Whether a new repository is visible to its owner only.
        token: An access token; by default that of ``hf auth login`` or ``HF_TOKEN``.
        revision: Branch to upload to, created if it does not exist; by default the main branch.
        license: See ``save_pretrained``.
        images: See ``save_pretrained``.

    Returns:
        The address of the repository.

    Raises:
        UsageError: If ``name`` is not a repository's name, or ``license`` is not a valid identifier.
        CrossXError: If an image cannot be read, or the upload fails.
    """
    model = hub_model(name, revision)
    with tempfile.TemporaryDirectory(prefix="crossx-") as folder:
        save_pretrained(predictor, folder, license=license, images=images, repository=model.repository)
        return upload_model(Path(folder), model, files=list(FILES), private=private, token=token)


def hub_model(name: str, revision: str | None = None) -> HubModel:
    """Parse ``user/name`` or ``user/name@revision``.

    Raises:
        UsageError: If ``name`` is neither.
    """
    model = HubModel.parse(name, on_hub=True)
    if model is None:
        raise UsageError(f"{name!r} names no repository of the Hugging Face Hub: write USER/NAME.")
    return HubModel(model.repository, revision or model.revision)


def check_target(folder: Path) -> None:
    """Check that a folder is new or empty, or holds a shared model.

    Raises:
        UsageError: If it holds other files.
    """
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    if not names:
        return
    try:
        shared = read_json(folder / CONFIG).get("library_name") == LIBRARY
    except CrossXError:
        shared = False
    if not shared:
        raise UsageError(
            f"{folder}: holds other files ({names[0]}). Choose a new or an empty folder as --output, or that of a "
            "shared model."
        )


def hub_config(spec: ModelSpec) -> dict[str, Any]:
    """Return ``config.json`` in timm's form. ``crossx.load`` does not read it; the Hub counts its downloads."""
    prep = spec.preprocessing
    return {
        "library_name": LIBRARY,
        "library_version": metadata.version(LIBRARY),
        "architecture": architecture(published_name(spec.method, spec.options), spec.backbone),
        "num_classes": len(spec.classes),
        "label_names": list(spec.classes),
        "pretrained_cfg": {
            "input_size": [3, prep.image_size, prep.image_size],
            "interpolation": prep.interpolation,
            "mean": list(prep.mean),
            "std": list(prep.std),
        },
    }


def _read_card_data(predictor: Predictor) -> CardData:
    """Collect what is known about the network; results only if they were measured on its weights."""
    if predictor.origin is None:
        return CardData(predictor.method, predictor.spec)
    run, weights = predictor.origin
    results: Mapping[str, Any] = run.read_results(weights)
    if results and not _same(predictor.method, load_method(weights)[0]):
        log.warning("the network was changed after it was loaded: the model card gives no results.")
        results = {}
    return CardData.read(predictor.method, predictor.spec, run, results)


def _same(method: Method, other: Method) -> bool:
    state, others = method.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(
        torch.equal(value.cpu(), others[key]) for key, value in state.items()
    )


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(folder / name, error) from error
