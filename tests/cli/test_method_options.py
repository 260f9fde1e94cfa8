import inspect
import subprocess
import sys
from typing import get_type_hints

import pytest

from crossx.cli import method_options
from crossx.cli.fit_options import parse_fit
from crossx.cli.parser import option_helps
from crossx.errors import UsageError
from crossx.methods import list_methods, method_class, register_method
from crossx.methods.plain import Plain
from crossx.methods.registry import _REGISTRY


def test_every_registered_method_is_found() -> None:
    assert method_options.list_methods() == list_methods()
    assert sorted(method_options._packaged()) == list_methods()


@pytest.mark.parametrize("name", list_methods())
def test_options_read_from_the_source_are_those_of_the_class(name: str) -> None:
    cls = method_class(name)
    hints, helps = get_type_hints(cls.__init__), option_helps(cls)
    expected = {
        item.name: (hints[item.name], item.default, helps[item.name])
        for item in inspect.signature(cls.__init__).parameters.values()
        if item.kind is item.KEYWORD_ONLY
    }
    found = {
        option.name.removeprefix("model."): (option.hint, option.default, option.help)
        for option in method_options.method_options(name)
    }
    assert found == expected
    assert all(text for _, _, text in found.values())


def test_a_method_registered_elsewhere_has_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossx.methods.registry._REGISTRY", {**_REGISTRY})

    @register_method("strange")
    class Strange(Plain):
        """A method of another package.

        Args:
            depth: How deep.
        """

        def __init__(self, backbone: object, num_classes: int, *, depth: int = 3) -> None: ...

    assert "strange" in method_options.list_methods()
    asked = parse_fit(["--model.method", "strange", "--model.depth", "5"])
    assert asked.config.model.options == {"depth": 5}
    with pytest.raises(UsageError, match=r"^--model\.depth takes a whole number, not 'x'"):
        parse_fit(["--model.method", "strange", "--model.depth", "x"])


def test_a_typo_is_told_without_torch() -> None:
    code = (
        "import sys; from crossx.cli.main import main; main(['fit', '--model.method', 'plane'])\n"
        "main(['fit', '--model.method', 'plain', '--model.num_parts', '3']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Did you mean 'plain'? Choose from: crossx, dfl," in done.stderr
    assert (
        "method 'plain' has no option 'num_parts'; crossx, fcan, ma_cnn, mamc, pdisconet have it."
        in done.stderr
    )
    assert done.stdout == "False\n"
