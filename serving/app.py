"""The application: `serve run serving.app:build model=checkpoints/longclip index=index`.

Annotations must stay real types in this module, so it has no `from __future__ import annotations`: Ray reads the type
of the builder's argument to validate what it is given.
"""

from pathlib import Path

from pydantic import BaseModel, Field
from ray import serve
from ray.serve import Application

from serving.artifacts import open_model
from serving.embedder import MAX_BATCH_CALLS, Embedder
from serving.index import SearchIndex, check_model, read_manifest
from serving.ingress import Ingress
from serving.retriever import MAX_BATCH_QUERIES, Retriever

MAX_QUEUED = 1024
"""Calls that wait for a deployment before further ones are refused with 429."""


class AppArgs(BaseModel, extra="forbid"):
    """What can be set on the command line of `serve run`, or under `args` in the YAML of `serve deploy`."""

    model: str = Field(description="checkpoint directory, models:/NAME/VERSION or models:/NAME@ALIAS")
    index: str | None = Field(None, description="index directory; without one there is no search")
    cache: str = Field("~/.cache/longclip", description="where models from the registry are downloaded to")
    embedder_replicas: int = Field(1, ge=1)
    embedder_gpus: float = Field(0, ge=0, description="GPUs of each embedder replica; may be a fraction")
    torch_threads: int = Field(1, ge=1, description="CPU threads, and CPUs, of each embedder replica")
    retriever_replicas: int = Field(1, ge=1)
    ingress_replicas: int = Field(1, ge=1)


def build(args: AppArgs) -> Application:
    """Check the model and the index, and bind the deployments to them.

    Raises:
        LongClipError: one of them is missing, damaged, or the index was made with another model.
    """
    model = open_model(args.model, args.cache)
    embedder = serve.deployment(
        Embedder,
        num_replicas=args.embedder_replicas,
        ray_actor_options={"num_cpus": args.torch_threads, "num_gpus": args.embedder_gpus},
        # Enough to fill a batch of texts and one of images while the next ones wait; the default of 5 fills none.
        max_ongoing_requests=4 * MAX_BATCH_CALLS,
        max_queued_requests=MAX_QUEUED,
    ).bind(model, args.torch_threads)
    manifest, retriever = None, None
    if args.index is not None:
        directory = str(Path(args.index).expanduser().absolute())
        manifest = read_manifest(directory)
        check_model(directory, manifest, model.checkpoint_id)
        SearchIndex.open(directory)  # a damaged one is refused here, not by replicas that restart again and again
        retriever = serve.deployment(
            Retriever,
            num_replicas=args.retriever_replicas,
            ray_actor_options={"num_cpus": 0.5},
            max_ongoing_requests=4 * MAX_BATCH_QUERIES,
            max_queued_requests=MAX_QUEUED,
        ).bind(directory, manifest)
    return serve.deployment(
        Ingress,
        num_replicas=args.ingress_replicas,
        ray_actor_options={"num_cpus": 0.5},
        max_ongoing_requests=256,
    ).bind(model, manifest, embedder, retriever)
