import pytest

from answers import make_tested
from crossx.report import Tested


@pytest.fixture
def tested() -> Tested:
    return make_tested()
