"""A trained network as a folder to share, and on the Hugging Face Hub.

::

    FOLDER/
      README.md          the model card
      config.json        architecture and class names in timm's form, as the Hub and its tools look for them
      model.json         ModelSpec: what ``crossx.load`` reads
      model.safetensors  the weights
      accuracy.png       the accuracy of each class, where the network was tested
      activation_maps.png  where it looks in images given for that
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

from crossx.errors import CrossXError, UsageError
from crossx.explain.figures import figure, save_png
from crossx.hub import CONFIG, LIBRARY, SPEC, WEIGHTS, HubModel, upload_model
from crossx.methods.base import Method
from crossx.methods.weights import load_method, save_weights
from crossx.predict.inputs import ImageInput, expand
from crossx.predict.predictor import Predictor
from crossx.recipes import architecture
from crossx.report.class_bars import plot_class_accuracy
from crossx.runs import (
    ModelSpec,
    atomic_path,
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
    """Write a network into a folder to share: safetensors, JSON, a model card and figures.

    ``crossx.load(folder)`` gives the same network again. The card has the results of ``crossx test`` where the
    network was loaded from a run that has them.

    Args:
        predictor: The network.
        folder: A new or empty folder, or one that this function wrote, whose files are written anew.
        license: The Hub's identifier of the licence of the weights (``apache-2.0``); None leaves it open.
        images: Images to show activation maps of in the card. They are published: they must be yours to give.
        repository: ``user/name`` on the Hub where it is known.

    Returns:
        The folder.

    Raises:
        UsageError: If the folder holds something else, or ``license`` cannot be an identifier.
        CrossXError: If an image cannot be read, or the folder cannot be written to.
    """
    target = Path(folder)
    check_target(target)
    check_license(license)
    data = _read_card_data(predictor)
    check_writable(target)
    maps = None
    if given := expand(images):
        maps = figure(predictor.method, predictor.inputs(given), predictor.spec)
    # Without model.json nothing loads the folder: it goes first and comes last, so that a kill in between leaves no
    # weights beside another network's description.
    _remove(target, (SPEC, ACCURACY, MAPS))
    write_json(target / CONFIG, hub_config(predictor.spec))
    save_weights(predictor.method, target / WEIGHTS)
    figures = []
    if data.classes:
        title = f"Accuracy of each class on {data.results['n']:,} test images"
        plot_class_accuracy(data.classes, target / ACCURACY, title=title)
        figures.append(CardFigure(ACCURACY, "Accuracy of each class on the test images"))
    if maps is not None:
        with atomic_path(target / MAPS) as temporary:
            save_png(maps, temporary)
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
    """Upload what ``save_pretrained`` writes to the Hugging Face Hub.

    Args:
        predictor: The network.
        name: ``user/name``; made where it is not there yet.
        private: Whether a new repository is visible to its owner only.
        token: An access token; by default the one of ``hf auth login`` or ``HF_TOKEN``.
        revision: Branch to upload to, made where it is not there yet; the main one by default.
        license: See ``save_pretrained``.
        images: See ``save_pretrained``.

    Returns:
        The address of the repository.

    Raises:
        UsageError: If ``name`` is no name of a repository, or ``license`` cannot be an identifier.
        CrossXError: If an image cannot be read, or the Hub cannot be reached or refuses.
    """
    model = hub_model(name, revision)
    with tempfile.TemporaryDirectory(prefix="crossx-") as folder:
        save_pretrained(predictor, folder, license=license, images=images, repository=model.repository)
        return upload_model(Path(folder), model, files=list(FILES), private=private, token=token)


def hub_model(name: str, revision: str | None = None) -> HubModel:
    """Return the repository that ``user/name`` or ``user/name@revision`` means.

    Raises:
        UsageError: If it means none.
    """
    model = HubModel.parse(name)
    if model is None:
        raise UsageError(f"{name!r} names no repository of the Hugging Face Hub: write USER/NAME.")
    return HubModel(model.repository, revision or model.revision)


def check_target(folder: Path) -> None:
    """Check that a folder may be written to: it is new, empty, or holds a shared model.

    Raises:
        UsageError: If it holds something else.
    """
    if not os.path.isdir(folder):
        return
    names = sorted(os.listdir(folder))
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
    """Return ``config.json``: what timm's has for its models, as far as it is the same here.

    ``crossx.load`` does not read it. The Hub counts its downloads.
    """
    prep = spec.preprocessing
    return {
        "library_name": LIBRARY,
        "library_version": metadata.version(LIBRARY),
        "architecture": architecture(spec.method, spec.backbone, spec.options),
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
    """Return what is known about the network, with results only if they are those of its weights."""
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
