"""Samples of a WebDataset tar: which consecutive files belong together, and what each is for.

WebDataset's key of a file is its path up to the first full stop of its name: `s.jpg`, `s.txt` and `s.mask.png` are one
sample. Names with full stops, such as `IMG_2.0.1.jpg` and `IMG_2.0.2.jpg`, share such a key: among these, files whose
names agree up to the last full stop belong together.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from longclip.errors import DataError
from pipelines.data.sources.captions import caption_texts, side_captions
from pipelines.data.sources.settings import SourceSettings
from pipelines.data.sources.source import SourceRow
from pipelines.data.sources.suffixes import IMAGE_SUFFIXES, TEXT_SUFFIXES
from pipelines.data.sources.text_decoding import decode_text, is_unicode, printable

MAX_IMAGES = 16
"""Maximum number of images with the same key that are in memory together."""

SIDE_SUFFIXES = (*TEXT_SUFFIXES, ".json")
REPACK = "if it is elsewhere in the tar, repack with tar --sort=name: the files of a sample must follow each other"


@dataclass(frozen=True)
class Member:
    """A file of a tar."""

    name: str
    content: bytes | str
    """The content, or the reason why it is not read."""

    @property
    def key(self) -> str:
        """WebDataset's key: the path without everything after the first full stop of the name."""
        folder, separator, file = self.name.rpartition("/")
        return folder + separator + file.partition(".")[0]

    @property
    def stem(self) -> str:
        """The path without the last suffix."""
        return self.name.rpartition(".")[0]

    @property
    def extension(self) -> str:
        """What follows the key and a full stop, in lower case."""
        return self.name[len(self.key) + 1 :].lower()

    @property
    def suffix(self) -> str:
        """The last suffix, in lower case."""
        return f".{self.extension.rpartition('.')[2]}"


def is_needed(name: str, settings: SourceSettings) -> bool:
    """Whether a sample may need a file; all others are not even read."""
    named = tuple(f".{_extension(value)}" for value in (settings.image, settings.caption) if value)
    return name.lower().endswith((*IMAGE_SUFFIXES, *SIDE_SUFFIXES, *named))


def samples(members: Iterable[Member], settings: SourceSettings) -> Iterator[SourceRow]:
    """Rows of the files of a tar, in their order; few files are in memory at a time."""
    pending: list[Member] = []
    for member in members:
        if pending and (member.key != pending[0].key or member.extension in [other.extension for other in pending]):
            yield from _rows(pending, settings)
            pending = []
        elif settings.image is None and _begins_sample(member, pending):
            yield from _rows([other for other in pending if other.stem != member.stem], settings)
            pending = [other for other in pending if other.stem == member.stem]
        pending.append(member)
    yield from _rows(pending, settings)


def _begins_sample(member: Member, pending: list[Member]) -> bool:
    """Whether a file is the image of another sample than the pending files, although it has the same key."""
    if member.suffix not in IMAGE_SUFFIXES:
        return False
    images = {other.stem for other in pending if other.suffix in IMAGE_SUFFIXES} - {member.stem}
    complete = images & {other.stem for other in pending if other.suffix in SIDE_SUFFIXES}
    return len(images) >= MAX_IMAGES or any(not member.stem.startswith(f"{stem}.") for stem in complete)


def _rows(pending: list[Member], settings: SourceSettings) -> Iterator[SourceRow]:
    """Rows of files with the same key: one, or one for each stem. None if no file is needed."""
    needed = [member for member in pending if is_needed(member.name, settings)]
    if not needed:
        return
    groups: dict[str, list[Member]] = {}
    for member in sorted(pending, key=lambda member: len(member.stem)):
        root = next((stem for stem in groups if f"{member.stem}.".startswith(f"{stem}.")), member.stem)
        groups.setdefault(root, []).append(member)
    kinds = [{_kind(member) for member in group} for group in groups.values()]
    complete = any({"image", "text"} <= kind for kind in kinds)
    if settings.image is not None or (not complete and set.union(*kinds) >= {"image", "text"}):
        groups = {pending[0].key: pending}  # parts with names of their own, such as `s.input.jpg` and `s.output.txt`
    for stem, members in groups.items():
        if any(member in needed for member in members):
            yield _row(stem, members, settings)


def _kind(member: Member) -> str:
    return "image" if member.suffix in IMAGE_SUFFIXES else "text" if member.suffix in SIDE_SUFFIXES else "other"


def _row(name: str, members: list[Member], settings: SourceSettings) -> SourceRow:
    row = SourceRow(printable(name.strip("/")))
    try:
        image = _image(members, settings)
        row.image = _content(image)
        metadata = _nearest(members, (".json",), image.stem, "source.caption")
        row.id = _id(row.id, metadata, settings)
        row.captions, row.problem = _captions(members, image, metadata, settings)
    except DataError as error:
        row.problem = printable(str(error))
    return row


def _image(members: list[Member], settings: SourceSettings) -> Member:
    if settings.image is None:
        stems = [member.stem for member in members if member.suffix in SIDE_SUFFIXES]
        image = _nearest(members, IMAGE_SUFFIXES, stems[0] if stems else "", "source.image")
    else:
        image = next((member for member in members if member.extension == _extension(settings.image)), None)
    if image is None:
        named = f" '{settings.image}'" if settings.image else ""
        raise DataError(f"sample has no image{named}, only {_names(members)}; {REPACK}")
    return image


def _captions(
    members: list[Member], image: Member, metadata: Member | None, settings: SourceSettings
) -> tuple[list[str], str | None]:
    if settings.caption is not None:
        named = next((member for member in members if member.extension == _extension(settings.caption)), None)
        if named is not None and named.suffix == ".json":
            return side_captions(None, _content(named), settings.model_copy(update={"caption": None}))
        if named is not None:
            return caption_texts(_content(named), settings.encoding)
        return side_captions(None, None if metadata is None else _content(metadata), settings)
    text = _nearest(members, TEXT_SUFFIXES, image.stem, "source.caption")
    if text is None and metadata is None:
        return [], f"sample has no caption, only {_names(members)}; {REPACK}"
    content = None if text is None else _content(text)
    # A .json file that is too large does no harm if there is a text.
    usable = metadata is not None and (text is None or isinstance(metadata.content, bytes))
    return side_captions(content, _content(metadata) if metadata is not None and usable else None, settings)


def _id(key: str, metadata: Member | None, settings: SourceSettings) -> str:
    """The field that the settings name in the .json file, if it is there, or else the key."""
    if settings.id is None or metadata is None:
        return key
    try:
        fields = json.loads(decode_text(_content(metadata), settings.encoding))
    except (ValueError, RecursionError):
        return key
    value = fields.get(settings.id) if isinstance(fields, dict) else None
    if value is not None and not is_unicode(str(value)):
        raise DataError(f"id '{value}' is not valid Unicode: it has half of a surrogate pair")
    return key if value in (None, "") else str(value)


def _nearest(members: list[Member], suffixes: tuple[str, ...], stem: str, setting: str) -> Member | None:
    """The file with one of these suffixes whose name is most like a stem, or shortest.

    Raises:
        DataError: several are alike.
    """
    rank = [
        (member.stem != stem, member.extension.count("."), suffixes.index(member.suffix), member)
        for member in members
        if member.suffix in suffixes
    ]
    rank.sort(key=lambda entry: entry[:3])
    if len(rank) > 1 and rank[0][:2] == rank[1][:2]:
        names = _names([rank[0][3], rank[1][3]])
        raise DataError(f"sample has {names}; name the one to read with --set {setting}={rank[0][3].extension}")
    return rank[0][3] if rank else None


def _content(member: Member) -> bytes:
    if isinstance(member.content, str):
        raise DataError(member.content)
    return member.content


def _extension(setting: str) -> str:
    return setting.lower().removeprefix(".")


def _names(members: list[Member]) -> str:
    return ", ".join(sorted(f".{member.extension}" for member in members))
