from dataclasses import replace
from pathlib import Path

import pytest

from crossx.ablation.suite import list_suites, load_suite
from crossx.cli.fit_options import parse_fit
from crossx.cli.main import main
from crossx.errors import UsageError
from crossx.methods import create_method, method_options
from crossx.training.config import Config, ModelConfig, OptimConfig
from slow import slow_except

BASE = Config(
    model=ModelConfig(options={"num_parts": 3, "c3s_weights": [0.5, 0.25, 0.5]}),
    optim=OptimConfig(lr=0.02),
    seed=7,
)

# Section 4.3: what each row of Fig. 3 has. Heads of Eq. 7, terms of Eq. 8.
FIG3 = {
    "plain": ({"last"}, {"data"}),
    "osme": ({"last"}, {"data"}),
    "c3s": ({"last"}, {"data", "c3s_last"}),
    "c3s+gmp": ({"last", "previous"}, {"data", "c3s_last", "c3s_previous"}),
    "c3s+gmp+cl": ({"last", "previous"}, {"data", "c3s_last", "c3s_previous", "cross_layer_previous"}),
    "c3s+gmp+fp": (
        {"last", "previous", "merged"},
        {"data", "c3s_last", "c3s_previous", "c3s_merged"},
    ),
    "c3s+gmp+fp+cl": (
        {"last", "previous", "merged"},
        {"data", "c3s_last", "c3s_previous", "c3s_merged", "cross_layer_previous", "cross_layer_merged"},
    ),
}


def build(config: Config):
    return create_method(
        config.model.method,
        backbone="resnet10t",
        backbone_args={"channels": [4, 8, 16, 32]},
        num_classes=3,
        **config.model.options,
    )


def test_the_rows_of_fig_3_have_the_heads_and_terms_that_the_paper_gives_them() -> None:
    import torch

    images, targets = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    configs = load_suite("fig3").configure(BASE)
    assert list(configs) == list(FIG3)
    for name, (config,) in configs.items():
        method = build(config)
        heads, terms = FIG3[name]
        assert set(method.head_logits(images)) == heads, name
        assert set(method.objective(images, targets).terms) == terms, name


def test_fig_4_is_fig_3_with_gap_on_the_previous_stage() -> None:
    third, fourth = load_suite("fig3"), load_suite("fig4")
    assert [name.replace("gmp", "gap") for name in third.variants] == list(fourth.variants)
    pooled = {
        name: build(config).options.get("previous_pooling")
        for name, (config,) in fourth.configure(BASE).items()
    }
    assert {name for name, pooling in pooled.items() if pooling == "avg"} == {n for n in pooled if "gap" in n}


@pytest.mark.parametrize("name", list_suites())
def test_every_packaged_suite_can_be_built_and_no_two_variants_are_the_same(name: str) -> None:
    suite = load_suite(name)
    assert suite.title
    assert suite.source
    options = [
        (method.name, method.options, c.optim)
        for configs in suite.configure(BASE).values()
        for c in configs
        for method in [build(c)]
    ]
    assert all(options.count(entry) == 1 for entry in options)


def test_a_variant_keeps_what_it_does_not_change_and_another_method_keeps_no_option() -> None:
    configs = load_suite("fig3").configure(BASE)
    assert configs["plain"][0].model.options == {}
    assert configs["c3s"][0].model.options["num_parts"] == 3
    assert configs["c3s"][0].seed == 7
    assert BASE.model.options == {"num_parts": 3, "c3s_weights": [0.5, 0.25, 0.5]}


@pytest.mark.parametrize(
    ("recipe", "method"),
    slow_except([("finetune_fast", "crossx"), ("finetune", "fcan")], ("finetune", "fcan")),
)
def test_a_variant_has_the_options_that_every_other_way_gives_its_method(
    recipe: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, derived, printed, typed = (
        tmp_path / f"{name}.yaml" for name in ("suite", "own", "printed", "typed")
    )
    suite.write_text(f"variants: {{a: {{model: {{method: {method}}}}}}}")
    derived.write_text(f"base: {recipe}\nmodel: {{method: {method}}}\n")
    assert main(["recipes", recipe]) == 0
    printed.write_text(capsys.readouterr().out)
    assert main(["fit", "--config", recipe, "--print_config"]) == 0
    typed.write_text(capsys.readouterr().out)

    def options(config: Config) -> dict[str, object]:
        model = replace(config.model, options={**method_options(method), **config.model.options})
        return model.to_dict()

    expected = options(Config.from_recipe(derived))
    variants = load_suite(suite)
    for file in (recipe, printed, typed):
        assert options(Config.from_recipe(file, model={"method": method})) == expected
        assert options(parse_fit(["--config", str(file), "--model.method", method]).config) == expected
        assert options(variants.configure(parse_fit(["--config", str(file)]).config)["a"][0]) == expected
    other = parse_fit(["--config", recipe, "--model.method", "dfl"]).config
    assert options(variants.configure(other)["a"][0]) == expected


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "variants: {slow: {optim: {lr: 1e-4}}, fast: {optim: {lr: 0.1}, trainer: {max_epochs: 3}}}"
    )
    configs = load_suite(path).configure(replace(BASE))
    assert [c.optim.lr for (c,) in configs.values()] == [1e-4, 0.1]
    assert configs["fast"][0].trainer.max_epochs == 3


def test_alternatives_are_the_same_for_all_variants_or_given_for_each(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "variants: {crossx: {}, plain: {model: {method: plain}}}\ntune: [{optim: {lr: 0.1}}, {optim: {lr: 0.3}}]"
    )
    configs = load_suite(path).configure(BASE)
    for variant in configs.values():
        assert [c.optim.lr for c in variant] == [BASE.optim.lr, 0.1, 0.3]
    path.write_text(
        "variants: {a: {model: {num_parts: 1}}, b: {}}\n"
        "tune: {a: [{optim: {lr: 0.1}}], b: [{model: {num_parts: 4}}]}"
    )
    configs = load_suite(path).configure(BASE)
    assert [(c.model.options["num_parts"], c.optim.lr) for c in configs["a"]] == [
        (1, BASE.optim.lr),
        (1, 0.1),
    ]
    assert [c.model.options["num_parts"] for c in configs["b"]] == [3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "`variants`, a mapping"),
        ("variants: {}", "`variants`, a mapping"),
        ("variants: [a]", "`variants`, a mapping"),
        ("variants: {a/b: {}}", "'a/b' cannot be a variant's name"),
        ("variants: {a: {modle: {}}}", "Did you mean 'model'?"),
        ("variants: {a: 3}", "must map sections to options"),
        ("titel: x\nvariants: {a: {}}", "unknown key 'titel'"),
        ("variants: {a: {", "not valid YAML"),
        ("variants: {a: {}}\ntune: {lr: 1}", "`tune` is a list of changes"),
        ("variants: {a: {}, b: {}}\ntune: {a: [{optim: {lr: 1}}]}", "`tune` is a list of changes"),
        (
            "variants: {a: {}, b: {}}\ntune: {a: [{optim: {lr: 1}}], b: []}",
            "the same number of alternatives, not [0, 1]",
        ),
        ("variants: {a: {}}\ntune: [{lr: 1}]", "tune: a, alternative 1 must map sections"),
        ("variants: {a: {}}\ntune: [{optm: {lr: 1}}]", "Did you mean 'optim'?"),
    ],
)
def test_what_is_wrong_with_a_suite_is_said(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"mine\.yaml") as refusal:
        load_suite(path)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model: {method: plain, num_parts: 2}", "has no option 'num_parts'"),
        ("model: {numparts: 2}", "Did you mean 'num_parts'?"),
        ("optim: {lr: -1}", "optim.lr must be above 0"),
        ("model: {method: corssx}", "Did you mean 'crossx'?"),
    ],
)
def test_an_option_that_cannot_work_names_the_variant(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"variants: {{good: {{}}, bad: {{{change}}}}}")
    with pytest.raises(UsageError, match="variant bad") as refusal:
        load_suite(path).configure(BASE)
    assert message in str(refusal.value)


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'losses'"):
        load_suite("loses")
    with pytest.raises(UsageError, match=r"none\.yaml: no such file"):
        load_suite("none.yaml")
