"""The HTTP application: routes, errors and documentation."""

from __future__ import annotations

import hmac
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse
from starlette.types import Scope

from crossx.data.images import printable
from crossx.predict.identity import Identity, identify
from crossx.predict.predictor import Predictor
from crossx.schema.base import shown
from crossx.serve.browsers import ANY, BrowserGuard, SecureHeaders, page_policy
from crossx.serve.limits import Limits
from crossx.serve.monitoring import (
    CLIENT_CLOSED_REQUEST,
    MODEL_HEADERS,
    RequestMonitor,
    model_headers,
    problem,
)
from crossx.serve.neighbors import SimilarImages
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
"""Static files, served at ``/page``; ``index.html`` also at ``/``."""
PAGE_HEADERS = {
    # only the page's own files, and images in responses (data:)
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}
API_KEY_HEADER = "X-API-Key"
_DOCS = "/static-offline-docs"
"""Where fastapi_offline serves the files of Swagger UI."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body or the header Host is malformed."},
    401: {"description": "The API key is missing or wrong."},
    403: {"description": "A page of another site sent the request."},
    408: {"description": "The body was not received in time."},
    413: {"description": "The body is too large, or has too many images."},
    415: {"description": "The body is neither multipart/form-data nor application/json nor an image."},
    422: {"description": "A value is invalid, or no image can be read."},
    429: {"description": "The queue is full; try again after the seconds in the header Retry-After."},
    503: {"description": "The service is stopping."},
    504: {"description": "The response took too long."},
}


def create_app(
    predictor: Predictor,
    limits: Limits | None = None,
    *,
    api_keys: Sequence[str] = (),
    cors: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (ANY,),
    identity: Identity | None = None,
    similar: SimilarImages | None = None,
) -> FastAPI:
    """Create the HTTP application of a trained network.

    Args:
        predictor: The network; from now on only the application's own thread may use it.
        limits: Limits of the service.
        api_keys: If any are given, ``/predict``, ``/explain`` and ``/model`` require one of them in the header
            ``X-API-Key``.
        cors: Origins whose pages may call the service from a browser; ``*`` for all.
        allowed_hosts: Names by which clients may call the service, besides those of loopback; ``*`` for all.
        identity: Name, version and checksum of the network, by default those of ``identify``.
        similar: Finds training images that are similar to those of a request; None leaves them out.

    Returns:
        The application; ``app.state.service`` is its ``Service``. Its lifespan ends when all requests are answered.
    """
    service = Service(predictor, limits or Limits(), identity or identify(predictor), similar)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    app = FastAPIOffline(
        title="crossx", version=version("crossx"), docs_url=None, redoc_url=None, lifespan=lifespan,
        dependencies=[Depends(_refuse_unknown_query)], responses={422: {**_PROBLEMS[422], "model": Problem}},
        description="Fine-grained image classification, and where the network looks.",
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
            expose_headers=["Retry-After", "X-Request-ID", *MODEL_HEADERS],
        )  # fmt: skip
    app.add_middleware(BrowserGuard, hosts=allowed_hosts, origins=cors)
    app.add_middleware(RequestMonitor, metrics=service.metrics, headers=model_headers(service.identity))
    app.add_middleware(SecureHeaders)
    app.add_middleware(CorrelationIdMiddleware, validator=lambda given: bool(_REQUEST_ID.fullmatch(given)))
    return app


def _add_page(app: FastAPI) -> None:
    files = _PageFiles(directory=PAGE)
    # mounted at "/" it would match every path, and a wrong method would be 404 instead of 405
    app.mount("/page", files, name="page")

    documentation = get_swagger_ui_html(
        openapi_url="/openapi.json", title="crossx",
        swagger_js_url=f"{_DOCS}/swagger-ui-bundle.js", swagger_css_url=f"{_DOCS}/swagger-ui.css",
        swagger_favicon_url="/page/icon.svg",
    ).body  # fmt: skip
    policy = page_policy(bytes(documentation).decode())

    async def docs(request: Request) -> Response:
        return HTMLResponse(documentation, headers={"Content-Security-Policy": policy})

    async def index(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    # unlike the endpoints, pages take any query, such as those that links add
    app.add_route("/docs", docs, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_route("/", index, methods=["GET", "HEAD"], include_in_schema=False)


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
        "/model",
        dependencies=guards,
        tags=["network"],
        summary="Describe the network and the limits of a request",
    )
    async def model() -> ServiceInfo:
        return service.info

    @app.post(
        "/predict", dependencies=guards, tags=["network"], summary="Classify images",
        response_model=PredictResponse, openapi_extra=_body(many=True),
        responses=problems | {422: {"description": "No image can be read (see the errors in the predictions), "
                                    "or a value is invalid.", "model": PredictResponse | Problem}},
    )  # fmt: skip
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, description="Classes per image.")] = 5,
        coverage: Annotated[
            float | None, Query(ge=0.5, le=0.99, description="Coverage of the prediction sets, such as 0.9.")
        ] = None,
    ) -> Response:
        answer = await service.predict(request, top, coverage)
        unreadable = all(prediction.error is not None for prediction in answer.predictions)
        return _json(answer, 422 if unreadable else 200)

    @app.post(
        "/explain", dependencies=guards, tags=["network"], summary="Show where the network looks in an image",
        openapi_extra=_body(many=False),
        responses=problems | {200: {"description": "A figure, or with format=json the prediction and the maps.",
                                    "content": {"image/png": {}}, "model": ExplainResponse},
                              501: {"description": "An exported network only predicts.",
                                    "model": Problem}},
    )  # fmt: skip
    async def explain(
        request: Request,
        maps: Annotated[
            Literal["activation", "class"],
            Query(description="Maps of every part and stage, or of the evidence for a class."),
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
    @app.head("/healthz", include_in_schema=False)
    @app.get(
        "/healthz",
        tags=["health"],
        summary="Whether the process is healthy",
        responses={503: {"model": Health}},
    )
    async def healthz() -> Response:
        return _json(Health(status="ok"), 200) if service.alive else _json(Health(status="dead"), 503)

    @app.head("/readyz", include_in_schema=False)
    @app.get(
        "/readyz",
        tags=["health"],
        summary="Whether requests are accepted",
        responses={503: {"model": Health}},
    )
    async def readyz() -> Response:
        return _json(Health(status="ready"), 200) if service.ready else _json(Health(status="stopping"), 503)

    @app.get("/metrics", tags=["health"], summary="Metrics for Prometheus")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> Response:
        detail, headers = str(error.detail), dict(error.headers or {})
        # those of starlette have no more than the name of the status
        if detail == HTTPStatus(error.status_code).phrase:
            detail = _explained(request, error.status_code, headers) or detail
        return problem(error.status_code, detail, headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return problem(422, printable(f"{where}: {first['msg']}."))

    @app.exception_handler(ClientDisconnect)
    async def client_disconnected(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


def _explained(request: Request, status: int, headers: Mapping[str, str]) -> str | None:
    path = shown(request.url.path)
    if status == 404:
        return f"there is no path {path}: /docs lists the requests."
    if status == 405:
        # starlette joins a set, whose order differs between processes
        allowed = sorted(headers.get("Allow", "GET, HEAD").split(", "))
        return f"{path} does not take {shown(request.method)}, only {', '.join(allowed)}."
    return None


async def _refuse_unknown_query(request: Request) -> None:
    """Refuse queries that an endpoint does not take, and values that would replace each other."""
    route: APIRoute = request.scope["route"]
    known = [parameter.alias for parameter in route.dependant.query_params]
    for name in request.query_params:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise HTTPException(422, f"query.{shown(name)}: not known here, {route.path} {takes}.")
        if len(request.query_params.getlist(name)) > 1:
            raise HTTPException(422, f"query.{name}: given more than once.")


def _guards(api_keys: Sequence[str]) -> list[Any]:
    """Return the dependencies of routes that require a key."""
    if not api_keys:
        return []
    keys = [key.encode() for key in api_keys]

    def check(request: Request) -> None:
        given = request.headers.get(API_KEY_HEADER, "").encode()
        # compare with every key, so that the time does not reveal which one matched
        if not sum(hmac.compare_digest(given, key) for key in keys):
            raise HTTPException(
                401, f"the header {API_KEY_HEADER} is missing or wrong.", {"WWW-Authenticate": "APIKey"}
            )

    return [Security(APIKeyHeader(name=API_KEY_HEADER, auto_error=False)), Depends(check)]


def _body(*, many: bool) -> dict[str, Any]:
    """Describe a body for OpenAPI; ``BodyReader`` reads it instead of FastAPI."""
    binary = {"type": "string", "format": "binary"}
    files: dict[str, Any] = {"type": "array", "minItems": 1, "items": binary}
    files |= {} if many else {"maxItems": 1}
    form = {"type": "object", "required": ["images"], "properties": {"images": files}}
    content = {
        "multipart/form-data": {"schema": form},
        "application/json": {"schema": PredictRequest.model_json_schema()},
        "image/*": {"schema": binary},
        "application/octet-stream": {"schema": binary},
    }
    return {"requestBody": {"required": True, "content": content}}


def _json(content: BaseModel, status: int = 200) -> Response:
    return Response(content.model_dump_json(), status, media_type="application/json")
