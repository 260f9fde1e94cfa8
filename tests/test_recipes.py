import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import layouts
from crossx import recipes
from crossx.cli.fit_options import parse_fit
from crossx.data.catalog import read_dataset
from crossx.data.datamodule import DataModule
from crossx.data.index import DatasetIndex
from crossx.errors import UsageError
from crossx.methods import KernelPooling, create_method
from crossx.methods.registry import published_name
from crossx.recipes import Recipe, Setting, list_recipes, load_recipe, model_name, model_names
from crossx.runs import Preprocessing
from crossx.training.config import Config

FILES = sorted(Path(recipes.__file__).parent.glob("*.yaml"))

# The released code's initialization.py: dataset -> lambda of L, L-1 and G as they are meant.
LAMBDAS = {
    "resnet50": {
        "cub": [0.5, 0.25, 0.5],
        "nabirds": [0.5, 0.25, 0.5],
        "cars": [1, 0.25, 1],
        "dogs": [0.01, 0.01, 1],
        "aircraft": [0.5, 0.1, 0.5],
    },
    "senet50": {
        "cub": [1, 0.25, 1],
        "nabirds": [0.1, 0.25, 0.5],
        "cars": [1, 0.25, 1],
        "dogs": [1, 0.5, 1],
        "aircraft": [0.5, 0.1, 0.1],
    },
}
CASES = [(backbone, dataset) for backbone, values in LAMBDAS.items() for dataset in values]


def has_number(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(item, int | float) and not isinstance(item, bool) for item in values)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_number_of_a_packaged_file_has_its_source_in_a_comment(path: Path) -> None:
    recipe = recipes._parse(path.stem, path.read_text())
    bare = [
        key
        for key, item in recipe.settings.items()
        if has_number(item.value) and not (item.above or item.beside)
    ]
    assert not bare


@pytest.mark.parametrize("name", list_recipes())
@pytest.mark.slow
def test_printed_recipe_reads_back_with_its_comments(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.description
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.to_yaml())
    again = load_recipe(copy)
    assert dict(again.settings) == dict(recipe.settings)
    assert yaml.safe_load(recipe.to_yaml()) == {"description": recipe.description, **recipe.to_dict()}


def test_there_is_a_recipe_for_every_dataset_backbone_and_kind() -> None:
    wanted = {
        f"crossx_{dataset}_{backbone}{kind}" for backbone, dataset in CASES for kind in ("", "_released")
    }
    wanted |= {f"plain_{dataset}_{backbone}" for backbone, dataset in CASES}
    assert wanted | {"finetune", "quickstart"} <= set(list_recipes())


@pytest.mark.parametrize(("backbone", "dataset"), CASES)
def test_paper_recipe(backbone: str, dataset: str) -> None:
    recipe = load_recipe(f"crossx_{dataset}_{backbone}")
    birds, dogs = dataset in ("cub", "nabirds"), dataset == "dogs"
    expected = {
        ("model", "num_parts"): 2,
        ("model", "c3s_form"): "paper",
        ("model", "interpolation"): "bilinear",
        ("model", "previous_pooling"): "max" if birds else "avg",
        ("model", "c3s_weights"): LAMBDAS[backbone][dataset],
        ("data", "dataset"): dataset,
        ("data", "image_size"): 448,
        ("data", "resize_size"): 448 if dataset in ("cars", "dogs") else 600,
        ("data", "batch_size"): 32,
        ("data", "val_fraction"): 0.1,
        ("data", "train_on"): "trainval" if dataset == "aircraft" else "train",
        ("optim", "optimizer"): "sgd",
        ("optim", "lr"): 0.001 if dogs else 0.01,
        ("optim", "momentum"): 0.9,
        ("optim", "schedule"): "step",
        ("optim", "step_size"): 15,
        ("optim", "selection"): "last" if dataset == "aircraft" else "best",
        ("trainer", "max_epochs"): 30,
    }
    assert {key: recipe.get(*key) for key in expected} == expected


@pytest.mark.parametrize(("backbone", "dataset"), CASES)
def test_released_recipe(backbone: str, dataset: str) -> None:
    recipe = load_recipe(f"crossx_{dataset}_{backbone}_released")
    aircraft, dogs = dataset == "aircraft", dataset == "dogs"
    expected = {
        ("model", "num_parts"): 3 if dogs and backbone == "senet50" else 2,
        ("model", "use_merged"): not (dogs and backbone == "resnet50"),
        ("model", "reduction"): 256 if backbone == "resnet50" else [128, 64],
        ("model", "c3s_form"): "released",
        ("model", "interpolation"): "nearest",
        ("model", "c3s_weights"): [0, 0, 0] if aircraft else LAMBDAS[backbone][dataset],
        ("data", "train_on"): "trainval",
        ("optim", "schedule"): "multistep",
        ("optim", "milestones"): [14, 24],
        ("optim", "selection"): "best_on_test",
        ("optim", "weight_decay"): 0,
    }
    assert {key: recipe.get(*key) for key in expected} == expected


@pytest.mark.parametrize(("backbone", "dataset"), CASES)
def test_plain_recipe_trains_like_the_paper_recipe(backbone: str, dataset: str) -> None:
    plain = load_recipe(f"plain_{dataset}_{backbone}").to_dict()
    crossx = load_recipe(f"crossx_{dataset}_{backbone}").to_dict()
    assert plain.pop("model") == {
        "method": "plain",
        "pretrained": True,
        "backbone": crossx["model"]["backbone"],
    }
    crossx.pop("model")
    assert plain == crossx


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DatasetIndex]:
    """Give a small dataset of the paper, read from the layout of its site: 20 images per class and official split."""

    @functools.cache
    def read(dataset: str) -> DatasetIndex:
        images = 60 if dataset == "aircraft" else 40
        write = getattr(layouts, f"write_{dataset}")
        return read_dataset(
            dataset, write(tmp_path_factory.mktemp("data") / dataset, images_per_class=images)
        )

    return read


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name for name in list_recipes() if load_recipe(name).get("data", "dataset") in LAMBDAS["resnet50"]],
)
def test_a_recipe_trains_on_as_many_images_as_the_paper(
    name: str, laid_out: Callable[[str], DatasetIndex]
) -> None:
    """Table 1 counts an official validation set as training images; section 4.2 holds 10% out of the other datasets."""
    config = Config.from_recipe(name).data
    index = laid_out(config.dataset)
    official = [(record.label, record.path) for split in ("train", "val") for record in index.split(split)]
    data = DataModule(index, Preprocessing(448, 448, "bilinear", (0.5,) * 3, (0.5,) * 3), config, seed=0)
    trained = [(record.label, record.path) for record in data.train_records()]
    assert len(set(trained)) == len(trained)
    assert set(trained) <= set(official)
    # of the 20 of each class
    assert len(trained) >= len(official) - (0 if index.split("val") else 2 * len(index.classes))
    if config.dataset == "aircraft":
        assert len(trained) == len(index.classes) * (20 + 20)
        assert not data.holds_out


ROWS = {
    "maxent": "nabirds_resnet50 nabirds_densenet161 cub_resnet50 cub_densenet161 cars_resnet50 dogs_resnet50 "
    "dogs_densenet161 aircraft_resnet50 aircraft_densenet161",
    "mamc": "cub_resnet50 cub_resnet101 cars_resnet50 dogs_resnet50 dogs_resnet101",
    "kernel_pooling": "cub_resnet50 cub_vgg16 cars_resnet50 cars_vgg16 aircraft_resnet50 aircraft_vgg16",
    "dfl": "cub_resnet50 cub_vgg16 cars_resnet50 aircraft_resnet50 aircraft_vgg16",
    "nts": "cub_resnet50 cars_resnet50 aircraft_resnet50",
    "dt_ram": "cub_resnet50 cars_resnet50",
    "probe": "nabirds_alexnet",
    "ma_cnn": "cub_vgg19 cars_vgg19 aircraft_vgg19",
    "ra_cnn": "cub_vgg19 cars_vgg19 dogs_vgg19",
}
BACKBONES = {
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv_in1k",
    "densenet161": "densenet161.tv_in1k",
    "vgg16": "vgg16.tv_in1k",
    "vgg19": "vgg19.tv_in1k",
    "alexnet": "alexnet.tv_in1k",
}


@functools.cache
def build_outline(method: str, backbone: str, size: int, options: tuple[tuple[str, Any], ...]) -> None:
    """Build a network without memory for its weights, and check that it takes images of a size."""
    with torch.device("meta"):
        network = create_method(
            method, backbone=backbone, num_classes=100, image_size=size, **load_options(options)
        )
        network.check_image_size(size)


def load_options(options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options}


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"{method}_{row}" for method, rows in ROWS.items() for row in rows.split()])
def test_a_recipe_of_a_compared_method_is_what_its_name_says_and_can_be_built(name: str) -> None:
    method, dataset, backbone = re.fullmatch(r"(\w+)_([a-z]+)_([a-z0-9]+)", name).groups()  # type: ignore[union-attr]
    recipe = load_recipe(name)
    model = recipe.to_dict()["model"]
    assert (model.pop("method"), recipe.get("data", "dataset")) == (method, dataset)
    assert (model.pop("backbone"), model.pop("pretrained")) == (BACKBONES[backbone], True)
    assert (model.get("stride"), model.get("filter_stride")) == {
        ("kernel_pooling", "vgg16"): (16, None),
        ("dfl", "vgg16"): (None, 8),
    }.get((method, backbone), (None, None))
    if dataset == "aircraft":
        assert (recipe.get("data", "level"), recipe.get("data", "train_on")) == ("variant", "trainval")
        assert recipe.get("optim", "selection") == "last"
    size = recipe.get("data", "image_size")
    assert size == (224 if backbone == "alexnet" else 448)
    build_outline(
        method,
        BACKBONES[backbone],
        size,
        tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in model.items()),
    )


def test_kernel_pooling_on_vgg_takes_conv5_3() -> None:
    with torch.device("meta"):
        model = load_recipe("kernel_pooling_cub_vgg16").to_dict()["model"]
        method = create_method(
            "kernel_pooling", backbone=model["backbone"], num_classes=200, stride=model["stride"]
        )
        maps = method.activation_maps(torch.zeros(1, 3, 448, 448))
        assert maps["previous"].shape == (1, 1, 28, 28)
    assert isinstance(method, KernelPooling)
    # orders 0, 1 and 2 to 4
    assert method.classifier.in_features == 1 + 512 + 3 * 4096
    last = [module for module in method.backbone.trunk.features if isinstance(module, torch.nn.Conv2d)][-1]
    assert last.weight.requires_grad


def test_pdisconet_recipe_builds_the_released_network() -> None:
    recipe = load_recipe("pdisconet_cub_resnet101").to_dict()
    model, optim = recipe["model"], recipe["optim"]
    released = {"data": 2, "presence": 1, "equivariance": 1, "concentration": 1000, "orthogonality": 1}
    assert {name: model[f"{name}_weight"] for name in released} == released
    rates = [1, model["prototype_lr_factor"], model["modulation_lr_factor"]]
    assert [optim["lr"] * optim["new_layers_lr_factor"] * rate for rate in rates] == pytest.approx(
        [1e-3, 1e-4, 1e-2]
    )
    options = {key: value for key, value in model.items() if key not in ("method", "pretrained")}
    with torch.device("meta"):
        method = create_method("pdisconet", num_classes=200, **options)
        assert method.backbone.map_size(448, "previous") == (28, 28)
    assert method.get_parameter("prototypes").shape == (9, 1024 + 2048)


def test_nts_recipe() -> None:
    recipe = load_recipe("nts_cub_resnet50")
    expected = {
        ("model", "num_proposals"): 6,
        ("model", "num_crops"): 4,
        ("data", "dataset"): "cub",
        ("data", "image_size"): 448,
        ("data", "resize_size"): 600,
        ("data", "batch_size"): 16,
        ("data", "val_fraction"): 0,
        ("optim", "lr"): 0.001,
        ("optim", "weight_decay"): 1e-4,
        ("optim", "milestones"): [60, 100],
        ("optim", "gamma"): 0.1,
        ("optim", "selection"): "last",
    }
    assert {key: recipe.get(*key) for key in expected} == expected


def test_own_file_builds_on_packaged_recipe(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: crossx_cub_resnet50\noptim:\n  lr: 1e-4  # mine\n")
    recipe = load_recipe(mine)
    assert recipe.settings["optim", "lr"] == Setting(1e-4, beside="mine")
    assert recipe.get("data", "dataset") == "cub"


def test_later_base_wins(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"seed: {seed}\noptim: {{lr: {seed}.5}}\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: [{tmp_path}/a.yaml, {tmp_path}/b.yaml]\nseed: 3\n")
    assert load_recipe(mine).to_dict() == {"seed": 3, "optim": {"lr": 2.5}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: [1, 2]", "line 1 is not a mapping"),
        ("- a", "line 1 is not a mapping"),
        ("optim:\n  lr: 1\n  lr: 2", "line 3 gives 'lr' again"),
        ("seed: 1\noptim:\n  lr: {a: 1, a: 2}", "line 3 gives 'a' again"),
        ("optim: {lr: 1", "line 1 is not valid YAML"),
        ("seed: 1\na: !!python/object/apply:os.system [x]", "line 2 is not valid YAML (could not determine"),
        ("a: !mine x", "line 1 is not valid YAML (could not determine"),
        ("seed: 1\n{a: 1}: 2", "line 2 is not valid YAML"),
        ("seed: 2001-13-45", "line 1 is not valid YAML (month must be in 1..12)"),
        ("seed: " + "9" * 5000, "line 1 is not valid YAML (Exceeds the limit"),
        ("seed: !!bool x", "line 1 is not valid YAML"),
        ("seed: *other", "line 1 is not valid YAML (found undefined alias 'other')"),
        ("seed: 1\nb: \x07", "line 2 is not valid YAML (unacceptable character"),
        ("<<: 3", "line 1 is not valid YAML (expected a mapping"),
        ("a: 1\n---\nb: 2", "line 2 is not valid YAML"),
        ("%YAML 3.0\n---\na: 1", "line 1 is not valid YAML"),
        ("[" * 5000, "not valid YAML (nested too deeply)"),
        ("!!omap [a: 1]", "line 1 is not valid YAML (could not determine"),
        ("!!set {a}", "line 1 is not valid YAML (could not determine"),
        ("base: 3", "base must be the name of a recipe"),
        ("base: {a: 1}", "base must be the name of a recipe"),
        (
            "base: crossx_cub_resnet",
            "unknown recipe 'crossx_cub_resnet'. Did you mean 'crossx_cub_resnet50'?",
        ),
        ("base: nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_wrong_file_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as refused:
        load_recipe(path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(b"seed: \xff")
    with pytest.raises(UsageError, match=r"wrong\.yaml: not UTF-8 text \(byte 7\)\."):
        load_recipe(path)


def test_anchors_and_merged_keys_keep_their_comments(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text(
        "x: &x\n  lr: 1  # x\ny: &y\n  lr: 2  # y\n  gamma: 3  # z\noptim:\n  <<: [*x, *y]\n  momentum: 4  # own\n"
        "model: {<<: *x, lr: 5}\n"
    )
    settings = load_recipe(path).settings
    assert settings["optim", "lr"] == Setting(1, beside="x")
    assert settings["optim", "gamma"] == Setting(3, beside="z")
    assert settings["optim", "momentum"] == Setting(4, beside="own")
    assert settings["model", "lr"].value == 5


def test_words_for_truth_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text("model: {a: yes, b: Off, c: note, d: 1e-4, e: 017, f: 1:30, g: '1e-4'}\n")
    expected = {"a": True, "b": False, "c": "note", "d": 1e-4, "e": 17, "f": "1:30", "g": "1e-4"}
    assert load_recipe(path).to_dict() == {"model": expected}


def test_a_changed_value_does_not_change_the_packaged_recipe() -> None:
    load_recipe("crossx_cub_resnet50").to_dict()["model"]["c3s_weights"].append(1)
    assert load_recipe("crossx_cub_resnet50").get("model", "c3s_weights") == [0.5, 0.25, 0.5]


def test_base_of_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text(f"base: {path}\n")
    with pytest.raises(UsageError, match="based on it in turn"):
        load_recipe(path)


names = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, width=32) | texts
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(names, scalars, max_size=2)
comments = st.from_regex(r"[A-Za-z0-9#:%][ -~]{0,20}", fullmatch=True).map(str.strip)
settings = st.builds(Setting, values, st.lists(comments, max_size=2).map(tuple), comments | st.just(""))


@hypothesis_settings(max_examples=50)
@given(st.dictionaries(st.tuples(st.sampled_from(recipes.SECTIONS), names), settings, max_size=6))
@example({("model", name): Setting(1) for name in ("no", "on", "null", "true", "y", "_")})
def test_any_recipe_survives_printing(drawn: dict[recipes.Key, Setting]) -> None:
    options = {key: setting for key, setting in drawn.items() if recipes.is_method_option(key)}
    recipe = Recipe("drawn", settings=drawn, others={"no": options, "dfl": options} if options else {})
    again = recipes._parse("drawn", recipe.to_yaml())
    assert dict(again.settings) == drawn
    assert again.others == recipe.others


def test_a_base_that_is_not_there_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: crossx_cub_resnet5\n")
    with pytest.raises(
        UsageError, match=r"mine.yaml: base: unknown recipe .*Did you mean 'crossx_cub_resnet50'"
    ):
        load_recipe(path)


def test_every_recipe_has_a_model_name_that_leads_back_to_it() -> None:
    names = model_names()
    assert sorted(names.values()) == list_recipes()
    for name, recipe in names.items():
        assert load_recipe(name).to_dict() == load_recipe(recipe).to_dict()
        assert re.fullmatch(r"[a-z0-9_]+\.[a-z0-9_]+", name)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("crossx_cub_resnet50", "crossx_resnet50.cub_448"),
        ("crossx_cub_resnet50_released", "crossx_resnet50.cub_448_released"),
        ("plain_cars_senet50", "plain_legacy_seresnet50.cars_448"),
        ("crossx_mobilenetv2_160", "crossx_mobilenetv2_035.cub_160"),
        ("kernel_pooling_mobilenetv2_160", "kernel_pooling_mobilenetv2_035.cub_160"),
        ("kernel_pooling_bilinear_mobilenetv2_160", "bilinear_mobilenetv2_035.cub_160"),
        ("kernel_pooling_compact_mobilenetv2_160", "compact_bilinear_mobilenetv2_035.cub_160"),
        ("finetune", "crossx_tf_efficientnetv2_s.folder_384"),
        ("finetune_parts", "crossx_parts_tf_efficientnetv2_s.folder_384"),
    ],
)
def test_a_model_is_named_as_timm_names_models(recipe: str, name: str) -> None:
    assert model_names()[name] == recipe


@pytest.mark.parametrize("recipe", list_recipes())
def test_a_recipe_and_its_method_agree_on_the_published_name(recipe: str) -> None:
    model = load_recipe(recipe).to_dict()["model"]
    stated = load_recipe(recipe).published_as or model["method"]
    assert published_name(model["method"], model) == stated


def test_a_trained_network_has_the_name_of_its_recipe() -> None:
    assert model_names()[model_name("crossx", "resnet50.tv_in1k", "cub", 448)] == "crossx_cub_resnet50"


def test_own_file_builds_on_a_model_name(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: crossx_resnet50.cub_448\nseed: 3\n")
    expected = {**load_recipe("crossx_cub_resnet50").to_dict(), "seed": 3}
    assert load_recipe(mine).to_dict() == expected


def test_a_misspelt_model_name_is_suggested() -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'crossx_resnet50\.cub_448'"):
        load_recipe("crossx_resnet50.cub_44")


def test_the_note_of_a_search_names_what_was_changed_afterwards(tmp_path: Path) -> None:
    sentence = "the best of 9 trials of `crossx tune`"
    best = Config.from_recipe("finetune", tuned=sentence, optim={"lr": 0.02})
    (file := tmp_path / "best.yaml").write_text(best.to_yaml())

    def note(*words: str) -> str | None:
        return parse_fit(["--config", str(file), *words]).config.tuned

    assert note("--seed", "3", "--data.root", "elsewhere", "--optim.lr", "0.02") == sentence
    faster = ("--data.cache", "disk", "--data.cache_folder", "elsewhere", "--trainer.profile", "true")
    assert note(*faster) == sentence
    assert note("--optim.lr", "0.1") == f"{sentence}; changed afterwards: optim.lr"
    # num_parts is an option of the former method
    changed = note("--model.method", "plain") or ""
    assert "model.method" in changed
    assert "model.num_parts" in changed
    assert Config.from_recipe(file, optim={"lr": 0.1}).tuned == f"{sentence}; changed afterwards: optim.lr"
    assert Config.from_recipe(file, data={"root": "elsewhere"}).tuned == sentence

    decay = best.optim.weight_decay
    (own := tmp_path / "own.yaml").write_text(f"base: {file}\noptim: {{lr: 0.1, weight_decay: {decay}}}")
    config = Config.from_recipe(own, trainer={"max_epochs": 1})
    assert config.tuned == f"{sentence}; changed afterwards: optim.lr; changed afterwards: trainer.max_epochs"
    # the configuration of a run keeps its note
    own.write_text(config.to_yaml())
    assert Config.from_recipe(own).tuned == config.tuned
    own.write_text(f"base: {file}\ntuned: by hand\noptim: {{lr: 0.1}}")
    assert Config.from_recipe(own).tuned == "by hand"
