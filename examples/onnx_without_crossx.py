"""Classify images with an ONNX file of `crossx export`, with only onnxruntime and Pillow.

pip install onnxruntime pillow
python onnx_without_crossx.py model.onnx bird.jpg more.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepare(image, to):
    """Return an opened image as the network takes it, uint8 (1, 3, size, size); ``to`` is the file's "input"."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    image = image.crop((0, 0, image.width, image.height - to["crop_bottom"]))
    if "shorter_side" in to["resize"]:
        side = to["resize"]["shorter_side"]
        width, height = (int(side * length / min(image.size)) for length in image.size)
    else:
        width, height = to["resize"]["width"], to["resize"]["height"]
    # Pillow's resize always filters against aliasing
    image = image.resize((width, height), Image.Resampling[to["interpolation"].upper()])
    left, top = round((width - to["size"]) / 2), round((height - to["size"]) / 2)
    image = image.crop((left, top, left + to["size"], top + to["size"]))
    return np.asarray(image).transpose(2, 0, 1)[None]


def main(model, paths):
    """Print path, most probable class and its probability, one line per image."""
    session = onnxruntime.InferenceSession(model, providers=onnxruntime.get_available_providers())
    about = json.loads(session.get_modelmeta().custom_metadata_map["crossx"])
    for path in paths:
        with Image.open(path) as image:
            pixels = prepare(image, about["input"])
        (probabilities,) = session.run(["probabilities"], {"images": pixels})[0]
        best = probabilities.argmax()
        print(f"{path}\t{about['classes'][best]}\t{probabilities[best]:.6f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
