import pytest

from answers import make_tested
from crossx.report.results import RunResults


@pytest.fixture
def tested() -> RunResults:
    return make_tested()
