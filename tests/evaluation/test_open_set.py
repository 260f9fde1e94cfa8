import pytest
import torch

from crossx.evaluation.open_set import describe_unknown
from crossx.evaluation.unknowns import ViewScores
from crossx.runs import ModelSpec, Preprocessing, Rejection

PREPROCESSING = Preprocessing(64, 72, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def rejection(score: str, weight: float | None) -> Rejection:
    return Rejection(score, 0.95, 40, {"1": 1.0}, weight)


@pytest.mark.parametrize(
    ("set_by", "weight", "has_means", "expected"),
    [
        (rejection("similarity", 2.0), None, True, "similarity"),
        (rejection("max_probability", None), None, True, "max_probability"),
        # no image is rejected: `calibrate --keep 1`, or too few images
        (None, 2.0, True, "combined"),
        (None, None, True, "max_logit"),
        (None, None, False, "max_logit"),
        # a checkpoint has no class means
        (rejection("combined", 2.0), None, False, "max_logit"),
    ],
)
def test_the_score_of_unknown_images_is_that_of_the_run_or_the_default(
    set_by: Rejection | None, weight: float | None, has_means: bool, expected: str
) -> None:
    spec = ModelSpec(
        "plain", {}, "test_resnet", {}, ("auk", "jay", "owl"), PREPROCESSING, "folder",
        rejection=set_by, combined_weight=weight,
    )  # fmt: skip
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    outputs = ViewScores([logits], [logits[:, 0].tanh()] if has_means else None)
    found = describe_unknown(spec, outputs, logits.argmax(1), outputs)
    assert found["score"] == expected
    assert expected in found["scores"]
    assert ("rejected" in found) == (set_by is not None and expected == set_by.score)
