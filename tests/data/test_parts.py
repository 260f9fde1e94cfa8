from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from crossx.data.config import DataConfig
from crossx.data.datamodule import DataModule
from crossx.data.dataset import ImageDataset
from crossx.data.index import DatasetIndex, Record
from crossx.data.parts import PartPoints, opposites
from crossx.data.sampler import Draw
from crossx.data.transforms import eval_crop_place, eval_transform, train_transform
from crossx.runs import Preprocessing

NAMES = ("beak", "left eye", "right eye", "tail")
RADIUS = 5
MOVES = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def prep(side: int = 64, **options: object) -> Preprocessing:
    return replace(Preprocessing(side, None, "bilinear", (0, 0, 0), (0.5, 0.5, 0.5)), **options)


def dot(height: int, width: int, x: float, y: float) -> Tensor:
    """Draw a soft white disc on black, uint8 (3, H, W)."""
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    distance = ((rows[:, None] - y) ** 2 + (columns[None] - x) ** 2).sqrt()
    disc = (255 * (RADIUS + 0.5 - distance).clamp(0, 1)).round().to(torch.uint8)
    return disc.expand(3, height, width).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def centre(image: Tensor) -> tuple[float, float]:
    """Return the centre of gravity of an image, x and y."""
    weight = image.double().mean(0)
    rows, columns = (torch.arange(side) + 0.5 for side in weight.shape)
    total = weight.sum()
    return float((weight.sum(0) * columns).sum() / total), float((weight.sum(1) * rows).sum() / total)


def follow(transform, image, points, seed, names=NAMES) -> tuple[Tensor, Tensor]:
    """Transform an image with parts at ``points`` (name -> x, y)."""
    record = Record(None, 0, "train", parts={name: (*xy, 0.0, 0.0) for name, xy in points.items()})
    size = tuple(image.shape[-2:])
    parts = PartPoints(record, names, size, size)
    torch.manual_seed(seed)
    return transform(image, parts), parts.stacked()


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(40, 300), st.integers(40, 300)),
    place=st.tuples(st.floats(0.1, 0.9), st.floats(0.1, 0.9)),
    augmentation=st.sampled_from(["crop", "resized_crop", "trivial"]),
    pipeline=st.sampled_from(["fast", "strict"]),
    resize=st.sampled_from([None, 80]),
    crop_bottom=st.integers(0, 8),
    seed=st.integers(0, 10_000),
)
@example(
    size=(205, 64),
    place=(0.5, 0.46875),
    augmentation="trivial",
    pipeline="fast",
    resize=None,
    crop_bottom=0,
    seed=2555,
)
def test_a_part_is_where_its_pixels_are(
    size, place, augmentation, pipeline, resize, crop_bottom, seed
) -> None:
    height, width = size
    x, y = place[0] * width, place[1] * height
    image = dot(height, width, x, y)
    preprocessing = prep(pipeline=pipeline, resize_size=resize, crop_bottom=crop_bottom)
    transform = train_transform(preprocessing, augmentation)
    prepared, parts = follow(transform, image, {"beak": (x, y)}, seed)
    torch.manual_seed(seed)
    assert torch.equal(prepared, transform(image))
    assert not parts[1:].any()
    found_x, found_y, visible = parts[0].tolist()
    if visible:
        assert 0 <= found_x <= 64
        assert 0 <= found_y <= 64
    # other operations than the geometric ones may turn a disc on black into anything
    if augmentation == "trivial" and transform.steps[-1].args[0].drawn[0] not in MOVES:
        return
    whole = not _touches_border(prepared[0])
    if augmentation == "trivial":
        # a disc that the crop has cut may be moved away from the border
        torch.manual_seed(seed)
        whole &= not _touches_border(replace(transform, steps=transform.steps[:-1])(image)[0])
    if visible and prepared[0].sum() and whole:
        assert centre(prepared) == pytest.approx((found_x, found_y), abs=0.6)
    if not prepared.any():
        assert not visible


def _touches_border(plane: Tensor) -> bool:
    return bool(plane[0].any() or plane[-1].any() or plane[:, 0].any() or plane[:, -1].any())


def test_parts_follow_each_operation_of_trivial_augment() -> None:
    transform = train_transform(prep(), "trivial", hflip=0)
    moved = Counter()
    for seed in range(250):
        image = dot(64, 64, 30, 36)
        # the whole image is the crop, so that only the operation moves it
        step = transform.steps[-1]
        record = Record(None, 0, "train", parts={"beak": (30.0, 36.0, 0.0, 0.0)})
        parts = PartPoints(record, ("beak",), (64, 64), (64, 64))
        torch.manual_seed(seed)
        after = step(image, parts)
        operation = step.args[0].drawn[0]
        if operation not in MOVES:
            continue
        x, y, visible = parts.stacked()[0].tolist()
        if visible and not _touches_border(after[0]):
            moved[operation] += (x, y) != (30, 36)
            assert centre(after) == pytest.approx((x, y), abs=0.6)
    assert all(moved[operation] > 2 for operation in MOVES[1:])


def test_a_part_that_was_cropped_away_does_not_come_back() -> None:
    record = Record(None, 0, "train", parts={"beak": (5.0, 5.0, 0.0, 0.0)})
    parts = PartPoints(record, ("beak",), (64, 64), (64, 64))
    parts.move(shift=(-10, -10), size=(32, 32))
    parts.move(shift=(20, 20), size=(32, 32))
    assert not parts.stacked().any()


def test_boxes_count_as_their_centres_and_parts_without_one_are_not_visible() -> None:
    record = Record(None, 0, "train", parts={"tail": (10.0, 20.0, 4.0, 6.0), "beak": (70.0, 1.0, 0.0, 0.0)})
    parts = PartPoints(record, NAMES, (40, 60), (20, 30)).stacked()
    assert parts.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [6, 11.5, 1]]
    assert not PartPoints(Record(None, 0, "train"), NAMES, (40, 60), (20, 30)).stacked().any()


def test_a_flip_mirrors_the_points_and_swaps_the_sides() -> None:
    points = {"beak": (20.0, 10.0), "left eye": (12.0, 8.0), "tail": (50.0, 60.0)}
    image = dot(64, 64, 20, 10)
    transform = train_transform(prep(resize_size=64), "crop", hflip=1.0)
    _, parts = follow(transform, image, points, 0)
    assert parts.tolist() == [[44, 10, 1], [0, 0, 0], [52, 8, 1], [14, 60, 1]]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("beak", "left eye", "right eye"), [0, 2, 1]),
        (("left_wing", "right_wing", "left_leg", "right_leg"), [1, 0, 3, 2]),
        (("LeftWing", "RightWing", "TAIL"), [1, 0, 2]),
        (("eye-l", "eye-r", "bill", "crown"), [1, 0, 2, 3]),
        (("L ear", "R ear", "r", "l"), [1, 0, 3, 2]),
        (("bright spot", "cleft", "upright"), [0, 1, 2]),
        (("Left Headlight", "Right Headlight"), [1, 0]),
        (("left eye", "beak"), [-1, 1]),
        ((), []),
    ],
)
def test_opposites(names, expected) -> None:
    assert opposites(names) == expected


def test_one_side_without_the_other_is_not_visible_after_a_flip() -> None:
    transform = train_transform(prep(resize_size=64), "crop", hflip=1.0)
    points = {"left eye": (12.0, 8.0), "beak": (20.0, 10.0)}
    _, parts = follow(transform, dot(64, 64, 20, 10), points, 0, names=("left eye", "beak"))
    assert parts.tolist() == [[0, 0, 0], [44, 10, 1]]


def test_without_randomness_parts_are_where_the_evaluation_puts_them() -> None:
    for height, width in ((90, 130), (400, 30), (64, 64)):
        preprocessing = prep(crop_bottom=3)
        points = {"beak": (width / 2 - 1.5, height / 2 + 1.5), "tail": (0.5, 0.5)}
        _, parts = follow(eval_transform(preprocessing), dot(height, width, 5, 5), points, 0)
        place = eval_crop_place(preprocessing, height, width)
        for index, name in ((0, "beak"), (3, "tail")):
            expected = place(torch.tensor(points[name], dtype=torch.float64))
            inside = bool(((expected >= 0) & (expected < 64)).all())
            assert bool(parts[index, 2]) == inside
            if inside:
                torch.testing.assert_close(parts[index, :2], expected.float())


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    folder, random = tmp_path_factory.mktemp("birds"), np.random.default_rng(0)
    made = []
    for number in range(12):
        x, y = random.uniform(60, 200, 2).tolist()
        path = folder / f"{number}.jpg"
        # JPEGs of this size are decoded at half of it
        picture = dot(240, 320, x, y).permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(path, quality=95)
        parts = {"left eye": (x, y, 0.0, 0.0), "right eye": (100.0, 100.0, 0.0, 0.0)}
        made.append(Record(path, number % 3, "train", parts=None if number == 7 else parts))
    return made


@pytest.mark.parametrize("augmentation", ["crop", "resized_crop"])
def test_parts_of_jpegs_that_are_decoded_at_a_fraction(records, augmentation) -> None:
    transform = train_transform(prep(48), augmentation, hflip=0)
    dataset = ImageDataset(records, transform, 0, transform.read, ("left eye", "tail"))
    assert transform.size(records[0].path) == ((120, 160) if augmentation == "crop" else (240, 320))
    found = 0
    for index in range(12):
        for epoch in range(4):
            image, label, parts = dataset[Draw(epoch, index)]
            assert label == index % 3
            assert not parts[1].any()
            plane = image[0] * (image[0] > 100)
            if parts[0, 2] and plane.any() and not _touches_border(plane):
                found += 1
                assert centre(plane[None]) == pytest.approx(parts[0, :2].tolist(), abs=0.6)
    assert found > 10
    assert not dataset[7][2].any()


def make(records, **options) -> DataModule:
    index = DatasetIndex("birds", ("auk", "bittern", "crow"), tuple(records))
    parts = options.pop("parts", NAMES)
    config = DataConfig(
        **{"image_size": 48, "batch_size": 4, "num_workers": 0, "val_fraction": 0.25, **options}
    )
    return DataModule(index, prep(48), config, 5, parts)


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"cache": "ram"}])
@pytest.mark.parametrize("augmentation", ["crop", "trivial"])
def test_batches_have_parts_whatever_the_workers_and_the_cache(records, options, augmentation) -> None:
    common = {"augmentation": augmentation, "random_erasing": 0.5}
    expected = list(make(records, **common).train_dataloader())
    loader = make(records, **common, **options).train_dataloader()
    for _ in range(2):  # the second time from the cache
        actual = list(loader)
        for batch, own in zip(actual, expected, strict=True):
            assert len(batch) == 3
            assert batch[2].shape == (4, 4, 3)
            assert batch[2].dtype == torch.float32
            assert all(map(torch.equal, batch, own))
    assert sum(float(batch[2][..., 2].sum()) for batch in expected) > 0


def test_without_parts_batches_are_the_same_pairs(records) -> None:
    pairs = list(make(records, parts=()).train_dataloader())
    triples = list(make(records).train_dataloader())
    for pair, triple in zip(pairs, triples, strict=True):
        assert len(pair) == 2
        assert all(map(torch.equal, pair, triple[:2]))


def test_evaluation_has_no_parts(records) -> None:
    data = make(records)
    assert all(len(batch) == 2 for batch in data.val_dataloader())
    images, targets, parts = data.to_device(next(iter(data.train_dataloader())), torch.device("cpu"))
    assert images.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert parts.dtype == torch.float32
