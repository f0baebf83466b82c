"""Evaluation tasks: protocols of protocols.yaml or data sets of the user, and checks that their data is complete."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
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
from pipelines.evaluation.questions.annotations import Annotations
from pipelines.evaluation.questions.layouts import read_questions
from pipelines.evaluation.questions.rows import QuestionSet, RowSource
from pipelines.evaluation.settings import TaskSettings

FILE = Path(__file__).with_name("protocols.yaml")
CLASSES = Path(__file__).with_name("classes")
SETTINGS_OF_QUESTIONS = {"images", "encoding", "uri_schemes", "max_image_bytes", "rows_per_piece"}
"""Settings of a source that also apply to a set of questions."""


class Protocol(Settings):
    """Everything that makes results on a data set comparable."""

    title: str
    source: SourceSettings = SourceSettings()
    text: Literal["long", "short"] | None = None
    """Kind of the captions; None for classification."""
    annotations: list[str] = Field(default=[])
    """Possible places of the annotations in the data directory; empty if the directory has its own layout."""
    images_below: list[str] = Field(default=[])
    """Possible places of the images in the data directory; an empty one is the directory itself."""
    questions: str | None = None
    """Layout of a set of questions (see `questions/layouts.py`); None for retrieval and classification."""
    annotations_below: list[str] = Field(default=[""])
    """Possible places of the annotations of questions in the data directory; an empty one is the directory itself."""
    captions_per_image: PositiveInt | None = None
    """Number of captions per image that are used, from the first; null for all."""
    classes: str | None = None
    """File of class names in classes/; None for retrieval, or if the data has the names."""
    templates: str | None = None
    """File of prompt templates in classes/ (`<name>_templates.txt`); None for retrieval."""
    only_present_classes: bool = False
    """Leave out classes without any image."""
    expected_images: PositiveInt | None = None
    expected_texts: PositiveInt | None = None
    expected_questions: dict[str, PositiveInt] = Field(default={})
    """Number of questions by the name of the score."""
    note: str = ""


@dataclass(frozen=True)
class Task:
    """A protocol with its opened data."""

    name: str
    protocol: Protocol
    source: Source
    pinned: str | None
    """Name of the protocol; None for a data set of the user."""
    subset: bool
    class_file: Path | None = None
    questions: QuestionSet | None = None
    """What is asked about the rows of the source; None if their texts are ranked."""

    @property
    def kind(self) -> Literal["retrieval", "zero_shot", "questions"]:
        """Kind of the task."""
        return "questions" if self.questions else "zero_shot" if self.is_zero_shot else "retrieval"

    @property
    def is_zero_shot(self) -> bool:
        """Whether the task is classification."""
        return self.protocol.templates is not None

    def check_counts(self, images: int, texts: int | None, questions: Mapping[str, int] = MappingProxyType({})) -> str:
        """Name of the result: the protocol, or a note that it is only a subset.

        Args:
            images: number of images.
            texts: number of texts; None for classification.
            questions: number of questions by the name of the score.

        Raises:
            DataError: the counts differ from the protocol's, and `subset` is false.
        """
        if self.pinned is None:
            return f"own data: {images} images"
        expected = {"images": self.protocol.expected_images, "texts": self.protocol.expected_texts}
        expected |= {f"questions ({name})": count for name, count in self.protocol.expected_questions.items()}
        counts = {"images": images, "texts": texts}
        counts |= {f"questions ({name})": questions.get(name, 0) for name in self.protocol.expected_questions}
        if not any(expected.values()):
            return f"{self.pinned}: {images} images, a number that is not checked"
        wrong = [name for name, count in expected.items() if count is not None and counts[name] != count]
        if not wrong:
            return self.pinned
        message = f"{counts[wrong[0]]} of the {expected[wrong[0]]} {wrong[0]} of {self.pinned}"
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
    """Open the data of a task.

    Raises:
        ConfigError: the protocol, or a file of classes or templates, is unknown.
        DataError: something that the protocol requires is missing.
    """
    field = f"tasks.{name}.input"
    pinned = settings.protocol or (name if name in protocols() else None)
    if pinned is not None and pinned not in protocols():
        raise ConfigError(f"tasks.{name}.protocol='{pinned}' is unknown; known are {', '.join(protocols())}")
    protocol = protocols()[pinned] if pinned else _user_protocol(name, settings)
    given = {key: value for key, value in dump(settings.source).items() if key in settings.source.model_fields_set}
    try:
        source = SourceSettings.model_validate(given | protocol.source.model_dump(exclude_unset=True))
    except ValidationError as error:
        raise ConfigError(f"tasks.{name}.source: {error.errors()[0]['msg']}") from error
    root = existing_path(field, settings.input, storage)
    if pinned is not None and protocol.questions is not None:
        return _open_questions(name, pinned, root, settings, storage)
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
            raise ConfigError(f"tasks.{name}.classes='{class_file}' does not exist; give a file with one name per line")
    return replace(task, class_file=class_file)


def _open_questions(name: str, pinned: str, root: UPath, settings: TaskSettings, storage: Storage) -> Task:
    field, source, protocol = f"tasks.{name}.input", settings.source, protocols()[pinned]
    if ignored := source.model_fields_set - SETTINGS_OF_QUESTIONS:
        raise ConfigError(
            f"tasks.{name}.source.{min(ignored)} does not apply to a set of questions, only"
            f" {', '.join(sorted(SETTINGS_OF_QUESTIONS))}; remove it"
        )
    with explained(field, root):
        annotations = Annotations(field, root, protocol.annotations_below, source.encoding)
        questions = read_questions(str(protocol.questions), annotations)
        places = [root / folder if folder else root for folder in protocol.images_below]
        images = next((place for place in places if place.is_dir()), None)
    if source.images:
        images = existing_path(f"tasks.{name}.source.images", source.images, storage)
    if images is None:
        folders = " or ".join(f"{folder}/" for folder in protocol.images_below)
        raise DataError(f"{field}='{root}' has no {folders}; name it with --set tasks.{name}.source.images=<directory>")
    rows = RowSource(pinned, root, images, questions.rows, source, storage)
    return Task(name, protocol, rows, pinned, settings.subset, questions=questions)


def _user_protocol(name: str, settings: TaskSettings) -> Protocol:
    if settings.kind == "retrieval":
        return Protocol(title=name, source=settings.source, text=settings.text)
    if not (CLASSES / f"{settings.templates}_templates.txt").is_file():
        known = ", ".join(sorted(path.stem.removesuffix("_templates") for path in CLASSES.glob("*_templates.txt")))
        raise ConfigError(f"tasks.{name}.templates='{settings.templates}' is unknown; known are {known}")
    return Protocol(title=name, source=settings.source, templates=settings.templates)


def _annotations(field: str, root: UPath, protocol: Protocol) -> UPath:
    if not protocol.annotations or root.is_file():
        return root
    annotations = next((root / name for name in protocol.annotations if (root / name).is_file()), None)
    if annotations is None:
        raise DataError(
            f"{field}='{root}' has no {' or '.join(protocol.annotations)}; give the directory that has it, or the file"
        )
    return annotations


def lines_of(path: Path) -> list[str]:
    """Lines of a file of classes or templates, without comments and empty ones."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def templates_of(task: Task) -> list[str]:
    """Prompt templates of a zero-shot task."""
    return lines_of(CLASSES / f"{task.protocol.templates}_templates.txt")


def label_classes(task: Task, labels: list[str]) -> tuple[list[str], list[int]]:
    """Names of the candidate classes, and the class of each label.

    A file of classes has a name or `key<TAB>name` per line. A label is a key, a name, or the number of a line from 0.
    Without a file the labels are the names, with spaces for underscores.

    Raises:
        DataError: a label is not a class.
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
        raise DataError(f"tasks.{task.name}.input: label '{unknown}' is not a class of {task.class_file.name}")
    numbers = [places[label] for label in labels]
    kept: list[Any] = sorted(set(numbers)) if task.protocol.only_present_classes else list(range(len(pairs)))
    new = {number: place for place, number in enumerate(kept)}
    return [pairs[number][-1].replace("_", " ") for number in kept], [new[number] for number in numbers]
