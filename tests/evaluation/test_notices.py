import pytest

from crossx.evaluation.notices import result_notices


@pytest.mark.parametrize(
    ("results", "notice"),
    [
        ({"seen_images": 0, "seen_in_training": False}, ""),
        # of an earlier version
        ({"seen_in_training": True}, "These images were trained on"),
        ({"seen_images": 9, "seen_in_training": True}, "These images were trained on"),
        (
            {"seen_images": 8, "seen_in_training": True},
            "8 of these 9 images were trained on: the numbers say nothing",
        ),
        (
            {"seen_images": 1, "seen_in_training": False},
            "1 of these 9 images was trained on, so that the numbers",
        ),
        (
            {"seen_images": 2, "seen_in_training": False},
            "2 of these 9 images were trained on, so that the numbers",
        ),
    ],
)
def test_images_that_were_trained_on_are_counted(results: dict[str, object], notice: str) -> None:
    notices = result_notices({"n": 9, "run_status": "finished", **results})
    assert [text for text in notices if not text.startswith(notice)] == []
    assert len(notices) == bool(notice)
