import pytest

from crossx.evaluation.parts import measures


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a twentieth of the resamples: the tests look at intervals only roughly."""
    monkeypatch.setattr(measures, "RESAMPLES", 50)
