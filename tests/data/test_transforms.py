import numpy as np
import pytest
import torch
from PIL import Image

from crossx.data.config import DataConfig
from crossx.data.transforms import eval_transform, preprocessing_for, train_transform
from crossx.errors import CrossXError
from crossx.runs import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_LEVEL = 1 / 255 / min(STD)


def prep(image_size=56, resize_size=None, interpolation="bilinear", crop_bottom=0):
    return Preprocessing(image_size, resize_size, interpolation, MEAN, STD, crop_bottom)


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


def normalized(pil):
    array = np.asarray(pil, dtype=np.float64) / 255
    return torch.from_numpy((array - MEAN) / STD).permute(2, 0, 1).float()


def undo_normalize(image):
    return image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(150, 201), (201, 150), (40, 61)])
@pytest.mark.parametrize(("resize_size", "resized"), [(None, None), (75, (75, 75)), (56, (56, 56))])
def test_evaluation_equals_pillow(interpolation, height, width, resize_size, resized):
    image = picture(height, width)
    if resized is None:  # shorter side to 56 / 0.875 = 64, aspect ratio kept
        scale = 64 / min(height, width)
        resized = (64, int(height * scale)) if width < height else (int(width * scale), 64)
    pil = to_pil(image).resize(resized, Image.Resampling[interpolation.upper()])
    left, top = round((resized[0] - 56) / 2), round((resized[1] - 56) / 2)
    expected = normalized(pil.crop((left, top, left + 56, top + 56)))

    actual = eval_transform(prep(resize_size=resize_size, interpolation=interpolation))(image)

    assert actual.shape == (3, 56, 56)
    assert actual.dtype == torch.float32
    # both round to bytes: a grey level of difference
    torch.testing.assert_close(actual, expected, rtol=0, atol=1.01 * GREY_LEVEL)
    assert (actual - expected).abs().mean() < 0.1 * GREY_LEVEL


@pytest.mark.parametrize(("resize_size", "resized"), [(None, (92, 64)), (75, (75, 75))])
def test_training_crop_is_a_crop_of_the_resized_image(resize_size, resized):
    image = picture(90, 130)
    whole = normalized(to_pil(image).resize(resized, Image.Resampling.BILINEAR))
    every_crop = whole.unfold(1, 56, 1).unfold(2, 56, 1).permute(1, 2, 0, 3, 4)
    transform = train_transform(prep(resize_size=resize_size), "crop", hflip=0.0)
    places = set()
    for seed in range(20):
        torch.manual_seed(seed)
        distance = (every_crop - transform(image)).abs().amax(dim=(2, 3, 4))
        assert distance.min() <= 1.01 * GREY_LEVEL
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
        pixels = undo_normalize(transform(image)) * 255
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
        assert output.dtype == torch.float32
        assert undo_normalize(output).min() > -1e-6
        assert undo_normalize(output).max() < 1 + 1e-6
    assert torch.equal(torch.stack(outputs[0]), torch.stack(outputs[2]))
    assert not torch.equal(torch.stack(outputs[0]), torch.stack(outputs[1]))


def test_trivial_changes_colours_that_resized_crop_keeps():
    image = torch.full((3, 60, 60), 200, dtype=torch.uint8)
    constant = normalized(to_pil(image))[:, :56, :56]
    torch.manual_seed(0)
    plain = [train_transform(prep(), "resized_crop")(image) for _ in range(30)]
    trivial = [train_transform(prep(), "trivial")(image) for _ in range(30)]
    assert all(torch.allclose(output, constant, atol=1e-5) for output in plain)
    changed = sum(not torch.allclose(output, constant, atol=1e-5) for output in trivial)
    assert 10 < changed < 30


def test_random_erasing_puts_the_mean_colour():
    image = torch.full((3, 60, 60), 250, dtype=torch.uint8)
    torch.manual_seed(0)
    for _ in range(10):
        output = train_transform(prep(), "crop", random_erasing=1.0)(image)
        erased = (output == 0).all(dim=0)
        assert 0.01 < erased.float().mean() < 0.4
        rows, columns = erased.any(1).sum(), erased.any(0).sum()
        assert erased.sum() == rows * columns
    assert not (train_transform(prep(), "crop")(image) == 0).any()


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
    train_transform(prep(resize_size=80), "trivial", random_erasing=1.0)(image)
    assert torch.equal(image, before)


def test_preprocessing_follows_the_backbone_unless_told():
    backbone = {
        "mean": (0.5, 0.5, 0.5),
        "std": [0.25, 0.5, 1],
        "interpolation": "bicubic",
        "input_size": (3, 224, 224),
    }
    made = preprocessing_for(DataConfig(image_size=64, resize_size=80, crop_bottom=3), backbone)
    assert made == Preprocessing(64, 80, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.5, 1.0), 3)
    assert preprocessing_for(DataConfig(interpolation="bilinear"), backbone).interpolation == "bilinear"
