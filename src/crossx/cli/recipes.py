"""``crossx recipes [NAME]``."""

from __future__ import annotations

from crossx.cli.parser import MAX_WIDTH
from crossx.cli.values import Name
from crossx.recipes import PRESETS, load_recipe, model_names
from crossx.terminal import fold, page_width


def recipes(name: Name | None = None) -> None:
    """List the packaged training recipes with the models they train, or print one.

    A recipe is printed as YAML with everything that it builds on filled in, each number with its source.

    Args:
        name: A recipe's name, its model's name, or a YAML file.

    Examples:
        crossx recipes
        crossx recipes finetune > mine.yaml    # a start for a recipe of your own
        crossx fit --config crossx_cub_resnet50 --data.root CUB_200_2011
    """
    if name:
        print(load_recipe(name).to_yaml(), end="")
    else:
        _print_table()


def _print_table() -> None:
    width = min(MAX_WIDTH, page_width())
    presets = {recipe: preset for preset, recipe in PRESETS.items()}
    for model, name in model_names().items():
        preset = f" (--preset {presets[name]})" if name in presets else ""
        print(f"{name}{preset}")
        print(fold(f"  {load_recipe(name).description}", width=width))
        print(fold(f"  model {model}", width=width))
    text = (
        "`crossx recipes NAME` prints a recipe, `crossx fit --config NAME` trains it. `model` is the name of its "
        "model, as timm names models; --config takes that too."
    )
    print(f"\n{fold(text, width=width)}")
