import unicodedata

import pytest

from crossx.cli.main import VERBS
from crossx.cli.parser import build
from crossx.suggestions import SYNONYMS, nearest

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("name", "choices", "suggested"),
    [
        ("fti", ["fit", "test"], " Did you mean 'fit'?"),
        ("wandb", ["wandb", "csv"], ""),
        ("Wandb", ["wandb", "csv"], " Did you mean 'wandb'?"),
        ("CUB", ["cub", "cars"], " Did you mean 'cub'?"),
        ("image-size", ["image_size", "resize_size"], " Did you mean 'image_size'?"),
        ("cub ", ["cub", "cars"], " Did you mean 'cub'?"),
        ("train", ["fit", "explain"], " Did you mean 'fit'?"),
        ("train", ["train", "explain"], " Did you mean 'explain'?"),
        ("valid", ["train", "val", "test"], " Did you mean 'val'?"),
        ("gpu", ["auto", "cpu", "cuda"], " Did you mean 'cuda'?"),
        ("xyz", ["fit"], ""),
        ("fit", [], ""),
        (
            COMPOSED,
            [DECOMPOSED],
            " Did you mean 'cafe\\u0301', which is written with other characters than 'caf\\xe9'?",
        ),
        (
            DECOMPOSED,
            [COMPOSED],
            " Did you mean 'caf\\xe9', which is written with other characters than 'cafe\\u0301'?",
        ),
    ],
)
def test_the_nearest_name_is_another_one(name: str, choices: list[str], suggested: str) -> None:
    assert nearest(name, choices) == suggested


def test_every_synonym_is_one_of_a_verb_an_option_or_a_value() -> None:
    """A renamed option would leave its synonyms without effect."""
    import importlib

    from crossx.cli.fit_options import fit_parser

    parsers = [fit_parser([])]
    for verb in set(VERBS) - {"fit", "ablate"}:
        module = importlib.import_module(f"crossx.cli.{verb.replace('-', '_')}")
        parsers.append(build(getattr(module, verb.replace("-", "_")), verb))
    options = {option for parser in parsers for option in parser._option_string_actions}
    for names in SYNONYMS.values():
        for name in names.split(" | "):
            if name.startswith("--"):
                assert {name, name.rpartition(".")[0]} & (options | {"--version"}), name
            elif " " in name:
                assert name.split()[0] in VERBS, name
