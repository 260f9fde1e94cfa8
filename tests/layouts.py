"""Tiny archives in each dataset's official layout, drawn and written on the spot.

Every writer takes the folder to write to, the number of classes and of images in each class. Image ``n`` of class
``c`` has its own content, of a colour that tells the class; where it goes (its split) depends on ``n`` alone and is
said by the writer. All is the same on every call.
"""

from __future__ import annotations

import colorsys
import csv
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat

WIDTH, HEIGHT = 48, 40

CUB_CLASSES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
CUB_PARTS = ("back", "beak", "left eye")
NABIRDS_SPECIES = ("Common Eider", "Yellow-rumped Warbler", "Ruddy Duck", "American Redstart")
CARS = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012")
DOGS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02087046-toy_terrier")
VARIANTS = ("F-16A/B", "F/A-18", "Cessna 172", "737-800", "737-900")
FOLDERS = ("robin", "wren", "crossbill")


def name(names: Sequence[str], index: int, pattern: str) -> str:
    """Return ``names[index]``, or ``pattern`` filled with ``index`` beyond their end."""
    return names[index] if index < len(names) else pattern.format(index=index)


def write_image(path: Path, label: int, number: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """Draw image ``number`` of class ``label``: soft blotches of the class's hue on grey."""
    generator = np.random.default_rng((label, number))
    hue = np.array(colorsys.hsv_to_rgb(label * 0.618 % 1, 0.9, 1.0))
    weight = generator.uniform(0.2, 1.0, (4, 5, 1))
    blotches = 255 * (weight * hue + (1 - weight) * generator.uniform(0.3, 0.7, (4, 5, 1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blotches.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_cub(root: Path, classes: int = 3, images_per_class: int = 4, *, annotations: bool = True) -> Path:
    """Write CUB-200-2011 as the folder ``root`` (``CUB_200_2011`` in the archive).

    Image ``n`` is for training where ``n`` is even. With ``annotations``, image ids count from 1, image ``i`` has
    the box ``(i, 2, 20.5, 30)``, and of the three parts the first is visible at ``(i, 5)``, the last at ``(7, 8)``.
    """
    names = [name(CUB_CLASSES, c, "{index:03d}.Some_Bird") for c in range(classes)]
    write_lines(root / "classes.txt", (f"{c + 1} {n}" for c, n in enumerate(names)))
    paths = [f"{n}/{n[4:]}_{i:04d}.jpg" for n in names for i in range(images_per_class)]
    ids = [str(i) for i in range(1, len(paths) + 1)]
    _write_listed(root, ids, paths, list(range(1, classes + 1)), images_per_class)
    if annotations:
        write_lines(root / "bounding_boxes.txt", (f"{i} {i}.0 2.0 20.5 30.0" for i in ids))
        write_lines(root / "parts/parts.txt", (f"{p} {n}" for p, n in enumerate(CUB_PARTS, start=1)))
        write_lines(
            root / "parts/part_locs.txt",
            (f"{i} {part}" for i in ids for part in (f"1 {i}.0 5.0 1", "2 0.0 0.0 0", "3 7.0 8.0 1")),
        )
    return root


def write_nabirds(root: Path, classes: int = 4, images_per_class: int = 4) -> Path:
    """Write NABirds as the folder ``root`` (``nabirds`` in the archive).

    The tree: 0 Birds; orders 1 (ducks) and 2 (perching birds); family 3 (wood-warblers) below order 2; species from
    10, even ones below order 1 and odd ones below family 3; two leaves a species, from 295, of both sexes. Image
    ``n`` is for training where ``n`` is even. Image ids are UUIDs, as in the archive.
    """
    nodes = {0: "Birds", 1: "Ducks, Geese, and Swans", 2: "Perching Birds", 3: "Wood-Warblers"}
    parents = {1: 0, 2: 0, 3: 2}
    for c in range(classes):
        species = 10 + c // 2
        nodes[species] = name(NABIRDS_SPECIES, c // 2, "Bird {index}")
        parents[species] = 1 if species % 2 == 0 else 3
        nodes[295 + c] = f"{nodes[species]} ({'Female/juvenile' if c % 2 else 'Adult male'})"
        parents[295 + c] = species
    write_lines(root / "classes.txt", (f"{i} {nodes[i]}" for i in sorted(nodes)))
    write_lines(root / "hierarchy.txt", (f"{child} {parent}" for child, parent in parents.items()))
    leaves = list(range(295, 295 + classes))
    keys = [uuid.uuid5(uuid.NAMESPACE_OID, f"{leaf}/{i}") for leaf in leaves for i in range(images_per_class)]
    ids = [str(key) for key in keys]
    paths = [f"{leaves[i // images_per_class]:04d}/{key.hex}.jpg" for i, key in enumerate(keys)]
    _write_listed(root, ids, paths, leaves, images_per_class)
    write_lines(root / "sizes.txt", (f"{i} {WIDTH} {HEIGHT}" for i in ids))
    write_lines(root / "bounding_boxes.txt", (f"{i} 3 2 20 30" for i in ids))
    write_lines(root / "parts/parts.txt", ("0 bill", "1 left wing"))
    write_lines(
        root / "parts/part_locs.txt", (f"{i} {part}" for i in ids for part in ("0 11 12 1", "1 -1 -1 0"))
    )
    return root


def _write_listed(
    root: Path, ids: Sequence[str], paths: Sequence[str], class_ids: Sequence[int], images_per_class: int
) -> None:
    """Write the images and the three lists that CUB and NABirds have in common."""
    for index, path in enumerate(paths):
        write_image(root / "images" / path, *divmod(index, images_per_class))
    labels = [class_ids[index // images_per_class] for index in range(len(ids))]
    training = [int(index % images_per_class % 2 == 0) for index in range(len(ids))]
    write_lines(root / "images.txt", (f"{i} {path}" for i, path in zip(ids, paths, strict=True)))
    write_lines(
        root / "image_class_labels.txt", (f"{i} {label}" for i, label in zip(ids, labels, strict=True))
    )
    write_lines(root / "train_test_split.txt", (f"{i} {flag}" for i, flag in zip(ids, training, strict=True)))


def mat_cells(values: Sequence[object], *, column: bool = False) -> np.ndarray:
    """Return a cell array for ``savemat``: a row, or a column."""
    cells = np.empty(len(values), dtype=object)
    cells[:] = values
    return cells.reshape((-1, 1) if column else (1, -1))


def mat_structs(entries: Sequence[dict[str, object]]) -> np.ndarray:
    """Return a struct array for ``savemat``, one row, with the fields of the first entry in order."""
    structs = np.empty((1, len(entries)), dtype=[(field, object) for field in entries[0]])
    for index, entry in enumerate(entries):
        structs[0, index] = tuple(entry.values())
    return structs


CARS_BOX = {"bbox_x1": 3, "bbox_y1": 4, "bbox_x2": 32, "bbox_y2": 33}


def write_cars(
    root: Path,
    classes: int = 3,
    images_per_class: int = 4,
    *,
    layout: str = "devkit",
    test_list: str | None = ".",
) -> Path:
    """Write Stanford Cars in one of its layouts, ``joint`` (``car_ims/``, ``cars_annos.mat``) or ``devkit``.

    Image ``n`` is for training where ``n`` is even; all have the box of ``CARS_BOX``. ``test_list`` is the folder
    of the labelled test list in the devkit layout, ``None`` for none.
    """
    names = mat_cells([name(CARS, c, "Some Car {index} 2012") for c in range(classes)])
    images = [(c, i) for c in range(classes) for i in range(images_per_class)]
    if layout == "joint":
        entries: list[dict[str, object]] = []
        for number, (c, i) in enumerate(images, start=1):
            path = f"car_ims/{number:06d}.jpg"
            write_image(root / path, c, i)
            entries.append({"relative_im_path": path, **CARS_BOX, "class": c + 1, "test": i % 2})
        savemat(root / "cars_annos.mat", {"annotations": mat_structs(entries), "class_names": names})
        return root
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    for remainder, split in enumerate(("train", "test")):
        entries = []
        for number, (c, i) in enumerate((image for image in images if image[1] % 2 == remainder), start=1):
            write_image(root / f"cars_{split}/{number:05d}.jpg", c, i)
            entries.append({**CARS_BOX, "class": c + 1, "fname": f"{number:05d}.jpg"})
        unlabelled = [{field: entry[field] for field in entry if field != "class"} for entry in entries]
        if split == "train":
            savemat(root / "devkit/cars_train_annos.mat", {"annotations": mat_structs(entries)})
        else:
            savemat(root / "devkit/cars_test_annos.mat", {"annotations": mat_structs(unlabelled)})
            if test_list is not None:
                savemat(
                    root / test_list / "cars_test_annos_withlabels.mat", {"annotations": mat_structs(entries)}
                )
    return root


def write_dogs(root: Path, classes: int = 3, images_per_class: int = 4, *, lists: str = ".") -> Path:
    """Write Stanford Dogs, the three lists into the folder ``lists``; image ``n`` is for training if even."""
    (root / lists).mkdir(parents=True, exist_ok=True)
    entries = []
    for c in range(classes):
        folder = name(DOGS, c, "n{index:08d}-some_dog_{index}")
        for i in range(images_per_class):
            file = f"{folder}/{folder.split('-')[0]}_{100 * c + i}.jpg"
            write_image(root / "Images" / file, c, i)
            entries.append((file, c + 1, i))
    chosen = {
        "file": entries,
        "train": [entry for entry in entries if entry[2] % 2 == 0],
        "test": [entry for entry in entries if entry[2] % 2 == 1],
    }
    for which, listed in chosen.items():
        files = [file for file, _, _ in listed]
        write_dogs_list(root / lists / f"{which}_list.mat", files, [label for _, label, _ in listed])
    return root


def write_dogs_list(path: Path, files: Sequence[str], labels: Sequence[int]) -> None:
    """Write one list of Stanford Dogs."""
    savemat(
        path,
        {
            "file_list": mat_cells(files, column=True),
            "annotation_list": mat_cells([file.removesuffix(".jpg") for file in files], column=True),
            "labels": np.array(labels, dtype=np.float64).reshape(-1, 1),
        },
    )


def write_aircraft(root: Path, classes: int = 4, images_per_class: int = 6) -> Path:
    """Write FGVC-Aircraft and return ``root / "fgvc-aircraft-2013b"``.

    Image ``n`` goes to train, val, test, train, ... in turn. Two variants share a family, four a manufacturer; the
    box of each image is 3 4 32 33 (xmin ymin xmax ymax).
    """
    archive = root / "fgvc-aircraft-2013b"
    data = archive / "data"
    names = {
        "variant": [name(VARIANTS, c, "Variant {index}") for c in range(classes)],
        "family": [f"Family {c // 2}" for c in range(classes)],
        "manufacturer": [f"Maker/{c // 4}" for c in range(classes)],
    }
    images = [(c, i) for c in range(classes) for i in range(images_per_class)]
    ids = {image: f"{34309 + 7 * number:07d}" for number, image in enumerate(images)}
    for image, key in ids.items():
        write_image(data / f"images/{key}.jpg", *image)
    write_lines(data / "images_box.txt", (f"{key} 3 4 32 33" for key in ids.values()))
    splits = {"train": (0,), "val": (1,), "trainval": (0, 1), "test": (2,)}
    for level, file in (
        ("variant", "variants.txt"),
        ("family", "families.txt"),
        ("manufacturer", "manufacturers.txt"),
    ):
        write_lines(data / file, dict.fromkeys(names[level]))
        for split, turns in splits.items():
            write_lines(
                data / f"images_{level}_{split}.txt",
                (f"{ids[c, i]} {names[level][c]}" for c, i in images if i % 3 in turns),
            )
    return archive


def _folder_split(number: int) -> str:
    return ("train", "train", "val", "test")[number % 4]


def write_folder(
    root: Path, classes: int = 3, images_per_class: int = 8, *, split_folders: bool = False
) -> Path:
    """Write a folder a class; with ``split_folders`` below ``train``, ``val`` and ``test`` (2:1:1 in turn)."""
    for c in range(classes):
        for i in range(images_per_class):
            parent = root / _folder_split(i) if split_folders else root
            write_image(parent / name(FOLDERS, c, "class {index}") / f"{i:03d}.jpg", c, i)
    return root


def write_table(
    root: Path, classes: int = 3, images_per_class: int = 8, *, suffix: str = ".csv", splits: bool = True
) -> Path:
    """Write images and a table of path (relative to it), label and, with ``splits``, split; return the table.

    Splits are train, train, val, test in turn.
    """
    rows = []
    for c in range(classes):
        for i in range(images_per_class):
            path = f"images/{c}_{i:03d}.jpg"
            write_image(root / path, c, i)
            rows.append({"path": path, "label": name(FOLDERS, c, "class {index}"), "split": _folder_split(i)})
    if not splits:
        rows = [{"path": row["path"], "label": row["label"]} for row in rows]
    table = root / f"table{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
        return table
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return table


def write_run(root: Path, classes: Sequence[str] = FOLDERS, method: str = "crossx") -> Path:
    """Write a run folder of a tiny network with random weights, the same on every call."""
    import torch

    from crossx.methods import create_method
    from crossx.methods.weights import describe, save_weights
    from crossx.runs import Preprocessing, Run, write_json

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = create_method(method, backbone="test_resnet", num_classes=len(classes), image_size=64)
    preprocessing = Preprocessing(64, 72, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    run = Run(root)
    spec = describe(network, classes=classes, preprocessing=preprocessing, dataset="folder")
    write_json(run.spec, spec.to_json())
    save_weights(network, run.weights)
    return root
