"""The application builder: `serve run serving.app:build model=checkpoints/longclip index=index`.

This module must not use `from __future__ import annotations`: Ray reads the type of the builder's argument to validate
the arguments of the application.
"""

import difflib
import os
from typing import Annotated, Any

import click
from pydantic import BaseModel, BeforeValidator, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from ray import serve
from ray.serve import Application

from longclip.errors import ConfigError, LongClipError
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
DEPLOYMENT_OPTIONS: dict[str, Any] = {
    # Higher than the limit of the replica itself, which refuses further requests with status 429.
    "max_ongoing_requests": 4 * MAX_REQUESTS,
    "graceful_shutdown_timeout_s": 30.0,
    "health_check_period_s": 5.0,
}


class ApplicationError(click.ClickException):
    """The application cannot be built. `serve run` prints the message as one line, without a traceback."""


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class AppArgs(BaseModel, extra="forbid"):
    """Arguments of the application: NAME=VALUE after `serve run`, or `args` in the YAML file of `serve deploy`."""

    model: str = Field(description="checkpoint directory, models:/NAME/VERSION or models:/NAME@ALIAS")
    index: str | None = Field(
        None,
        description="directory or URI written by embed, or one version of it, INDEX@N; without it there is no search",
    )
    cache: str = Field("~/.cache/longclip", description="directory for downloaded models and indexes")
    replicas: int = Field(1, ge=1, description="number of replicas; each holds the model and the index")
    max_replicas: int | None = Field(
        None, ge=1, description="maximum number of replicas, added while requests queue up"
    )
    replica_gpus: float = Field(0, ge=0, description="GPUs per replica; may be a fraction")
    torch_threads: int = Field(2, ge=1, description="CPU threads per replica, and CPUs reserved for it")
    precision: Precision | None = Field(
        None,
        description="precision of matrix products, float32 or bfloat16; the default is bfloat16 on a GPU and float32 on"
        " a CPU. A CPU with AVX-512 BF16 or AMX computes nearly twice as many embeddings in bfloat16",
    )
    retrievers: int = Field(
        0,
        ge=0,
        description="number of processes that share the shards of the index; with 0, each replica holds them all",
    )
    max_surge_percent: int = Field(
        20,
        ge=0,
        le=100,
        description="percentage of new replicas, rounded up, that start before old ones stop in an update; the cluster"
        " needs room for them. With 0, old replicas stop first, and a single replica is unavailable in the meantime",
    )
    revision: str = Field("", description="any text; changing it makes `serve deploy` resolve aliases again")
    image_hosts: Annotated[list[str], BeforeValidator(_split_commas)] = Field(
        [], description="hosts from which images given as https URLs are fetched; by default none"
    )

    @model_validator(mode="wrap")
    @classmethod
    def _one_line_errors(cls, values: Any, handler: ModelWrapValidatorHandler["AppArgs"]) -> "AppArgs":
        try:
            args = handler(values)
        except ValidationError as error:
            raise ApplicationError(_first_problem(error)) from None
        if args.max_replicas is not None and args.max_replicas < args.replicas:
            raise ApplicationError(
                f"max_replicas={args.max_replicas} is less than replicas={args.replicas}; raise it, or leave it out"
            )
        if args.retrievers and args.index is None:
            raise ApplicationError(f"retrievers={args.retrievers} needs an index to share; set index=INDEX too")
        return args


def _first_problem(error: ValidationError) -> str:
    # A misspelled name also makes a required argument missing; report the misspelling.
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"argument '{name}' is missing; set {name}=VALUE ({AppArgs.model_fields[name].description})"
    if problem["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(name, AppArgs.model_fields, 1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"there are {', '.join(AppArgs.model_fields)}"
        return f"unknown argument '{name}'; {hint}"
    return f"{name}={problem['input']}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def build(args: AppArgs) -> Application:
    """Check the model and the index, and bind the deployments to them.

    This resolves an alias of the registry, once. API keys come from the environment variable `LONGCLIP_API_KEYS`,
    separated by commas; replicas receive only their digests.

    Raises:
        ApplicationError: the model or index is missing or damaged, the index was built with another model, there are
            too few retrievers, or an API key is too short. Its cause is a `LongClipError`.
    """
    try:
        return _bind(args, api_keys())
    except LongClipError as error:
        raise ApplicationError(str(error)) from error


def _bind(args: AppArgs, keys: list[str]) -> Application:
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
                **DEPLOYMENT_OPTIONS,
            ).bind(args.cache)
        else:
            open_index(index)  # refuse a damaged index now; replicas would fail and be restarted over and over
    autoscaling = {"min_replicas": args.replicas, "max_replicas": args.max_replicas, "target_ongoing_requests": 8}
    return serve.deployment(
        Replica,
        name="longclip",
        **({"autoscaling_config": autoscaling} if args.max_replicas else {"num_replicas": args.replicas}),
        ray_actor_options={"num_cpus": args.torch_threads, "num_gpus": args.replica_gpus},
        max_surge_percent=args.max_surge_percent,
        **DEPLOYMENT_OPTIONS,
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
    """The keys in `LONGCLIP_API_KEYS`; empty if it is not set.

    Raises:
        ConfigError: a key is short enough to be guessed. The message does not contain it.
    """
    keys = [key.strip() for key in os.environ.get(API_KEYS, "").split(",") if key.strip()]
    for number, key in enumerate(keys, start=1):
        if len(key) < MIN_KEY_LENGTH:
            raise ConfigError(
                f"{API_KEYS}: key {number} has {len(key)} characters, but at least {MIN_KEY_LENGTH} are required;"
                " generate one with: openssl rand -hex 24"
            )
    return keys
