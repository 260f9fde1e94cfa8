"""The user's own images as a dataset of Hugging Face's ``datasets``: saved on disk, or on the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossx.data.index import DatasetIndex
from crossx.data.names import split_name
from crossx.data.readers.embedded import COLUMNS as IMAGE_COLUMNS
from crossx.data.readers.embedded import EncodedImage, is_encoded_image, unpack_images
from crossx.data.readers.rows import ONE_LABEL, LabelTable, index_rows
from crossx.data.readers.table import require_text
from crossx.errors import CrossXError, UsageError, first_line
from crossx.extras import require
from crossx.hub import HubModel
from crossx.runs import read_json
from crossx.suggestions import nearest

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

LABEL_COLUMNS = ("label", "class", "species", "category", "fine_label", "labels")


def read_huggingface(
    root: Path,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    test_fraction: float = 0.2,
    split_seed: int = 0,
) -> DatasetIndex:
    """Read what ``Dataset.save_to_disk`` wrote, a folder that ``load_dataset`` reads, or a dataset on the Hub.

    Splits are those of the dataset under their usual names (``names.split_name``); a single one is divided as a folder
    without splits. A split without rows, or for testing without any label, as benchmarks publish them, is left
    out. The images are unpacked into the cache once.

    Args:
        root: The folder, or ``user/name`` on the Hub.
        image_column: The column of images; by default the only one.
        label_column: The column of labels (``ClassLabel``, text, whole numbers); by default ``label``, or the only
            ``ClassLabel``.
        test_fraction: Share of each class's images that becomes the test split, in [0, 1).
        split_seed: Seed of that choice.

    Raises:
        CrossXError: If the dataset cannot be read, or rows are wrong (as rows of a table).
        UsageError: If the package is not installed, or no column, or several, may be meant.
    """
    require("data.dataset huggingface", "datasets", extra="datasets")

    import datasets

    loaded = _load(root, datasets)
    found = dict(loaded) if isinstance(loaded, Mapping) else {"": loaded}
    parts, empty = _with_rows(root, found)
    for name, part in parts.items():
        _check_arrow(root, name, part)
    # a test split may lack the labels
    trained = [part for name, part in parts.items() if split_name(name)[0] == "train"]
    first = next(iter([*trained, *parts.values()]))
    schema = first.features.arrow_schema
    image = _image_column(root, first, schema, image_column, datasets)
    label = _label_column(root, first, schema, label_column, image, datasets)
    require_text(root, "label", schema.field(label))
    parts, unlabelled = _labelled(parts, label)
    for name, part in parts.items():
        if any(_kind(part, column) != _kind(first, column) for column in (image, label)):
            raise CrossXError(
                f"{root}: split {name!r} has other columns {image!r} and {label!r} than the first one."
            )
    several = len(parts) > 1
    rows: list[tuple[str, dict[str, Any]]] = []
    for name, part in parts.items():
        names = _class_names(part.features[label])
        for number, value in enumerate(part[label], start=1):
            if names is not None:
                value = names[value] if value is not None and 0 <= value < len(names) else None
            place = f"split {name}, row {number}" if name else f"row {number}"
            rows.append((place, {"label": value, "split": name}))
    files = unpack_images(
        root, _key(root, parts, image), lambda: _images(parts, image, datasets), _base(root)
    )
    for (_, fields), file in zip(rows, files, strict=True):
        fields["path"] = file
    columns = ("path", "label", *(("split",) if several else ()))
    table = LabelTable(columns, rows, embedded=True, notes=[*empty, *unlabelled])
    return index_rows("huggingface", root, table, test_fraction, split_seed)


def _load(root: Path, datasets: Any) -> Any:
    if root.is_file():
        raise UsageError(
            f"{root}: is a file. --data.root takes the folder of save_to_disk, or a name on the Hub."
        )
    on_hub = not root.exists()
    name = HubModel.parse(str(root)) if on_hub and not root.is_absolute() else None
    if on_hub and name is None:
        raise CrossXError(
            f"{root}: no such folder. --data.root takes the folder of save_to_disk, or a name on the Hub."
        )
    saved = any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))
    datasets.disable_progress_bars()
    try:
        if name is not None:
            return datasets.load_dataset(name.repository, revision=name.revision)
        # a relative path may be the name of a loader of the package, such as imagefolder
        folder = str(root.absolute())
        return _load_saved(Path(folder), datasets) if saved else datasets.load_dataset(folder)
    except (CrossXError, MemoryError):
        raise
    except Exception as error:  # the package, Arrow and the client of the Hub raise many kinds of errors
        where = "on the Hub, or the Hub cannot be reached" if on_hub else "as a dataset"
        raise CrossXError(f"{root}: cannot be read {where} ({first_line(error)}).") from error


def _load_saved(folder: Path, datasets: Any) -> Any:
    """Load what ``save_to_disk`` wrote; None for a dataset or split without rows, which the package does not load."""

    def load(part: Path) -> Any:
        return datasets.load_from_disk(str(part)) if read_json(part / "state.json")["_data_files"] else None

    if not (folder / "dataset_dict.json").is_file():
        return load(folder)
    return {name: load(folder / name) for name in read_json(folder / "dataset_dict.json")["splits"]}


def _with_rows(root: Path, parts: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the splits that have rows, and a note on each of the others.

    Raises:
        CrossXError: If none is left to train on.
    """
    empty = [name for name, part in parts.items() if not part]
    if len(empty) == len(parts):
        raise CrossXError(f"{root}: the dataset has no rows.")
    for name in empty:
        if split_name(name)[0] == "train":
            raise CrossXError(f"{root}: split {name!r} has no rows, so there is nothing to train on.")
    kept = {name: part for name, part in parts.items() if name not in empty}
    return kept, [f"split {name!r} has no rows and is left out" for name in empty]


def _check_arrow(root: Path, name: str, part: datasets.Dataset) -> None:
    """Check the offsets, codes and text of a split, which Arrow reads as they are in the file."""
    import pyarrow as pa

    for table in filter(None, (part._data, part._indices)):
        try:
            table.table.validate(full=True)
        except pa.ArrowException as error:
            where = f"split {name!r} is" if name else "its Arrow file is"
            raise CrossXError(f"{root}: {where} damaged ({first_line(error)}). Copy it again.") from error


def _image_column(root: Path, part: Any, schema: pa.Schema, asked: str | None, datasets: Any) -> str:
    encoded = [
        name
        for name, feature in part.features.items()
        if isinstance(feature, datasets.Image) or is_encoded_image(schema.field(name).type)
    ]
    if asked is not None:
        if asked not in encoded:
            problem = (
                "holds no images."
                if asked in schema.names
                else f"is not there.{nearest(asked, schema.names)}"
            )
            raise UsageError(f"{root}: data.image_column {asked!r} {problem} {_found(schema)}")
        return asked
    images = [name for name in encoded if isinstance(part.features[name], datasets.Image)] or [
        name for name in encoded if name.lower() in IMAGE_COLUMNS
    ]
    chosen = images if len(images) == 1 else [name for name in images if name.lower() in IMAGE_COLUMNS][:1]
    if not chosen:
        what = f"several columns hold images: {', '.join(images)}" if images else "no column holds images"
        raise UsageError(f"{root}: {what}. Name one with --data.image_column. {_found(schema)}")
    return str(chosen[0])


def _label_column(
    root: Path, part: Any, schema: pa.Schema, asked: str | None, image: str, datasets: Any
) -> str:
    if asked is not None:
        if asked not in schema.names:
            raise UsageError(
                f"{root}: there is no column {asked!r}.{nearest(asked, schema.names)} {_found(schema)}"
            )
        chosen = asked
    else:
        labelled = [
            name for name, feature in part.features.items() if isinstance(feature, datasets.ClassLabel)
        ]
        named = [name for name in LABEL_COLUMNS if name in schema.names and name != image]
        if not labelled and not named:
            raise UsageError(
                f"{root}: no column is a label. Name one with --data.label_column. {_found(schema)}"
            )
        if len(labelled) > 1 and not set(labelled) & {"label"}:
            raise UsageError(
                f"{root}: several columns are labels: {', '.join(labelled)}. Name one with --data.label_column."
            )
        chosen = "label" if "label" in named else labelled[0] if labelled else named[0]
    feature = part.features[chosen]
    if isinstance(feature, list) or type(feature).__name__ in ("List", "LargeList", "Sequence"):
        raise CrossXError(f"{root}: column {chosen!r} holds lists of labels: {ONE_LABEL}.")
    return chosen


def _found(schema: pa.Schema) -> str:
    return f"Columns found: {', '.join(map(repr, schema.names))}."


def _class_names(feature: Any) -> list[str] | None:
    names = getattr(feature, "names", None)
    return [str(name) for name in names] if isinstance(names, Sequence) else None


def _labelled(parts: dict[str, Any], label: str) -> tuple[dict[str, Any], list[str]]:
    """Return the splits without those for testing that have no label (-1 or null), and a note on each of these."""
    unlabelled = [
        name
        for name, part in parts.items()
        if len(parts) > 1
        and split_name(name)[0] != "train"
        and (label not in part.features or _is_empty(part, label))
    ]
    if len(unlabelled) == len(parts):
        # the error names their rows
        return parts, []
    notes = [f"split {name!r} has no labels and is left out" for name in unlabelled]
    return {name: part for name, part in parts.items() if name not in unlabelled}, notes


def _is_empty(part: Any, label: str) -> bool:
    # values of lists and structs cannot be listed once each
    is_nested = part.features.arrow_schema.field(label).type.num_fields > 0
    return not is_nested and all(value in (None, -1, "") for value in part.unique(label))


def _kind(part: Any, column: str) -> tuple[Any, bool] | None:
    """Return the type of a column and whether its numbers have names, which may differ; None if it is missing."""
    if column not in part.features:
        return None
    return part.features.arrow_schema.field(column).type, _class_names(part.features[column]) is not None


def _images(parts: Mapping[str, datasets.Dataset], image: str, datasets: Any) -> Iterator[EncodedImage]:
    for part in parts.values():
        column = part.select_columns([image])
        if isinstance(part.features[image], datasets.Image):
            column = column.cast_column(image, datasets.Image(decode=False))
        for row in column:
            yield EncodedImage(None) if row[image] is None else EncodedImage.of(row[image])


def _key(root: Path, parts: Mapping[str, Any], image: str) -> str:
    """Return text that changes when the images do."""
    state = []
    for name, part in parts.items():
        files = [Path(file["filename"]).absolute() for file in part.cache_files]
        sizes = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        state.append((name, part._fingerprint, len(part), sizes))
    where = root.absolute() if root.exists() else root
    return repr((1, str(where), image, state))


def _base(root: Path) -> Path:
    return root if root.is_dir() else Path()
