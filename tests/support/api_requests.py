"""Requests to the HTTP API, and checks of its responses."""

import base64
from typing import Any

import httpx
import numpy as np

LONG_TEXT = "A long walk along the river, past boats, barges and bridges. " * 30
"""More than 248 tokens."""


def data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def embed(client: httpx.Client, items: Any, path: str = "/v1/embeddings", **options: Any) -> np.ndarray:
    """Embeddings `[N, E]` of a string or of items."""
    response = client.post(path, json={"input": items, **options})
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return np.array([entry["embedding"] for entry in data], np.float32)


def search(client: httpx.Client, **query: Any) -> dict:
    """The response to a search with `top_k` 5."""
    response = client.post("/v1/search", json={"query": query, "top_k": 5})
    assert response.status_code == 200, response.text
    return response.json()


def assert_refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Check an error response; returns its message."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    return error["message"]
