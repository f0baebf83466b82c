"""Classification, tokenization, thumbnails, descriptions of the server, the page and the schema."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from longclip.checkpoint import Checkpoint, checkpoint_id, save_checkpoint
from longclip.lineage import Lineage
from longclip.tokenizer import count_tokens
from longclip.zero_shot import class_embeddings
from serving import limits
from serving.api import create_api
from tests.support.api_requests import LONG_TEXT, assert_refused, data_uri, embed, search
from tests.support.live_api import running_api, tiny_operations
from tests.support.scenes_index import COUNT, library_image_embedding, library_text_embedding, scene


def test_classification_agrees_with_the_library(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    labels, templates = ["boat", "dog", "tree"], ["a photo of a {}.", "{} in the sun"]
    request = {"input": [{"image": data_uri(scene(2)[0])}, "a boat"], "labels": labels, "templates": templates}
    answer = client.post("/v1/classify", json=request).json()
    classes = class_embeddings(tiny_checkpoint, labels, templates).numpy()
    items = np.concatenate(
        [library_image_embedding(tiny_checkpoint, scene(2)[0]), library_text_embedding(tiny_checkpoint, "a boat")]
    )
    scores = items @ classes.T
    logits = torch.from_numpy(scores) * tiny_checkpoint.model.logit_scale.detach().exp()
    for row, entry in enumerate(answer["data"]):
        scored = {label["label"]: (label["score"], label["probability"]) for label in entry["labels"]}
        scores_in_order = [label["score"] for label in entry["labels"]]
        assert scores_in_order == sorted(scores_in_order, reverse=True)
        for column, label in enumerate(labels):
            expected = (scores[row, column], logits[row].softmax(-1)[column].item())
            np.testing.assert_allclose(scored[label], expected, atol=1e-5)
    best = client.post("/v1/classify", json=request | {"top_k": 1}).json()["data"]
    assert [len(entry["labels"]) for entry in best] == [1, 1]


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"labels": ["one"]}, 422, "invalid_value", "labels"),
        ({"labels": ["one", ""]}, 422, "invalid_value", "labels[1]"),
        ({"labels": ["one", "two " * 300]}, 422, "context_length_exceeded", "labels[1]"),
        ({"labels": [str(n) for n in range(100)], "templates": ["{}"] * 50}, 413, "too_many_items", "labels"),
        ({"templates": ["a photo"]}, 422, "invalid_value", "templates[0]"),
        ({"input": []}, 422, "invalid_value", "input"),
        ({"input": [{"image": "?"}]}, 422, "invalid_image", "input[0]"),
        ({"model": "other"}, 404, "model_not_found", "model"),
    ],
)
def test_invalid_classifications_are_refused(
    client: httpx.Client, change: dict, status: int, code: str, param: str
) -> None:
    request = {"input": "a boat", "labels": ["boat", "dog"]} | change
    assert_refused(client.post("/v1/classify", json=request), status, code, param)


def test_thumbnails(client: httpx.Client) -> None:
    hit = search(client, text="a boat")["hits"][0]
    response = client.get(hit["thumbnail_url"])
    assert response.headers["Content-Type"] == "image/jpeg"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert Image.open(io.BytesIO(response.content)).size == (96, 72)
    assert_refused(client.get("/v1/thumbnails/scene/99"), 404, "id_not_found", "id")


def test_tokenize(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    for text in ("", "a dog", LONG_TEXT):
        answer = client.post("/v1/tokenize", json={"text": text}).json()
        assert answer == {"tokens": count_tokens(tiny_checkpoint.tokenizer, [text])[0], "context_length": 248}


def test_model_index_limits_and_health(client: httpx.Client, tiny_checkpoint_dir: Path) -> None:
    identity = checkpoint_id(tiny_checkpoint_dir)
    ids = {"version": identity, "checkpoint_id": identity, "lineage": asdict(Lineage())}
    entry = {"id": "tiny", "object": "model", "owned_by": "longclip", **ids}
    assert client.get("/v1/models").json() == {"object": "list", "data": [entry]}
    info = client.get("/info").json()
    assert info["model"]["checkpoint_id"] == info["index"]["checkpoint_id"] == identity
    assert (info["model"]["context_length"], info["model"]["embedding_dim"]) == (248, 24)
    assert info["model"]["precision"] == "float32"
    assert info["index"]["count"] == COUNT
    assert info["limits"]["images"] == limits.MAX_IMAGES
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "reasons": []}
    examples = client.get("/v1/examples").json()["examples"]
    assert len(examples) == 4
    assert examples[0] == scene(0)[1]


def test_models_show_the_lineage_of_the_checkpoint(tmp_path: Path, tiny_checkpoint: Checkpoint) -> None:
    lineage = Lineage("r1", "d2", "manifest", "clip-b16", "c3", "r0", "0.1.0", "abc")
    save_checkpoint(tiny_checkpoint, tmp_path / "run" / "checkpoint", lineage.metadata())
    api = create_api(tiny_operations(tmp_path / "run" / "checkpoint"))
    with running_api(api) as url:
        (entry,) = httpx.get(f"{url}/v1/models", timeout=60).json()["data"]
    manifest = json.loads((tmp_path / "run" / "checkpoint" / "longclip.json").read_text())
    assert entry["lineage"] == manifest["metadata"]["lineage"] == asdict(lineage)
    assert entry["checkpoint_id"] == manifest["checkpoint_id"]


def test_unknown_routes_and_methods_are_refused(client: httpx.Client) -> None:
    assert "GET /v2" in assert_refused(client.get("/v2"), 404, "not_found")
    assert_refused(client.get("/static/../app.py"), 404, "not_found")
    response = client.get("/v1/search")
    assert_refused(response, 405, "method_not_allowed")
    assert response.headers["Allow"] == "POST"


def test_the_page_loads_only_its_own_files(client: httpx.Client) -> None:
    response = client.get("/")
    assert "<title>Long-CLIP search</title>" in response.text
    assert "http" not in response.text, "the page loads nothing from other hosts"
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("app.js", "server.js", "style.css", "icon.svg"):
        assert client.get(f"/static/{name}").status_code == 200


def test_without_an_index_search_is_refused_and_the_rest_works(client: httpx.Client, tiny_checkpoint_dir: Path) -> None:
    bare_api = create_api(tiny_operations(tiny_checkpoint_dir))
    with running_api(bare_api) as url, httpx.Client(base_url=url, timeout=60) as bare:
        assert_refused(bare.post("/v1/search", json={"query": {"text": "a boat"}}), 404, "index_not_found")
        assert_refused(bare.get("/v1/thumbnails/scene/1"), 404, "index_not_found")
        assert bare.get("/info").json()["index"] is None
        assert bare.get("/v1/examples").json() == {"examples": []}
        assert bare.get("/readyz").status_code == 200
        np.testing.assert_array_equal(embed(bare, "a boat"), embed(client, "a boat"))


def test_the_schema_allows_every_form_of_input(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]["EmbeddingsRequest"]["properties"]["input"]
    assert {"type": "string"} in schema["anyOf"]
