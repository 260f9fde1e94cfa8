import dataclasses
import re
from pathlib import Path

import jsonargparse
import pytest

import layouts
from crossx.cli import fit
from crossx.cli.fit import _count_images
from crossx.cli.fit_options import fit_parser, parse_fit
from crossx.cli.main import main
from crossx.cli.parser import unknown_argument
from crossx.commands import quoted
from crossx.data.config import DataConfig
from crossx.errors import UsageError
from crossx.methods import list_methods, method_options
from crossx.recipes import PRESETS, SECTIONS, list_recipes, load_recipe
from crossx.training.config import Config, OptimConfig, TrainerConfig
from refusals import refusal


@pytest.fixture(scope="module")
def parser() -> jsonargparse.ArgumentParser:
    return fit_parser([])


def test_without_arguments_every_default_is_that_of_the_dataclasses() -> None:
    config = parse_fit([]).config
    assert config.data == DataConfig()
    assert config.optim == OptimConfig()
    assert config.trainer == TrainerConfig()
    assert config.model.options == method_options("crossx")


@pytest.mark.parametrize("method", list_methods())
def test_second_pass_has_the_options_of_the_chosen_method(method: str) -> None:
    assert parse_fit(["--model.method", method]).config.model.options == method_options(method)
    assert parse_fit([f"--model.method={method}"]).config.model.method == method


@pytest.mark.parametrize("name", list_recipes())
@pytest.mark.slow
def test_every_recipe_becomes_a_configuration_with_its_values(name: str) -> None:
    asked = parse_fit(["--config", name])
    values = asked.config.to_dict()
    expected = load_recipe(name).to_dict()
    assert asked.recipe == name
    assert not asked.notes
    for section in SECTIONS:
        for option, value in expected.get(section, {}).items():
            assert values[section][option] == value, (section, option)


def test_a_second_recipe_is_refused_instead_of_replacing_the_first() -> None:
    message = refusal(parse_fit, ["--config", "plain_cub_resnet50", "--seed", "1", "--config=finetune"])
    assert message == "--config is given twice: give one recipe, which can name another as its `base`."
    # of other options the last value counts
    assert parse_fit(["--optim.lr", "0.5", "--optim.lr=0.25"]).config.optim.lr == 0.25


def test_options_override_the_recipe() -> None:
    words = ["--optim.lr", "0.5", "--config", "crossx_cub_resnet50", "--model.num_parts", "5", "--seed=3"]
    words += ["--data.root", "012", "--output", "runs/x", "--trainer.precision", "bf16-mixed"]
    config = parse_fit(words).config
    assert (config.optim.lr, config.model.options["num_parts"], config.seed) == (0.5, 5, 3)
    assert (config.data.root, config.output, config.data.dataset) == ("012", "runs/x", "cub")
    assert config.trainer == TrainerConfig(precision="bf16-mixed")


def test_configuration_of_a_run_reads_back(tmp_path: Path) -> None:
    words = [
        "--config",
        "crossx_dogs_senet50_released",
        "--trainer.devices",
        "[0, 1]",
        "--trainer.logger",
        "false",
    ]
    words += ["--model.backbone_args", "{drop_path_rate: 0.1}", "--trainer.max_time", "{hours: 2}"]
    config = parse_fit(words).config
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml())
    assert parse_fit(["--config", str(saved)]).config.to_dict() == config.to_dict()
    assert Config.from_yaml(saved).to_dict() == config.to_dict()


def test_another_method_leaves_the_options_of_the_recipes_method_out_and_says_so() -> None:
    asked = parse_fit(["--config", "crossx_cub_resnet50", "--model.method", "plain"])
    assert asked.config.model.options == {}
    assert asked.config.data == parse_fit(["--config", "plain_cub_resnet50"]).config.data
    assert len(asked.notes) == 1
    assert "num_parts" in asked.notes[0]


def test_smaller_crop_keeps_the_recipes_proportion_and_says_so() -> None:
    asked = parse_fit(["--config", "crossx_cub_resnet50", "--data.image_size", "224"])
    assert asked.config.data.resize_size == 300
    assert "data.resize_size is 300" in asked.notes[0]
    given = parse_fit(
        ["--config", "crossx_cub_resnet50", "--data.image_size", "224", "--data.resize_size=256"]
    )
    assert (given.config.data.resize_size, given.notes) == (256, ())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data.rot x", "unknown option '--data.rot'. Did you mean '--data.root'?"),
        ("--num_parts 3", "unknown option '--num_parts'. Did you mean '--model.num_parts'?"),
        ("--optim.lrr=3", "unknown option '--optim.lrr'. Did you mean '--optim.lr'?"),
        ("cub", "unexpected argument 'cub'"),
        ("--model.method cross", "unknown method 'cross'. Did you mean 'crossx'?"),
        (
            "--model.method plain --model.c3s_form paper",
            "method 'plain' has no option 'c3s_form'; crossx has it.",
        ),
        (
            "--model.method plain --model.num_parts 3",
            "method 'plain' has no option 'num_parts'; crossx, fcan, ma_cnn, mamc, pdisconet have it.",
        ),
        (
            "--config crossx_cub_resnet",
            "unknown recipe 'crossx_cub_resnet'. Did you mean 'crossx_cub_resnet50'?",
        ),
        ("--config none.yaml", "none.yaml: no such file"),
        ("--data.image_size big", "--data.image_size takes a whole number, not 'big'"),
        (
            "--data.sampling balance",
            "--data.sampling takes uniform, balanced, pairs or null, not 'balance'. Did you mean 'balanced'?",
        ),
        (
            "--trainer.precision bf17",
            "--trainer.precision takes auto, 32, 32-true, 16, 16-mixed, bf16, bf16-mixed, not 'bf17'.",
        ),
        ("--trainer.profiler simple", "unknown option '--trainer.profiler'"),
        ("--trainer.max_epochs many", "--trainer.max_epochs takes a whole number, not 'many'"),
        ("--model.c3s_weights 3", "--model.c3s_weights takes a list such as [1, 2], not '3'"),
        ("--model.use_merged maybe", "--model.use_merged takes true or false, not 'maybe'"),
        ("--model.num_parts", "--model.num_parts: expected one argument"),
        ("--trainer.callbacks x", "--trainer.callbacks cannot be given: crossx has its own training loop"),
        ("--trainer.logger [tensorbord]", "--trainer.logger takes"),
        ("--data.image_size 8", "data.image_size must be at least 32, not 8"),
        ("--optim.lr -1", "optim.lr must be above 0"),
        ("--resume r --seed 3", "leave out --seed"),
        (
            "--resume r --trainer.max_epochs 3 --optim.lr=3",
            "--optim.patience may be given): leave out --optim.lr.",
        ),
        ("--resume r --init q", "leave out --init"),
        ("--resume r --trainer.max_epochs many", "--trainer.max_epochs takes a whole number, not 'many'"),
        ("--resume r --trainer.max_epochs 0", "trainer.max_epochs must be at least 1, not 0"),
        ("--resume r --trainer.max_time soon", "trainer.max_time takes a time such as 1h30m"),
        ("--resume r more", "unexpected argument 'more'"),
        ("--init", "--init: expected one argument"),
        (
            "--init r --model.backbone_weights w",
            "init and model.backbone_weights both say what the backbone starts",
        ),
    ],
)
def test_wrong_option_is_refused_in_one_line(words: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_fit(words.split())
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "suggested"),
    [
        ("--epochs 3", "--trainer.max_epochs"),
        ("-e 3", "--trainer.max_epochs"),
        ("--max-epochs=3", "--trainer.max_epochs"),
        ("--trainer.epochs 3", "--trainer.max_epochs"),
        ("epochs=3", "--trainer.max_epochs 3"),
        ("--lr 0.1", "--optim.lr"),
        ("--learning-rate 0.1", "--optim.lr"),
        ("--optim.learning_rate 0.1", "--optim.lr"),
        ("--wd 0.1", "--optim.weight_decay"),
        ("--weight-decay 0.1", "--optim.weight_decay"),
        ("--batch-size 8", "--data.batch_size"),
        ("-b 8", "--data.batch_size"),
        ("--model resnet50", "--model.backbone"),
        ("--arch resnet50", "--model.backbone"),
        ("--data images", "--data.root"),
        ("--data-dir images", "--data.root"),
        ("--workers 2", "--data.num_workers"),
        ("-j 2", "--data.num_workers"),
        ("--device cpu", "--trainer.accelerator"),
        ("--gpus 2", "--trainer.devices"),
        ("--trainer.gpus 2", "--trainer.devices"),
        ("--img-size 224", "--data.image_size"),
        ("--imgsz 224", "--data.image_size"),
        ("--amp", "--trainer.precision"),
        ("--fp16", "--trainer.precision"),
        ("--out runs/a", "--output"),
        ("--name a", "--output"),
        ("--dropout 0.1", "--model.backbone_args.drop_rate"),
        ("--mixup 1", "--optim.mixup"),
    ],
)
def test_options_of_other_tools_suggest_ours(
    words: str, suggested: str, parser: jsonargparse.ArgumentParser
) -> None:
    assert f"Did you mean {suggested!r}?" in str(unknown_argument(words.split()[0], parser))


def test_a_file_that_looks_like_an_option_is_written_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-1 a.jpg", "--top.jpg"):
        Path(name).touch()
        assert main(["predict", "run", name]) == 2
        expected = f"unknown option '{name}'. For the file of that name write {quoted(Path(name))}."
        assert expected in " ".join(capsys.readouterr().err.split())
        Path(name).unlink()
        assert main(["predict", "run", name]) == 2
        assert "For the file" not in capsys.readouterr().err


def test_a_path_without_an_option_suggests_the_option(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.touch()
    for path, option in ((recipe, "--config"), (tmp_path, "--data.root")):
        with pytest.raises(UsageError, match=f"unexpected argument '{path}'. Did you mean '{option} {path}'"):
            parse_fit([str(path)])


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("--early-stopping", "give --optim.patience N"),
        ("--num-classes", "the classes are those of the images"),
    ],
)
def test_options_that_do_not_exist_here_say_what_to_do_instead(option: str, instead: str) -> None:
    with pytest.raises(UsageError, match=f"^unknown option '{option}': {instead}"):
        parse_fit([option, "3"])


WORDS = [
    "#try1",
    "null",
    "~",
    "&a",
    "*a",
    "!x",
    "yes",
    "off",
    "1e3",
    "007",
    "1_000",
    "2024-01-01",
    "{a}",
    "[a]",
]
WORDS += [
    "- a",
    "%a",
    "@a",
    "`a",
    "a: b",
    " a ",
    '"a"',
    "'a'",
    "a\nb",
    "-",
    "=a",
    "${a}",
    "\\n",
    "|",
    ">",
    "? a",
]


@pytest.mark.slow
def test_words_are_taken_literally_where_a_text_is_expected(tmp_path: Path) -> None:
    options = [
        "output",
        "data.root",
        "data.dataset",
        "data.level",
        "model.backbone",
        "model.backbone_weights",
    ]
    for start in range(0, len(WORDS), len(options)):
        given = dict(zip(options, WORDS[start:], strict=False))
        config = parse_fit([part for option, word in given.items() for part in (f"--{option}", word)]).config
        saved = tmp_path / "config.yaml"
        saved.write_text(config.to_yaml())
        # also when they come back from the file of the run
        for read in (config, parse_fit(["--config", str(saved)]).config, Config.from_yaml(saved)):
            values = read.to_dict()
            flat = {
                **values,
                **{f"{key}.{name}": values[key][name] for key in SECTIONS for name in values[key]},
            }
            assert {option: flat[option] for option in given} == given


@pytest.mark.parametrize("option", ["--output", "--data.dataset", "--model.backbone", "--config"])
def test_an_empty_text_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match=f"{option}: the value is empty"):
        parse_fit([option, ""])


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("output: 007", "output"),
        ("output: yes", "output"),
        ("output: 2024-01-01", "output"),
        ("output: [a]", "output"),
        ("data: {root: 1e3}", "data.root"),
        ("data: {dataset: null}", "data.dataset"),
        ("data: {interpolation: no}", "data.interpolation"),
        ("model: {backbone: .5}", "model.backbone"),
    ],
)
def test_a_file_gives_text_where_text_is_expected(text: str, option: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    for read in (lambda: parse_fit(["--config", str(path)]), lambda: Config.from_recipe(path)):
        with pytest.raises(UsageError, match=rf"(--)?{option} takes text, not .*: put it in quotes\.$"):
            read()


def test_a_command_without_images_asks_for_them(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["fit"],
        ["fit", "--model.method", "plain"],
        ["ablate", "--suite", "heads", "--output", "out"],
    ):
        assert main(words) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert "--data.root" in shown
        assert "`crossx quickstart`" in shown
    assert not Path("out").exists()


def test_one_logger_needs_no_list() -> None:
    assert parse_fit(["--trainer.logger", "csv"]).config.trainer.loggers == ["csv"]
    assert parse_fit(["--trainer.logger", "[csv, wandb]"]).config.trainer.loggers == ["csv", "wandb"]


@pytest.mark.slow
@pytest.mark.parametrize("method", list_methods())
@pytest.mark.parametrize("recipe", ["finetune", "crossx_cub_resnet50"])
def test_python_and_the_command_line_change_a_recipe_alike(recipe: str, method: str) -> None:
    words = ["--config", recipe, "--model.method", method, "--data.image_size", "224"]
    config = Config.from_recipe(recipe, model={"method": method}, data={"image_size": 224})
    typed = parse_fit(words).config
    assert {**method_options(method), **config.model.options} == typed.model.options
    assert config.data == typed.data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "unknown option '--optim.lrr'. Did you mean '--optim.lr'?"),
        ("data: {image_size: big}", "--data.image_size takes a whole number, not 'big'"),
        ("modle: {method: crossx}", "unknown section 'modle'. Did you mean 'model'?"),
        ("model: {num_part: 3}", "unknown option '--model.num_part'. Did you mean '--model.num_parts'?"),
        ("trainer: {callbacks: []}", "--trainer.callbacks cannot be given"),
    ],
)
def test_wrong_file_is_refused_with_its_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as refused:
        parse_fit(["--config", str(path)])
    assert str(refused.value).startswith(f"{path}: ")
    assert message in str(refused.value)


def test_resume_takes_the_root_of_the_data_alone() -> None:
    asked = parse_fit(["--resume", "runs/a", "--data.root", "elsewhere"])
    assert (asked.resume, asked.config.data.root, asked.restart) == ("runs/a", "elsewhere", False)
    assert asked.limits == {}


def test_restart_goes_with_resume() -> None:
    assert parse_fit(["--resume", "runs/a", "--restart"]).restart
    with pytest.raises(UsageError, match="name it with --resume RUN"):
        parse_fit(["--restart", "--output", "runs/a"])


@pytest.mark.parametrize(
    ("words", "limits"),
    [
        (["--trainer.max_epochs", "7"], {"max_epochs": 7}),
        (["--trainer.max_epochs=7", "--trainer.max_steps", "-1"], {"max_epochs": 7, "max_steps": -1}),
        (["--trainer.max_time", "00:02:00:00"], {"max_time": "00:02:00:00"}),
        (["--trainer.max_time", "{hours: 2}"], {"max_time": {"hours": 2}}),
        (["--trainer.max_time", "1h30m", "--optim.patience", "0"], {"max_time": "1h30m", "patience": 0}),
        (["--trainer.max_time", "00:30:00"], {"max_time": "00:30:00"}),
    ],
)
def test_resume_takes_another_length(words: list[str], limits: dict[str, object]) -> None:
    assert parse_fit(["--resume", "runs/a", *words]).limits == limits


def test_init_is_an_option_of_the_command_of_recipes_and_of_python(tmp_path: Path) -> None:
    assert parse_fit(["--config", "finetune", "--init", "runs/a"]).config.init == "runs/a"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: finetune\ninit: runs/a\n")
    assert parse_fit(["--config", str(recipe)]).config.init == "runs/a"
    assert parse_fit(["--config", str(recipe), "--init", "me/birds@v2"]).config.init == "me/birds@v2"
    assert Config.from_recipe(recipe).init == Config.from_recipe("finetune", init="runs/a").init == "runs/a"
    assert parse_fit([]).config.init is None


def test_print_config_prints_a_recipe_of_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "dfl_cub_vgg16", "--optim.lr", "0.25"]
    assert main(["fit", *words, "--print_config"]) == 0
    file = tmp_path / "mine.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse_fit(["--config", str(file)]).config == parse_fit(words).config


def test_help_begins_with_the_options_used_most(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_fit(["--help"])
    shown = capsys.readouterr().out
    options = re.findall(r"^  (--[\w.]+)", shown, re.MULTILINE)
    first = ["--config", "--resume", "--output", "--data.root", "--data.dataset", "--trainer.max_epochs"]
    first += ["--optim.lr", "--data.batch_size", "--data.image_size", "--model.backbone", "--model.method"]
    assert {*first} <= {*options[:18]}
    assert len(options) == len({*options})


def test_help_shows_the_values_in_effect(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_fit(["--config", "crossx_dogs_senet50_released", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "excitation modules (section 4.2 uses 2). (default: 3)" in shown
    assert "default: legacy_seresnet50.in1k" in shown
    assert "30% of training" in shown


@pytest.mark.parametrize("option", ["model.backbone_args", "optim.milestones", "optim.lr", "data.image_size"])
def test_an_empty_value_is_one_line(option: str) -> None:
    with pytest.raises(UsageError, match=rf"--{option} takes .*, not ''"):
        parse_fit([f"--{option}", ""])


@pytest.mark.parametrize(("preset", "recipe"), PRESETS.items())
def test_a_preset_is_its_recipe_with_the_options_of_the_command(preset: str, recipe: str) -> None:
    words = ["--data.root", "x", "--trainer.max_epochs", "7"]
    asked = parse_fit(["--preset", preset, *words])
    assert asked == parse_fit(["--config", recipe, *words])
    assert asked == dataclasses.replace(parse_fit(["--config", preset, *words]), recipe=recipe)
    assert (asked.config.trainer.max_epochs, asked.config.data.dataset) == (7, "folder")
    expected = Config.from_recipe(preset, data={"root": "x"}, trainer={"max_epochs": 7})
    assert asked.config.to_dict()["optim"] == expected.to_dict()["optim"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--preset", "fst"],
            "unknown preset 'fst'. Did you mean 'fast'? Choose from: balanced, best, fast.",
        ),
        (
            ["--preset", "fast", "--config", "probe"],
            "--preset fast and --config probe: give only one of them.",
        ),
        (["--resume", "runs/x", "--preset", "fast"], "leave out --preset"),
        (["--config", "balancd"], "Did you mean 'balanced'?"),
    ],
)
def test_wrong_presets(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_fit(words)


@pytest.mark.parametrize(
    ("words", "counts"),
    [
        ([], "15 train, 3 val, 9 test"),
        (["--data.train_on", "trainval"], "18 train, 0 val, 9 test"),
        (["--data.train_on", "trainval", "--data.val_fraction", "0"], "18 train, 0 val, 9 test"),
    ],
)
def test_the_images_are_counted_as_they_are_trained_on(words: list[str], counts: str, tmp_path: Path) -> None:
    root = layouts.write_folder(tmp_path / "birds", classes=3, images_per_class=9)
    data = ["--data.dataset", "folder", "--data.root", str(root), "--data.test_fraction", "0.34"]
    config = parse_fit([*data, *words]).config
    assert _count_images(config) == f"3 classes, images: {counts}"


def test_several_machines_need_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would take the first free name, also where one process of each is started by hand."""
    monkeypatch.chdir(tmp_path)
    words = ["--data.dataset", "folder", "--data.root", ".", "--trainer.num_nodes", "2"]
    message = refusal(fit.run, words)
    assert message == (
        "trainer.num_nodes 2: each machine would choose a run folder of its own. Give all of them the same --output."
    )
    # with it, the dataset is the next to be checked
    assert "--output" not in refusal(fit.run, [*words, "--output", "run"])
    assert not list(tmp_path.iterdir())
