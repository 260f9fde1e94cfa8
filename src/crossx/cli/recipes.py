"""``crossx recipes [NAME]``."""

from __future__ import annotations

from collections.abc import Sequence

from crossx.cli.options import VerbParser
from crossx.recipes import load_recipe, model_names


def run(arguments: Sequence[str]) -> int:
    """List the packaged recipes, or print one with everything that it builds on filled in."""
    parser = VerbParser(
        "recipes",
        "List the packaged training recipes with the models they train, or print one as YAML:\n"
        "each number with its source.",
        [
            "crossx recipes",
            "crossx recipes finetune > mine.yaml    # a start for a recipe of your own",
            "crossx fit --config crossx_cub_resnet50 --data.root CUB_200_2011",
        ],
    )
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="a recipe's name, its model's name, or a YAML file"
    )
    name = parser.parse(arguments).name
    if name:
        print(load_recipe(name).to_yaml(), end="")
    else:
        _print_table()
    return 0


def _print_table() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", box=None, pad_edge=False)
    table.add_column("what it trains", overflow="fold")
    for model, name in model_names().items():
        table.add_row(name, f"{load_recipe(name).description}\n[dim]{model}[/dim]")
    Console().print(table)
    print(
        "\n`crossx recipes NAME` prints one; `crossx fit --config NAME` trains it. Below each stands the name of the"
    )
    print("model it trains, as timm names models; it is accepted too.")
