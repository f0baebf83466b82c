"""Evaluation sets: pinned by name in protocols.yaml, or a user's own; what they expect, and whether it is there."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError
from upath import UPath

from longclip.errors import ConfigError, DataError
from pipelines.common.settings import Settings, dump
from pipelines.common.storage import Storage, existing_path, explained
from pipelines.data.sources.opening import open_source
from pipelines.data.sources.settings import SourceSettings
from pipelines.data.sources.source import Source

FILE = Path(__file__).with_name("protocols.yaml")
CLASSES = Path(__file__).with_name("classes")


class Protocol(Settings):
    """What makes results on a set comparable."""

    title: str
    source: SourceSettings
    text: Literal["long", "short"] | None = None
    """Kind of the captions; None for classification."""
    annotations: list[str] = Field(default=[])
    """Where the annotations may be below the directory of the set; empty where the directory is the layout."""
    images_below: list[str] = Field(default=[])
    """Where the images may be below the directory of the set."""
    captions_per_image: PositiveInt | None = None
    """Only the first captions of each image count."""
    classes: str | None = None
    """File of class names in classes/; None for retrieval, or for names that the data has itself."""
    templates: str | None = None
    """File of prompt templates in classes/ (`<name>_templates.txt`); None for retrieval."""
    only_present_classes: bool = False
    """Whether classes without any image are no candidates."""
    expected_images: PositiveInt | None = None
    expected_texts: PositiveInt | None = None
    note: str = ""


class TaskSettings(Settings):
    """One thing to measure: `--set tasks.urban1k.input=/data/Urban1k`."""

    input: str
    """Directory, annotation file or Parquet of the set."""
    protocol: str | None = None
    """Name in protocols.yaml; empty takes the task's own name where there is one such, or else a user's own set."""
    kind: Literal["retrieval", "zero_shot"] = "retrieval"
    """What a user's own set is for."""
    text: Literal["long", "short"] = "long"
    """Kind of the captions of a user's own set."""
    templates: str = "simple"
    """Prompt templates of a user's own classes: `simple` or `openai`."""
    classes: str | None = None
    """Class names of a user's own set, one a line in the order of their numbers; empty takes the labels themselves."""
    source: SourceSettings = SourceSettings()
    """How it is read; `format` and `split` are those of the protocol, if there is one."""
    subset: bool = False
    """Accept other counts than the protocol's. The result then says that it is not the protocol's."""


@dataclass(frozen=True)
class Task:
    """A protocol that was found on disk."""

    name: str
    protocol: Protocol
    source: Source
    pinned: str | None
    """Name of the protocol; None for a user's own set."""
    subset: bool
    class_file: Path | None = None

    @property
    def is_zero_shot(self) -> bool:
        """Whether it classifies."""
        return self.protocol.templates is not None

    def check_counts(self, images: int, texts: int | None) -> str:
        """What the result is called: the protocol, or a subset of it.

        Raises:
            DataError: these are not the protocol's counts, and no subset was asked for.
        """
        if self.pinned is None:
            return f"own data: {images} images"
        expected = {"images": self.protocol.expected_images, "texts": self.protocol.expected_texts}
        found = {"images": images, "texts": texts}
        wrong = [name for name, count in expected.items() if count is not None and found[name] != count]
        if not wrong:
            return self.pinned
        message = f"{found[wrong[0]]} of the {expected[wrong[0]]} {wrong[0]} of {self.pinned}"
        if not self.subset:
            raise DataError(
                f"tasks.{self.name}.input has {message}; results would not be comparable. Complete the set, or measure"
                f" what is there with --set tasks.{self.name}.subset=true"
            )
        return f"NOT {self.pinned}: only {message}"


@cache
def protocols() -> dict[str, Protocol]:
    """All protocols by name."""
    return {name: Protocol.model_validate(values) for name, values in yaml.safe_load(FILE.read_text()).items()}


def open_task(name: str, settings: TaskSettings, storage: Storage) -> Task:
    """Find a task's data.

    Raises:
        ConfigError: the protocol is unknown, or a file of classes or templates.
        DataError: something the protocol expects is not there.
    """
    field = f"tasks.{name}.input"
    pinned = settings.protocol or (name if name in protocols() else None)
    if pinned is not None and pinned not in protocols():
        raise ConfigError(f"tasks.{name}.protocol='{pinned}' is unknown; known are {', '.join(protocols())}")
    protocol = protocols()[pinned] if pinned else _own_protocol(name, settings)
    given = {key: value for key, value in dump(settings.source).items() if key in settings.source.model_fields_set}
    try:
        source = SourceSettings.model_validate(given | protocol.source.model_dump(exclude_unset=True))
    except ValidationError as error:
        raise ConfigError(f"tasks.{name}.source: {error.errors()[0]['msg']}") from error
    root = existing_path(field, settings.input, storage)
    with explained(field, root):
        annotations = _annotations(field, root, protocol)
        if source.images is None and root.is_dir():
            below = next((root / folder for folder in protocol.images_below if (root / folder).is_dir()), None)
            source = source.model_copy(update={"images": str(below) if below else None})
    task = Task(name, protocol, open_source(field, str(annotations), source, storage), pinned, settings.subset)
    class_file = CLASSES / f"{protocol.classes}.txt" if pinned and protocol.classes else None
    if not pinned and settings.classes:
        class_file = Path(settings.classes).expanduser()
        if not class_file.is_file():
            raise ConfigError(f"tasks.{name}.classes='{class_file}' does not exist; give a file with one name a line")
    return replace(task, class_file=class_file)


def _own_protocol(name: str, settings: TaskSettings) -> Protocol:
    if settings.kind == "retrieval":
        return Protocol(title=name, source=settings.source, text=settings.text)
    if not (CLASSES / f"{settings.templates}_templates.txt").is_file():
        known = ", ".join(sorted(path.stem.removesuffix("_templates") for path in CLASSES.glob("*_templates.txt")))
        raise ConfigError(f"tasks.{name}.templates='{settings.templates}' is unknown; known are {known}")
    return Protocol(title=name, source=settings.source, templates=settings.templates)


def _annotations(field: str, root: UPath, protocol: Protocol) -> UPath:
    if not protocol.annotations or root.is_file():
        return root
    found = next((root / name for name in protocol.annotations if (root / name).is_file()), None)
    if found is None:
        raise DataError(
            f"{field}='{root}' holds no {' or '.join(protocol.annotations)}; give the directory that does, or the file"
        )
    return found


def lines_of(path: Path) -> list[str]:
    """Lines of a file of classes or templates, without comments and empty ones."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def templates_of(task: Task) -> list[str]:
    """Prompt templates of a zero-shot task."""
    return lines_of(CLASSES / f"{task.protocol.templates}_templates.txt")


def label_classes(task: Task, labels: list[str]) -> tuple[list[str], list[int]]:
    """Names of the candidate classes, and the class of each label.

    A file of classes has a name a line, or `key<TAB>name`; a label is such a key, a name, or a number of a line from 0.
    Without a file the labels themselves are the names, underscores being spaces.

    Raises:
        DataError: a label is no class.
    """
    if task.class_file is None:
        keys = sorted(set(labels))
        places = {key: place for place, key in enumerate(keys)}
        return [key.replace("_", " ") for key in keys], [places[label] for label in labels]
    pairs = [line.split("\t") for line in lines_of(task.class_file)]
    places = {str(number): number for number in range(len(pairs))}
    places |= {part: number for number, pair in enumerate(pairs) for part in pair}
    unknown = next((label for label in labels if label not in places), None)
    if unknown is not None:
        raise DataError(f"tasks.{task.name}.input: label '{unknown}' is no class of {task.class_file.name}")
    found = [places[label] for label in labels]
    kept: list[Any] = sorted(set(found)) if task.protocol.only_present_classes else list(range(len(pairs)))
    new = {number: place for place, number in enumerate(kept)}
    return [pairs[number][-1].replace("_", " ") for number in kept], [new[number] for number in found]
