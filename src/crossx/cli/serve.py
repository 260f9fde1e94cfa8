"""``crossx serve RUN``."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from crossx.cli.neighbors import open_index
from crossx.cli.options import Inference, PredictorPath, check_run
from crossx.cli.values import File, Natural
from crossx.errors import CrossXError, UsageError
from crossx.serve.limits import Limits
from crossx.terminal import step

API_KEY_VARIABLE = "CROSSX_API_KEY"


@dataclass(frozen=True)
class Access:
    """Access.

    Attributes:
        api_key_file: File with one key per line (default: the variable CROSSX_API_KEY).
        cors: Origins whose web pages may call the service, such as https://example.org (default: none).
        trusted_proxies: Proxies whose X-Forwarded-* headers are trusted, separated by commas.
        allowed_hosts: Names by which clients call the service, such as birds.example (default: those of loopback,
            and any with another --host).
    """

    api_key_file: File | None = None
    cors: Sequence[Annotated[str, "ORIGIN"]] = ()
    trusted_proxies: Annotated[str, "ADDRESSES"] = "127.0.0.1"
    allowed_hosts: Sequence[Annotated[str, "NAME"]] = ()


@contextmanager
def _stoppable() -> Iterator[None]:
    """End the process with code 0 and one line at a SIGTERM that comes before the server handles it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        # an exception could be caught by what is being imported, and nothing has to be cleaned up
        line = {
            "level": "INFO",
            "logger": "crossx.serve",
            "message": "stopped by SIGTERM before it was ready",
        }
        os.write(2, (json.dumps(line) + "\n").encode())
        os._exit(0)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@_stoppable()
def serve(
    run: PredictorPath,
    *,
    host: Annotated[str, "HOST"] = "127.0.0.1",
    port: Natural = 8000,
    model_name: Annotated[str, "NAME"] | None = None,
    model_version: Annotated[str, "VERSION"] | None = None,
    neighbors: Annotated[Natural, "K"] = 0,
    inference: Inference,
    access: Access,
    limits: Limits,
) -> None:
    """Serve predictions, and maps of where the network looks, over HTTP.

    The routes POST /predict and /explain are documented at /docs. Images of several requests go through the network in
    one batch. SIGTERM and Ctrl-C finish the accepted requests. With CROSSX_API_KEY or --api_key_file, requests need a
    key in the header X-API-Key. Needs crossx[serve].

    Args:
        host: Address to listen on; by default only this machine can connect.
        port: Port to listen on; 0 takes any free one.
        model_name: Name in answers and metrics (default: of the run folder, the model on the Hub or the file).
        model_version: Version in answers and metrics (default: the run's id, or the commit on the Hub).
        neighbors: Also answer with this many training images that are most similar, at most 10; needs a run folder and
            its training images.

    Examples:
        crossx serve runs/mine
        crossx serve runs/mine --host 0.0.0.0 --port 80 --api_key_file keys.txt
        crossx serve mine.onnx --flip
        crossx serve runs/mine --model_name birds --model_version 2026-03
        curl -F images=@bird.jpg http://127.0.0.1:8000/predict
        curl -F images=@bird.jpg http://127.0.0.1:8000/explain -o maps.png
    """
    keys = _api_keys(access.api_key_file)
    try:
        import uvicorn  # noqa: F401  # before the others, which take seconds

        check_run(run)
        with step("Loading PyTorch"):
            from crossx.serve.app import create_app
            from crossx.serve.browsers import allowed_hosts
            from crossx.serve.server import listen, log_as_json
            from crossx.serve.server import run as run_server
    except ModuleNotFoundError as error:
        raise UsageError(f"crossx serve needs {error.name}: pip install 'crossx[serve]'.") from error

    from crossx.predict.identity import identify
    from crossx.predict.predictor import Predictor

    with listen(host, port) as listening:
        with step("Loading the network"):
            predictor = Predictor.load(run, **vars(inference))
        identity = identify(predictor, model_name, model_version)
        similar = None
        if neighbors:
            from crossx.serve.neighbors import SimilarImages, check_top

            check_top(neighbors)
            similar = SimilarImages(open_index(predictor), neighbors)
        log_as_json()
        address, port = listening.getsockname()[:2]
        app = create_app(
            predictor, limits, api_keys=keys, cors=access.cors,
            allowed_hosts=allowed_hosts(access.allowed_hosts, host, address), identity=identity,
            similar=similar,
        )  # fmt: skip
        app.state.service.warm_up()
        url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        run_server(
            app,
            listening,
            trusted_proxies=access.trusted_proxies,
            ready=lambda: print(f"crossx serve: {url}", flush=True),
        )


def _api_keys(file: str | None) -> list[str]:
    """Return the keys from a file or the environment, as every user of a machine sees a command's arguments."""
    where = file or API_KEY_VARIABLE
    if file is None:
        if API_KEY_VARIABLE not in os.environ:
            return []
        text = os.environ[API_KEY_VARIABLE]
    else:
        text = Path(file).read_text(encoding="utf-8", errors="replace")
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise CrossXError(f"{where}: there is no API key in it.")
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise CrossXError(f"{where}: an API key may have printable ASCII characters only.")
    return keys
