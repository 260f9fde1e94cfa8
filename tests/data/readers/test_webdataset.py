from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import layouts
from crossx.data.images import read_image
from crossx.data.readers import webdataset
from crossx.data.readers.webdataset import read_webdataset
from crossx.errors import CrossXError, UsageError

pytestmark = pytest.mark.usefixtures("cache")


def write(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write a shard with Python's tar; webdataset's own writer is used in one test."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(images: list[bytes], label: str = "cls") -> dict[str, bytes]:
    """Return the members of a shard whose classes are 0 and 1, wren and robin, or fields of JSON."""
    names = ("wren", "robin")
    members = {}
    for number, image in enumerate(images):
        text = {"cls": str(number % 2), "txt": names[number % 2], "json": json.dumps({"label": number % 2})}[
            label
        ]
        members |= {f"{number:03d}.jpg": image, f"{number:03d}.{label}": text.encode()}
    return members


@pytest.mark.parametrize(("label", "classes"), [("cls", "0 1"), ("txt", "robin wren"), ("json", "0 1")])
def test_every_sample_has_its_image_and_label(
    tmp_path: Path, images: list[bytes], label: str, classes: str
) -> None:
    write(tmp_path / "data/a.tar", samples(images[:8], label))
    write(tmp_path / "data/b.tar", samples(images[8:], label))
    index = read_webdataset(tmp_path / "data", test_fraction=0)
    assert index.classes == tuple(classes.split())
    assert [record.path.read_bytes() for record in index.records] == images
    assert [record.label for record in index.records] == [(n + (label == "txt")) % 2 for n in range(12)]
    assert read_image(index.records[0].path).shape == (3, layouts.HEIGHT, layouts.WIDTH)


def test_shards_of_the_package_itself_and_splits_by_name(
    tmp_path: Path, images: list[bytes], cache: Path
) -> None:
    package = pytest.importorskip("webdataset")
    for split, part in (("train", images[:6]), ("val", images[6:8]), ("test", images[8:])):
        (tmp_path / "data").mkdir(exist_ok=True)
        with package.TarWriter(str(tmp_path / f"data/birds-{split}-000000.tar")) as writer:
            for number, image in enumerate(part):
                writer.write(
                    {"__key__": f"{split}/{number:04d}", "jpg": image, "json": {"species": f"c{number % 2}"}}
                )
    (tmp_path / "data/README.md").write_text("birds")
    index = read_webdataset(tmp_path / "data")
    assert index.classes == ("c0", "c1")
    assert [len(index.split(split)) for split in ("train", "val", "test")] == [6, 2, 4]
    assert index.notes == ()
    unpacked = {path.name for path in cache.iterdir()}
    assert read_webdataset(tmp_path / "data") == index
    assert {path.name for path in cache.iterdir()} == unpacked


def test_names_of_numbered_classes_folders_of_splits_and_other_members(
    tmp_path: Path, images: list[bytes]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/classnames.txt").write_text("wren\nrobin\n")
    others = {"__MACOSX/._000.jpg": b"x", "000.mask.png": b"x", "000.seg": b"x"}
    write(tmp_path / "data/train/0.tar", samples(images[:6]) | others)
    write(tmp_path / "data/test/0.tar", samples(images[6:]))
    index = read_webdataset(tmp_path / "data")
    assert index.classes == ("robin", "wren")
    assert [index.classes[record.label] for record in index.split("test")] == ["wren", "robin"] * 3
    (tmp_path / "data/classnames.txt").write_text("wren\n")
    with pytest.raises(CrossXError, match="sample 001: class 1, but only 1 class have names"):
        read_webdataset(tmp_path / "data")
    for names, message in (
        ("wren\n\nrobin\n", "line 2 is empty"),
        ("wren\nwren\n\n", "'wren' names two classes, 0 and 1"),
    ):
        (tmp_path / "data/classnames.txt").write_text(names)
        with pytest.raises(CrossXError, match=message):
            read_webdataset(tmp_path / "data")


@pytest.mark.parametrize(("label", "message"), [(1.0, None), (-1, "class -1, but only 2 classes have names")])
def test_numbers_in_json_are_numbers_of_names(
    tmp_path: Path, images: list[bytes], label: float, message: str | None
) -> None:
    (tmp_path / "classes.txt").write_text("wren\nrobin\n\n")
    members = {}
    for number, image in enumerate(images[:4]):
        text = json.dumps({"label": label if number % 2 else 0})
        members |= {f"{number}.jpg": image, f"{number}.json": text.encode()}
    path = write(tmp_path / "one.tar", members)
    if message is None:
        assert read_webdataset(path).classes == ("robin", "wren")
    else:
        with pytest.raises(CrossXError, match=message):
            read_webdataset(path)


def test_a_field_of_json_is_chosen(tmp_path: Path, images: list[bytes]) -> None:
    members = {}
    for number, image in enumerate(images[:4]):
        text = json.dumps({"width": 48, "order": "passerine", "kind": ["wren", "robin"][number % 2]})
        members |= {f"{number}.jpg": image, f"{number}.json": text.encode()}
    path = write(tmp_path / "one.tar", members)
    with pytest.raises(
        UsageError, match=r"no field 'label'\. Fields found: 'width', 'order', 'kind'\. Name one with"
    ):
        read_webdataset(path)
    with pytest.raises(UsageError, match=r"no field 'kinds'\. Did you mean 'kind'"):
        read_webdataset(path, label_column="kinds")
    assert read_webdataset(path, label_column="kind").classes == ("robin", "wren")


def corrupt(path: Path, at: int, size: int = 64) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * size)


JPG = b"\xff\xd8\xff"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../0.jpg": JPG, "../0.cls": b"0"}, r"member '\.\./0\.jpg' leads out of the archive"),
        ({"/etc/0.jpg": JPG}, r"member '/etc/0\.jpg' leads out of the archive"),
        ({"a\\..\\..\\0.jpg": JPG}, "leads out of the archive"),
        ({"0.jpg": JPG}, "sample 0: no label"),
        ({"0.cls": b"0"}, "sample 0: no image"),
        ({"0.jpg": JPG, "0.png": JPG, "0.cls": b"0"}, "sample '0' has two images"),
        ({"0.jpg": JPG, "0.cls": b"\xff\xfe"}, "label in .cls is not UTF-8 text"),
        ({"0.jpg": JPG, "0.json": b"{"}, "not valid JSON"),
        ({"0.jpg": JPG, "0.json": b'{"label": ["a", "b"]}'}, "holds lists: .* one label per image"),
        ({"0.jpg": JPG, "0.json": b'{"label": {"a": 1}}'}, "holds objects with fields"),
        (
            {"0.jpg": JPG, "0.txt": b"a;b", "1.jpg": JPG, "1.txt": b"b"} | {"2.jpg": JPG, "2.txt": b"c|b"},
            "look like",
        ),
        ({"0.jpg": JPG, "0.cls": b"", "1.jpg": JPG, "1.cls": b"1"}, "sample 0: label empty"),
        ({"0.jpg": JPG, "0.cls": b"0"}, "only one class"),
        ({"readme": b""}, "no images in 1 shard"),
    ],
)
def test_wrong_members_are_one_line(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    path = write(tmp_path / "0.tar", members)
    with pytest.raises(CrossXError, match=message) as refused:
        read_webdataset(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        member = tarfile.TarInfo("0.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(CrossXError, match=r"member '0\.jpg' is (a link|not a plain file)"):
        read_webdataset(tmp_path / "0.tar")


def test_a_member_larger_than_its_file_or_than_any_image_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = tarfile.TarInfo("0.jpg")
    member.size = 1 << 40
    (tmp_path / "0.tar").write_bytes(member.tobuf() + JPG)
    with pytest.raises(CrossXError, match=r"has 1,099,511,627,776 bytes, more than the 512 MiB"):
        read_webdataset(tmp_path / "0.tar")
    monkeypatch.setattr(webdataset, "MAX_IMAGE", 1 << 50)
    with pytest.raises(CrossXError, match=r"is cut off|not a complete tar file"):
        read_webdataset(tmp_path / "0.tar")


def test_no_length_of_a_cut_shard_gives_fewer_samples_silently(tmp_path: Path, images: list[bytes]) -> None:
    path = write(tmp_path / "0.tar", samples(images[:4]))
    whole = path.read_bytes()
    complete = len(read_webdataset(path, test_fraction=0).records)
    refused = []
    for length in range(0, len(whole), 300):
        path.write_bytes(whole[:length])
        try:
            index = read_webdataset(path, test_fraction=0)
        except CrossXError as error:
            refused.append(str(error))
        else:
            assert len(index.records) == complete or "may have been cut off" in index.notes[0]
    assert len(refused) > 10
    assert all(message.startswith(str(tmp_path)) and "\n" not in message for message in refused)


def test_a_shard_cut_off_within_a_sample_is_said_to_be(tmp_path: Path, images: list[bytes]) -> None:
    path = write(tmp_path / "0.tar", samples(images))
    with tarfile.open(path) as archive:
        *_, image, label = archive.getmembers()
    assert (image.name.partition(".")[0], Path(label.name).suffix) == (label.name.partition(".")[0], ".cls")
    path.write_bytes(path.read_bytes()[: label.offset])
    with pytest.raises(
        CrossXError, match=r"no label; 0\.tar has no mark at its end: it may have been cut off"
    ):
        read_webdataset(path)


def test_a_damaged_header_does_not_end_the_list_silently(tmp_path: Path, images: list[bytes]) -> None:
    path = write(tmp_path / "0.tar", samples(images))
    with tarfile.open(path) as archive:
        third = archive.getmembers()[4].offset
    corrupt(path, third)
    with pytest.raises(CrossXError, match=r"not a complete tar file"):
        read_webdataset(path)


def test_folders_without_shards_and_compressed_ones(tmp_path: Path, images: list[bytes]) -> None:
    with pytest.raises(CrossXError, match="no such folder"):
        read_webdataset(tmp_path / "none")
    with pytest.raises(CrossXError, match=r"no \.tar shards"):
        read_webdataset(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"not a tar")
    with pytest.raises(CrossXError, match="not a complete tar file"):
        read_webdataset(tmp_path)
    (tmp_path / "1.tar.gz").touch()
    with pytest.raises(CrossXError, match=r"'1\.tar\.gz' is compressed"):
        read_webdataset(tmp_path)
    (tmp_path / "1.tar.gz").unlink()
    write(tmp_path / "0.tar", samples(images))
    write(tmp_path / "train-1.tar", samples(images))
    with pytest.raises(CrossXError, match=r"'0\.tar' is not"):
        read_webdataset(tmp_path)
