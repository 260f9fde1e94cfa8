import io

import numpy as np
import pytest
from PIL import Image

from crossx.data.geometry import read_view
from crossx.data.images import ImageError
from crossx.data.transforms import eval_transform
from crossx.runs import Preprocessing


def encoded(width: int, height: int, form: str) -> bytes:
    """Return a smooth picture, as photographs are, with some noise."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = np.stack([np.sin(9 * x + 4 * y + shift) for shift in range(3)], axis=2)
    noise = np.random.default_rng(0).normal(0, 4, waves.shape)
    file = io.BytesIO()
    Image.fromarray((127 + 110 * waves + noise).clip(0, 255).astype(np.uint8)).save(file, form, quality=95)
    return file.getvalue()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("pipeline", ["fast", "strict"])
@pytest.mark.parametrize(
    ("width", "height", "image_size", "resize_size", "bottom", "form"),
    [
        (300, 200, 64, None, 0, "JPEG"),
        (300, 200, 64, 80, 0, "PNG"),
        (97, 333, 48, 48, 13, "PNG"),
        (40, 30, 64, None, 0, "JPEG"),
        (900, 30, 32, None, 0, "PNG"),  # cut to the largest aspect ratio
        (1, 1, 8, None, 0, "PNG"),
    ],
)
def test_the_view_is_the_networks_input(
    interpolation, pipeline, width, height, image_size, resize_size, bottom, form
):
    prep = Preprocessing(
        image_size, resize_size, interpolation, (0.5,) * 3, (0.5,) * 3, crop_bottom=bottom, pipeline=pipeline
    )
    source, transform = encoded(width, height, form), eval_transform(prep)
    expected = transform(transform.read(source)).permute(1, 2, 0).numpy().astype(int)
    view = read_view(source, prep)
    assert view.shape == (image_size, image_size, 3)
    # without resize_size the longer side is rounded to whole pixels, which moves the crop by less than half a pixel
    difference = np.abs(view - expected)
    assert difference.mean() < 1
    assert np.quantile(difference, 0.99) <= 4


def test_a_smaller_view_shows_the_same():
    prep = Preprocessing(96, 112, "bilinear", (0.5,) * 3, (0.5,) * 3)
    source = encoded(300, 200, "JPEG")
    large = Image.fromarray(read_view(source, prep)).resize((24, 24), Image.Resampling.BOX)
    assert np.abs(read_view(source, prep, 24).astype(int) - np.asarray(large)).mean() < 3


def test_nothing_above_the_cut_off_rows():
    with pytest.raises(ImageError, match="is 30 rows high"):
        read_view(
            encoded(40, 30, "PNG"), Preprocessing(8, 8, "bilinear", (0.5,) * 3, (0.5,) * 3, crop_bottom=30)
        )
