import errno
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import layouts
from crossx.cli import main as main_module
from crossx.cli.main import VERBS, main
from crossx.cli.parser import function_options
from crossx.errors import CrossXError, UsageError


def fails_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the verb ``recipes`` raise ``error``."""

    def recipes(name: str | None = None) -> None:
        """Fail."""
        raise error

    monkeypatch.setattr(importlib.import_module("crossx.cli.recipes"), "recipes", recipes)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_imports_the_standard_library_alone() -> None:
    """What keeps it quick: no torch, no timm, no jsonargparse."""
    done = python(
        "import sys\n"
        "before = set(sys.modules)\n"
        "from crossx.cli.main import main; main(['--help'])\n"
        "imported = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(imported - sys.stdlib_module_names), file=sys.stderr)"
    )
    assert done.stderr.strip() == "['crossx']"
    assert all(f"  {verb} " in done.stdout for verb in VERBS)


def test_help_of_a_verb_imports_no_torch() -> None:
    done = python(
        "import sys\n"
        "from crossx.cli.main import VERBS, main\n"
        "heavy = {'torch', 'lightning', 'timm', 'numpy', 'pydantic', 'matplotlib', 'fastapi'}\n"
        "for verb in [*VERBS, 'datasets check', 'datasets audit']:\n"
        "    main([*verb.split(), '--help'])\n"
        "    print(verb, sorted(heavy & {name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    assert done.stderr.splitlines() == [f"{verb} []" for verb in [*VERBS, "datasets check", "datasets audit"]]
    assert done.stdout.count("usage: crossx ") == len(VERBS) + 2


def test_wrong_commands_import_no_torch(tmp_path: Path) -> None:
    wrong = [
        "nonsense",
        "fit --model.method plian",
        "fit --optim.schedule nope",
        "fit --config nowhere.yaml",
        "fit --data.root nowhere",
        "fit --resume nowhere",
        "predict nowhere nowhere.jpg",
        "predict nowhere .",
        *(f"{verb} nowhere" for verb in ("test", "report", "calibrate", "compare", "serve")),
        "export nowhere --output a.onnx",
        "share nowhere --output shared",
        "explain nowhere a.jpg --output maps",
        "export run --output a.pt2 --precision int8",
        "export run --output a.safetensors --images nowhere",
        "export run --output a.safetensors --images empty",
        "test run --unknown nowhere",
        "test run --unknown empty",
        "fit --data.dataset folder --data.root . --trainer.num_nodes 2",
    ]
    (tmp_path / "a.jpg").touch()
    (tmp_path / "empty").mkdir()
    layouts.write_run(tmp_path / "run")
    done = python(
        "import os, sys\n"
        "from crossx.cli.main import main\n"
        f"os.chdir({str(tmp_path)!r})\n"
        f"for words in {wrong!r}:\n"
        "    code = main(words.split())\n"
        "    heavy = {'torch', 'lightning', 'timm', 'pydantic', 'scipy', 'fastapi'}\n"
        "    print(code, words, sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert [rest for _, rest in lines] == [f"{words} []" for words in wrong]
    assert {code for code, _ in lines} <= {"1", "2"}
    assert len(done.stderr.splitlines()) == len(wrong)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_help(verb: str) -> None:
    module = importlib.import_module(f"crossx.cli.{verb.replace('-', '_')}")
    functions = [getattr(module, verb.replace("-", "_"), None), getattr(module, "check", None)]
    options = [option for function in functions if function for option in function_options(function)]
    assert options or verb == "fit"
    assert all(option.help.endswith(".") for option in options)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("crossx 0.")


@pytest.mark.parametrize("verb", [*VERBS, "datasets check", "datasets audit"])
def test_every_verb_has_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: crossx {verb}")
    assert f"examples:\n  crossx {verb}" in shown


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CrossXError("it broke."), 1, "crossx recipes: error: it broke."),
        (UsageError("no."), 2, "crossx recipes: error: no."),
        (KeyboardInterrupt(), 130, "crossx recipes: error: stopped by Ctrl-C."),
        (PermissionError(13, "Permission denied", "/x"), 1, "crossx recipes: error: /x: Permission denied."),
    ],
)
def test_error_is_one_line_and_a_code(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fails_with(error, monkeypatch)
    assert main(["recipes"]) == code
    assert capsys.readouterr().err == f"{line}\n"


def test_unforeseen_error_is_one_line_and_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(main_module.tempfile, "tempdir", str(tmp_path))
    fails_with(ZeroDivisionError("of two\nlines"), monkeypatch)
    assert main(["recipes"]) == 1
    (log,) = tmp_path.iterdir()
    assert "ZeroDivisionError: of two\nlines" in log.read_text()
    shown = capsys.readouterr().err
    assert shown.startswith("crossx recipes: error: unexpected ZeroDivisionError: of two lines (")
    assert str(log) in shown
    assert shown.count("\n") == 1


def test_an_unforeseen_error_may_be_that_of_an_own_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from crossx.methods import registry

    monkeypatch.setattr(main_module.tempfile, "tempdir", str(tmp_path))
    packaged = {name: cls for name, cls in registry._REGISTRY.items() if cls.__module__.startswith("crossx.")}
    monkeypatch.setattr(registry, "_REGISTRY", packaged)
    fails_with(ZeroDivisionError("x"), monkeypatch)
    main(["recipes"])
    assert "(a defect of crossx; report it with" in capsys.readouterr().err
    registry.register_method("own")(type("Own", (registry.Method,), {"__module__": "mine"}))
    main(["recipes"])
    assert "(a defect of crossx or of the method own, see `crossx.testing" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["option", "variable"])
def test_debug_shows_the_traceback(
    way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails_with(CrossXError("it broke."), monkeypatch)
    if way == "variable":
        monkeypatch.setenv("CROSSX_DEBUG", "1")
    assert main(["recipes"] + ["--debug"] * (way == "option")) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("crossx recipes: error: it broke.\n")


def test_exit_inside_ctrl_c_counts_as_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leaving = SystemExit(1)
    leaving.__context__ = KeyboardInterrupt()
    fails_with(leaving, monkeypatch)
    assert main(["recipes"]) == 130
    assert capsys.readouterr().err == "crossx recipes: error: stopped by Ctrl-C.\n"


def test_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from crossx.cli.main import main; sys.exit(main(['recipes', 'finetune']))",
        ],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def write_to(
    monkeypatch: pytest.MonkeyPatch, encoding: str, target: io.RawIOBase | None = None
) -> tuple[io.BytesIO, io.BytesIO]:
    """Let stdout (``target``, if given) and stderr have an encoding; return what they hold."""
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(io.BufferedWriter(target) if target else out, encoding)
    )
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding))
    return out, err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_the_encoding_lacks_is_escaped(
    encoding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = os.fsdecode(b"caf\xe9") + "\u0142\u732b"
    out, err = write_to(monkeypatch, encoding)
    recipe = tmp_path / "ł.yaml"
    recipe.write_text("description: 猫 ł é\n", encoding="utf-8")
    assert main(["recipes", str(recipe)]) == 0
    assert main(["recipes", name]) == 2
    shown = out.getvalue().decode(encoding), err.getvalue().decode(encoding)
    escaped = "猫" if encoding == "utf-8" else "\\u732b"
    assert f"{escaped} " in shown[0]
    assert "caf\\udce9" in shown[1]
    assert "猫" in shown[1] if encoding == "utf-8" else "\\u732b" in shown[1]


class Full(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return os.open(os.devnull, os.O_WRONLY)

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_stdout_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    _, err = write_to(monkeypatch, "utf-8", Full())
    assert main(["recipes", "finetune"]) == 1
    sys.stderr.flush()
    line = err.getvalue().decode()
    assert line.startswith("crossx recipes: error: standard output: no space left on the disk")
    assert line.count("\n") == 1


def test_closed_streams_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["recipes", "finetune"]) == 0
    assert main(["recipes", "finetun"]) == 2
    assert sys.stdin.read() == ""


@pytest.mark.parametrize(
    "environment",
    [
        {"COLUMNS": "0"},
        {"COLUMNS": "1"},
        {"COLUMNS": "20"},
        {"COLUMNS": "x"},
        {"TERM": "dumb"},
        {"NO_COLOR": "1"},
    ],
)
def test_lists_are_printed_at_any_width(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for words in (["recipes"], ["datasets", "list"], ["predict", "--help"]):
        assert main(words) == 0
    shown, errors = capsys.readouterr()
    assert "\x1b" not in shown
    assert not errors
    # every character is there, whatever is broken over lines
    assert "crossx_cub_resnet50_released" in "".join(shown.split()), environment


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["fti"], "crossx: error: unknown verb 'fti'. Did you mean 'fit'? Choose from: "),
        (["--versoin"], "crossx: error: unknown option '--versoin'. Did you mean '--version'? "),
        ([], "crossx: error: which verb? Choose from: quickstart, fit, "),
        (
            ["recipes", "finetun"],
            "crossx recipes: error: unknown recipe 'finetun'. Did you mean 'finetune'? ",
        ),
        (["recipes", "a", "b"], "crossx recipes: error: unexpected argument 'b'; "),
        (
            ["test", "--data.rot", "x", "run"],
            "crossx test: error: unknown option '--data.rot'. Did you mean '--data.root'? ",
        ),
        (
            ["predict", "run"],
            "crossx predict: error: the following arguments are required: IMAGES; ",
        ),
        (
            ["predict", "run", "a.jpg", "--top", "0"],
            "crossx predict: error: --top takes a whole number of at least 1, not '0'.",
        ),
        (["datasets", "lst"], "crossx datasets: error: unknown action 'lst'. Did you mean 'list'? "),
    ],
)
def test_wrong_command_is_one_line_and_2(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(line)
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "suggested"),
    [
        ("train", "fit"),
        ("Fine-Tune", "fit"),
        ("evaluate", "test"),
        ("val", "test"),
        ("inference", "predict"),
        ("classify", "predict"),
        ("deploy", "serve"),
        ("convert", "export"),
        ("push", "share"),
        ("resume", "fit --resume"),
        ("gradcam", "explain"),
        ("FIT", "fit"),
        ("list", "recipes"),
    ],
)
def test_verbs_of_other_tools_suggest_ours(
    word: str, suggested: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    assert capsys.readouterr().err.startswith(
        f"crossx: error: unknown verb {word!r}. Did you mean {suggested!r}? Choose from: "
    )


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("predict --weights run a.jpg", "RUN is given without an option: `crossx predict RUN IMAGES`."),
        ("predict run --source photos", "IMAGES is given without an option: `crossx predict RUN IMAGES`."),
        ("predict run a.jpg --batch-size 4", "Did you mean '--data.batch_size'?"),
        ("predict run a.jpg --topk 4", "Did you mean '--top'?"),
        ("predict run a.jpg --half", "Did you mean '--precision'?"),
        ("predict run a.jpg -o out.csv", "Did you mean '--output'?"),
        (
            "datasets check --data.dataset cub x",
            "NAME is given without an option: `crossx datasets check NAME ROOT`.",
        ),
        (
            "datasets audit cub --data-dir x",
            "ROOT is given without an option: `crossx datasets audit NAME ROOT`.",
        ),
        ("test --model run", "RUN is given without an option: `crossx test RUN`."),
        ("test run --data x", "Did you mean '--data.root'?"),
        ("explain run --input photos", "IMAGE_OR_FOLDER is given without an option: "),
        ("export run -o a.onnx", "Did you mean '--output'?"),
        ("serve run -p 80", "Did you mean '--port'?"),
        ("share run --repo me/birds", "Did you mean '--hub'?"),
    ],
)
def test_options_of_other_tools_suggest_ours(
    words: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert hint in shown


def test_recipe_is_printed_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "crossx_dogs_senet50_released"]) == 0
    shown = capsys.readouterr().out
    assert "  num_parts: 3" in shown
    assert "  lr: 0.001  # section 4.2: 0.001 on Dogs" in shown


def test_recipes_and_datasets_are_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["recipes"]) == 0
    assert "crossx_cub_resnet50_released" in capsys.readouterr().out
    assert main(["datasets", "list"]) == 0
    listed = capsys.readouterr().out
    assert "cub: Caltech-UCSD Birds-200-2011" in listed
    assert "md5:97eceeb196236b17998738112f37df78" in listed
