"""Drawn images with structure at all scales."""

import numpy as np
from PIL import Image


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
