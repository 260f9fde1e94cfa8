"""``crossx recipes [NAME]``."""

from __future__ import annotations

from crossx.cli.parser import Name
from crossx.recipes import PRESETS, load_recipe, model_names

MIN_WIDTH = 80


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
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", box=None, pad_edge=False)
    table.add_column("what it trains", overflow="fold")
    presets = {recipe: preset for preset, recipe in PRESETS.items()}
    for model, name in model_names().items():
        preset = f" (--preset {presets[name]})" if name in presets else ""
        table.add_row(name, f"{load_recipe(name).description}{preset}\n[dim]{model}[/dim]")
    console = Console()
    # a narrow window breaks the lines, but a name must not lose its end
    console.width = max(MIN_WIDTH, console.width)
    console.print(table)
    print(
        "\n`crossx recipes NAME` prints a recipe, `crossx fit --config NAME` trains it. Below each is the\n"
        "name of its model, as timm names models; --config takes that too."
    )
