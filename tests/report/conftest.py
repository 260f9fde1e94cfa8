import pytest

from answers import make_tested
from crossx.report.tested import Tested


@pytest.fixture
def tested() -> Tested:
    return make_tested()
