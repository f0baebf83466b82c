"""Registered models by URI, `models:/NAME/VERSION` or `models:/NAME@ALIAS`, and what the registry keeps for each.

The pipelines write the registry and serving reads it; both use these names.
"""

from dataclasses import dataclass

from longclip.errors import CheckpointError

SCHEME = "models:/"

CHECKPOINT_ARTIFACT = "artifacts/checkpoint"
"""Path of the checkpoint directory in the artifacts of a registered version."""

MANIFEST_TAG = "manifest_sha256"
"""Tag of a version: hex sha256 of its checkpoint's manifest."""


@dataclass(frozen=True)
class ModelUri:
    """A registered model; exactly one of `version` and `alias` is set."""

    name: str
    version: str | None = None
    alias: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}" + (f"/{self.version}" if self.version else f"@{self.alias}")


def is_model_uri(source: str) -> bool:
    """Whether a model is named by its place in the registry."""
    return source.startswith(SCHEME)


def parse_model_uri(uri: str) -> ModelUri:
    """Parse `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    Raises:
        CheckpointError: it has neither of the two forms.
    """
    path = uri.removeprefix(SCHEME)
    name, _, alias = path.partition("@")
    if is_model_uri(uri) and name and alias and "/" not in name:
        return ModelUri(name, alias=alias)
    name, _, version = path.partition("/")
    if is_model_uri(uri) and name and version.isdecimal():
        return ModelUri(name, version=version)
    raise CheckpointError(f"model '{uri}' is neither models:/NAME/VERSION nor models:/NAME@ALIAS")
