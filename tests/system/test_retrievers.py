"""An index whose shards are shared out among processes: real Serve, real load, a process that is killed."""

import os
import signal
from collections import Counter

import httpx
import pytest
from ray import serve

from longclip.index import version_directory
from serving.app import ApplicationError, build
from tests.support.processes import processes_below
from tests.support.scenes_index import scene
from tests.support.variants import QUERY, Searches, Variant, check_answer, url, variants, wait_until

__all__ = ["url", "variants"]  # fixtures

slow = pytest.mark.slow


def retriever_pids() -> set[int]:
    return {pid for pid, name in processes_below(os.getpid()) if "ServeReplica" in name and "retriever" in name}


@slow
def test_queries_are_answered_from_every_shard(url: str, variants: tuple[Variant, Variant]) -> None:
    first, _ = variants
    serve.run(build(first.args(retrievers=2)), route_prefix="/")
    assert httpx.get(f"{url}/readyz").status_code == 200
    with httpx.Client(base_url=url, timeout=60) as client:
        check_answer(client.post("/v1/search", json={"query": {"text": QUERY}, "top_k": 5}), first)
        for number in range(12):
            hits = client.post("/v1/search", json={"query": {"id": f"scene/{number}"}, "top_k": 12}).json()["hits"]
            assert {hit["id"] for hit in hits} == {f"scene/{other}" for other in range(12)} - {f"scene/{number}"}
            assert client.get(f"/v1/thumbnails/scene%2F{number}").headers["content-type"] == "image/jpeg"
        odd = {"query": {"text": scene(7)[1]}, "target": "caption", "filter": {"parity": {"eq": "odd"}}, "top_k": 12}
        found = client.post("/v1/search", json=odd).json()["hits"]
        assert found[0]["id"] == "scene/7"
        assert sorted(hit["metadata"]["number"] for hit in found) == [1, 3, 5, 7, 9, 11]
        refused = client.post("/v1/search", json={"query": {"text": "x"}, "filter": {"place": {"eq": "here"}}})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_filter")
        assert client.post("/v1/search", json={"query": {"id": "nobody"}}).status_code == 404
        assert client.get("/v1/thumbnails/nobody").status_code == 404
        assert client.get("/info").json()["index"]["count"] == 12


@slow
def test_killed_retriever_fails_no_request(url: str, variants: tuple[Variant, Variant]) -> None:
    first, _ = variants
    serve.run(build(first.args(retrievers=2)), route_prefix="/")
    before = retriever_pids()
    assert len(before) == 2
    with Searches(url) as load:
        load.wait_for(40)
        os.kill(min(before), signal.SIGKILL)
        load.wait_for(40)
        wait_until(lambda: len(retriever_pids() - {min(before)}) == 2)
        load.wait_for(40)
    assert load.errors == []
    assert Counter(check_answer(response, first) for response in load.answers).keys() == {first.id}


@slow
def test_model_and_index_switch_together_and_back(url: str, variants: tuple[Variant, Variant]) -> None:
    first, second = variants
    serve.run(build(first.args(retrievers=2)), route_prefix="/")
    with Searches(url) as load:
        load.wait_for(40)
        serve.run(build(second.args(retrievers=2)), route_prefix="/")
        load.wait_for(40)
        serve.run(build(first.args(retrievers=2)), route_prefix="/")
        load.wait_for(40)
    assert load.errors == []
    served = [check_answer(response, first, second) for response in load.answers]
    assert set(served) == {first.id, second.id}
    assert served[0] == served[-1] == first.id


@slow
def test_damaged_shard_is_rejected_and_the_served_index_stays(
    url: str, variants: tuple[Variant, Variant], tmp_path_factory: pytest.TempPathFactory
) -> None:
    first, _ = variants
    serve.run(build(first.args(retrievers=1)), route_prefix="/")
    damaged = Variant(tmp_path_factory.mktemp("damaged"))
    vectors = version_directory(damaged.index, 1) / "0002" / "image.npy"
    vectors.write_bytes(vectors.read_bytes()[:-1] + b"\1")
    with pytest.raises(ApplicationError, match=r"image\.npy"):
        build(damaged.args(retrievers=1))
    check_answer(httpx.post(f"{url}/v1/search", json={"query": {"text": QUERY}, "top_k": 5}), first)
