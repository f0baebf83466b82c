"""Configuration of vLLM's engines in `ray.data.llm`, checked before a job starts."""

import dataclasses
import difflib
import importlib.util
from typing import Any

from pydantic import ValidationError
from ray.data.llm import vLLMEngineProcessorConfig

from longclip.errors import ConfigError
from pipelines.data.model_loading import model_source
from pipelines.data.vllm_settings import VllmEngine


def vllm_config(settings: VllmEngine, engines: int, instead: str, **options: Any) -> vLLMEngineProcessorConfig:
    """Configuration of the engines, validated by Ray and against the arguments of the installed vLLM.

    Args:
        settings: model and arguments.
        engines: number of engines; each uses tensor_parallel_size x pipeline_parallel_size GPUs.
        instead: strategies that do without vLLM, for messages.
        options: further fields of the configuration.

    Raises:
        CheckpointError: the directory of the model does not exist.
        ConfigError: vLLM is not installed, or an engine argument is wrong.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"strategy vllm needs vLLM and a GPU: pip install 'longclip[vllm]'; or use {instead}")
    import vllm  # takes many seconds, and is optional

    model = settings.model or ""
    if "://" not in model:  # Ray downloads URIs itself
        model = model_source("vllm.model", model)
    known = [field.name for field in dataclasses.fields(vllm.AsyncEngineArgs)]
    for name in settings.engine_kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "see the engine arguments in vLLM's documentation"
            raise ConfigError(f"vllm.engine_kwargs: vLLM's engine has no argument '{name}'; {hint}")
    try:
        return vLLMEngineProcessorConfig(
            model_source=model,
            engine_kwargs=dict(settings.engine_kwargs),  # Ray modifies it
            concurrency=engines,
            batch_size=settings.batch_size,
            accelerator_type=settings.accelerator_type,
            should_continue_on_error=True,
            **options,
        )
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ConfigError(f"vllm: Ray rejects the settings: {reasons}; fix them") from error
