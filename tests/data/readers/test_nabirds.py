from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossx.data.readers.nabirds import read_nabirds
from layouts import write_lines, write_nabirds
from refusals import refusal


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_nabirds(tmp_path / "nabirds")


def write_tree(root: Path, names: dict[int, str], parents: dict[int, int], labels: list[int]) -> None:
    """Write an archive of one image a label, without annotations."""
    write_lines(root / "classes.txt", (f"{i} {name}" for i, name in names.items()))
    write_lines(root / "hierarchy.txt", (f"{child} {parent}" for child, parent in parents.items()))
    write_lines(root / "images.txt", (f"u{i} {label:04d}/u{i}.jpg" for i, label in enumerate(labels)))
    write_lines(root / "image_class_labels.txt", (f"u{i} {label}" for i, label in enumerate(labels)))
    write_lines(root / "train_test_split.txt", (f"u{i} 1" for i in range(len(labels))))
    (root / "images").mkdir(exist_ok=True)


def test_what_was_written_is_read(root: Path) -> None:
    index = read_nabirds(root)
    assert index.name == "nabirds"
    assert index.classes == (
        "Common Eider (Adult male)",
        "Common Eider (Female/juvenile)",
        "Yellow-rumped Warbler (Adult male)",
        "Yellow-rumped Warbler (Female/juvenile)",
    )
    assert index.levels == {
        "order": ("Ducks, Geese, and Swans",) * 2 + ("Perching Birds",) * 2,
        "family": ("Ducks, Geese, and Swans",) * 2 + ("Wood-Warblers",) * 2,
        "species": ("Common Eider",) * 2 + ("Yellow-rumped Warbler",) * 2,
    }
    assert list(index.levels) == ["order", "family", "species"]
    assert [record.label for record in index.records] == [label for label in range(4) for _ in range(4)]
    assert [record.split for record in index.records] == ["train", "test"] * 8
    assert [record.path.parent.name for record in index.records[::4]] == ["0295", "0296", "0297", "0298"]
    assert all(record.path.is_file() for record in index.records)
    assert {record.box for record in index.records} == {(3.0, 2.0, 20.0, 30.0)}
    assert all(record.parts == {"bill": (11.0, 12.0, 0.0, 0.0)} for record in index.records)


def test_the_containing_folder_serves_as_root(root: Path) -> None:
    assert read_nabirds(root.parent) == read_nabirds(root)


def test_class_ids_are_ordered_as_numbers(tmp_path: Path) -> None:
    names = {
        0: "Birds",
        1: "Loons",
        2: "Common Loon",
        1010: "Common Loon (Breeding)",
        99: "Common Loon (Winter)",
    }
    write_tree(tmp_path, names, {1: 0, 2: 1, 1010: 2, 99: 2}, [1010, 99, 1010])
    index = read_nabirds(tmp_path)
    assert index.classes == ("Common Loon (Winter)", "Common Loon (Breeding)")
    assert [record.label for record in index.records] == [1, 0, 1]


def test_a_leaf_named_as_its_species_and_leaves_named_alike(tmp_path: Path) -> None:
    names = {
        0: "Birds",
        1: "Tits",
        2: "Oak Titmouse",
        3: "Tit",
        4: "Tit",
        10: "Oak Titmouse",
        11: "Tit",
        12: "Tit",
    }
    write_tree(tmp_path, names, {1: 0, 2: 1, 3: 1, 4: 1, 10: 2, 11: 3, 12: 4}, [10, 11, 12])
    index = read_nabirds(tmp_path)
    assert index.classes == ("Oak Titmouse", "Tit (11)", "Tit (12)")
    assert index.levels["species"] == ("Oak Titmouse", "Tit (3)", "Tit (4)")
    assert index.levels["order"] == ("Tits", "Tits", "Tits")


def test_a_leaf_just_below_the_root_is_its_own_group(tmp_path: Path) -> None:
    write_tree(tmp_path, {0: "Birds", 1: "Hoatzin", 2: "Owls", 3: "Barn Owl"}, {1: 0, 2: 0, 3: 2}, [1, 3])
    assert read_nabirds(tmp_path).levels == {
        "order": ("Hoatzin", "Owls"),
        "family": ("Hoatzin", "Owls"),
        "species": ("Hoatzin", "Owls"),
    }


@given(parents=st.lists(st.integers(0, 10_000), min_size=1, max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_tree_gives_its_leaves_and_nested_levels(tmp_path: Path, parents: list[int]) -> None:
    # Node i + 1 hangs below one of the nodes 0 to i: every tree can be written so.
    tree = {i + 1: parent % (i + 1) for i, parent in enumerate(parents)}
    leaves = [node for node in tree if node not in tree.values()]
    write_tree(tmp_path, {node: f"b{node}" for node in (0, *tree)}, tree, leaves)
    index = read_nabirds(tmp_path)
    assert index.classes == tuple(f"b{leaf}" for leaf in leaves)
    for label, leaf in enumerate(leaves):
        order = leaf
        while tree[order] != 0:
            order = tree[order]
        species = tree[leaf] or leaf
        assert index.levels["order"][label] == f"b{order}"
        assert index.levels["family"][label] == f"b{tree[species] or species}"
        assert index.levels["species"][label] == f"b{species}"


def test_a_label_that_is_no_leaf(root: Path) -> None:
    labels = root / "image_class_labels.txt"
    lines = labels.read_text().splitlines()
    lines[2] = lines[2].split()[0] + " 10"
    write_lines(labels, lines)
    assert f"{labels}, line 3: class id 10 is not a leaf" in refusal(read_nabirds, root)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("295", "expected class id, parent id"),
        ("295 ten", "the parent id must be a whole number, not 'ten'"),
        ("295 4000", "class id 4000 is not in classes.txt"),
        ("4000 10", "class id 4000 is not in classes.txt"),
        ("1 0", "'1' was already listed in"),
    ],
)
def test_a_malformed_line_of_the_hierarchy(root: Path, line: str, problem: str) -> None:
    path = root / "hierarchy.txt"
    lines = path.read_text().splitlines()
    lines[4] = line
    write_lines(path, lines)
    message = refusal(read_nabirds, root)
    assert message.startswith(f"{path}, line 5: ")
    assert problem in message


def test_a_hierarchy_that_is_no_tree(tmp_path: Path) -> None:
    names = {0: "Birds", 1: "Owls", 2: "Barn Owl", 3: "Barn Owl (White)"}
    write_tree(tmp_path, names, {1: 2, 2: 1, 3: 2}, [3])
    assert "class id 1 is its own ancestor" in refusal(read_nabirds, tmp_path)
    write_tree(tmp_path, names, {3: 2, 2: 1}, [3])
    assert "hierarchy.txt: 2 classes have no parent (0, 1)" in refusal(read_nabirds, tmp_path)


@pytest.mark.parametrize(
    "file", ["classes.txt", "hierarchy.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt"]
)
def test_half_an_archive_names_the_missing_file(root: Path, file: str) -> None:
    (root / file).unlink()
    assert f"{root / file} is missing" in refusal(read_nabirds, root)


def test_the_images_folder_is_needed(root: Path) -> None:
    (root / "images").rename(root / "elsewhere")
    assert f"{root / 'images'}/ is missing" in refusal(read_nabirds, root)
