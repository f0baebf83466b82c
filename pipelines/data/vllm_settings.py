"""Settings of vLLM's engines, for every job that generates text with them. Imports neither Ray nor vLLM."""

from typing import Any

from pydantic import Field, PositiveInt, field_validator

from pipelines.common.settings import Settings

VLLM_STAGE_CPUS = 5
"""Logical CPUs of the stages around the engines: without them, a local Ray would wait forever."""


class VllmEngine(Settings):
    """A model run by vLLM, through ray.data.llm."""

    model: str | None = None
    """Hugging Face directory, hub name, or s3:// or gs:// URI."""
    template_options: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """vLLM engine arguments, e.g. {max_model_len: 4096, tensor_parallel_size: 2}."""
    batch_size: PositiveInt = 64
    """Rows per batch that an engine receives."""
    accelerator_type: str | None = None
    """GPU type that an engine requires, as Ray names it, e.g. A100 or H100."""

    @field_validator("engine_kwargs")
    @classmethod
    def _are_engine_arguments(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "model" in values:
            raise ValueError("must not contain model; set vllm.model instead")
        if values.get("trust_remote_code"):
            raise ValueError(
                "must not contain trust_remote_code: code from a model repository is never run; use a model that vLLM"
                " supports natively"
            )
        return values
