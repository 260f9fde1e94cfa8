"""Recipes with another method than their own."""

from pathlib import Path

import pytest

from crossx.cli.fit_options import parse_fit
from crossx.errors import UsageError
from crossx.training.config import Config


def test_the_method_of_a_base_has_its_options_where_it_is_chosen_instead(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "model: {method: crossx, backbone: resnet18, num_parts: 3}\noptim: {lr: 0.5}\n"
    )
    mine, second = tmp_path / "mine.yaml", tmp_path / "second.yaml"
    mine.write_text(f"base: {tmp_path}/base.yaml\nmodel: {{method: plain}}\noptim: {{lr: 0.25}}\n")
    second.write_text(f"base: {mine}\nmodel: {{method: mamc, embedding_size: 8}}\n")
    for file in (mine, second):
        assert "num_parts" not in Config.from_recipe(file).model.options
        by_call = Config.from_recipe(file, model={"method": "crossx"})
        by_words = parse_fit(["--config", str(file), "--model.method", "crossx"]).config
        for config in (by_call, by_words):
            assert config.model.options["num_parts"] == 3
            assert (config.model.backbone, config.optim.lr) == ("resnet18", 0.25)
            assert "embedding_size" not in config.model.options
    assert Config.from_recipe(second, model={"method": "plain"}).model.options == {}
    given = parse_fit(["--config", str(mine), "--model.method", "crossx", "--model.num_parts", "4"]).config
    assert given.model.options["num_parts"] == 4


def test_a_file_that_returns_to_the_method_of_a_base_has_its_options(tmp_path: Path) -> None:
    plain, back, own = (tmp_path / f"{name}.yaml" for name in ("plain", "back", "own"))
    (tmp_path / "base.yaml").write_text("model: {method: crossx, num_parts: 3, reduction: 8}\n")
    plain.write_text(f"base: {tmp_path}/base.yaml\nmodel: {{method: plain}}\n")
    back.write_text(f"base: {plain}\nmodel: {{method: crossx, reduction: 4}}\n")
    assert Config.from_recipe(back).model.options == {"num_parts": 3, "reduction": 4}
    assert Config.from_recipe(back, model={"method": "plain"}).model.options == {}
    # of the user's file, not of its base
    own.write_text(f"base: {plain}\nmodel: {{num_parts: 5}}\n")
    for config in (
        Config.from_recipe(own, model={"method": "crossx"}),
        parse_fit(["--config", str(own), "--model.method", "crossx"]).config,
    ):
        assert (config.model.options["num_parts"], config.model.options["reduction"]) == (5, 8)


def test_options_are_those_of_their_method(tmp_path: Path) -> None:
    base, mine = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text(
        "model: {method: pn_cnn, margin: 1.5}\nother_methods: {nts: {margin: 0.9, dropout: 0.1}}\n"
    )
    mine.write_text(
        f"base: {base}\nother_methods: {{nts: {{dropout: 0.2}}, dfl: {{}}, pn_cnn: {{margin: 1.25}}}}\n"
    )
    assert Config.from_recipe(mine).model.options == {"margin": 1.25}
    assert Config.from_recipe(mine, model={"method": "nts"}).model.options == {"margin": 0.9, "dropout": 0.2}
    # a margin of another loss
    assert Config.from_recipe(mine, model={"method": "ra_cnn"}).model.options == {}
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(f"base: [{base}, quickstart]\n")
    second.write_text(f"base: [quickstart, {base}]\n")
    assert Config.from_recipe(first).model.options == Config.from_recipe("quickstart").model.options
    assert Config.from_recipe(second).model.options == {"margin": 1.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[plain]", "other_methods: line 2 is not a mapping"),
        ("{plain: 3}", "other_methods: plain: line 2 is not a mapping"),
        ("{dfl: {backbone: resnet18}}", "other_methods: dfl: backbone is no option of a method"),
        (
            "{dfl: {num_filter: 3}}",
            "for the method dfl: unknown option 'num_filter'. Did you mean 'num_filters'",
        ),
    ],
)
def test_wrong_options_of_other_methods_are_refused_whichever_is_chosen(
    text: str, message: str, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(f"base: finetune_fast\nother_methods: {text}\n")
    for chosen in ("dfl", "nts", None):
        with pytest.raises(UsageError, match=message):
            parse_fit(["--config", str(wrong), *(["--model.method", chosen] if chosen else [])])
        with pytest.raises(UsageError, match=message):
            Config.from_recipe(wrong, **({"model": {"method": chosen}} if chosen else {}))


def test_a_wrong_option_of_the_method_of_a_base_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    (tmp_path / "base.yaml").write_text("model: {method: crossx, num_partss: 3}\n")
    mine.write_text(f"base: {tmp_path}/base.yaml\nmodel: {{method: plain}}\n")
    with pytest.raises(UsageError, match="for the method crossx: unknown option 'num_partss'"):
        Config.from_recipe(mine)


def test_options_of_an_unknown_method_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: finetune_fast\nother_methods: {crosx: {num_parts: 3}}\n")
    note = f"{mine}: other_methods: unknown method 'crosx'. Did you mean 'crossx'?"
    for words in ([], ["--model.method", "crossx"]):
        notes = parse_fit(["--config", str(mine), *words]).notes
        assert [found.startswith(note) for found in notes] == [True]
    with caplog.at_level("INFO"):
        Config.from_recipe(mine, model={"method": "crossx"})
    assert note in caplog.text
    assert parse_fit(["--config", "finetune_fast"]).notes == ()


def test_a_recipe_without_a_method_has_the_options_of_the_default(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("other_methods: {crossx: {num_parts: 3}, dfl: {num_filters: 2}}\n")
    assert Config.from_recipe(mine).model.options == {"num_parts": 3}
    assert parse_fit(["--config", str(mine)]).config.model.options["num_parts"] == 3
    assert Config.from_recipe(mine, model={"method": "dfl"}).model.options == {"num_filters": 2}


def test_a_method_that_is_no_text_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("base: finetune_fast\nmodel: {method: [crossx]}\n")
    with pytest.raises(UsageError, match="method"):
        Config.from_recipe(wrong)


def test_the_preset_fast_with_cross_x_has_the_options_of_finetune() -> None:
    fast = Config.from_recipe("fast", model={"method": "crossx"})
    assert fast.model.options == Config.from_recipe("finetune").model.options
    assert fast.optim.cached_views
