"""The HTTP application: routes, errors, documentation; what they do is in ``service``."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import APIKeyHeader
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from crossx.data.images import printable
from crossx.predict.predictor import Predictor
from crossx.serve.limits import Limits
from crossx.serve.monitoring import CLIENT_GONE, RequestMonitor, problem
from crossx.serve.schemas import (
    ExplainResponse,
    Health,
    PredictRequest,
    PredictResponse,
    Problem,
    ServiceInfo,
)
from crossx.serve.service import Service

PAGE = Path(__file__).parent / "page"
"""Static files: ``index.html`` is served at ``/``, all at ``/page``."""
PAGE_HEADERS = {
    # the page loads its own files alone; pictures come out of answers (data:)
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
API_KEY_HEADER = "X-API-Key"

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is malformed."},
    401: {"description": "The API key is missing or wrong."},
    408: {"description": "The body did not come in time."},
    413: {"description": "The body is too large, or has too many images."},
    415: {"description": "The body is neither multipart/form-data nor application/json."},
    422: {"description": "A value is wrong, or no image can be read."},
    429: {"description": "The queue is full; the header Retry-After says when to try again."},
    503: {"description": "The service is stopping."},
    504: {"description": "The answer took too long."},
}


def create_app(
    predictor: Predictor,
    limits: Limits | None = None,
    *,
    api_keys: Sequence[str] = (),
    cors: Sequence[str] = (),
) -> FastAPI:
    """Make the HTTP application of a trained network.

    Args:
        predictor: The network. The application's own thread uses it from here on.
        limits: What is taken at most.
        api_keys: Where there are any, ``/predict``, ``/explain`` and ``/model`` ask for one of them in the header
            ``X-API-Key``.
        cors: Origins whose pages may call the service from a browser; ``*`` for all.

    Returns:
        The application; ``app.state.service`` is its ``Service``. Its lifespan ends with all answers given.
    """
    service = Service(predictor, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    app = FastAPIOffline(
        title="crossx", version=version("crossx"), redoc_url=None, lifespan=lifespan,
        description="Fine-grained visual categorization: what is on images, and where the network looks.",
    )  # fmt: skip
    app.state.service = service
    _answer_errors(app)
    _add_health(app, service)
    _add_network(app, service, api_keys)
    _add_page(app)
    if cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=cors, allow_methods=["GET", "POST"],
            allow_headers=["Content-Type", API_KEY_HEADER, "X-Request-ID"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )  # fmt: skip
    app.add_middleware(RequestMonitor, metrics=service.metrics)
    return app


def _add_page(app: FastAPI) -> None:
    files = _PageFiles(directory=PAGE)
    # not at "/": it would answer for every path, and a wrong method were 404
    app.mount("/page", files, name="page")

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)


class _PageFiles(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


def _add_network(app: FastAPI, service: Service, api_keys: Sequence[str]) -> None:
    guards = _guards(api_keys)
    problems = {
        code: {**described, "model": Problem}
        for code, described in _PROBLEMS.items()
        if api_keys or code != 401
    }

    @app.get(
        "/model", dependencies=guards, tags=["network"], summary="The network and the limits of a request"
    )
    async def model() -> ServiceInfo:
        limits = service.limits
        return ServiceInfo(
            model=service.model, classes=list(service.classes), explains=service.explains,
            max_images=limits.max_images, max_upload_mb=limits.max_upload_mb, max_pixels=limits.max_pixels,
        )  # fmt: skip

    @app.post(
        "/predict", dependencies=guards, tags=["network"], summary="Name what is on images",
        response_model=PredictResponse, openapi_extra=_body(many=True),
        responses=problems | {422: {"description": "No image can be read (the errors stand in the predictions), "
                                    "or a value is wrong.", "model": PredictResponse | Problem}},
    )  # fmt: skip
    async def predict(
        request: Request, top: Annotated[int, Query(ge=1, description="Classes an image.")] = 5
    ) -> Response:
        answer = await service.predict(request, top)
        unreadable = all(prediction.error is not None for prediction in answer.predictions)
        return _json(answer, 422 if unreadable else 200)

    @app.post(
        "/explain", dependencies=guards, tags=["network"], summary="Show where the network looks in an image",
        openapi_extra=_body(many=False),
        responses=problems | {200: {"description": "A figure, or with format=json the prediction and the maps.",
                                    "content": {"image/png": {}}, "model": ExplainResponse},
                              501: {"description": "The network was exported, and gives predictions alone.",
                                    "model": Problem}},
    )  # fmt: skip
    async def explain(
        request: Request,
        maps: Annotated[
            Literal["activation", "class"],
            Query(description="Of every part and stage, or what speaks for a class."),
        ] = "activation",
        target: Annotated[
            str | None, Query(description="The class of class maps (default: the predicted one).")
        ] = None,
        format: Annotated[Literal["png", "json"], Query()] = "png",
    ) -> Response:
        if format == "json":
            return _json(await service.explain_json(request, maps, target))
        return Response(await service.explain_png(request, maps, target), media_type="image/png")


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get(
        "/healthz",
        tags=["health"],
        summary="Whether the process is sound",
        responses={503: {"model": Health}},
    )
    async def healthz() -> Response:
        return _json(Health(status="ok"), 200) if service.alive else _json(Health(status="dead"), 503)

    @app.get(
        "/readyz", tags=["health"], summary="Whether requests are taken", responses={503: {"model": Health}}
    )
    async def readyz() -> Response:
        return _json(Health(status="ready"), 200) if service.ready else _json(Health(status="stopping"), 503)

    @app.get("/metrics", tags=["health"], summary="Metrics for Prometheus")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> Response:
        headers = dict(error.headers or {})
        return problem(request.state.request_id, error.status_code, str(error.detail), headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return problem(request.state.request_id, 422, printable(f"{where}: {first['msg']}."))

    @app.exception_handler(ClientDisconnect)
    async def client_disconnected(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)


def _guards(api_keys: Sequence[str]) -> list[Any]:
    """Return the dependencies of routes that ask for a key."""
    if not api_keys:
        return []
    keys = [key.encode() for key in api_keys]

    def check(request: Request) -> None:
        given = request.headers.get(API_KEY_HEADER, "").encode()
        # all are compared, so that the time does not tell which it was either
        if not sum(hmac.compare_digest(given, key) for key in keys):
            raise HTTPException(
                401, f"the header {API_KEY_HEADER} is missing or wrong.", {"WWW-Authenticate": "APIKey"}
            )

    return [Security(APIKeyHeader(name=API_KEY_HEADER, auto_error=False)), Depends(check)]


def _body(*, many: bool) -> dict[str, Any]:
    """Describe a body for OpenAPI: the routes read theirs themselves, within limits."""
    files: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "string", "format": "binary"},
    }
    if not many:
        files["maxItems"] = 1
    form = {"type": "object", "required": ["images"], "properties": {"images": files}}
    content = {
        "multipart/form-data": {"schema": form},
        "application/json": {"schema": PredictRequest.model_json_schema()},
    }
    return {"requestBody": {"required": True, "content": content}}


def _json(content: BaseModel, status: int = 200) -> Response:
    return Response(content.model_dump_json(), status, media_type="application/json")
