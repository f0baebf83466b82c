"""POST /v1/search: hits, filters, refused requests."""

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from longclip.checkpoint import Checkpoint, checkpoint_id
from longclip.tokenizer import count_tokens
from tests.support.api_requests import LONG_TEXT, assert_refused, data_uri, embed, search
from tests.support.scenes_index import COUNT, library_image_embedding, library_text_embedding, scene


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


def test_an_indexed_image_is_its_own_best_hit(client: httpx.Client) -> None:
    for seed in (0, 17, 29):
        best = search(client, image=data_uri(scene(seed)[0]))["hits"][0]
        assert best["id"] == f"scene/{seed}"
        assert best["score"] == pytest.approx(1, abs=1e-5)


def test_search_by_embedding(client: httpx.Client) -> None:
    vector = embed(client, [{"image": data_uri(scene(8)[0])}])[0]
    answer = search(client, embedding=(3 * vector).tolist())
    assert answer["hits"][0]["id"] == "scene/8"
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)


def test_search_by_id_leaves_out_the_item_itself(client: httpx.Client) -> None:
    by_id = search(client, id="scene/4")["hits"]
    by_image = search(client, image=data_uri(scene(4)[0]))["hits"]
    assert [hit["id"] for hit in by_id[:4]] == [hit["id"] for hit in by_image[1:]]
    assert len(by_id) == 5


def test_search_among_captions(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    request = {"query": {"text": scene(9)[1]}, "target": "caption", "top_k": 3}
    hits = client.post("/v1/search", json=request).json()["hits"]
    assert hits[0]["id"] == "scene/9"
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
    like = client.post("/v1/search", json=request | {"query": {"id": "scene/9"}}).json()["hits"]
    assert [hit["id"] for hit in like[:2]] == [hit["id"] for hit in hits[1:]]


def test_filters_and_min_score_limit_the_hits(client: httpx.Client) -> None:
    request = {"query": {"text": "a boat"}, "top_k": 100}
    hits = client.post("/v1/search", json=request).json()["hits"]
    even = client.post("/v1/search", json=request | {"filter": {"parity": {"eq": "even"}}}).json()["hits"]
    # Scores differ by rounding if other rows are in the batch, so nearly equal ones may change places.
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


def test_a_search_response_names_model_and_index(client: httpx.Client, tiny_checkpoint_dir: Path) -> None:
    answer = search(client, text="a boat")
    identity = checkpoint_id(tiny_checkpoint_dir)
    assert answer["model"]["id"] == "tiny"
    assert answer["model"]["version"] == answer["index"]["checkpoint_id"] == identity
    assert answer["index"]["count"] == COUNT


def test_a_long_query_is_truncated_only_on_request(client: httpx.Client) -> None:
    request: dict[str, Any] = {"query": {"text": LONG_TEXT}}
    assert_refused(client.post("/v1/search", json=request), 422, "context_length_exceeded", "query.text")
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
def test_invalid_searches_are_refused(
    client: httpx.Client, request_body: dict, status: int, code: str, param: str
) -> None:
    assert_refused(client.post("/v1/search", json=request_body), status, code, param)


def test_a_query_vector_must_be_finite(client: httpx.Client) -> None:
    body = '{"query": {"embedding": [NaN' + ", 0" * 23 + "]}}"
    response = client.post("/v1/search", content=body, headers={"Content-Type": "application/json"})
    assert_refused(response, 422, "invalid_value", "query.embedding[0]")
