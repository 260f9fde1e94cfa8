"""What the service takes and gives, as JSON; the OpenAPI description is made of these."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ModelInfo(BaseModel):
    """The network that answers."""

    method: str = Field(examples=["crossx"])
    backbone: str = Field(examples=["mobilenetv2_035"])
    dataset: str = Field(examples=["cub"])


class ServiceInfo(BaseModel):
    """The network, its classes, and what a request may have."""

    model: ModelInfo
    classes: list[str] = Field(description="Names of the classes, in label order.")
    explains: bool = Field(description="Whether /explain answers; an exported file gives predictions alone.")
    max_images: int = Field(description="Images a request.")
    max_upload_mb: int = Field(description="Megabytes (10^6 bytes) of a request's body.")
    max_pixels: int = Field(description="Pixels an image.")


class PredictRequest(BaseModel):
    """Images as base64 of the bytes of image files."""

    model_config = ConfigDict(extra="forbid")

    images: list[str]
    top: int | None = Field(default=None, ge=1, description="Classes an image (default: 5).")


class Ranked(BaseModel):
    """One class and its probability."""

    label: str
    probability: float


class ImagePrediction(BaseModel):
    """What the network says about one image, or why it says nothing."""

    name: str | None = Field(description="File name that the client gave; null for base64.")
    label: str | None = Field(default=None, description="The most probable class.")
    probability: float | None = Field(default=None, description="Its calibrated probability.")
    top: list[Ranked] = Field(default=[], description="The most probable classes, best first.")
    error: str | None = Field(
        default=None, description="Why the image cannot be read; null where there is a prediction."
    )


class PredictResponse(BaseModel):
    """A prediction for each image, in the order of the request."""

    model: ModelInfo
    predictions: list[ImagePrediction]


class Overlay(BaseModel):
    """One map as a transparent picture."""

    stage: str = Field(
        description="Stage of the network, or `combined`; `CAM` or `Grad-CAM` before it for class maps."
    )
    part: int | None = Field(
        description="Number of the part, from 1; null where the network has one part only."
    )
    png: str = Field(description="Base64 of an RGBA PNG of the image's size, to lay over it.")


class ExplainResponse(BaseModel):
    """Where the network looks in one image."""

    prediction: ImagePrediction
    target: str = Field(description="The class that class maps explain.")
    size: int = Field(description="Pixels a side of the image and of each overlay.")
    image: str = Field(description="Base64 PNG of what the network saw: resized and cropped.")
    overlays: list[Overlay]
    boxes: list[list[float]] | None = Field(
        description="Regions that the network looks at again, best first: left, top, right, bottom in pixels of the "
        "image, and beyond it; null for a method without."
    )


class Problem(BaseModel):
    """An error."""

    detail: str = Field(description="What is wrong, on one line.")
    request_id: str


class Health(BaseModel):
    """Whether the service lives, or takes requests."""

    status: str
