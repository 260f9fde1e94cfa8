"""``crossx share RUN --output DIR | --hub USER/NAME``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from crossx.cli.options import ModelPath, check_folder, check_run
from crossx.cli.values import Folder
from crossx.commands import command
from crossx.errors import UsageError
from crossx.runs import PREDICTS_ALONE
from crossx.terminal import step

if TYPE_CHECKING:
    from crossx.predict.predictor import Predictor


def share(
    run: ModelPath,
    *,
    output: Folder | None = None,
    hub: Annotated[str, "USER/NAME"] | None = None,
    private: bool = False,
    license: Annotated[str, "ID"] | None = None,
    figure: Sequence[Annotated[str, "IMAGE"]] = (),
) -> None:
    """Write a trained network and its model card into a folder, or upload them to the Hugging Face Hub.

    It consists of weights (safetensors), a description (JSON) and a model card with the results of `crossx test`, the
    terms of the training images, intended use, limits and a chart of the accuracy per class. To load it, give that
    folder or USER/NAME as RUN.

    The card shows no image of the dataset, whose terms may forbid it; --figure adds activation maps of images that you
    may publish. A folder or repository that was shared before is overwritten, an edited README.md too.

    Args:
        output: New or empty folder, or that of a shared model.
        hub: Repository on the Hugging Face Hub, created if needed; USER/NAME@BRANCH for another branch. Log in with
            `hf auth login` or HF_TOKEN first.
        private: Make a new repository visible only to its owner.
        license: Licence of the weights, such as apache-2.0 (default: none is named).
        figure: Images of your own to show activation maps of; they are published with the model.

    Examples:
        crossx share runs/mine --output shared/mine --license apache-2.0
        crossx share runs/mine --hub me/my-birds --private
        crossx share runs/mine --hub me/my-birds@v2 --figure my_photos/jay.jpg my_photos/wren.jpg
    """
    if bool(output) == bool(hub):
        raise UsageError("give either --output DIR or --hub USER/NAME.")
    if private and not hub:
        raise UsageError("--private needs --hub USER/NAME.")

    if output:
        check_folder(output)
    check_run(run)

    with step("Loading PyTorch"):
        from crossx.predict.exported import is_exported
        from crossx.predict.predictor import Predictor
        from crossx.share.model_card import check_license
        from crossx.share.sharing import check_target, hub_model, push_to_hub, save_pretrained

    check_license(license)
    if is_exported(run):
        raise UsageError(f"{run}: {PREDICTS_ALONE}")
    model = hub_model(hub) if hub else None
    if output:
        check_target(Path(output))
    with step("Loading the network"):
        predictor = Predictor.load(run, device="cpu")
    target: object
    if model is None:
        assert output is not None
        with step("Writing the model and its card"):
            target = save_pretrained(predictor, output, license=license, images=figure)
    else:
        with step("Uploading the model and its card"):
            target = push_to_hub(
                predictor,
                model.repository,
                revision=model.revision,
                private=private,
                license=license,
                images=figure,
            )
    print(f"shared: {target}", flush=True)
    if missing := _missing_results(predictor):
        test = command("test", run)
        print(f"crossx share: the model card has {missing}: run `{test}` first.", file=sys.stderr)
    if license is None:
        print("crossx share: the model card names no licence: --license ID names one.", file=sys.stderr)


def _missing_results(predictor: Predictor) -> str:
    """Say which numbers `crossx test` would add to the card; empty for none, and for a model that it cannot test."""
    if predictor.origin is None or predictor.origin[0].hub:
        return ""
    run, weights = predictor.origin
    results = run.read_results(weights)
    if not results:
        return "no results"
    recalibrated = results.get("temperature", 1.0) != predictor.spec.temperature
    return "no calibration error, since the run was calibrated after its test" if recalibrated else ""
