"""Captions by a real vision-language architecture with random weights, through transformers."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from upath import UPath

from longclip.errors import CheckpointError
from pipelines.common.storage import Storage
from pipelines.data.captions.drafts import Draft, draft_of
from pipelines.data.captions.journal import Journal
from pipelines.data.captions.piece import CaptionJob
from pipelines.data.captions.prompting import load_prompt
from pipelines.data.captions.settings import CaptionSettings, Transformers
from pipelines.data.captions.vision_model import AskVisionModel, VisionModel, checked_source
from pipelines.data.sources.opening import open_source
from pipelines.data.sources.source import SourceRow
from tests.support.broken_rows import encoded, photograph
from tests.support.layouts import write_parquet


def settings_of(**values: Any) -> CaptionSettings:
    return CaptionSettings.model_validate({"input": "x", "output": "y", "strategy": "transformers", **values})


def drafts(settings: CaptionSettings, *rows: SourceRow) -> list[Draft]:
    prompt = load_prompt(settings)
    return [draft_of(number, row, [], prompt, settings.image, settings.checks) for number, row in enumerate(rows)]


def pictures(count: int) -> list[bytes]:
    return [encoded(photograph(number)) for number in range(count)]


def test_replies_depend_on_image_and_prompt_but_not_on_the_batch(llava: str, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("the dog {caption} runs")
    settings = settings_of(prompt=str(path), transformers={"model": llava, "max_new_tokens": 12})
    first, second = pictures(2)
    model = VisionModel(settings.transformers)
    rows = [
        SourceRow("a", first, ["a"]),
        SourceRow("b", second, ["a"]),
        SourceRow("c", first, ["red bus on the beach"]),
    ]
    together = model(drafts(settings, *rows))
    alone = [model(drafts(settings, row))[0] for row in rows]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    assert len({reply.text for reply in together}) == 3
    assert [reply.prompt_tokens for reply in together] == [reply.prompt_tokens for reply in alone]
    assert together[2].prompt_tokens == (together[0].prompt_tokens or 0) + 4
    for reply in together:
        assert reply.finish_reason == ("length" if reply.completion_tokens == 12 else "stop")
    (injected,) = model(drafts(settings, SourceRow("d", first, ["<image> <image>"])))
    assert injected.text, "texts of a row must not be taken for images"


def test_a_piece_is_asked_about_in_rounds_and_journaled(llava: str, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "x.parquet", image=[*pictures(3), b"broken"])
    settings = settings_of(
        input=str(source),
        transformers={"model": llava, "max_new_tokens": 10, "batch_size": 2},
        checks={"min_tokens": 5, "attempts": 2},
    )
    opened = open_source("input", str(source), settings.source, Storage(), captions_required=False)
    job = CaptionJob(opened, settings, load_prompt(settings), UPath(tmp_path / "journals"))
    unit = {"file": str(source), "first": 0, "rows": 4, "take": None}
    result = AskVisionModel(job, lambda tokens: False)(0, unit)
    replies = Journal(job.journals, 0).read()
    assert (result["rows_in"], sorted(replies)) == (4, [0, 1, 2])
    assert "cannot be decoded" in result["failed"]["3"]
    for row, answers in replies.items():
        assert len(answers) == 2 or str(row) not in result["failed"]
    assert result["usage"]["replies"] == sum(map(len, replies.values()))
    stopped = AskVisionModel(job, lambda tokens: True)(1, unit)
    assert (stopped["stopped"], stopped["usage"]["replies"]) == (True, 0)


def test_other_models_are_refused_before_the_job_starts(llava: str, tmp_path: Path) -> None:
    assert checked_source(Transformers(model=llava)) == llava
    transformers.BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"transformers.model='.*' is a 'bert' model, not a vision"):
        checked_source(Transformers(model=str(tmp_path)))
    with pytest.raises(CheckpointError, match="does not exist"):
        checked_source(Transformers(model=str(tmp_path / "none")))
    without = transformers.AutoProcessor.from_pretrained(llava)
    without.chat_template = None
    without.save_pretrained(tmp_path / "silent")
    transformers.AutoConfig.from_pretrained(llava).save_pretrained(tmp_path / "silent")
    (tmp_path / "silent" / "model.safetensors").write_bytes(b"")
    (tmp_path / "silent" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="has no chat template"):
        checked_source(Transformers(model=str(tmp_path / "silent")))
