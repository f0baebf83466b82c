"""Summaries by vLLM: the configuration as Ray validates it, and the way of the rows with a stand-in for the engine."""

import json
from pathlib import Path

import pytest
import ray

from longclip.errors import ConfigError
from pipelines.data.summaries.preflight import check_strategies
from pipelines.data.summaries.settings import Checks, SummarySettings, Vllm
from pipelines.data.summaries.summarizers import checked_summaries
from pipelines.data.summaries.vllm import INSTEAD, vllm_processor, vllm_summaries
from pipelines.data.vllm_engine import vllm_config
from tests.support.fake_vllm import write_word_model
from tests.support.local_ray import own_ray


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory with all that the stages around the engine read of a model: no weights are loaded."""
    template = (
        "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}answer : {% if quiet %}quietly {% endif %}{% endif %}"
    )
    return write_word_model(
        tmp_path / "model", "a the dog cat runs sleeps on beach . user system shorten answer : quietly", template
    )


def test_configuration_is_accepted_by_ray(vllm: None) -> None:
    settings = Vllm(
        model="org/name",
        engine_kwargs={"max_model_len": 4096, "tensor_parallel_size": 2},
        batch_size=8,
        accelerator_type="H100",
    )
    before = json.dumps(settings.engine_kwargs)
    config = vllm_config(settings, 3, INSTEAD)
    assert (config.model_source, config.concurrency, config.batch_size) == ("org/name", 3, 8)
    assert config.should_continue_on_error
    assert config.engine_kwargs["max_model_len"] == 4096
    assert json.dumps(settings.engine_kwargs) == before, "Ray's additions must not change what identifies a job"


def test_unknown_engine_arguments_are_found_early(vllm: None, model: str) -> None:
    def settings(**engine_kwargs: object) -> SummarySettings:
        return SummarySettings.model_validate(
            {"strategy": "vllm", "vllm": {"model": model, "engine_kwargs": engine_kwargs}}
        )

    check_strategies(settings(max_model_len=64))
    with pytest.raises(ConfigError, match=r"no argument 'max_model_length'; did you mean 'max_model_len'\?"):
        check_strategies(settings(max_model_length=64))
    with pytest.raises(ConfigError, match="no argument 'xyz'; see the engine arguments"):
        check_strategies(settings(xyz=1))


@pytest.mark.slow
def test_rows_go_through_all_stages(vllm: None, model: str) -> None:
    settings = Vllm(
        model=model,
        system="",
        prompt="shorten : {caption}",
        max_new_tokens=9,
        template_options={"quiet": True},
        engine_kwargs={"max_model_len": 24},
        batch_size=4,
    )
    captions = {f"row-{number}": f"the {animal} runs on a beach ." for number, animal in enumerate(["dog", "cat"] * 5)}
    captions["row-3"] = " ".join(["the cat sleeps on a beach ."] * 9)
    # Logical CPUs and GPU: one of each for the engine, one for every stage around it.
    with own_ray(num_cpus=6, num_gpus=1):
        rows = ray.data.from_items([{"key": key, "caption": caption} for key, caption in captions.items()])
        assert vllm_processor(settings).list_stage_names() == [
            "ChatTemplateStage",
            "TokenizeStage",
            "vLLMEngineStage",
            "DetokenizeStage",
        ]
        made = vllm_summaries(rows, settings).take_all()
    assert all(row.keys() == {"key", "summary"} for row in made)
    found = {row["key"]: row["summary"] for row in made}
    assert len(found) == len(made) == 10
    assert found.pop("row-3") == "", "a row that the engine refuses must not end the job"
    assert found == {key: f"{captions[key].removeprefix('the ')} answer : quietly" for key in found}
    texts, sources, replaced = checked_summaries("vllm", [""], [captions["row-3"]], Checks())
    assert (texts[0], sources, replaced) == ("the cat sleeps on a beach .", ["extractive"], {"vllm: empty": 1})
