"""POST /v1/embeddings: vectors, truncation, refused requests."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from longclip.checkpoint import Checkpoint
from longclip.tokenizer import count_tokens
from serving import limits
from tests.support.api_requests import LONG_TEXT, assert_refused, data_uri, embed
from tests.support.pictures import picture
from tests.support.scenes_index import library_image_embedding, library_text_embedding, scene


def test_embeddings_equal_those_of_the_library(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    texts = ["a dog", scene(3)[1], "two boats on a river at dusk"]
    images = [scene(0)[0], picture(5)]
    items = [texts[0], {"image": data_uri(images[0])}, {"text": texts[1]}, texts[2]]
    items.append({"image": base64.b64encode(images[1]).decode()})
    vectors = embed(client, items)
    np.testing.assert_allclose(vectors[[0, 2, 3]], library_text_embedding(tiny_checkpoint, *texts), atol=1e-5)
    np.testing.assert_allclose(vectors[[1, 4]], library_image_embedding(tiny_checkpoint, *images), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_single_string_is_accepted(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    response = client.post("/v1/embeddings", json={"input": "a dog", "model": "tiny", "user": "someone"}).json()
    tokens = count_tokens(tiny_checkpoint.tokenizer, ["a dog"])[0]
    assert response["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "truncated": 0}
    assert (response["object"], response["model"], len(response["data"])) == ("list", "tiny", 1)


def test_base64_embeddings_equal_float_embeddings(client: httpx.Client) -> None:
    numbers = embed(client, ["a dog", "a cat"])
    request = {"input": ["a dog", "a cat"], "encoding_format": "base64"}
    data = client.post("/v1/embeddings", json=request).json()["data"]
    vectors = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in data]
    np.testing.assert_allclose(vectors, numbers, atol=1e-6)


def test_many_texts_keep_their_order(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    texts = [f"picture {row} " + "of a boat " * (row % 7) for row in range(200)]
    np.testing.assert_allclose(embed(client, texts), library_text_embedding(tiny_checkpoint, *texts), atol=1e-5)


def test_long_texts_are_truncated_only_on_request(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
    tokens = count_tokens(tiny_checkpoint.tokenizer, [LONG_TEXT])[0]
    items = ["a", "b", "c", LONG_TEXT]
    response = client.post("/v1/embeddings", json={"input": items})
    message = assert_refused(response, 422, "context_length_exceeded", "input[3]")
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
        ({"input": ["a"] * (limits.MAX_TEXTS + 1)}, 413, "too_many_items", "input"),
        ({"input": [{"image": "x"}] * (limits.MAX_IMAGES + 1)}, 413, "too_many_items", "input"),
        ({"input": ["a", "b" * (limits.MAX_TEXT_CHARS + 1)]}, 413, "text_too_long", "input[1]"),
    ],
)
def test_invalid_embedding_requests_are_refused(
    client: httpx.Client, request_body: dict, status: int, code: str, param: str
) -> None:
    assert_refused(client.post("/v1/embeddings", json=request_body), status, code, param)


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
        ("A" * (limits.MAX_IMAGE_BYTES * 4 // 3 + 8), 413, "image_too_large"),
    ],
    ids=[
        "characters", "bytes", "cut", "html", "comma", "address", "file", "empty", "bomb", "pixels", "thread", "size"
    ],
)  # fmt: skip
def test_invalid_images_are_refused(client: httpx.Client, image: str, status: int, code: str) -> None:
    items = [{"image": data_uri(picture())}, {"text": "a dog"}, {"image": image}]
    message = assert_refused(client.post("/v1/embeddings", json={"input": items}), status, code, "input[2]")
    assert image[-40:] not in message or not image


@pytest.mark.parametrize("text", ["\0", "a\0b", "🦊" * 30, "рис 米 أرز", "<|endoftext|>", "\u202e\ufeffabc"])
def test_unusual_texts_cause_no_server_error(client: httpx.Client, text: str) -> None:
    response = client.post("/v1/embeddings", json={"input": text, "truncate": True})
    assert response.status_code in (200, 422), response.text


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b'{"input": "\\ud800"}', b"[1]", b"", b"[" * 100_000])
def test_invalid_bodies_are_refused(client: httpx.Client, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/embeddings", content=body, headers=headers)
    assert response.status_code == 422, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


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


def test_an_invalid_image_fails_only_its_own_request(client: httpx.Client, tiny_checkpoint: Checkpoint) -> None:
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
