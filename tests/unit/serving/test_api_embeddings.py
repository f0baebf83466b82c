"""The serving application over HTTP, on a real local Ray Serve."""

import base64
import io
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from ray import serve
from ray.serve import RunTarget
from ray.serve.schema import ServeDeploySchema

from longclip.checkpoint import Checkpoint, checkpoint_id
from longclip.tokenizer import count_tokens
from longclip.zero_shot import class_embeddings
from serving import decoding as inputs
from serving.app import AppArgs, build
from tests.support.local_serve import LONG_TEXT, local_serve
from tests.support.pictures import picture
from tests.support.places import ROOT
from tests.support.scenes_index import COUNT, library_image_embedding, library_text_embedding, scene, write_index


@pytest.fixture(scope="module")
def client(
    tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client of three applications: the whole one at /, and without an index one at /bare, and one at /bfloat16."""
    index = write_index(tmp_path_factory.mktemp("serving") / "index", tiny_checkpoint, tiny_checkpoint_dir)
    with local_serve() as url:
        bare = build(AppArgs(model=str(tiny_checkpoint_dir)))
        rounded = build(AppArgs(model=str(tiny_checkpoint_dir), precision="bfloat16", torch_threads=1))
        whole = build(AppArgs(model=str(tiny_checkpoint_dir), index=str(index)))
        targets = [(bare, "bare", "/bare"), (rounded, "bfloat16", "/bfloat16"), (whole, "longclip", "/")]
        serve.run_many([RunTarget(*target) for target in targets])
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client


def data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def embed(client: httpx.Client, items: Any, **options: Any) -> np.ndarray:
    response = client.post("/v1/embeddings", json={"input": items, **options})
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return np.array([entry["embedding"] for entry in data], np.float32)


def search(client: httpx.Client, **query: Any) -> dict:
    response = client.post("/v1/search", json={"query": query, "top_k": 5})
    assert response.status_code == 200, response.text
    return response.json()


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Check an error in its one shape; returns its message."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    return error["message"]


# ---- embeddings


def test_embeddings_equal_the_library(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    texts = ["a dog", scene(3)[1], "two boats on a river at dusk"]
    images = [scene(0)[0], picture(5)]
    items = [texts[0], {"image": data_uri(images[0])}, {"text": texts[1]}, texts[2]]
    items.append({"image": base64.b64encode(images[1]).decode()})
    vectors = embed(client, items)
    np.testing.assert_allclose(vectors[[0, 2, 3]], library_text_embedding(tiny_checkpoint, *texts), atol=1e-5)
    np.testing.assert_allclose(vectors[[1, 4]], library_image_embedding(tiny_checkpoint, *images), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_string_is_one_input(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    response = client.post("/v1/embeddings", json={"input": "a dog", "model": "tiny", "user": "someone"}).json()
    tokens = count_tokens(tiny_checkpoint.tokenizer, ["a dog"])[0]
    assert response["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "truncated": 0}
    assert (response["object"], response["model"], len(response["data"])) == ("list", "tiny", 1)


def test_base64_is_the_same_as_float(client: httpx.Client) -> None:
    numbers = embed(client, ["a dog", "a cat"])
    request = {"input": ["a dog", "a cat"], "encoding_format": "base64"}
    data = client.post("/v1/embeddings", json=request).json()["data"]
    vectors = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in data]
    np.testing.assert_allclose(vectors, numbers, atol=1e-6)


def test_many_texts_keep_their_order(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    texts = [f"picture {row} " + "of a boat " * (row % 7) for row in range(200)]
    np.testing.assert_allclose(embed(client, texts), library_text_embedding(tiny_checkpoint, *texts), atol=1e-5)


def test_long_texts_are_cut_only_on_request(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    tokens = count_tokens(tiny_checkpoint.tokenizer, [LONG_TEXT])[0]
    items = ["a", "b", "c", LONG_TEXT]
    response = client.post("/v1/embeddings", json={"input": items})
    message = refused(response, 422, "context_length_exceeded", "input[3]")
    assert f"{tokens} tokens" in message
    assert "248" in message
    response = client.post("/v1/embeddings", json={"input": items, "truncate": True}).json()
    assert response["usage"]["truncated"] == 1
    expected = library_text_embedding(tiny_checkpoint, LONG_TEXT)[0]
    np.testing.assert_allclose(response["data"][3]["embedding"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("request_body", "status", "code", "param"),
    [
        ({}, 422, "invalid_value", "input"),
        ({"input": []}, 422, "invalid_value", "input"),
        ({"input": 7}, 422, "invalid_value", "input"),
        ({"input": ["a", 7]}, 422, "invalid_value", "input[1]"),
        ({"input": ""}, 422, "empty_text", "input[0]"),
        ({"input": ["a", " \n"]}, 422, "empty_text", "input[1]"),
        ({"input": [{"text": "a", "image": "b"}]}, 422, "invalid_value", "input[0]"),
        ({"input": [{}]}, 422, "invalid_value", "input[0]"),
        ({"input": "a", "encoding_fromat": "base64"}, 422, "invalid_value", "encoding_fromat"),
        ({"input": "a", "encoding_format": "hex"}, 422, "invalid_value", "encoding_format"),
        ({"input": "a", "dimensions": 8}, 422, "invalid_value", "dimensions"),
        ({"input": "a", "model": "other"}, 404, "model_not_found", "model"),
        ({"input": ["a"] * (inputs.MAX_TEXTS + 1)}, 413, "too_many_items", "input"),
        ({"input": [{"image": "x"}] * (inputs.MAX_IMAGES + 1)}, 413, "too_many_items", "input"),
        ({"input": ["a", "b" * (inputs.MAX_TEXT_CHARS + 1)]}, 413, "text_too_long", "input[1]"),
    ],
)
def test_bad_embedding_requests(client: httpx.Client, request_body: dict, status: int, code: str, param: str) -> None:
    refused(client.post("/v1/embeddings", json=request_body), status, code, param)


def black(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        ("not base64!", 422, "invalid_image"),
        (base64.b64encode(b"no image").decode(), 422, "invalid_image"),
        (data_uri(picture()[:200]), 422, "invalid_image"),
        ("data:text/html;base64,PGI+", 422, "invalid_image"),
        ("data:image/png;base64", 422, "invalid_image"),
        ("http://169.254.169.254/latest", 422, "invalid_image"),
        ("file:///etc/passwd", 422, "invalid_image"),
        ("", 422, "invalid_image"),
        (data_uri(black(30_000, 30_000)), 413, "image_too_large"),
        (data_uri(black(8_100, 8_000)), 413, "image_too_large"),
        (data_uri(black(60_000, 1)), 413, "image_too_large"),
        ("A" * (inputs.MAX_IMAGE_BYTES * 4 // 3 + 8), 413, "image_too_large"),
    ],
    ids=[
        "characters", "bytes", "cut", "html", "comma", "address", "file", "empty", "bomb", "pixels", "thread", "size"
    ],
)  # fmt: skip
def test_bad_images(client: httpx.Client, image: str, status: int, code: str) -> None:
    items = [{"image": data_uri(picture())}, {"text": "a dog"}, {"image": image}]
    message = refused(client.post("/v1/embeddings", json={"input": items}), status, code, "input[2]")
    assert image[-40:] not in message or not image


@pytest.mark.parametrize("text", ["\0", "a\0b", "🦊" * 30, "рис 米 أرز", "<|endoftext|>", "\u202e\ufeffabc"])
def test_odd_texts_are_answered(client: httpx.Client, text: str) -> None:
    response = client.post("/v1/embeddings", json={"input": text, "truncate": True})
    assert response.status_code in (200, 422), response.text


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b'{"input": "\\ud800"}', b"[1]", b"", b"[" * 100_000])
def test_bad_bodies(client: httpx.Client, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/embeddings", content=body, headers=headers)
    assert response.status_code == 422, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_large_bodies_are_refused(client: httpx.Client) -> None:
    piece = b" " * 2**20
    pieces = inputs.MAX_BODY_BYTES // len(piece) + 1
    refused(client.post("/v1/search", content=piece * pieces), 413, "body_too_large")
    unannounced = (piece for _ in range(pieces))
    refused(
        client.post("/v1/search", content=unannounced, headers={"Content-Type": "application/json"}),
        413,
        "body_too_large",
    )


def test_poison_fails_alone(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    good = data_uri(picture(1))
    expected = library_image_embedding(tiny_checkpoint, picture(1))[0]

    def post(number: int) -> httpx.Response:
        image = good if number % 2 else data_uri(picture(1)[:300])
        return client.post("/v1/embeddings", json={"input": [{"image": image}]})

    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(post, range(40)))
    assert [response.status_code for response in responses] == [422, 200] * 20
    for response in responses[1::2]:
        np.testing.assert_allclose(response.json()["data"][0]["embedding"], expected, atol=1e-5)


# ---- search


def test_text_search_agrees_with_the_library(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    caption = scene(11)[1]
    answer = search(client, text=caption)
    pictures = library_image_embedding(tiny_checkpoint, *(scene(seed)[0] for seed in range(COUNT)))
    scores = pictures @ library_text_embedding(tiny_checkpoint, caption)[0]
    expected = np.argsort(-scores, kind="stable")[:5]
    assert [hit["id"] for hit in answer["hits"]] == [f"scene/{seed}" for seed in expected]
    np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], scores[expected], atol=1e-5)
    assert answer["hits"][0]["caption"] == scene(int(expected[0]))[1]
    assert answer["tokens"] == count_tokens(tiny_checkpoint.tokenizer, [caption])[0]
    assert not answer["truncated"]
    assert answer["took_ms"] > 0


def test_an_image_finds_itself_first(client: httpx.Client) -> None:
    for seed in (0, 17, 29):
        best = search(client, image=data_uri(scene(seed)[0]))["hits"][0]
        assert best["id"] == f"scene/{seed}"
        assert best["score"] == pytest.approx(1, abs=1e-5)


def test_an_embedding_is_a_query(client: httpx.Client) -> None:
    vector = embed(client, [{"image": data_uri(scene(8)[0])}])[0]
    answer = search(client, embedding=(3 * vector).tolist())
    assert answer["hits"][0]["id"] == "scene/8"
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)


def test_an_item_finds_its_neighbours_without_itself(client: httpx.Client) -> None:
    by_id = search(client, id="scene/4")["hits"]
    by_image = search(client, image=data_uri(scene(4)[0]))["hits"]
    assert [hit["id"] for hit in by_id[:4]] == [hit["id"] for hit in by_image[1:]]
    assert len(by_id) == 5


def test_captions_can_be_searched(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    request = {"query": {"text": scene(9)[1]}, "target": "caption", "top_k": 3}
    hits = client.post("/v1/search", json=request).json()["hits"]
    assert hits[0]["id"] == "scene/9"
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
    like = client.post("/v1/search", json=request | {"query": {"id": "scene/9"}}).json()["hits"]
    assert [hit["id"] for hit in like[:2]] == [hit["id"] for hit in hits[1:]]


def test_filters_and_scores_bound_the_hits(client: httpx.Client) -> None:
    request = {"query": {"text": "a boat"}, "top_k": 100}
    hits = client.post("/v1/search", json=request).json()["hits"]
    even = client.post("/v1/search", json=request | {"filter": {"parity": {"eq": "even"}}}).json()["hits"]
    # Compared with other rows beside them, scores differ by rounding, and near equal ones may change places.
    expected = [hit for hit in hits if hit["metadata"]["parity"] == "even"]
    assert {hit["id"] for hit in even} == {hit["id"] for hit in expected}
    np.testing.assert_allclose([hit["score"] for hit in even], [hit["score"] for hit in expected], atol=1e-5)
    assert len(even) == COUNT // 2 - 1
    least = hits[4]["score"] - 1e-5
    exact = client.post("/v1/search", json=request | {"exact": True, "min_score": least}).json()["hits"]
    assert {hit["id"] for hit in exact} >= {hit["id"] for hit in hits[:5]}
    assert all(hit["score"] >= least for hit in exact)
    assert len(exact) < COUNT
    nothing = client.post("/v1/search", json=request | {"filter": {"number": {"gt": 1000}}}).json()["hits"]
    assert nothing == []


def test_search_says_what_it_searched(client: httpx.Client, tiny_checkpoint_dir: Path) -> None:
    answer = search(client, text="a boat")
    identity = checkpoint_id(tiny_checkpoint_dir)
    assert answer["model"]["id"] == "tiny"
    assert answer["model"]["version"] == answer["index"]["checkpoint_id"] == identity
    assert answer["index"]["count"] == COUNT


def test_search_cuts_only_on_request(client: httpx.Client) -> None:
    request: dict[str, Any] = {"query": {"text": LONG_TEXT}}
    refused(client.post("/v1/search", json=request), 422, "context_length_exceeded", "query.text")
    answer = client.post("/v1/search", json=request | {"truncate": True}).json()
    assert (answer["truncated"], answer["tokens"], len(answer["hits"])) == (True, 248, 10)


@pytest.mark.parametrize(
    ("request_body", "status", "code", "param"),
    [
        ({}, 422, "invalid_value", "query"),
        ({"query": {}}, 422, "invalid_value", "query"),
        ({"query": {"text": "a", "id": "scene/1"}}, 422, "invalid_value", "query"),
        ({"query": {"text": " "}}, 422, "empty_text", "query.text"),
        ({"query": {"image": "?"}}, 422, "invalid_image", "query.image"),
        ({"query": {"embedding": [1.0]}}, 422, "invalid_value", "query.embedding"),
        ({"query": {"embedding": [0.0] * 24}}, 422, "invalid_value", "query.embedding"),
        ({"query": {"embedding": [1e308] * 24}}, 422, "invalid_value", "query.embedding"),
        ({"query": {"text": "a"}, "top_k": 0}, 422, "invalid_value", "top_k"),
        ({"query": {"text": "a"}, "top_k": 101}, 422, "invalid_value", "top_k"),
        ({"query": {"id": "scene/99"}}, 404, "id_not_found", "query.id"),
        ({"query": {"text": "a"}, "target": "sound"}, 422, "invalid_value", "target"),
        ({"query": {"text": "a"}, "filter": {"colour": {"eq": 1}}}, 422, "invalid_filter", "filter"),
        ({"query": {"text": "a"}, "filter": {"number": {"eq": "1; DROP TABLE"}}}, 422, "invalid_filter", "filter"),
        ({"query": {"text": "a"}, "filter": "number = 1"}, 422, "invalid_value", "filter"),
    ],
)
def test_bad_searches(client: httpx.Client, request_body: dict, status: int, code: str, param: str) -> None:
    refused(client.post("/v1/search", json=request_body), status, code, param)


def test_a_query_vector_must_be_finite(client: httpx.Client) -> None:
    body = '{"query": {"embedding": [NaN' + ", 0" * 23 + "]}}"
    response = client.post("/v1/search", content=body, headers={"Content-Type": "application/json"})
    refused(response, 422, "invalid_value", "query.embedding[0]")


# ---- classification


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
        found = {label["label"]: (label["score"], label["probability"]) for label in entry["labels"]}
        shown = [label["score"] for label in entry["labels"]]
        assert shown == sorted(shown, reverse=True)
        for column, label in enumerate(labels):
            expected = (scores[row, column], logits[row].softmax(-1)[column].item())
            np.testing.assert_allclose(found[label], expected, atol=1e-5)
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
def test_bad_classifications(client: httpx.Client, change: dict, status: int, code: str, param: str) -> None:
    request = {"input": "a boat", "labels": ["boat", "dog"]} | change
    refused(client.post("/v1/classify", json=request), status, code, param)


# ---- the rest


def test_thumbnails(client: httpx.Client) -> None:
    hit = search(client, text="a boat")["hits"][0]
    response = client.get(hit["thumbnail_url"])
    assert response.headers["Content-Type"] == "image/jpeg"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert Image.open(io.BytesIO(response.content)).size == (96, 72)
    refused(client.get("/v1/thumbnails/scene/99"), 404, "id_not_found", "id")


def test_tokenize(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    for text in ("", "a dog", LONG_TEXT):
        answer = client.post("/v1/tokenize", json={"text": text}).json()
        assert answer == {"tokens": count_tokens(tiny_checkpoint.tokenizer, [text])[0], "context_length": 248}


def test_what_the_server_says_of_itself(client: httpx.Client, tiny_checkpoint_dir: Path) -> None:
    identity = checkpoint_id(tiny_checkpoint_dir)
    entry = {"id": "tiny", "object": "model", "owned_by": "longclip", "version": identity}
    assert client.get("/v1/models").json() == {"object": "list", "data": [entry]}
    info = client.get("/info").json()
    assert info["model"]["checkpoint_id"] == info["index"]["checkpoint_id"] == identity
    assert (info["model"]["context_length"], info["model"]["embedding_dim"]) == (248, 24)
    assert [client.get(f"{at}/info").json()["model"]["precision"] for at in ("", "/bfloat16")] == [
        "float32",
        "bfloat16",
    ]
    assert info["index"]["count"] == COUNT
    assert info["limits"]["images"] == inputs.MAX_IMAGES
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "reasons": []}
    examples = client.get("/v1/examples").json()["examples"]
    assert len(examples) == 4
    assert examples[0] == scene(0)[1]


def test_metrics_tell_of_all_replicas(client: httpx.Client) -> None:
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
        found = {name: re.search(rf"^{name}.*}} (\S+)$", text, re.MULTILINE) for name in wanted}
        if all(found.values()):
            break
        assert time.monotonic() < deadline, [name for name, value in found.items() if not value]
        time.sleep(1)
    for name, least in wanted.items():
        value = found[name]
        assert value is not None
        assert float(value[1]) >= least


def test_routes_that_do_not_exist(client: httpx.Client) -> None:
    assert "GET /v2" in refused(client.get("/v2"), 404, "not_found")
    refused(client.get("/static/../app.py"), 404, "not_found")
    response = client.get("/v1/search")
    refused(response, 405, "method_not_allowed")
    assert response.headers["Allow"] == "POST"


def test_the_page_loads_only_its_own_files(client: httpx.Client) -> None:
    response = client.get("/")
    assert "<title>Long-CLIP search</title>" in response.text
    assert "http" not in response.text, "nothing comes from elsewhere"
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("app.js", "style.css", "icon.svg"):
        assert client.get(f"/static/{name}").status_code == 200


def test_without_an_index_there_is_no_search(client: httpx.Client) -> None:
    refused(client.post("/bare/v1/search", json={"query": {"text": "a boat"}}), 404, "index_not_found")
    refused(client.get("/bare/v1/thumbnails/scene/1"), 404, "index_not_found")
    assert client.get("/bare/info").json()["index"] is None
    assert client.get("/bare/v1/examples").json() == {"examples": []}
    assert client.get("/bare/readyz").status_code == 200
    response = client.post("/bare/v1/embeddings", json={"input": "a boat"})
    np.testing.assert_array_equal(response.json()["data"][0]["embedding"], embed(client, "a boat")[0])


def test_serve_yaml_is_valid() -> None:
    config = yaml.safe_load((ROOT / "infra" / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == "serving.app:build"
    assert config["http_options"]["host"] == "127.0.0.1"
    AppArgs.model_validate(application.args)


def test_the_schema_tells_every_form_of_input(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]["EmbeddingsRequest"]["properties"]["input"]
    assert {"type": "string"} in schema["anyOf"]
