"""What lies in deploy/ and what docs/operations.md says fit the server: settings, metrics, routes and times."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from topkapi.service.metrics import Metrics
from topkapi.service.server import LAST_SECONDS
from topkapi.service.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "topkapi.json").read_text())
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
MANIFESTS = [
    document
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]


def exposed() -> set[str]:
    """Every name under which a metric can be asked for."""
    names = set()
    for family in Metrics().registry.collect():
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        names |= {family.name + ending for ending in endings}
    return names


def test_every_metric_that_is_asked_for_is_there() -> None:
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
    asked += [rule["expr"] for rule in rules]
    asked += [DASHBOARD["templating"]["list"][0]["query"]["query"]]
    names = {name for expression in asked for name in re.findall(r"topkapi_\w+", expression)}
    assert len(asked) > 25 and names and names <= exposed(), names - exposed()
    metric = next(each for each in MANIFESTS if each["kind"] == "HorizontalPodAutoscaler")["spec"]["metrics"][0]
    assert metric["pods"]["metric"]["name"] in exposed()


def test_every_metric_is_in_the_document_and_on_the_dashboard() -> None:
    shown = json.dumps(DASHBOARD)
    for family in Metrics().registry.collect():
        assert family.name.removeprefix("topkapi_") in OPERATIONS, family.name
        assert family.name in shown, family.name


def test_panels_have_names_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)


def test_every_setting_that_is_named_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [path.read_text() for path in DEPLOY.rglob("*") if path.is_file()]
    texts += [(ROOT / name).read_text() for name in ("compose.yaml", "Dockerfile")] + [OPERATIONS]
    for text in texts:
        for name in re.findall(r"TOPKAPI_([A-Z_]+)", text):
            assert name.lower() in Settings.model_fields, name
    flags = set(re.findall(r"`(--[a-z-]+)", OPERATIONS))
    known = {"--json"} | {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    assert flags and flags <= known, flags - known


def test_the_manifests_settings_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = next(each for each in MANIFESTS if each["kind"] == "ConfigMap")["data"]["topkapi.yaml"]
    keys = tmp_path / "keys"
    keys.write_text("")
    file = tmp_path / "topkapi.yaml"
    file.write_text(settings.replace("/etc/topkapi/keys/keys", str(keys)))
    found = Settings.read(config=str(file))
    assert (found.host, found.log_format, found.keys) == ("0.0.0.0", "json", keys)
    pod = deployment()["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > sleep + found.drain_seconds + LAST_SECONDS
    assert container["command"][:2] == ["topkapi", "serve"]


def deployment() -> dict[str, Any]:
    return next(each for each in MANIFESTS if each["kind"] == "Deployment")


def test_what_stands_around_gives_the_drain_its_time() -> None:
    drain = Settings.model_fields["drain_seconds"].default
    unit = (DEPLOY / "topkapi.service").read_text()
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["topkapi"]
    for seconds in (re.search(r"TimeoutStopSec=(\d+)", unit)[1], compose["stop_grace_period"].removesuffix("s")):  # type: ignore[index]
        assert int(seconds) > drain + LAST_SECONDS


def test_what_is_published_without_keys_is_published_on_loopback() -> None:
    files = [ROOT / "compose.yaml", DEPLOY / "compose.monitoring.yaml"]
    for service in (each for path in files for each in yaml.safe_load(path.read_text())["services"].values()):
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    container = deployment()["spec"]["template"]["spec"]["containers"][0]
    assert container["securityContext"]["readOnlyRootFilesystem"] and "insecure" not in json.dumps(MANIFESTS)


def test_whatever_is_mounted_is_there() -> None:
    monitoring = yaml.safe_load((DEPLOY / "compose.monitoring.yaml").read_text())
    for service in monitoring["services"].values():
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                assert (ROOT / volume.partition(":")[0]).exists(), volume
    ignored = (DEPLOY / ".gitignore").read_text().split()
    assert {Path(secret["file"]).name for secret in monitoring["secrets"].values()} == set(ignored)


def test_probes_ask_routes_that_need_no_key() -> None:
    from topkapi.service.api.http.authority import OPEN

    container = deployment()["spec"]["template"]["spec"]["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in OPEN
