"""Captions by vLLM: the configuration as Ray validates it, and the way of the rows with a stand-in for the engine."""

from pathlib import Path

import pytest
from upath import UPath

from pipelines.common.storage import Storage
from pipelines.data.captions.journal import Journal
from pipelines.data.captions.piece import CaptionJob
from pipelines.data.captions.prompting import load_prompt
from pipelines.data.captions.settings import CaptionSettings
from pipelines.data.captions.vllm import CloseJournals, ask_vllm, vllm_processor
from pipelines.data.sources.opening import open_source
from tests.support.broken_rows import jpeg
from tests.support.fake_vllm import write_word_model
from tests.support.layouts import write_parquet
from tests.support.local_ray import own_ray

TEMPLATE = "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}answer :"


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory with all that the stages around the engine read of a model: no weights are loaded."""
    return write_word_model(
        tmp_path / "model", "a the dog cat runs on beach . user answer assistant : <image> describe", TEMPLATE
    )


@pytest.mark.slow
def test_rows_go_through_all_stages_and_are_asked_again(vllm: None, model: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("describe : {caption}")
    texts = ["the dog runs on the beach .", "the cat .", "the cat runs . " * 60, "the dog ."]
    images = [jpeg(0), jpeg(1), jpeg(2), b"broken"]
    source = write_parquet(tmp_path / "x.parquet", image=images, caption=texts)
    settings = CaptionSettings.model_validate(
        {
            "input": str(source),
            "output": "y",
            "strategy": "vllm",
            "vllm": {"model": model, "max_new_tokens": 7, "engine_kwargs": {"max_model_len": 200}, "batch_size": 2},
            "prompt": str(tmp_path / "prompt.txt"),
            "checks": {"min_tokens": 9, "attempts": 2, "language": "Klingon"},
        }
    )
    opened = open_source("input", str(source), settings.source, Storage(), captions_required=False)
    job = CaptionJob(opened, settings, load_prompt(settings), UPath(tmp_path / "journals"))
    plan = [{"file": str(source), "first": first, "rows": 2, "take": None} for first in (0, 2)]
    # Logical CPUs and GPU: one of each for the engine, one for every stage around it.
    with own_ray(num_cpus=7, num_gpus=1):
        assert vllm_processor(settings).list_stage_names()[0] == "PrepareMultimodalStage"
        rejected, stopped = ask_vllm(job, plan, [0, 1], lambda tokens: False)
    assert not stopped
    first = Journal(job.journals, 0).read()
    assert first[0][0].text == "runs on the beach . answer :"
    assert len(first[1]) == 2, "a reply that cannot be used is sent back"
    assert {number: list(rows) for number, rows in rejected.items()} == {1: [0]}
    assert "the prompt is too long" in rejected[1][0]
    results = [CloseJournals(job, rejected, stopped)(number, unit) for number, unit in enumerate(plan)]
    assert [result["rows_in"] for result in results] == [2, 2]
    assert set(results[1]["failed"]) == {"0", "1"}
    assert "cannot be decoded" in results[1]["failed"]["1"]
