"""Handle requests: read the images, run them through the network in batches, and build the responses."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from fastapi import HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from numpy.typing import NDArray
from PIL import Image
from starlette.requests import ClientDisconnect
from torch import Tensor

from crossx.data.images import ImageError
from crossx.errors import UsageError
from crossx.explain.maps import Explanation, Kind
from crossx.explain.overlays import layer
from crossx.explain.plotting import save_png
from crossx.predict.identity import Identity
from crossx.predict.predictor import Answer, Predictor, class_number
from crossx.predict.results import ExplainedImage, Neighbor
from crossx.serve.batching import Batcher, ClosedError, QueueFullError
from crossx.serve.fairness import Capacity, Flow, ShareError
from crossx.serve.limits import Limits, share
from crossx.serve.monitoring import Metrics
from crossx.serve.neighbors import SimilarImages
from crossx.serve.schemas import (
    ExplainResponse,
    ImagePrediction,
    ModelInfo,
    Overlay,
    PredictResponse,
    Ranked,
    ServiceInfo,
)
from crossx.serve.uploads import BodyReader, CheckedUpload, Upload, client_of

T = TypeVar("T")

EXPLAINED_TOP = 5
"""Classes in the prediction of an explanation."""

_Prepared = tuple[Tensor, int, float | None]
"""A prepared image, the number of classes to name, and the coverage of its prediction set."""


class _Classified(NamedTuple):
    """The answer to an image, and the training images most similar to it."""

    answer: Answer
    near: tuple[Neighbor, ...]


class Service:
    """A predictor shared by concurrent requests.

    Args:
        predictor: The network; from now on only the service's own thread may use it.
        limits: Limits of the service.
        identity: The network's name, version and checksum.
        similar: Finds training images that are similar to those of a request.

    Attributes:
        draining: Whether new requests are refused because the service is stopping.
    """

    def __init__(
        self,
        predictor: Predictor,
        limits: Limits,
        identity: Identity,
        similar: SimilarImages | None = None,
    ) -> None:
        self._similar = similar
        self.limits, self.identity = limits, identity
        self.metrics = Metrics(
            identity,
            predictor.classes,
            limits.queue,
            queued=lambda: self._batcher.accepted,
            ready=lambda: self.ready,
        )
        self.draining = False
        self._predictor = predictor
        spec = predictor.spec
        self._model = ModelInfo(
            **vars(identity), method=spec.method, backbone=spec.backbone, dataset=spec.dataset
        )
        self._bodies = BodyReader(limits)
        self._images = Capacity(limits.queue, share(limits.queue, limits.max_images))
        self._work = Capacity(None, 2 * limits.max_request_work)
        self._explanations = Capacity(limits.max_explanations, share(limits.max_explanations))
        self._drawing = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._batcher = Batcher(
            max_batch=limits.max_batch,
            max_wait=limits.max_wait_ms / 1000,
            capacity=limits.queue,
            workers=limits.workers,
            observe=self.metrics.observe_batch,
        )

    @property
    def info(self) -> ServiceInfo:
        """The network, and the limits of a request."""
        spec, limits = self._predictor.spec, self.limits
        return ServiceInfo(
            model=self._model, classes=list(spec.classes), display_names=list(spec.display_names),
            temperature=spec.temperature,
            rejects=self._predictor.rejection is not None, coverage=self._predictor.coverage,
            explains=self._predictor.explains,
            max_images=limits.max_images, max_upload_mb=limits.max_upload_mb, max_pixels=limits.max_pixels,
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether the network's thread is running."""
        return self._batcher.alive

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self.alive and not self.draining

    def warm_up(self) -> None:
        """Run one grey image through the network, since the first is slower; raises ``CrossXError`` if it fails."""
        preprocessing = self._predictor.spec.preprocessing
        side = preprocessing.image_size
        image = torch.full((3, side + preprocessing.crop_bottom, side), 128, dtype=torch.uint8)
        grey = self._predictor.prepare(image)
        (done,) = self._batcher.submit([lambda: (grey, 1, self._predictor.coverage)], self._classify)
        done.result()

    async def predict(self, request: Request, top: int, coverage: float | None = None) -> PredictResponse:
        """Classify the images of a request; an image that cannot be read has ``error`` set.

        Args:
            request: The request with the images in its body.
            top: Classes per image, unless the body has ``top``.
            coverage: Coverage of the prediction sets; by default that of the predictor.

        Raises:
            HTTPException: See ``BodyReader.form``; 422 for a coverage that the network was not calibrated for, 429 if
                the queue is full, 503 while stopping, 504 on a timeout.
            ClientDisconnect: If the client disconnects.
        """
        if coverage is None:
            coverage = self._predictor.coverage
        else:
            try:
                self._predictor.least_probability(coverage)
            except UsageError as error:
                # which names the run's folder and an option of the command
                raise HTTPException(
                    422, f"query.coverage: the network was not calibrated for {coverage:g}."
                ) from error
        self._admit()
        async with self._bodies.form(request, self.limits.max_images) as form:
            uploads, top = form.uploads, form.top or top
            request.state.images = len(uploads)
            prepare = partial(self._prepare, top=top, coverage=coverage)
            classified = await self._run(request, uploads, prepare, self._classify)
        predictions = []
        for upload, found in zip(uploads, classified, strict=True):
            result, near = found if isinstance(found, _Classified) else (found, ())
            prediction = _answer(upload.name, result)
            if self._similar is not None:
                prediction.neighbors = await run_in_threadpool(self._similar.describe, near)
            predictions.append(prediction)
        for prediction in predictions:
            if prediction.probability is None:
                self.metrics.observe_unreadable()
            elif prediction.label is None:
                self.metrics.observe_rejection(prediction.probability)
            else:
                self.metrics.observe_prediction(prediction.label, prediction.probability)
        return PredictResponse(model=self._model, predictions=predictions)

    async def explain_png(self, request: Request, maps: Kind, target: str | None) -> bytes:
        """Draw where the network looks in the image of a request.

        Args:
            request: The request with the image in its body.
            maps: See ``Predictor.iter_explain``.
            target: Name of the class that class maps explain; by default the predicted one.

        Raises:
            HTTPException: As ``predict``; 422 for an unreadable image or an invalid ``target``, 501 if the network
                gives no explanations.
            ClientDisconnect: If the client disconnects.
        """
        return await self._explain(request, maps, target, self._figure)

    async def explain_json(self, request: Request, maps: Kind, target: str | None) -> ExplainResponse:
        """Return the prediction and the maps as images; arguments and errors as ``explain_png``."""
        return await self._explain(request, maps, target, self._layers)

    def close(self) -> bool:
        """Accept nothing more, and return whether everything accepted was answered in time."""
        self.draining = True
        finished = self._batcher.close(self.limits.timeout)
        self._drawing.shutdown(wait=finished, cancel_futures=True)
        return finished

    def _admit(self) -> None:
        """Refuse a request before its body is read."""
        if self.draining:
            raise _stopping()
        if self._batcher.full:
            raise _busy(self._batcher.retry_after())

    async def _explain(
        self,
        request: Request,
        maps: Kind,
        target: str | None,
        render: Callable[[Upload, ExplainedImage], T],
    ) -> T:
        if not self._predictor.explains:
            raise HTTPException(501, "an exported network only predicts: serve the run instead.")
        try:
            if target is not None and maps == "activation":
                raise UsageError("`target` requires maps=class.")
            if target is not None:
                class_number(target, self._predictor.classes, listed="/model")
        except UsageError as error:
            raise HTTPException(422, str(error)) from error
        self._admit()
        with self._hold(self._explanations, request, 1):
            async with self._bodies.form(request, 1) as form:
                request.state.images = 1
                (upload,) = form.uploads
                (explained,) = await self._run(
                    request,
                    form.uploads,
                    lambda checked: self._predictor.read(checked.data),
                    partial(self._explain_decoded, maps=maps, target=target),
                )
                drawn = self._drawing.submit(render, upload, _explained(explained))
                return await self._wait(request, asyncio.wrap_future(drawn), self._deadline())

    async def _run(
        self,
        request: Request,
        uploads: Sequence[Upload],
        prepare: Callable[[CheckedUpload], Any],
        run: Callable[[list[Any]], Sequence[T]],
    ) -> list[T | BaseException]:
        """Check images, then decode and run them; the result of an image that cannot be read is its error."""
        flow: Flow = (client_of(request), object())
        with self._hold(self._images, request, len(uploads)):
            deadline = self._deadline()
            checked = await self._wait(request, self._check(uploads, flow), deadline)
            good = [one for one in checked if isinstance(one, CheckedUpload)]
            work = sum(one.work for one in good)
            if len(good) > 1 and work > self.limits.max_request_work:
                raise HTTPException(
                    413, "the images of this request take too long to decode together: send fewer at a time."
                )
            with self._hold(self._work, request, work):
                try:
                    futures = self._batcher.submit(
                        [partial(prepare, one) for one in good],
                        run,
                        flow,
                        heavy=[one.work > self.limits.light_work for one in good],
                    )
                except QueueFullError as error:
                    raise _busy(error.retry_after) from error
                except ClosedError as error:
                    raise _stopping() from error
                results = await self._wait(request, _gathered(futures), deadline)
        answers = iter(results)
        return [next(answers) if isinstance(one, CheckedUpload) else one for one in checked]

    def _check(
        self, uploads: Sequence[Upload], flow: Flow
    ) -> asyncio.Future[list[CheckedUpload | BaseException]]:
        futures: list[Future[CheckedUpload]] = [Future() for _ in uploads]

        def check(upload: Upload, future: Future[CheckedUpload]) -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(upload.check(self.limits))
                except BaseException as error:
                    future.set_exception(error)

        for upload, future in zip(uploads, futures, strict=True):
            self._batcher.pool.submit(partial(check, upload, future), flow)
        return _gathered(futures)

    @contextmanager
    def _hold(self, capacity: Capacity, request: Request, amount: int) -> Iterator[None]:
        client = client_of(request)
        try:
            capacity.take(client, amount)
        except ShareError:
            raise _busy(self._batcher.retry_after()) from None
        try:
            yield
        finally:
            capacity.give(client, amount)

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.limits.timeout

    async def _wait(self, request: Request, work: asyncio.Future[T], deadline: float) -> T:
        """Wait for work in threads; cancel it at the deadline or when the client disconnects."""
        left = deadline - asyncio.get_running_loop().time()
        disconnected = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait((work, disconnected), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if disconnected.done():
                raise ClientDisconnect
            raise HTTPException(504, f"the response took longer than {self.limits.timeout} s.")
        finally:
            disconnected.cancel()
            work.cancel()

    def _prepare(self, upload: CheckedUpload, top: int, coverage: float | None) -> _Prepared:
        return self._predictor.prepare(upload.data), top, coverage

    def _classify(self, batch: list[_Prepared]) -> list[_Classified]:
        images, tops, coverages = zip(*batch, strict=True)
        answers = self._predictor.answer(images, max(tops), coverages)
        near = self._similar.find(images) if self._similar is not None else [()] * len(images)
        return [
            _Classified(answer._replace(top=answer.top[:top]), found)
            for answer, top, found in zip(answers, tops, near, strict=True)
        ]

    def _explain_decoded(
        self, images: list[Tensor], *, maps: Kind, target: str | None
    ) -> list[ExplainedImage]:
        explained = list(self._predictor.iter_explain(images, maps=maps, target=target))
        if explained[0].error is not None:
            raise ImageError(explained[0].error)
        return explained

    def _figure(self, upload: Upload, explained: ExplainedImage) -> bytes:
        # draws with matplotlib's axes, which take a while to import
        from crossx.explain.figures import FigureRow, caption, draw

        pixels, explanation = _parts(explained)
        text = caption(
            explanation,
            self._predictor.spec.display_names,
            name=upload.name or "",
            rejected=explained.rejected,
        )
        picture = io.BytesIO()
        save_png(draw([FigureRow(pixels, explanation, text)]), picture)
        return picture.getvalue()

    def _layers(self, upload: Upload, explained: ExplainedImage) -> ExplainResponse:
        pixels, explanation = _parts(explained)
        order = np.argsort(-explanation.probabilities, kind="stable")[:EXPLAINED_TOP]
        best = tuple((self._predictor.classes[i], float(explanation.probabilities[i])) for i in order)
        height, width = pixels.shape[:2]
        return ExplainResponse(
            prediction=_answer(upload.name, Answer(best, explained.rejected)),
            target=self._predictor.classes[explanation.target],
            size=height,
            image=_png(pixels),
            overlays=[
                Overlay(stage=stage, part=int(part) if part else None, png=_png(layer(map_, (height, width))))
                for name, map_ in explanation.maps.items()
                for stage, _, part in [name.partition(" part ")]
            ],
            boxes=None if explanation.boxes is None else explanation.boxes.tolist(),
        )


def _answer(name: str | None, result: Answer | BaseException) -> ImagePrediction:
    if isinstance(result, ImageError):
        return ImagePrediction(name=name, error=result.reason)
    if isinstance(result, BaseException):
        raise result
    top = [Ranked(label=label, probability=probability) for label, probability in result.top]
    return ImagePrediction(
        name=name,
        label=None if result.rejected else top[0].label,
        probability=top[0].probability,
        top=top,
        nearest=top[0].label,
        score=result.score,
        candidates=None if result.candidates is None else list(result.candidates),
    )


def _explained(result: ExplainedImage | BaseException) -> ExplainedImage:
    if isinstance(result, ImageError):
        raise HTTPException(422, f"the image {result.reason.rstrip('.')}.")
    if isinstance(result, UsageError):
        raise HTTPException(422, str(result))
    if isinstance(result, BaseException):
        raise result
    return result


def _parts(explained: ExplainedImage) -> tuple[NDArray[np.uint8], Explanation]:
    assert explained.pixels is not None
    assert explained.explanation is not None
    return explained.pixels, explained.explanation


def _gathered(futures: Iterable[Future[T]]) -> asyncio.Future[list[T | BaseException]]:
    """Wait for results or exceptions; unlike ``asyncio.gather``, nothing is logged if it is cancelled."""
    wrapped = [asyncio.wrap_future(future) for future in futures]

    async def gather() -> list[T | BaseException]:
        if wrapped:
            await asyncio.wait(wrapped)
        return [future.exception() or future.result() for future in wrapped]

    def finish(_: object) -> None:
        for future in wrapped:
            if not future.cancel() and not future.cancelled():
                future.exception()  # retrieved, or asyncio logs it

    task = asyncio.ensure_future(gather())
    task.add_done_callback(finish)
    return task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _png(pixels: NDArray[np.uint8]) -> str:
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "PNG")
    return base64.b64encode(picture.getvalue()).decode()


def _busy(retry_after: int) -> HTTPException:
    return HTTPException(429, "the queue is full; try again later.", {"Retry-After": str(retry_after)})


def _stopping() -> HTTPException:
    return HTTPException(503, "the service is stopping.", {"Retry-After": "5", "Connection": "close"})
