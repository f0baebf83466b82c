"""Settings: precedence, values to the letter, and one clear line for every mistake."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, PositiveInt

from longclip.errors import ConfigError
from pipelines.common.settings import Settings, describe, documented, load_settings
from pipelines.common.storage import local_path, storage_path
from pipelines.data.settings import PrepareSettings
from pipelines.data.summaries.settings import SummarizeSettings
from pipelines.training.settings import FinetuneSettings


class Inner(Settings):
    """Nested."""

    rate: float = 0.5
    """How fast."""
    name: str | None = None
    """What it is called."""


class Outer(Settings):
    """Example."""

    path: str
    """Where."""
    count: PositiveInt = 3
    """How many."""
    limit: PositiveInt | None = None
    """At most."""
    check: bool = False
    """Whether."""
    mode: Literal["fast", "exact"] = "fast"
    """How."""
    names: list[str] = Field(default=[])
    """Which."""
    either: str | list[str] = "one"
    """One or several."""
    by_name: dict[str, Inner] = Field(default={})
    """Several."""
    options: dict[str, Any] = Field(default={})
    """For somebody else."""
    inner: Inner = Inner()


def load(*overrides: str, config: str | None = None, tmp_path: Path = Path()) -> Outer:
    arguments = [part for override in overrides for part in ("--set", override)]
    if config is not None:
        (tmp_path / "run.yaml").write_text(config)
        arguments += ["--config", str(tmp_path / "run.yaml")]
    return load_settings(Outer, "an example", arguments)


def test_override_beats_file_beats_default(tmp_path: Path) -> None:
    settings = load("inner.rate=1e-3", config="path: a\ncount: 5\ninner: {rate: 2}\n", tmp_path=tmp_path)
    assert settings == Outer(path="a", count=5, inner=Inner(rate=1e-3))
    assert load("path=x").count == 3
    assert load("path=x", "path=y").path == "y"


TEXTS = [
    "/data/run #1", "007", "no", "null and void", "1e-5", "2024-01-01", "key: value", "a: b # c", "12:30:00", "0x10",
    "~user", "[1]", "{a", "'quoted'", '"', "*star", "&anchor", "!tag", "- dash", "%", "a, b", " spaces ", "tab\tinside",
    "ümlaut", "@x", "=", "a=b", "1_000", "True", "NULL", ".5", "+1", "",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_arrives_to_the_letter(text: str) -> None:
    settings = load(f"path={text}", f"inner.name={text}", f"by_name.x.name={text}")
    assert (settings.path, settings.inner.name, settings.by_name["x"].name) == (text, text, text)


@pytest.mark.parametrize("text", ["007", "no", "1e-5", "2024-01-01", "12:30:00", "0x10", "/data/run#1", "yes", "1_000"])
def test_a_text_in_a_file_arrives_to_the_letter(text: str, tmp_path: Path) -> None:
    settings = load(config=f"path: {text}\nnames: [{text}, x]\nby_name: {{a: {{name: {text}}}}}\n", tmp_path=tmp_path)
    assert (settings.path, settings.names, settings.by_name["a"].name) == (text, [text, "x"], text)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("inner.rate=1e-5", {"inner": {"rate": 1e-5}}),
        ("inner.rate=3", {"inner": {"rate": 3.0}}),
        ("limit=7", {"limit": 7}),
        ("limit=null", {"limit": None}),
        ("inner.name=null", {"inner": {"name": None}}),
        ("path=null", {"path": "null"}),
        ("path=~", {"path": "~"}),
        ("check=true", {"check": True}),
        ("names=[a, 'b, c', 01, no, 'null']", {"names": ["a", "b, c", "01", "no", "null"]}),
        ("names=[]", {"names": []}),
        ("either=a b", {"either": "a b"}),
        ("either=[a, b]", {"either": ["a", "b"]}),
        ("by_name={x: {rate: 2}, y: {}}", {"by_name": {"x": {"rate": 2.0}, "y": {}}}),
        ("options.a.b=3", {"options": {"a": {"b": 3}}}),
        ("options.a=1e-5", {"options": {"a": 1e-5}}),
        ("options.a=007", {"options": {"a": "007"}}),
        ("options.a=off # on", {"options": {"a": "off # on"}}),
        ("options={a: true, b: [1, x, null], c: '1'}", {"options": {"a": True, "b": [1, "x", None], "c": "1"}}),
        ("inner={rate: 2}", {"inner": {"rate": 2.0}}),
    ],
)
def test_other_values_are_read_by_the_type_of_their_setting(override: str, expected: dict[str, Any]) -> None:
    settings = load("path=x", override)
    assert settings == Outer.model_validate({"path": "x"} | expected)
    dumped = settings.model_dump(exclude_unset=True)
    for key, value in expected.items():
        assert json.dumps(dumped[key]) == json.dumps(value), "an equal value of another type would pass above"


def test_a_mapping_adds_to_its_group() -> None:
    assert load("path=x", "inner.name=n", "inner={rate: 2}").inner == Inner(name="n", rate=2)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["path=x", "inner.rat=1"], "unknown setting 'inner.rat'; did you mean 'inner.rate'?"),
        (["path=x", "rate=1"], "did you mean 'inner.rate'?"),
        (["path=x", "zzz=1"], "known are path, count, limit"),
        ([], "setting 'path' is missing; give it in the YAML file or as --set path=..."),
        (["path=x", "count=0"], "setting 'count' = '0'"),
        (["path=x", "count=3 # three"], "setting 'count' = '3 # three'"),
        (["path=x", "count=1.5"], "setting 'count' = '1.5'"),
        (["path=x", "limit="], "setting 'limit' = ''"),
        (["path=x", "check=maybe"], "setting 'check' = 'maybe'"),
        (["path=x", "mode=slow"], "setting 'mode' = 'slow': Input should be 'fast' or 'exact'"),
        (["path"], "--set 'path' is not KEY=VALUE"),
        (["path=x", ".rows=1"], "--set '.rows=1' is not KEY=VALUE"),
        (["path=x", "inner..rate=1"], "is not KEY=VALUE"),
        (["path=x", "names=[a, null]"], "'names.1' is empty; give a value, or quote it if you mean the text"),
        (["path=x", "count=" + "9x" * 300], "9x9..."),
        (["path=x", "names=" + "[" * 60 + "]" * 60], "'names' is nested too deeply"),
        (["path=x", "options=" + "[" * 5000 + "]" * 5000], "nested too deeply"),
        (["path=x", "options.a=1", "options.a.b=2"], "'options.a' was set to a single value"),
        (["path=x", "path.y=1"], "'path' was set to a single value"),
        (["path=x", "inner.rate=1", "inner=2"], "'inner' is a group of settings, of which another --set gives a value"),
        (["path=x", "inner=2"], "setting 'inner' = '2' is a group of settings; set one of inner.rate, inner.name"),
        (["path=x", "names=[a, b"], "this is not valid YAML"),
        (["path=x", "names=[a] # b"], "'# b' follows the value"),
        (["path=x", "by_name={a: {rate: 1}, a: {rate: 2}}"], "gives 'a' a second time"),
    ],
)
def test_mistakes_are_one_clear_line(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("arguments", [["--path", "x"], ["--path=x"], ["x"], ["--conf=x"]])
def test_there_is_one_way_to_set_a_value(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"unknown option '.*'; settings are given as --set KEY=VALUE, see --help"):
        load_settings(Outer, "an example", ["--set", "path=x", *arguments])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1\n", "is not a mapping of settings"),
        ("a: [1\n", "is not valid YAML"),
        ("path: x\ncount: 1\ncount: 2\n", "line 3 gives 'count' a second time"),
        ("inner: {rate: 1, rate: 2}\n", "gives 'rate' a second time"),
        ("base: &base {rate: 1}\ninner:\n  <<: *base\n", "has a merge key (<<)"),
        ("path: x\ncount: many\n", "run.yaml': setting 'count' = 'many'"),
        ("path:\n", "'path' is empty; give a value, or quote it if you mean the text"),
        ("path: ~\n", "'path' is empty"),
        ("path: null\n", "'path' is empty"),
        ("path: Null\n", "'path' is empty"),
        ("names: [a, null]\n", "'names.1' is empty"),
        ("by_name: {a: }\n", "'by_name.a' is empty"),
        ("inner: {rate: }\n", "'inner.rate' is empty"),
        ("zzz:\n", "unknown setting 'zzz'"),
        ("inner.rate: 1\n", "unknown setting 'inner.rate'; write inner: {rate: ...}"),
        ("? [a]\n: 1\n", "line 1 has a list or mapping as a key; write the name of a setting"),
        ("options: &a {b: *a}\n", "nested too deeply; use at most 50 levels, no alias to itself"),
        ("names: &a [*a]\n", "nested too deeply; use at most 50 levels, no alias to itself"),
    ],
)
def test_mistakes_in_a_file_are_one_clear_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(config=text, tmp_path=tmp_path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_quoted_text_in_a_file_is_not_null(tmp_path: Path) -> None:
    settings = load(config="path: '~'\nnames: ['', \"null\"]\ninner: {name: ~}\n", tmp_path=tmp_path)
    assert (settings.path, settings.names, settings.inner.name) == ("~", ["", "null"], None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("True", True), ("FALSE", False), ("null", None), ("", None), ("7", 7), ("-1", -1), (".5", 0.5), ("1e-5", 1e-5),
        ("1.", 1.0), ("'007'", "007"), ("'yes'", "yes"), ("a b", "a b"), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_untyped_values_in_a_file(text: str, expected: Any, tmp_path: Path) -> None:
    value = load(config=f"path: x\noptions:\n  a: {text}\n", tmp_path=tmp_path).options["a"]
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    "text",
    ["yes", "Off", "0x10", "007", "08", "1_000", "2024-01-01", "12:30", ".nan", ".inf", "nan", "-Infinity", "1e999"],
)
def test_ambiguous_untyped_values_in_a_file_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'options\.a' = '.*' is ambiguous; quote it, or write true, false or a"):
        load(config=f"path: x\noptions: {{a: {text}}}\n", tmp_path=tmp_path)


def test_a_mapping_replaces_a_dictionary_of_the_file_and_merges_into_a_group(tmp_path: Path) -> None:
    config = "path: x\nby_name: {a: {rate: 1, name: n}}\noptions: {a: 1, b: {c: 2}}\ninner: {name: n}\n"

    def changed(*overrides: str) -> Outer:
        return load(*overrides, config=config, tmp_path=tmp_path)

    assert changed("options={b: {d: 3}}").options == {"b": {"d": 3}}
    assert changed("options.b={d: 3}").options == {"a": 1, "b": {"d": 3}}
    assert changed("options.b.d=3").options == {"a": 1, "b": {"c": 2, "d": 3}}
    assert changed("options.a=5", "options={b: 1}", "options.c=2").options == {"b": 1, "c": 2}
    assert changed("by_name={b: {rate: 2}}").by_name == {"b": Inner(rate=2)}
    assert changed("by_name.a={rate: 2}").by_name == {"a": Inner(rate=2, name="n")}
    assert changed("inner={rate: 2}").inner == Inner(rate=2, name="n")


def test_a_single_value_in_the_file_is_not_dropped_for_a_group(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml': setting 'inner' = 'x' is a group of settings"):
        load("inner.rate=1", config="path: x\ninner: x\n", tmp_path=tmp_path)
    with pytest.raises(ConfigError, match=r"'options\.a\.b' is set, but so is 'options\.a', to the single value 3"):
        load("options.a.b=1", config="path: x\noptions: {a: 3}\n", tmp_path=tmp_path)


def test_a_file_may_leave_values_to_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {lock_image_unlocked_groups: 1}\n")
    overrides = ["--set", "input=x", "--set", "model.base=a", "--set", "model.lock_image=true"]
    settings = load_settings(FinetuneSettings, "", ["--config", str(tmp_path / "run.yaml"), *overrides])
    assert settings.model.lock_image_unlocked_groups == 1


def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config '' cannot be read"):
        load_settings(Outer, "", ["--config", "", "--set", "path=x"])
    with pytest.raises(ConfigError, match=r"--config '/nowhere\.yaml' cannot be read"):
        load_settings(Outer, "", ["--config", "/nowhere.yaml"])
    (tmp_path / "latin.yaml").write_bytes("path: /daten/größe\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_settings(Outer, "", ["--config", str(tmp_path / "latin.yaml")])


def test_help_is_grouped_by_section_and_names_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        load_settings(Outer, "an example", ["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "  path = (required)\n      Where.\n" in text
    assert "  mode = fast\n      How. [fast | exact]\n" in text
    assert "  limit = null\n      At most.\n" in text
    assert "\ninner: Nested.\n  inner.rate = 0.5\n      How fast.\n" in text
    assert text.index("options = ") < text.index("inner: Nested."), "settings outside of sections come first"


def test_every_setting_of_finetune_is_documented() -> None:
    assert not [key for key, text in documented(FinetuneSettings).items() if not text.strip()]
    assert "optim.learning_rate = 1e-05" in describe(FinetuneSettings)


def test_relative_paths_inside_a_submitted_job_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "working_dir_files" / "pkg"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    with pytest.raises(ConfigError, match="output='var/x' is relative"):
        storage_path("output", "var/x")
    assert storage_path("output", "/data/x") == "/data/x"
    assert storage_path("output", "s3://bucket/x") == "s3://bucket/x"
    monkeypatch.chdir(tmp_path)
    assert storage_path("output", "var/x") == str(tmp_path / "var/x")


def test_uri_is_refused_where_only_a_local_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="output='s3://bucket/x' is a URI, but this entry needs a local path"):
        local_path("output", "s3://bucket/x")
    monkeypatch.chdir(tmp_path)
    assert local_path("output", "var/x") == tmp_path / "var/x"


@pytest.mark.parametrize("kind", [FinetuneSettings, SummarizeSettings, PrepareSettings])
def test_help_of_optional_settings_says_null_and_not_empty(kind: type[Settings]) -> None:
    lines = describe(kind).splitlines()
    optional = [meaning for setting, meaning in pairwise(lines) if setting.endswith(" = null")]
    assert optional
    assert not [meaning for meaning in optional if "empty" in meaning.lower()]
