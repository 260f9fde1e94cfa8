"""``crossx serve RUN``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from crossx.cli.options import VerbParser, add_prediction, add_run, natural, positive
from crossx.errors import CrossXError, UsageError

API_KEY_VARIABLE = "CROSSX_API_KEY"


def run(arguments: Sequence[str]) -> int:
    """Serve predictions over HTTP until SIGTERM or Ctrl-C; 0 when all that was accepted is answered."""
    parser = VerbParser(
        "serve",
        "Name what is on images, and show where the network looks, over HTTP: POST /predict and /explain, documented\n"
        "at /docs. Images of many requests go through the network together. SIGTERM and Ctrl-C finish what was\n"
        "accepted.\n"
        f"With {API_KEY_VARIABLE} or --api_key_file set, requests must bring the key in the header X-API-Key.\n"
        "Needs crossx[serve].",
        [
            "crossx serve runs/mine",
            "crossx serve runs/mine --host 0.0.0.0 --port 80 --api_key_file keys.txt",
            "crossx serve mine.onnx --flip",
            "curl -F images=@bird.jpg http://127.0.0.1:8000/predict",
            "curl -F images=@bird.jpg http://127.0.0.1:8000/explain -o maps.png",
        ],
    )
    add_run(parser, exported=True)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)"
    )
    parser.add_argument(
        "--port", type=natural, default=8000, metavar="N", help="port (default: %(default)s); 0: any free one"
    )
    add_prediction(parser)
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api_key_file",
        metavar="FILE",
        help=f"file with a key a line (default: the variable {API_KEY_VARIABLE})",
    )
    access.add_argument(
        "--cors", nargs="+", default=[], metavar="ORIGIN",
        help="origins whose web pages may call the service, such as https://example.org (default: none)",
    )  # fmt: skip
    access.add_argument(
        "--trusted_proxies", default="127.0.0.1", metavar="ADDRESSES",
        help="proxies whose X-Forwarded-* headers are believed, with commas between (default: %(default)s)",
    )  # fmt: skip
    limits = parser.add_argument_group("limits")
    for option, read, text in (
        ("max_batch", positive, "images a step (default: 16)"),
        ("max_wait_ms", natural, "milliseconds that an image waits for others being decoded (default: 5)"),
        ("queue", positive, "images accepted and not answered; beyond it requests get 429 (default: 128)"),
        ("max_upload_mb", positive, "megabytes of a request (default: 16)"),
        ("max_pixels", positive, "pixels of an image (default: 50000000)"),
        ("timeout", positive, "seconds for a request's head, its body, and the answer, each (default: 30)"),
        ("workers", positive, "threads that decode (default: one for each CPU core, at most 8)"),
    ):
        limits.add_argument(f"--{option}", type=read, metavar="N", help=text, default=argparse.SUPPRESS)
    options = parser.parse(arguments)
    keys = _api_keys(options.api_key_file)
    return _serve(options, keys)


def _serve(options: argparse.Namespace, keys: list[str]) -> int:
    try:
        from crossx.serve.app import create_app
        from crossx.serve.server import listen, log_as_json, run
    except ModuleNotFoundError as error:
        raise UsageError(f"crossx serve needs {error.name}: pip install 'crossx[serve]'.") from error

    from dataclasses import fields

    from crossx.predict.predictor import Predictor
    from crossx.serve.limits import Limits

    given = {
        field.name: value
        for field in fields(Limits)
        if (value := getattr(options, field.name, None)) is not None
    }
    limits = Limits(**given)
    with listen(options.host, options.port) as listening:
        predictor = Predictor.load(
            options.run,
            options.device,
            precision=options.precision,
            flip=options.flip,
            crops=options.crops,
            trust=options.trust,
        )
        app = create_app(predictor, limits, api_keys=keys, cors=options.cors)
        app.state.service.warm_up()
        host, port = listening.getsockname()[:2]
        print(f"crossx serve: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        log_as_json()
        run(app, listening, trusted_proxies=options.trusted_proxies)
    return 0


def _api_keys(file: str | None) -> list[str]:
    """Return the keys, from a file or the environment: a command's arguments are seen by every user of a machine."""
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
