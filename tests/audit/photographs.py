"""Drawn images with structure at all scales."""

import numpy as np
from PIL import Image

SHOT = 256
"""Side of the photographs of products, in pixels."""


def photograph(seed: int, colour: tuple[float, float, float] = (1, 1, 1), side: int = 96) -> Image.Image:
    """Draw structure at all scales, as photographs have it: noise whose amplitude falls with the frequency."""
    generator = np.random.default_rng(seed)
    rows, columns = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    spectrum = np.fft.fft2(generator.normal(size=(side, side))) / np.maximum(
        np.hypot(rows, columns), 1 / side
    )
    grey = np.fft.ifft2(spectrum).real
    grey = 127 + 50 * (grey - grey.mean()) / grey.std()
    return Image.fromarray((grey[..., None] * np.array(colour)).clip(0, 255).astype(np.uint8))


def product(kind: int, shot: int) -> Image.Image:
    """Photograph a product once more: the same object in the same pose, with noise and in another light."""
    generator = np.random.default_rng(1000 * kind + shot)
    pixels = np.asarray(photograph(kind, side=SHOT), dtype=np.float64)
    # light from another side
    slope = generator.normal(0, 0.15, 2)
    ramp = 1 + slope[0] * np.linspace(-1, 1, SHOT)[:, None] + slope[1] * np.linspace(-1, 1, SHOT)
    noise = generator.normal(0, 40, pixels.shape[:2])
    return Image.fromarray((pixels * ramp[..., None] + noise[..., None]).clip(0, 255).astype(np.uint8))
