from collections.abc import Iterator

import pytest

import fuzzing
from crossx.data.readers import mat


@pytest.fixture(scope="module")
def forked_mat() -> Iterator[None]:
    """Read .mat files in forks of one process: a process per file would take half a minute."""
    forks = fuzzing.Forks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mat, "run_child", forks)
        yield
    forks.close()
