import platform
from pathlib import Path

import pytest
import torch

from crossx.cli.main import main
from crossx.errors import UsageError
from crossx.runs import Run
from crossx.training import precision
from crossx.training.config import Config, TrainerConfig
from crossx.training.fit import fit, resume
from crossx.training.precision import has_bfloat16, resolve_precision


@pytest.mark.parametrize(
    ("accelerator", "gpu", "cpu", "chosen", "reason"),
    [
        ("auto", None, True, "bf16-mixed", "the processor computes in bfloat16"),
        ("auto", None, False, "32", "the processor has no bfloat16"),
        ("cpu", True, False, "32", "the processor has no bfloat16"),
        ("cpu", False, True, "bf16-mixed", "the processor computes in bfloat16"),
        ("auto", True, False, "bf16-mixed", "the GPU computes in bfloat16"),
        ("gpu", False, True, "32", "the GPU has no bfloat16"),
        ("cuda", True, True, "bf16-mixed", "the GPU computes in bfloat16"),
        ("mps", None, True, "32", "accelerator mps"),
    ],
)
def test_auto_follows_the_device(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, gpu: bool | None, cpu: bool, chosen: str, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bool(gpu))
    monkeypatch.setattr(precision, "has_bfloat16", lambda: cpu)
    options = TrainerConfig(precision="auto", accelerator=accelerator, max_epochs=7)  # type: ignore[arg-type]
    resolved, found = resolve_precision(options)
    assert (resolved.precision, resolved.max_epochs, found) == (chosen, 7, reason)


def test_a_given_precision_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    assert TrainerConfig().precision == "32"
    for given in ("32", "16-mixed", "bf16-mixed"):
        options = TrainerConfig(precision=given)  # type: ignore[arg-type]
        assert resolve_precision(options) == (options, "")


def test_several_machines_may_differ() -> None:
    with pytest.raises(UsageError, match="auto is chosen by each machine"):
        resolve_precision(TrainerConfig(precision="auto", num_nodes=2))


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_bfloat16_is_what_the_kernel_reports() -> None:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert has_bfloat16() == ("avx512_bf16" in flags)


@pytest.mark.slow
def test_a_run_keeps_what_it_began_with(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    trainer = {"precision": "auto", "accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 1}
    run = fit(make_config(trainer=trainer))
    assert run.read_info()["precision"] == "bf16-mixed"
    assert Config.from_yaml(run.config).trainer.precision == "bf16-mixed"
    # on a machine without bfloat16
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    resumed = resume(run.path, max_epochs=2)
    assert resumed.read_info()["precision"] == "bf16-mixed"
    assert Config.from_yaml(run.config).trainer.precision == "bf16-mixed"


def test_the_first_lines_say_it(
    make_config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    recipe = tmp_path / "recipe.yaml"
    config = make_config(
        trainer={"precision": "auto", "accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 1}
    )
    recipe.write_text(config.to_yaml(), encoding="utf-8")
    assert main(["fit", "--config", str(recipe), "--output", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "precision 32 (auto: the processor has no bfloat16)" in lines[:6]
    assert Run(tmp_path / "out").read_info()["precision"] == "32"
