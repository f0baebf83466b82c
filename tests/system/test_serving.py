"""The application on a real Ray Serve: what depends on deployments, replicas and Serve's proxy.

The tests of single requests are in tests/unit/serving, without Serve.
"""

import io
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from ray import serve
from ray.serve import RunTarget

from longclip.checkpoint import Checkpoint
from serving import limits
from serving.app import AppArgs, build
from tests.support.api_requests import assert_refused, data_uri, embed, search
from tests.support.local_serve import local_serve
from tests.support.scenes_index import COUNT, library_image_embedding, library_text_embedding, scene, write_index


@pytest.fixture(scope="module")
def client(
    tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client of three applications: / with an index, /bare without an index, and /bfloat16 in bfloat16."""
    index = write_index(tmp_path_factory.mktemp("serving") / "index", tiny_checkpoint, tiny_checkpoint_dir)
    with local_serve() as url:
        bare = build(AppArgs(model=str(tiny_checkpoint_dir)))
        bfloat16 = build(AppArgs(model=str(tiny_checkpoint_dir), precision="bfloat16", torch_threads=1))
        indexed = build(AppArgs(model=str(tiny_checkpoint_dir), index=str(index)))
        targets = [(bare, "bare", "/bare"), (bfloat16, "bfloat16", "/bfloat16"), (indexed, "longclip", "/")]
        serve.run_many([RunTarget(*target) for target in targets])
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client


def test_embeddings_and_search_agree_with_the_library(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    image, caption = scene(11)
    vectors = embed(client, [caption, {"image": data_uri(image)}])
    np.testing.assert_allclose(vectors[:1], library_text_embedding(tiny_checkpoint, caption), atol=1e-5)
    np.testing.assert_allclose(vectors[1:], library_image_embedding(tiny_checkpoint, image), atol=1e-5)
    best = search(client, image=data_uri(image))["hits"][0]
    assert best["id"] == "scene/11"
    assert best["score"] == pytest.approx(1, abs=1e-5)
    thumbnail = client.get(best["thumbnail_url"])
    assert Image.open(io.BytesIO(thumbnail.content)).size == (96, 72)


def test_each_application_has_its_precision(client: httpx.Client) -> None:
    precisions = [client.get(f"{prefix}/info").json()["model"]["precision"] for prefix in ("", "/bfloat16")]
    assert precisions == ["float32", "bfloat16"]


def test_health_and_readiness(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "reasons": []}


def test_large_bodies_are_refused(client: httpx.Client) -> None:
    piece = b" " * 2**20
    pieces = limits.MAX_BODY_BYTES // len(piece) + 1
    assert_refused(client.post("/v1/search", content=piece * pieces), 413, "body_too_large")
    unannounced = (piece for _ in range(pieces))
    assert_refused(
        client.post("/v1/search", content=unannounced, headers={"Content-Type": "application/json"}),
        413,
        "body_too_large",
    )


def test_metrics_cover_all_replicas(client: httpx.Client) -> None:
    embed(client, "a text that is counted")
    deadline = time.monotonic() + 60
    wanted = {
        'ray_longclip_requests_total{.*endpoint="embeddings".*status="200"': 1,
        'ray_longclip_request_seconds_count{.*endpoint="embeddings"': 1,
        'ray_longclip_stage_seconds_count{.*stage="embed"': 1,
        'ray_longclip_batch_total{.*queue="texts".*unit="items"': 1,
        'ray_longclip_waiting{.*queue="images"': 0,
        "ray_longclip_index_items{": COUNT,
    }
    while True:
        text = client.get("/metrics").text
        matches = {name: re.search(rf"^{name}.*}} (\S+)$", text, re.MULTILINE) for name in wanted}
        if all(matches.values()):
            break
        assert time.monotonic() < deadline, [name for name, value in matches.items() if not value]
        time.sleep(1)
    for name, least in wanted.items():
        value = matches[name]
        assert value is not None
        assert float(value[1]) >= least


def test_errors_of_routing_have_the_common_format(client: httpx.Client) -> None:
    assert "GET /v2" in assert_refused(client.get("/v2"), 404, "not_found")
    assert_refused(client.get("/v1/search"), 405, "method_not_allowed")


def test_an_application_without_an_index_under_a_route_prefix(client: httpx.Client) -> None:
    assert_refused(client.post("/bare/v1/search", json={"query": {"text": "a boat"}}), 404, "index_not_found")
    assert_refused(client.get("/bare/v1/thumbnails/scene/1"), 404, "index_not_found")
    assert client.get("/bare/info").json()["index"] is None
    assert client.get("/bare/v1/examples").json() == {"examples": []}
    assert client.get("/bare/readyz").status_code == 200
    np.testing.assert_array_equal(embed(client, "a boat", "/bare/v1/embeddings"), embed(client, "a boat"))


@pytest.mark.parametrize("prefix", ["", "/bare"])
def test_the_page_is_served(client: httpx.Client, prefix: str) -> None:
    response = client.get(f"{prefix}/")
    assert "<title>Long-CLIP search</title>" in response.text
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    for name in ("app.js", "server.js", "style.css", "icon.svg"):
        assert client.get(f"{prefix}/static/{name}").status_code == 200
