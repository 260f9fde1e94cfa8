import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from crossx.data.fingerprints import PER_TASK, READ, UNREADABLE, fingerprint, fingerprints


def test_copies_have_one_fingerprint_whatever_their_name(tmp_path: Path) -> None:
    original = tmp_path / "a.jpg"
    original.write_bytes(os.urandom(3 * READ))
    copy = tmp_path / "elsewhere" / "b.png"
    copy.parent.mkdir()
    shutil.copy(original, copy)
    found = fingerprints([original, copy])
    assert (found.dtype, found.shape) == (np.uint64, (2,))
    assert found[0] == found[1] == fingerprint(original)


@pytest.mark.parametrize("size", [0, 1, READ - 1, READ, READ + 1, 5 * READ])
def test_another_size_or_another_middle_is_another_file(tmp_path: Path, size: int) -> None:
    content = bytearray(os.urandom(size))
    path = tmp_path / "image"
    path.write_bytes(content)
    before = fingerprint(path)
    path.write_bytes(content + b"\0")
    assert fingerprint(path) != before
    if size:
        content[size // 2] ^= 1
        path.write_bytes(content)
        assert fingerprint(path) != before
    assert before != UNREADABLE


def test_each_file_has_its_own_in_the_order_of_the_files(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index % 50}.jpg" for index in range(3 * PER_TASK + 5)]
    for index, path in enumerate(paths[:49]):
        path.write_bytes(b"%d" % index)
    found = fingerprints(paths).tolist()
    assert found == [fingerprint(path) for path in paths]
    assert len({*found}) == 50
    assert found[49] == UNREADABLE


def test_what_cannot_be_read_is_no_image(tmp_path: Path) -> None:
    assert fingerprints([tmp_path / "nowhere", tmp_path]).tolist() == [UNREADABLE, UNREADABLE]
    assert fingerprints([]).shape == (0,)
