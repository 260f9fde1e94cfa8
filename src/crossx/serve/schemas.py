"""Requests and responses of the service as pydantic models, the source of its OpenAPI description."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ModelInfo(BaseModel):
    """The served network."""

    name: str = Field(examples=["mine"], description="Name of the run, the model on the Hub or the file.")
    version: str = Field(
        examples=["d43f4625648d40a69d9a9c047a4cdf0c"], description="Id of the run, or commit."
    )
    checksum: str | None = Field(description="SHA-256 of the weights file.")
    method: str = Field(examples=["crossx"])
    backbone: str = Field(examples=["mobilenetv2_035"])
    dataset: str = Field(examples=["cub"])


class ServiceInfo(BaseModel):
    """The network, its classes, and the limits of a request."""

    model: ModelInfo
    classes: list[str] = Field(description="Class names in label order.")
    display_names: list[str] = Field(description="The class names as the page shows them, in the same order.")
    temperature: float = Field(description="Probabilities are softmax(logits / temperature).")
    rejects: bool = Field(
        description="Whether `label` is null for an image of none of the classes; see `nearest`."
    )
    coverage: float | None = Field(
        description="Coverage of `candidates`, unless the query `coverage` has another; null for none."
    )
    explains: bool = Field(description="Whether /explain works; an exported network only predicts.")
    max_images: int = Field(description="Images per request.")
    max_upload_mb: int = Field(description="Megabytes (10^6 bytes) of a request's body.")
    max_pixels: int = Field(description="Pixels per image.")


class PredictRequest(BaseModel):
    """Image files, base64-encoded."""

    model_config = ConfigDict(extra="forbid")

    images: list[str]
    top: int | None = Field(default=None, ge=1, description="Classes per image (default: 5).")


class Ranked(BaseModel):
    """A class and its probability."""

    label: str
    probability: float


class SimilarImage(BaseModel):
    """A training image that is similar to the image."""

    label: str
    similarity: float = Field(description="Cosine of the features, -1 to 1.")
    path: str = Field(
        description="Path relative to the folder of the training images; of an image elsewhere only the file's name."
    )
    webp: str | None = Field(description="Base64-encoded thumbnail; null if the image is no longer there.")


class ImagePrediction(BaseModel):
    """The prediction for one image, or why there is none."""

    name: str | None = Field(description="File name as sent by the client; null for base64.")
    label: str | None = Field(
        default=None, description="The most probable class; null for an image of none of the classes."
    )
    probability: float | None = Field(
        default=None, description="Calibrated probability of the most probable class."
    )
    top: list[Ranked] = Field(default=[], description="The most probable classes, best first.")
    neighbors: list[SimilarImage] | None = Field(
        default=None, description="The most similar training images, if the service has --neighbors."
    )
    nearest: str | None = Field(default=None, description="The most probable class, also if `label` is null.")
    score: float | None = Field(
        default=None, description="Below a threshold for an image of none of the classes; null without one."
    )
    candidates: list[str] | None = Field(
        default=None,
        description="With a coverage, the classes that have the image's own among them with that probability.",
    )
    error: str | None = Field(
        default=None, description="Why the image cannot be read; null if there is a prediction."
    )


class PredictResponse(BaseModel):
    """One prediction per image, in the order of the request."""

    model: ModelInfo
    predictions: list[ImagePrediction]


class Overlay(BaseModel):
    """One map as a transparent image."""

    stage: str = Field(
        description="Stage of the network, or `combined`; class maps are prefixed with `CAM` or `Grad-CAM`."
    )
    part: int | None = Field(description="Number of the part, from 1; null if the network has only one part.")
    png: str = Field(description="Base64-encoded RGBA PNG of the image's size.")


class ExplainResponse(BaseModel):
    """Where the network looks in one image."""

    prediction: ImagePrediction
    target: str = Field(description="The class that class maps explain.")
    size: int = Field(description="Width and height of the image and of each overlay, in pixels.")
    image: str = Field(description="Base64-encoded PNG of the network's input: resized and cropped.")
    overlays: list[Overlay]
    boxes: list[list[float]] | None = Field(
        description="Regions that the network examines again, best first: left, top, right, bottom in pixels of the "
        "image; they may extend beyond it. Null for methods without regions."
    )


class Problem(BaseModel):
    """An error."""

    detail: str = Field(description="What is wrong, on one line.")
    request_id: str


class Health(BaseModel):
    """State of the service."""

    status: str
