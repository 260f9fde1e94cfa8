import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from crossx.data.config import DataConfig
from crossx.data.images import read_image
from crossx.data.transforms import (
    DECODE_MARGIN,
    MAX_ASPECT,
    Normalize,
    batch_images,
    eval_crop_place,
    eval_transform,
    preprocessing_for,
    train_transform,
)
from crossx.errors import CrossXError
from crossx.runs import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CUB80 = Path(os.environ.get("CROSSX_DATA", "../shared/data")) / "cub80"


def prep(image_size=56, resize_size=None, interpolation="bilinear", crop_bottom=0, pipeline="fast"):
    return Preprocessing(image_size, resize_size, interpolation, MEAN, STD, crop_bottom, pipeline)


def picture(height, width, seed=0):
    """A smooth picture with some texture, uint8 (3, H, W)."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    smooth = np.asarray(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16
    )
    noisy = np.clip(smooth + random.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    return torch.from_numpy(noisy).permute(2, 0, 1)


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pil(pil):
    return torch.from_numpy(np.array(pil)).permute(2, 0, 1)


def resized_by_pillow(image, size, interpolation):
    """Resize uint8 (3, H, W) to ``size`` (height, width)."""
    return from_pil(to_pil(image).resize(size[::-1], Image.Resampling[interpolation.upper()]))


def difference(image, other):
    """Return the largest and the mean difference in grey levels."""
    distance = (image.int() - other.int()).abs()
    return distance.max().item(), distance.float().mean().item()


@pytest.mark.parametrize("pipeline", ["fast", "strict"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(150, 201), (201, 150), (40, 61)])
@pytest.mark.parametrize(("resize_size", "resized"), [(None, None), (75, (75, 75)), (56, (56, 56))])
def test_evaluation_equals_pillow(interpolation, height, width, resize_size, resized, pipeline):
    image = picture(height, width)
    if resized is None:  # shorter side to 56 / 0.875 = 64, aspect ratio kept
        scale = 64 / min(height, width)
        resized = (int(height * scale), 64) if width < height else (64, int(width * scale))
    top, left = round((resized[0] - 56) / 2), round((resized[1] - 56) / 2)
    expected = resized_by_pillow(image, resized, interpolation)[:, top : top + 56, left : left + 56]

    actual = eval_transform(prep(resize_size=resize_size, interpolation=interpolation, pipeline=pipeline))(
        image
    )

    assert actual.shape == (3, 56, 56)
    assert actual.dtype == torch.uint8
    if pipeline == "strict":
        assert torch.equal(actual, expected)
    else:  # both round, in steps of their own
        largest, mean = difference(actual, expected)
        assert largest <= 1
        assert mean < 0.1


@st.composite
def resizing(draw):
    """Sizes before and after, and a crop: (height, width), resize_size, image_size."""
    height, width = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    image_size = draw(st.integers(1, 60))
    return height, width, draw(st.none() | st.integers(image_size, 80)), image_size


@example(case=(1, 90, 40, 32), interpolation="bicubic", seed=0)
@example(case=(90, 1, None, 32), interpolation="bilinear", seed=0)
@example(case=(64, 48, 64, 32), interpolation="bilinear", seed=0)
@settings(max_examples=80)
@given(case=resizing(), interpolation=st.sampled_from(["bilinear", "bicubic"]), seed=st.integers(0, 2**30))
def test_resizing_what_the_crop_keeps_equals_resizing_it_all(case, interpolation, seed):
    height, width, resize_size, image_size = case
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).permute(2, 0, 1)
    longest = MAX_ASPECT * min(height, width)
    top, left = (max(0, length - longest) // 2 for length in (height, width))
    kept = image[:, top : top + longest, left : left + longest]
    side = resize_size or int(image_size / 0.875)
    size = [
        int(side * length / min(kept.shape[1:])) if resize_size is None else side for length in kept.shape[1:]
    ]
    whole = v2.functional.resize(kept, size, v2.InterpolationMode(interpolation), antialias=True)
    by_pillow = resized_by_pillow(kept, size, interpolation)
    torch.manual_seed(seed)
    crop = v2.RandomCrop(image_size)
    place = crop.make_params([whole])
    for pipeline, expected in (("fast", whole), ("strict", by_pillow)):
        transform = train_transform(
            prep(image_size, resize_size, interpolation, pipeline=pipeline), "crop", hflip=0
        )
        torch.manual_seed(seed)
        # the draws are those of torchvision's RandomCrop
        assert difference(transform(image), crop.transform(expected, place)) == (0, 0)
    if interpolation == "bilinear":  # torch's bicubic clips noise before the second of its two passes
        assert difference(whole, by_pillow)[0] <= 2


@pytest.mark.parametrize(("resize_size", "resized"), [(None, (64, 92)), (75, (75, 75))])
def test_training_crop_is_a_crop_of_the_resized_image(resize_size, resized):
    image = picture(90, 130)
    whole = resized_by_pillow(image, resized, "bilinear").int()
    every_crop = whole.unfold(1, 56, 1).unfold(2, 56, 1).permute(1, 2, 0, 3, 4)
    transform = train_transform(prep(resize_size=resize_size), "crop", hflip=0.0)
    places = set()
    for seed in range(20):
        torch.manual_seed(seed)
        distance = (every_crop - transform(image).int()).abs().amax(dim=(2, 3, 4))
        assert distance.min() <= 1
        places.add(divmod(int(distance.argmin()), distance.shape[1]))
    assert len({top for top, _ in places}) > 4
    assert len({left for _, left in places}) > 4


def test_resize_to_the_image_size_leaves_nothing_to_crop():
    image = picture(90, 130)
    same = prep(resize_size=56)
    assert torch.equal(train_transform(same, "crop", hflip=0.0)(image), eval_transform(same)(image))


@pytest.mark.parametrize("augmentation", ["crop", "resized_crop"])
def test_flip_mirrors(augmentation):
    image = picture(90, 130)
    outputs = []
    for probability in (0.0, 1.0):
        torch.manual_seed(3)
        outputs.append(train_transform(prep(), augmentation, hflip=probability)(image))
    assert torch.equal(outputs[0].flip(-1), outputs[1])


def test_flip_happens_with_its_probability():
    image = picture(64, 64)
    transform = train_transform(prep(resize_size=56), "crop", hflip=0.25)
    upright = eval_transform(prep(resize_size=56))(image)
    torch.manual_seed(0)
    flipped = sum(not torch.equal(transform(image), upright) for _ in range(400))
    assert 70 <= flipped <= 130  # 100, standard deviation 8.7


def test_resized_crop_varies_area_and_aspect_within_bounds():
    # red grows to the right, green downwards: the crop's corners can be read off its colours
    ramp = torch.arange(256, dtype=torch.uint8)
    image = torch.stack(
        [ramp.expand(256, 256), ramp[:, None].expand(256, 256), torch.zeros_like(ramp).expand(256, 256)]
    )
    transform = train_transform(prep(image_size=64), "resized_crop", hflip=0.0)
    torch.manual_seed(0)
    areas, aspects = [], []
    for _ in range(200):
        pixels = transform(image).float()
        width = float(pixels[0, :, -1].mean() - pixels[0, :, 0].mean()) * 64 / 63
        height = float(pixels[1, -1, :].mean() - pixels[1, 0, :].mean()) * 64 / 63
        areas.append(width * height / 256**2)
        aspects.append(width / height)
    assert 0.07 < min(areas) < 0.2
    assert 0.85 < max(areas) <= 1.02
    assert 0.7 < min(aspects) < 0.85
    assert 1.2 < max(aspects) < 1.4


@pytest.mark.parametrize("augmentation", ["crop", "resized_crop", "trivial"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_is_random_but_a_function_of_the_generator(augmentation, interpolation):
    image = picture(100, 80)
    transform = train_transform(prep(interpolation=interpolation), augmentation, random_erasing=0.5)
    outputs = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        outputs.append([transform(image) for _ in range(20)])
    for output in outputs[0]:
        assert output.shape == (3, 56, 56)
        assert output.dtype == torch.uint8
    assert torch.equal(torch.stack(outputs[0]), torch.stack(outputs[2]))
    assert not torch.equal(torch.stack(outputs[0]), torch.stack(outputs[1]))


def test_trivial_changes_colours_that_resized_crop_keeps():
    image = torch.full((3, 60, 60), 200, dtype=torch.uint8)
    constant = image[:, :56, :56]
    torch.manual_seed(0)
    plain = [train_transform(prep(), "resized_crop")(image) for _ in range(30)]
    trivial = [train_transform(prep(), "trivial")(image) for _ in range(30)]
    assert all(torch.equal(output, constant) for output in plain)
    changed = sum(not torch.equal(output, constant) for output in trivial)
    assert 10 < changed < 30


def test_random_erasing_puts_the_mean_colour():
    image = torch.full((3, 60, 60), 250, dtype=torch.uint8)
    mean = torch.tensor(MEAN).mul(255).round().to(torch.uint8)[:, None, None]
    torch.manual_seed(0)
    for _ in range(10):
        output = train_transform(prep(), "crop", random_erasing=1.0)(image)
        erased = (output == mean).all(dim=0)
        assert 0.01 < erased.float().mean() < 0.4
        rows, columns = erased.any(1).sum(), erased.any(0).sum()
        assert erased.sum() == rows * columns
    assert not (train_transform(prep(), "crop")(image) == mean).any()


def test_crop_bottom_removes_the_banner_from_training_and_evaluation():
    image = picture(120, 150)
    banner = image.clone()
    banner[:, 100:] = 255
    cut = prep(crop_bottom=20)
    assert torch.equal(eval_transform(cut)(banner), eval_transform(prep())(image[:, :100]))
    for augmentation in ("crop", "resized_crop"):
        torch.manual_seed(0)
        with_banner = train_transform(cut, augmentation)(banner)
        torch.manual_seed(0)
        without = train_transform(prep(), augmentation)(image[:, :100])
        assert torch.equal(with_banner, without)


def test_crop_bottom_higher_than_the_image_is_told():
    with pytest.raises(CrossXError, match=r"20 rows high and data\.crop_bottom cuts off 20"):
        eval_transform(prep(crop_bottom=20))(picture(20, 30))


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (3, 3), (1, 1)])
def test_extreme_shapes_fit_in_memory(shape):
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    assert eval_transform(prep())(image).shape == (3, 56, 56)
    for augmentation in ("crop", "resized_crop", "trivial"):
        assert train_transform(prep(), augmentation)(image).shape == (3, 56, 56)


def test_long_image_is_cut_about_its_centre():
    image = picture(20, 400)
    centre = image[:, :, 120:280]
    assert torch.equal(eval_transform(prep())(image), eval_transform(prep())(centre))


def test_transforms_leave_their_input_alone():
    image = picture(80, 80)
    before = image.clone()
    eval_transform(prep(resize_size=56))(image)
    for augmentation in ("crop", "resized_crop", "trivial"):
        train_transform(prep(image_size=80, resize_size=80), augmentation, random_erasing=1.0)(image)
    assert torch.equal(image, before)


def test_normalize_follows_its_definition():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    expected = (images.double() / 255 - mean) / std
    for batch in (images, images.to(memory_format=torch.channels_last)):
        output = Normalize(prep())(batch)
        torch.testing.assert_close(output, expected.float(), rtol=0, atol=1e-5)
        assert output.is_contiguous(memory_format=torch.channels_last)


def test_batches_are_channels_last_whatever_the_images_are():
    images = [torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8) for _ in range(3)]
    images.append(images[0].permute(1, 2, 0).contiguous().permute(2, 0, 1))
    batch = batch_images(images)
    assert torch.equal(batch, torch.stack(images))
    assert batch.is_contiguous(memory_format=torch.channels_last)


def jpeg(image, **options):
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def read_shape(transform, data):
    shape = tuple(transform.read(data).shape[1:])
    assert transform.size(data) == shape
    return shape


def test_large_jpegs_are_decoded_as_small_as_the_crop_allows():
    data = jpeg(picture(480, 640))
    for resize_size, expected in ((241, (480, 640)), (120, (240, 320)), (60, (120, 160)), (24, (60, 80))):
        assert expected[0] == 480 or expected[0] >= DECODE_MARGIN * resize_size
        assert read_shape(eval_transform(prep(24, resize_size)), data) == expected
    assert read_shape(eval_transform(prep(56)), data) == (240, 320)
    assert read_shape(train_transform(prep(56), "crop"), data) == (240, 320)


def test_jpegs_are_decoded_at_full_size_where_a_smaller_one_would_not_do():
    data = jpeg(picture(480, 640))
    for transform in (
        eval_transform(prep(pipeline="strict")),
        eval_transform(prep(crop_bottom=20)),
        train_transform(prep(60), "resized_crop"),
        train_transform(prep(60), "trivial"),
    ):
        assert read_shape(transform, data) == (480, 640)
    assert read_shape(eval_transform(prep()), jpeg(picture(481, 643))) == (240, 321)


@pytest.mark.parametrize("augmentation", ["resized_crop", "trivial"])
def test_small_crops_of_a_jpeg_decoded_smaller_are_not_enlarged_and_differ_little(augmentation):
    image = picture(924, 924)
    data = jpeg(image)
    transform = train_transform(prep(), augmentation)
    assert read_shape(transform, data) == (231, 231)
    crop = transform.steps[2].args[1]
    decoded, sides = transform.read(data), []
    torch.manual_seed(0)
    for drawn in range(2000):
        region = crop.make_params([decoded])
        place = [region[name] for name in ("top", "left", "height", "width")]
        sides.append(min(place[2:]))
        if drawn % 200 == 0:
            small, large = (
                v2.functional.crop(whole, *(scale * length for length in place))
                for whole, scale in ((decoded, 1), (image, 4))
            )
            small, large = (resized_by_pillow(one, (56, 56), "bilinear") for one in (small, large))
            assert difference(small, large)[1] < 2
    assert 56 <= min(sides) < 60


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_jpegs_decoded_smaller_are_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(picture(480, 640), exif=exif)
    transform = eval_transform(prep())
    assert read_shape(transform, data) == ((320, 240) if orientation >= 5 else (240, 320))
    assert difference(transform(transform.read(data)), transform(read_image(data)))[1] < 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("side", [448, 896, 1792])
def test_jpegs_decoded_smaller_differ_little(interpolation, grey, side):
    image = picture(side, side)
    data = jpeg(image[:1].expand(3, -1, -1) if grey else image)
    transform = eval_transform(prep(96, 112, interpolation))
    assert read_shape(transform, data)[0] == max(224, side // 8)
    strict = eval_transform(prep(96, 112, interpolation, pipeline="strict"))
    largest, mean = difference(transform(transform.read(data)), strict(strict.read(data)))
    assert mean < 1
    assert largest <= 12


@pytest.mark.skipif(not CUB80.is_dir(), reason=f"{CUB80} is missing")
def test_real_images_differ_by_a_grey_level_at_most():
    fast, strict = (eval_transform(prep(448, 600, pipeline=pipeline)) for pipeline in ("fast", "strict"))
    for path in sorted(CUB80.rglob("*.jpg"))[::400]:
        pixels = fast.read(path)
        assert torch.equal(pixels, strict.read(path))
        largest, mean = difference(fast(pixels), strict(pixels))
        assert largest <= 1
        assert mean < 0.01


def test_preprocessing_follows_the_backbone_unless_told():
    backbone = {
        "mean": (0.5, 0.5, 0.5),
        "std": [0.25, 0.5, 1],
        "interpolation": "bicubic",
        "input_size": (3, 224, 224),
    }
    made = preprocessing_for(DataConfig(image_size=64, resize_size=80, crop_bottom=3), backbone)
    assert made == Preprocessing(64, 80, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.5, 1.0), 3, "fast")
    assert preprocessing_for(DataConfig(pipeline="strict"), backbone).pipeline == "strict"
    assert preprocessing_for(DataConfig(interpolation="bilinear"), backbone).interpolation == "bilinear"


@st.composite
def marked(draw):
    """An image's size, a square in it, and a preprocessing."""
    height, width = draw(st.tuples(st.integers(24, 200), st.integers(24, 200)))
    side = draw(st.integers(6, 20))
    top, left = draw(st.integers(0, height - side)), draw(st.integers(0, width - side))
    image_size = draw(st.integers(32, 64))
    resize_size = draw(st.none() | st.integers(image_size, 80))
    crop_bottom = draw(st.sampled_from([0, 0, 3]))
    return (height, width), (top, left, side), prep(image_size, resize_size, crop_bottom=crop_bottom)


def centre_of_light(image):
    """x and y of the centre of what is light, its pixels' centres at 0.5, 1.5, ..."""
    light = image[0].double()
    y, x = (torch.arange(length) + 0.5 for length in light.shape)
    return torch.stack([(light.sum(0) * x).sum(), (light.sum(1) * y).sum()]) / light.sum()


@example(case=((30, 400), (5, 190, 20), prep(48)))  # cut to MAX_ASPECT
@example(case=((400, 30), (195, 5, 20), prep(48, 64)))
@settings(max_examples=60)
@given(case=marked())
def test_a_mark_is_where_its_place_in_the_crop_is_said_to_be(case):
    (height, width), (top, left, side), preprocessing = case
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, top : top + side, left : left + side] = 255
    place = eval_crop_place(preprocessing, height, width)
    corners = place(torch.tensor([[left, top], [left + side, top + side]], dtype=torch.float64))
    crop = eval_transform(preprocessing)(image)
    last_row = height - preprocessing.crop_bottom
    # the filter blurs by up to two pixels: a mark near a border loses light beyond it
    inside = corners.min() >= 2 and corners.max() <= preprocessing.image_size - 2 and top + side <= last_row
    if inside:
        torch.testing.assert_close(centre_of_light(crop), corners.mean(0), atol=0.15, rtol=0)
    outside = (corners[1] <= -2).any() or (corners[0] >= preprocessing.image_size + 2).any()
    if outside:
        assert crop.sum() == 0


@pytest.mark.parametrize(("height", "width"), [(960, 1280), (961, 1281)])
def test_a_jpeg_decoded_smaller_ends_at_the_same_place(height, width):
    image = np.zeros((height, width, 3), np.uint8)
    image[320:400, 600:680] = 255
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    transform = eval_transform(prep(112))
    small = transform.read(buffer.getvalue())
    assert small.shape[1:] == (480, 640)
    centre = eval_crop_place(prep(112), height, width)(torch.tensor([640.0, 360.0]))
    light = (transform(small).int() - 20).clamp(min=0)
    torch.testing.assert_close(centre_of_light(light).float(), centre, atol=0.15, rtol=0)


def test_the_crop_place_of_an_image_that_the_cut_leaves_nothing_of():
    with pytest.raises(CrossXError, match=r"10 rows high and data\.crop_bottom cuts off 20"):
        eval_crop_place(prep(crop_bottom=20), 10, 50)
