"""What those who run the server see of it: the log of a request, from the proxy to the retriever."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
import yaml
from ray import serve

from longclip.checkpoint import Checkpoint
from serving.app import AppArgs, build
from tests.conftest import ROOT
from tests.scenes_index import write_index
from tests.test_serving import local_serve

KEY = "a-key-that-no-log-holds"
CAPTION = "a caption that no log holds"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
DEADLINE_SECONDS = 60


@pytest.fixture(scope="module")
def client(
    tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client of an application whose index lies in a retriever, with a log as infra/serve.yaml asks for it."""
    index = write_index(tmp_path_factory.mktemp("serving") / "index", tiny_checkpoint, tiny_checkpoint_dir)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serving.middleware:before_serve")
        environment.setenv("LONGCLIP_API_KEYS", KEY)
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
                for line in map(json.loads, path.read_text().splitlines()):
                    if line.get("request_id") == request_id:
                        found.setdefault(line.get("deployment", line["component_name"]), []).append(line)
        if found.keys() >= wanted:
            return found
        assert time.monotonic() < deadline, f"only {found.keys()} wrote of {request_id}"
        time.sleep(0.2)


def test_a_request_is_found_by_its_trace_in_every_log(client: httpx.Client) -> None:
    response = search(client, traceparent=f"00-{TRACE}-00f067aa0ba902b7-01")
    assert response.status_code == 200
    assert response.headers.get_list("X-Request-ID") == [TRACE]
    found = lines_of(TRACE)
    assert "/v1/search 200" in found["longclip_longclip"][-1]["message"]
    assert "CALL ask OK" in found["longclip_retriever"][-1]["message"]


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
