"""What is required of an exported file, and how it is compared with eager float32."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import layouts
from crossx.evaluation.intervals import Interval
from crossx.evaluation.unknowns import ViewScores
from crossx.export import export as export_module
from crossx.export.export import ControlledAccuracy
from crossx.export.verify import Accuracy, Kept, compare
from crossx.runs import ModelSpec, Rejection, Run
from refusals import refusal


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.write_run(tmp_path_factory.mktemp("run"))


def kept(before: float, after: float, reverted: int) -> ControlledAccuracy:
    """The accuracy on 200 images of a network of four layers."""
    names = ("a", "b", "c", "d")
    interval = Interval(0.0, 0.0)
    accuracy = Accuracy("val", 200, before, after, interval, 200, interval, 100)
    return ControlledAccuracy(0.5, accuracy, names, names[:reverted], trained_on=False)


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (kept(0.9, 0.895, 3), None),
        (kept(0.9, 0.95, 0), None),
        (
            kept(0.9, 0.89, 3),
            "x.onnx: not written, int8 loses 1.00 points of top-1 accuracy on 200 validation images with 3 of 4 layers "
            "in float, more than --max-drop 0.5. Allow more",
        ),
        (
            kept(0.9, 0.9, 4),
            "x.onnx: not written, int8 keeps --max-drop 0.5 on 200 validation images only with every layer in float. ",
        ),
    ],
)
def test_an_accuracy_that_is_not_kept_is_refused(control: ControlledAccuracy, message: str | None) -> None:
    if message is None:
        export_module._require_kept(Path("x.onnx"), control)
    else:
        assert refusal(export_module._require_kept, Path("x.onnx"), control).startswith(message)


@pytest.mark.parametrize("lost", [0.02, 0.007])
def test_a_loss_of_exactly_the_tolerance_is_accepted(lost: float) -> None:
    assert 0.9 - (0.9 - lost) != lost  # rounding
    accuracy = kept(0.9, 0.9 - lost, 0).accuracy
    export_module._require_accurate(Path("x.onnx"), accuracy, lost)
    message = refusal(export_module._require_accurate, Path("x.onnx"), accuracy, lost - 1e-4)
    assert message.startswith(f"x.onnx: not written, int8 loses {lost:.2%} of top-1 accuracy")


class Outputs:
    """A network that returns what it was given."""

    has_similarities = True

    def __init__(self, logits: Tensor, similarities: Tensor) -> None:
        self.outputs = logits, similarities

    def logits_and_similarities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, similarities = self.outputs
        return logits[: len(images)], similarities[: len(images)]


@pytest.mark.parametrize(
    ("logits", "similarities", "said"),
    [
        (
            0.0,
            0.25,
            "its similarities to class means differ from those of eager float32 by 2.5e-01, more than",
        ),
        (0.5, 0.0, "its logits differ from those of eager float32 by 5.0e-01 of the largest, more than"),
        (math.nan, 0.0, "its logits differ from those of eager float32 by nan"),
        (0.0, math.nan, "its similarities to class means differ from those of eager float32 by nan"),
        (0.0, 0.0, ""),
    ],
)
def test_what_differs_is_named(logits: float, similarities: float, said: str, run: Path) -> None:
    spec = replace(Run(run).read_spec(), rejection=Rejection("similarity", 0.95, 20, {"1": 0.4}, 1.0))
    expected = torch.ones(8, 3), torch.full((8,), 0.5)
    compared = compare(
        Outputs(expected[0] + logits, expected[1] - similarities),
        Outputs(*expected),
        (spec, spec),
        torch.zeros(8, 3, 4, 4),
        "photos",
    )
    largest = max(logits, similarities) if math.isfinite(logits + similarities) else math.nan
    assert compared.difference == pytest.approx(largest, nan_ok=True)
    assert compared.describe().endswith(f"of the largest, similarities by {similarities:.1e}")
    assert compared.kept is not None
    alike = similarities == 0  # 0.5 is kept; 0.25 and NaN are not
    assert (compared.kept.before, compared.kept.after, compared.kept.same) == (1, alike, 8 * alike)
    assert compared.kept.moved == (not alike)
    if said:
        refused = refusal(export_module._require_same, Path("x.onnx"), "fp16", compared, 1e-3)
        assert said in refused
        assert refused.endswith("(photos). Try --precision fp32, or allow it with --tolerance.")
    else:
        export_module._require_same(Path("x.onnx"), "fp16", compared, 1e-3)


def with_threshold(run: Path, threshold: float) -> ModelSpec:
    rejection = Rejection("max_logit", 0.95, 20, {"1": threshold})
    return replace(Run(run).read_spec(), rejection=rejection)


@pytest.mark.parametrize(
    ("images", "gone", "moved"),
    [(16, 1, False), (16, 5, False), (16, 6, True), (1000, 20, False), (1000, 21, True)],
)
def test_a_few_images_do_not_show_that_another_share_is_kept(
    images: int, gone: int, moved: bool, run: Path
) -> None:
    """Of 5 images, all are lost by chance with a probability of 2 / 32, of 6 with 2 / 64."""
    spec = with_threshold(run, 0.5)
    before, after = torch.ones(images, 3), torch.ones(images, 3)
    after[:gone] = 0
    for pair, shares in (
        ((before, after), (1, 1 - gone / images)),
        ((after, before), (1 - gone / images, 1)),
    ):
        kept = Kept.compare((spec, spec), *(ViewScores([logits]) for logits in pair))
        assert kept is not None
        assert (kept.before, kept.after) == pytest.approx(shares)
        assert kept.p_value == pytest.approx(2 / 2**gone)
        assert kept.moved == moved


def test_each_network_is_compared_at_its_own_threshold(run: Path) -> None:
    logits = torch.arange(10.0)[:, None].expand(10, 3)
    specs = with_threshold(run, 2.0), with_threshold(run, 1.0)
    kept = Kept.compare(specs, ViewScores([logits]), ViewScores([logits - 1]))
    assert kept is not None
    assert (kept.before, kept.after, kept.same, kept.p_value) == (0.8, 0.8, 10, 1)
    assert Kept.compare((specs[0], Run(run).read_spec()), ViewScores([logits]), ViewScores([logits])) is None
