"""What those who run it see: the log of a request from the proxy to the retriever; metrics, dashboards and alerts."""

import json
import re
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve

from longclip.checkpoint import Checkpoint
from pipelines import embed, finetune, prepare
from serving.app import AppArgs, build
from tests.support.local_serve import local_serve
from tests.support.places import ROOT
from tests.support.programs import needs_programs
from tests.support.rows import write_rows
from tests.support.scenes_index import write_index

KEY = "a-key-that-no-log-holds"
CAPTION = "a caption that no log holds"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
DEADLINE_SECONDS = 60
MONITORING = ROOT / "infra" / "monitoring"
DASHBOARDS = sorted((MONITORING / "dashboards").glob("*.json"))
REPORT_MS = "200"


@pytest.fixture(scope="module")
def client(
    tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client of an application with its index in a retriever and the logging of infra/serve.yaml."""
    index = write_index(tmp_path_factory.mktemp("serving") / "index", tiny_checkpoint, tiny_checkpoint_dir)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serving.middleware:before_serve")
        environment.setenv("LONGCLIP_API_KEYS", KEY)
        environment.setenv("RAY_metrics_report_interval_ms", REPORT_MS)
        logging = yaml.safe_load((ROOT / "infra" / "serve.yaml").read_text())["logging_config"]
        with local_serve(logging_config=logging) as url:
            arguments = AppArgs(model=str(tiny_checkpoint_dir), index=str(index), retrievers=1, torch_threads=1)
            serve.run(build(arguments), name="longclip", logging_config=logging)
            with httpx.Client(base_url=url, timeout=60, headers={"X-API-Key": KEY}) as client:
                yield client


def search(client: httpx.Client, **headers: str) -> httpx.Response:
    return client.post("/v1/search", json={"query": {"text": CAPTION}}, headers=headers)


def log_files() -> list[Path]:
    return sorted(Path(ray._private.worker._global_node.get_logs_dir_path()).rglob("*"))


def lines_of(request_id: str) -> dict[str, list[dict]]:
    """What each kind of process wrote about a request, waiting until all of them have written."""
    wanted = {"proxy", "longclip_longclip", "longclip_retriever"}
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        found: dict[str, list[dict]] = {}
        for path in log_files():
            if path.match("serve/*.log") and not path.match("controller_*"):  # which knows no requests
                whole = path.read_text().rpartition("\n")[0]  # the last line may be half-written
                for line in map(json.loads, whole.splitlines()):
                    if line.get("request_id") == request_id:
                        found.setdefault(line.get("deployment", line["component_name"]), []).append(line)
        if found.keys() >= wanted:
            return found
        assert time.monotonic() < deadline, f"only {found.keys()} wrote of {request_id}"
        time.sleep(0.2)


def test_trace_id_of_a_request_is_in_every_log(client: httpx.Client) -> None:
    response = search(client, traceparent=f"00-{TRACE}-00f067aa0ba902b7-01")
    assert response.status_code == 200
    assert response.headers.get_list("X-Request-ID") == [TRACE]
    found = lines_of(TRACE)
    assert "/v1/search 200" in found["longclip_longclip"][-1]["message"]
    assert "CALL call OK" in found["longclip_retriever"][-1]["message"]


def test_a_request_without_an_id_gets_one_that_leads_to_its_log(client: httpx.Client) -> None:
    ids = [search(client).headers["X-Request-ID"] for _ in range(2)]
    assert ids[0] != ids[1]
    for request_id in ids:
        lines_of(request_id)
    assert search(client, **{"X-Request-ID": "order-66"}).headers["X-Request-ID"] == "order-66"
    assert search(client, **{"X-Request-ID": CAPTION}).headers["X-Request-ID"] != CAPTION


def test_no_log_holds_texts_or_keys(client: httpx.Client) -> None:
    refused = client.post("/v1/embeddings", json={"input": [CAPTION, {"image": CAPTION}]})
    assert refused.status_code == 422
    assert client.post("/v1/embeddings", json={"input": CAPTION}, headers={"X-API-Key": KEY[1:]}).status_code == 401
    lines_of(search(client).headers["X-Request-ID"])
    for path in log_files():
        if path.is_file():
            written = path.read_text(errors="replace")
            assert CAPTION not in written, path
            assert KEY[1:] not in written, path


def panels(dashboard: Path) -> list[dict[str, Any]]:
    return [panel for panel in json.loads(dashboard.read_text())["panels"] if panel["type"] != "row"]


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> list[str]:
    """All that dashboards and alerts ask Prometheus; variables of dashboards are left to match everything."""
    asked = [target["expr"] for dashboard in DASHBOARDS for panel in panels(dashboard) for target in panel["targets"]]
    asked += [rule["expr"] for rule in alerts()]
    return [query.replace("$run", ".*") for query in asked]


def asked_metrics() -> set[str]:
    """Names of the metrics in all queries, but for those that Prometheus itself makes (`up`)."""
    return {
        name for query in queries() for name in re.findall(r"\b(?:ray|longclip)_\w+", re.sub(r'"[^"]*"', "", query))
    }


def exported_metrics() -> set[str]:
    """Names of the metrics that the node of this test exports now."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return set(re.findall(r"^(\w+)[{ ]", answer.read().decode(), re.MULTILINE))


@contextmanager
def noted_metrics() -> Iterator[set[str]]:
    """Names of all metrics that were exported while the context lasted."""
    names, done = set[str](), threading.Event()

    def note() -> None:
        while not done.wait(0.2):
            names.update(exported_metrics())

    thread = threading.Thread(target=note)
    thread.start()
    try:
        yield names
    finally:
        done.set()
        thread.join()


def run_job(entry: Any, *settings: str) -> None:
    entry.main([part for setting in settings for part in ("--set", setting)])


@pytest.mark.slow
def test_every_queried_metric_is_exported(
    client: httpx.Client, tmp_path: Path, tiny_checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the application, by data jobs and by a training run, as Prometheus finds them on a node."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    rows = write_rows(tmp_path / "rows.parquet", rows=48)
    with noted_metrics() as names:
        assert search(client).status_code == 200
        assert client.post("/v1/embeddings", json={"input": [CAPTION] * 2}).status_code == 200
        run_job(prepare, f"input={rows}", f"output={tmp_path}/clean", "val_fraction=0.1")
        settings = [f"input={rows}", f"model={tiny_checkpoint_dir}", f"output={tmp_path}/index"]
        run_job(embed, *settings, f"cache={tmp_path}/cache")
        settings = [f"input={rows}", f"validation.input={rows}", f"model.base={tiny_checkpoint_dir}"]
        settings += ["model.positions=keep", f"output={tmp_path}/run", "loss.pca_dim=2", "optim.epochs=4"]
        settings += ["optim.per_worker_batch_size=16", "checkpoints.every_steps=6", "log_every_steps=3"]
        run_job(finetune, *settings, "data.streams=1", "workers.count=1")
        deadline = time.monotonic() + DEADLINE_SECONDS
        while missing := asked_metrics() - names:
            assert time.monotonic() < deadline, f"not exported: {sorted(missing)}"
            time.sleep(0.2)
    assert len(asked_metrics()) > 30


@needs_programs("promtool", packages="prometheus")
def test_every_query_and_rule_is_valid(tmp_path: Path) -> None:
    recording = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries())]
    rules = tmp_path / "queries.yaml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": recording}]}))
    for command in (
        ["check", "rules", str(rules)],
        ["check", "config", str(MONITORING / "prometheus.yaml")],
        ["test", "rules", str(MONITORING / "alerts.test.yaml")],
    ):
        checked = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    rules.write_text(rules.read_text().replace("rate(", "rtae("))
    assert subprocess.run(["promtool", "check", "rules", rules], capture_output=True, check=False).returncode


def test_every_alert_is_tested_and_documented() -> None:
    tests = yaml.safe_load((MONITORING / "alerts.test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    guide = (ROOT / "docs" / "operations.md").read_text()
    for rule in alerts():
        assert rule["alert"] in fired
        assert f"`{rule['alert']}`" in guide
        assert rule["annotations"].keys() == {"summary", "action"}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboard_is_consistent(dashboard: Path) -> None:
    """Panels do not overlap, and query the data source that is provisioned with them."""
    (source,) = yaml.safe_load((MONITORING / "grafana" / "datasource.yaml").read_text())["datasources"]
    whole = json.loads(dashboard.read_text())
    assert len({panel["id"] for panel in whole["panels"]}) == len(whole["panels"])
    taken = set[tuple[int, int]]()
    for panel in whole["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells
    for panel in panels(dashboard):
        assert panel["datasource"]["uid"] == source["uid"]
        assert all(target["datasource"]["uid"] == source["uid"] for target in panel["targets"])
