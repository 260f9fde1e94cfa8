import pytest

from answers import make_tested
from crossx.report.results import Tested


@pytest.fixture
def tested() -> Tested:
    return make_tested()
