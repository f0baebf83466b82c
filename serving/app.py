"""The application: `serve run serving.app:build model=checkpoints/longclip index=index`.

Annotations must stay real types in this module, so it has no `from __future__ import annotations`: Ray reads the type
of the builder's argument to validate what it is given.
"""

import os
from typing import Any

from pydantic import BaseModel, Field, model_validator
from ray import serve
from ray.serve import Application

from longclip.errors import ConfigError
from serving.deployment import Replica
from serving.embedder import Precision
from serving.index_source import find_index, open_index
from serving.limits import MAX_REQUESTS
from serving.middleware import key_digest
from serving.model_source import open_model
from serving.retriever import Retriever, check_retrievers, verify_shards

API_KEYS = "LONGCLIP_API_KEYS"
MIN_KEY_LENGTH = 16
RETRIEVER_CPUS = 1
LIMITS: dict[str, Any] = {
    # A replica itself refuses what is too much, with the status that clients understand.
    "max_ongoing_requests": 4 * MAX_REQUESTS,
    "graceful_shutdown_timeout_s": 30.0,
    "health_check_period_s": 5.0,
}


class AppArgs(BaseModel, extra="forbid"):
    """What can be set on the command line of `serve run`, or under `args` in the YAML of `serve deploy`."""

    model: str = Field(description="checkpoint directory, models:/NAME/VERSION or models:/NAME@ALIAS")
    index: str | None = Field(
        None,
        description="directory or URI that embed wrote, or one version of it, INDEX@N; without one there is no search",
    )
    cache: str = Field("~/.cache/longclip", description="where models and indexes are downloaded to")
    replicas: int = Field(1, ge=1, description="processes that hold the model and the index and answer requests")
    max_replicas: int | None = Field(None, ge=1, description="more of them while many requests wait")
    replica_gpus: float = Field(0, ge=0, description="GPUs of each replica; may be a fraction")
    torch_threads: int = Field(2, ge=1, description="CPU threads, and CPUs, of each replica")
    precision: Precision | None = Field(
        None,
        description="of matrix products, float32 or bfloat16; by default bfloat16 on a GPU, float32 on a CPU. A CPU"
        " with AVX-512 BF16 or AMX computes nearly twice as many embeddings in bfloat16",
    )
    retrievers: int = Field(
        0, ge=0, description="processes that share out the shards of the index; without any, each replica holds all"
    )
    max_surge_percent: int = Field(
        20,
        ge=0,
        le=100,
        description="new replicas that start before old ones stop when the application is changed, rounded up; the"
        " cluster must have room for them. With 0 old ones stop first, and a single replica answers nothing meanwhile",
    )
    revision: str = Field("", description="any text; a changed one makes `serve deploy` look at aliases again")
    image_hosts: list[str] = Field(
        [], description="hosts that images are fetched from by https address; without any, none is fetched"
    )

    @model_validator(mode="after")
    def _replicas_in_order(self) -> "AppArgs":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than replicas={self.replicas}")
        return self

    @model_validator(mode="after")
    def _shards_of_something(self) -> "AppArgs":
        if self.retrievers and self.index is None:
            raise ValueError(f"retrievers={self.retrievers} share out an index; set index, too")
        return self


def build(args: AppArgs) -> Application:
    """Check the model and the index, and bind the deployment to them.

    An alias of the registry is resolved here, once. API keys are taken from the environment variable
    `LONGCLIP_API_KEYS`, separated by commas; replicas get only their digests.

    Raises:
        LongClipError: one of them is missing, damaged, or the index was made with another model.
    """
    keys = api_keys()
    model = open_model(args.model, args.cache)
    index, retrievers = None, None
    if args.index is not None:
        index = find_index(args.index, model.checkpoint_id, args.cache)
        if args.retrievers:
            check_retrievers(args.retrievers, index)
            verify_shards(index)
            retrievers = serve.deployment(
                Retriever,
                name="retriever",
                num_replicas=args.retrievers,
                ray_actor_options={"num_cpus": RETRIEVER_CPUS},
                max_surge_percent=args.max_surge_percent,
                **LIMITS,
            ).bind(args.cache)
        else:
            open_index(index)  # a damaged one is refused here, not by replicas that restart again and again
    scaled = {"min_replicas": args.replicas, "max_replicas": args.max_replicas, "target_ongoing_requests": 8}
    return serve.deployment(
        Replica,
        name="longclip",
        **({"autoscaling_config": scaled} if args.max_replicas else {"num_replicas": args.replicas}),
        ray_actor_options={"num_cpus": args.torch_threads, "num_gpus": args.replica_gpus},
        max_surge_percent=args.max_surge_percent,
        **LIMITS,
    ).bind(
        model,
        args.torch_threads,
        args.precision,
        index,
        retrievers,
        frozenset(key_digest(key) for key in keys),
        frozenset(args.image_hosts),
    )


def api_keys() -> list[str]:
    """Keys of `LONGCLIP_API_KEYS`; none where it is not set.

    Raises:
        ConfigError: a key is so short that it could be guessed. It is not repeated in the message.
    """
    keys = [key.strip() for key in os.environ.get(API_KEYS, "").split(",") if key.strip()]
    for number, key in enumerate(keys, start=1):
        if len(key) < MIN_KEY_LENGTH:
            raise ConfigError(
                f"{API_KEYS}: key {number} has {len(key)} characters, at least {MIN_KEY_LENGTH} are needed; make one"
                " with: openssl rand -hex 24"
            )
    return keys
