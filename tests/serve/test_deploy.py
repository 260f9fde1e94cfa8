"""The files in deploy/ name what exists: options, paths, ports, metrics, labels."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from layouts import write_image, write_run

pytest.importorskip("fastapi", reason="needs crossx[serve]")

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from crossx.cli.parser import build
from crossx.cli.serve import serve
from crossx.predict.predictor import Predictor
from crossx.serve import server
from crossx.serve.app import create_app
from crossx.serve.limits import Limits

ROOT = Path(__file__).parents[2]
KUBERNETES, MONITORING = ROOT / "deploy" / "kubernetes", ROOT / "deploy" / "monitoring"
ADDED = {"job", "instance", "namespace"}
"""Labels that Prometheus and its operator add."""


def read(path: Path) -> dict[str, Any]:
    (document,) = yaml.safe_load_all(path.read_text())
    return dict(document)


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    found = [read(path) for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml"]
    kinds = {manifest["kind"]: manifest for manifest in found}
    assert len(kinds) == len(found)
    return kinds


@pytest.fixture(scope="module")
def pod(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return dict(manifests["Deployment"]["spec"]["template"]["spec"])


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    return dict(container)


@pytest.fixture(scope="module")
def options(container: dict[str, Any]) -> dict[str, Any]:
    """The values of the container's command, parsed by the verb's own parser."""
    entry = re.findall(r"^ENTRYPOINT (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1]
    command, verb, path, *words = json.loads(entry)
    assert (command, verb, path) == ("crossx", "serve", "/model")
    values = build(serve, "serve").parse_args([*words, *container["args"], "--", path])
    return dict(values.as_dict())


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service that has answered one image, and refused a request."""
    folder = tmp_path_factory.mktemp("served")
    write_image(folder / "bird.jpg", 0, 0)
    with TestClient(create_app(Predictor.load(write_run(folder / "run"), device="cpu"))) as client:
        files = {"images": (folder / "bird.jpg").read_bytes()}
        assert client.post("/predict", files=files).status_code == 200
        client.post("/explain")
        yield client


@pytest.fixture(scope="module")
def metrics(client: TestClient) -> dict[str, set[str]]:
    """Every series of the service: its name and labels."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_each_manifest_is_applied_or_named_as_optional() -> None:
    text = (KUBERNETES / "kustomization.yaml").read_text()
    listed = read(KUBERNETES / "kustomization.yaml")["resources"]
    optional = re.findall(r"^  # - (\S+)", text, re.MULTILINE)
    here = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert {*listed, *optional} == here
    assert all((KUBERNETES / name).is_file() for name in [*listed, *optional])


def test_the_image_is_the_one_that_the_customization_replaces(container: dict[str, Any]) -> None:
    (image,) = read(KUBERNETES / "kustomization.yaml")["images"]
    assert image["name"] == container["image"]


def test_probes_ask_for_paths_that_answer(client: TestClient, container: dict[str, Any]) -> None:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert client.get(asked["path"], headers={"Host": "10.1.2.3:8000"}).status_code == 200
        assert asked["port"] in ports
    client.app.state.service.draining = True  # type: ignore[attr-defined]
    try:
        assert client.get(container["readinessProbe"]["httpGet"]["path"]).status_code == 503
        assert client.get(container["livenessProbe"]["httpGet"]["path"]).status_code == 200
    finally:
        client.app.state.service.draining = False  # type: ignore[attr-defined]


def test_everything_selects_the_pods_and_their_port(
    client: TestClient, manifests: dict[str, dict[str, Any]], options: dict[str, Any]
) -> None:
    deployment, service = manifests["Deployment"]["spec"], manifests["Service"]
    labels = deployment["template"]["metadata"]["labels"]
    (port,) = deployment["template"]["spec"]["containers"][0]["ports"]
    assert (port["containerPort"], options["host"]) == (options["port"], "0.0.0.0")
    (spread,) = deployment["template"]["spec"]["topologySpreadConstraints"]
    selectors = [
        deployment["selector"], spread["labelSelector"], manifests["PodDisruptionBudget"]["spec"]["selector"],
        manifests["NetworkPolicy"]["spec"]["podSelector"], {"matchLabels": service["spec"]["selector"]},
    ]  # fmt: skip
    for selector in selectors:
        assert selector == {"matchLabels": labels}
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert manifests["NetworkPolicy"]["spec"]["ingress"][0]["ports"] == [{"port": port["name"]}]
    monitor = manifests["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"] == service["metadata"]["labels"]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert client.get(endpoint["path"]).status_code == 200
    target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == manifests["Deployment"]["metadata"]["name"]
    # the alerts' job
    assert service["metadata"]["name"] == "crossx"


def test_a_pod_has_time_to_answer_what_it_accepted(
    monkeypatch: pytest.MonkeyPatch, pod: dict[str, Any], container: dict[str, Any], options: dict[str, Any]
) -> None:
    limits = Limits(timeout=options["timeout"])
    app = SimpleNamespace(state=SimpleNamespace(service=SimpleNamespace(limits=limits)))
    waits: list[int] = []

    class Stopped:
        def __init__(self, config: Any, *_: object) -> None:
            waits.append(config.timeout_graceful_shutdown)

        def run(self, **_: object) -> None:
            pass

    monkeypatch.setattr(server, "_Server", Stopped)
    with server.listen("127.0.0.1", 0) as listening:
        server.run(app, listening)  # type: ignore[arg-type]
    # the last of them is the network's thread, see Service.close
    drain = waits[0] + limits.timeout
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert drain + int(seconds) < pod["terminationGracePeriodSeconds"]
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["crossx"]
    assert drain < int(compose["stop_grace_period"].removesuffix("s"))


def test_an_update_takes_no_pod_away(manifests: dict[str, dict[str, Any]]) -> None:
    deployment = manifests["Deployment"]["spec"]
    assert deployment["strategy"]["type"] == "RollingUpdate"
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert deployment["strategy"]["rollingUpdate"]["maxSurge"] >= 1
    assert deployment["replicas"] > manifests["PodDisruptionBudget"]["spec"]["maxUnavailable"] >= 1
    assert manifests["HorizontalPodAutoscaler"]["spec"]["minReplicas"] == deployment["replicas"]


def test_threads_are_as_many_as_cores(container: dict[str, Any], options: dict[str, Any]) -> None:
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    cores = container["resources"]["limits"]["cpu"]
    assert cores == environment["OMP_NUM_THREADS"] == str(options["workers"])


def test_a_pod_has_no_privileges(pod: dict[str, Any], container: dict[str, Any]) -> None:
    recipe = (ROOT / "Dockerfile").read_text()
    user = int(re.findall(r"^USER (\d+)$", recipe, re.MULTILINE)[-1])
    assert pod["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": user, "runAsGroup": user, "fsGroup": user,
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert pod["automountServiceAccountToken"] is False
    # Kubernetes would set CROSSX_PORT and others for the Service
    assert pod["enableServiceLinks"] is False
    assert f"--chown={user}:{user}" in (ROOT / "deploy" / "model.Dockerfile").read_text()
    written = re.findall(r"(?:HOME|MPLCONFIGDIR)=(\S+)", recipe)
    assert len(written) == 2
    assert all(path.startswith("/tmp") for path in written)


def test_what_is_mounted_is_what_is_read(
    pod: dict[str, Any], container: dict[str, Any], options: dict[str, Any]
) -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert mounts["tmp"] == "/tmp"
    secret = volumes["api-keys"]["secret"]
    assert oct(secret["defaultMode"]) == "0o440"
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    created = re.search(r"create secret generic (\S+) --from-file=(\S+)", page)
    assert created is not None
    assert created[1] == secret["secretName"]
    assert options["api_key_file"] == f"{mounts['api-keys']}/{created[2]}"


def rules() -> list[dict[str, Any]]:
    (group,) = read(MONITORING / "alerts.yaml")["groups"]
    return list(group["rules"])


def dashboard() -> dict[str, Any]:
    return dict(json.loads((MONITORING / "dashboard.json").read_text()))


def expressions() -> Iterator[tuple[str, str]]:
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


@pytest.mark.parametrize(("name", "expression"), expressions())
def test_expressions_use_metrics_and_labels_that_exist(
    client: TestClient, metrics: dict[str, set[str]], name: str, expression: str
) -> None:
    recorded = {rule["record"]: {"label"} for rule in rules() if "record" in rule}
    known = metrics | recorded | {"up": set()}
    used = re.findall(r"(?<![\w:\"])(crossx[\w:]+|process_\w+|up)\b(?:\{([^}]*)\})?", expression)
    used = [(metric, matchers) for metric, matchers in used if metric != "crossx" or matchers]
    assert used
    labels: set[str] = set()
    for metric, matchers in used:
        assert metric in known
        labels |= known[metric]
        for label, operator, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', matchers):
            assert label in known[metric] | ADDED
            if label == "route":
                routes = {route.path for route in client.app.routes}  # type: ignore[attr-defined]
                assert set(value.split("|")) <= routes
            elif label == "job":
                assert value == "crossx"
            elif label == "outcome":
                assert f'crossx_images_total{{outcome="{value}"}}' in client.get("/metrics").text
            elif label == "status":
                assert operator == "=~" or "|" not in value
                assert set(value.split("|")) <= {"429", "500", "503", "504"}
    for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        assert set(group.replace(",", " ").split()) <= labels | ADDED


def test_every_alert_says_what_it_means() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    alerts = [rule for rule in rules() if "alert" in rule]
    assert [rule["alert"] for rule in alerts] == re.findall(r"^\| `(Crossx\w+)` ", page, re.MULTILINE)
    for rule in alerts:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_every_alert_fires_in_a_unit_test_of_its_own() -> None:
    tests = [case for path in MONITORING.glob("*.test.yaml") for case in read(path)["tests"]]
    firing = {
        check["alertname"] for case in tests for check in case["alert_rule_test"] if check.get("exp_alerts")
    }
    assert firing == {rule["alert"] for rule in rules() if "alert" in rule}


def test_panels_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_metrics_are_those_of_the_page(metrics: dict[str, set[str]]) -> None:
    section = (ROOT / "docs" / "serve.md").read_text().split("\n### Metrics\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` +\| \w+ +\|([^|]*)\|", section, re.MULTILINE)
    documented = {name: set(re.findall(r"`(\w+)`", labels.partition(":")[0])) for name, labels in rows}
    parts = re.compile(r"_(bucket|count|sum|created)$")
    exposed: dict[str, set[str]] = {}
    for name, labels in metrics.items():
        if name.startswith("crossx_") and not name.endswith("_created"):
            exposed.setdefault(parts.sub("", name), set()).update(labels - {"le"})
    assert documented == exposed


def promtool(*words: str | Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("needs promtool (Debian's package prometheus)")
    done = subprocess.run([program, *words], capture_output=True, text=True, cwd=MONITORING)
    assert done.returncode == 0, done.stdout + done.stderr


def test_expressions_are_promql(tmp_path: Path) -> None:
    variables = {"$__rate_interval": "5m", "$namespace": ".*"}
    written = []
    for number, (_, expression) in enumerate(expressions()):
        for variable, value in variables.items():
            expression = expression.replace(variable, value)
        written.append({"record": f"x{number}", "expr": expression})
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": [{"name": "all", "rules": written}]}))
    promtool("check", "rules", tmp_path / "rules.yaml")
    promtool("check", "rules", "alerts.yaml")


@pytest.mark.slow
def test_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", *sorted(path.name for path in MONITORING.glob("*.test.yaml")))


def test_manifests_fit_the_schemas_of_kubernetes(manifests: dict[str, dict[str, Any]]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for kind, manifest in manifests.items():
        if kind != "ServiceMonitor":
            kubernetes_validate.validate(manifest, "1.34", strict=True)


def test_the_image_of_a_model_has_the_files_of_a_run(tmp_path: Path) -> None:
    """A glob is written so that Docker does not insist on run.json, which a shared model lacks."""
    recipe = (ROOT / "deploy" / "model.Dockerfile").read_text()
    (copied,) = re.findall(r"^COPY (.*)$", recipe, re.MULTILINE)
    *patterns, target = [word for word in shlex.split(copied) if not word.startswith("--")]
    run = write_run(tmp_path / "run")
    (run / "run.json").write_text("{}")
    served = tmp_path / "served"
    served.mkdir()
    for pattern in patterns:
        for file in run.glob(pattern):
            shutil.copy(file, served)
    assert {file.name for file in served.iterdir()} == {"model.json", "model.safetensors", "run.json"}
    Predictor.load(served, "cpu")
    assert target == "/model/"
