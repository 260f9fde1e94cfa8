"""What users of a version of crossx rely on: ``python tests/contract.py RUN`` prints it as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from crossx.cli.main import VERBS
from crossx.methods import list_methods, method_options
from crossx.predict.predictor import Predictor
from crossx.runs import ModelSpec, Preprocessing
from crossx.schema.model import ARCHITECTURE_ARGUMENTS
from crossx.serve.app import create_app
from test_documented_commands import options_of


def contract(run: Path) -> dict[str, Any]:
    """Return the keys of model.json, options of methods and verbs, HTTP requests and answers, and metrics."""
    app = create_app(Predictor.load(run, "cpu"), api_keys=["key"])
    with TestClient(app) as client:
        client.get("/healthz")
        text = client.get("/metrics").text
        headers = sorted(name for name in client.get("/healthz").headers if name.startswith("x-"))
    return {
        "model.json": sorted(["schema", *(field.name for field in fields(ModelSpec))]),
        "preprocessing": sorted(field.name for field in fields(Preprocessing)),
        "backbone_args": sorted([*ARCHITECTURE_ARGUMENTS, "block_args"]),
        "methods": {name: sorted(method_options(name)) for name in list_methods()},
        "verbs": {verb: sorted(options_of(verb)) for verb in VERBS},
        "http": _http(app),
        "headers": headers,
        "metrics": _metrics(text),
    }


def _http(app: FastAPI) -> dict[str, Any]:
    described = app.openapi()
    routes = {
        f"{verb.upper()} {path}": {
            "queries": sorted(query["name"] for query in route.get("parameters", ())),
            "bodies": sorted(route.get("requestBody", {}).get("content", ())),
            "statuses": sorted(route["responses"]),
        }
        for path, routes in described["paths"].items()
        for verb, route in routes.items()
    }
    answers = {
        name: {key: _type(value) for key, value in schema["properties"].items()}
        for name, schema in described["components"]["schemas"].items()
        if not name.startswith("HTTPValidation") and name != "ValidationError"
    }
    return {"routes": routes, "answers": answers}


def _type(schema: dict[str, Any]) -> str:
    """Return a field's type without its description."""
    if "anyOf" in schema:
        return " or ".join(_type(kind) for kind in schema["anyOf"])
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[1]
    inner = f" of {_type(schema['items'])}" if "items" in schema else ""
    return f"{schema.get('type', 'any')}{inner}"


def _metrics(text: str) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("crossx_") and not sample.name.endswith("_created"):
                found.setdefault(sample.name, set()).update(sample.labels)
    return {name: sorted(labels) for name, labels in sorted(found.items())}


if __name__ == "__main__":
    print(json.dumps(contract(Path(sys.argv[1])), indent=1))
