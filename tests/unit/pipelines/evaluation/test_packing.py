"""Dataclasses in files: every kind of field that a measurement may have is read as it was written."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipelines.evaluation.packing import load_packed, read_header, save_packed


@dataclass
class Count:
    """A dataclass in another one."""

    count: int


@dataclass
class Share:
    """Another, which has other fields."""

    share: float
    bounds: tuple[float, float] = (0.0, 1.0)


@dataclass
class Sample:
    """Fields of all kinds."""

    either: Count | Share
    perhaps: Count | None
    number: float | None
    by_name: dict[str, dict[str, np.ndarray]]
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("either", "perhaps", "number"), [(Count(3), None, None), (Share(0.1, (-1.0, 1.0)), Count(4), 0.1)]
)
def test_fields_are_read_as_written(
    tmp_path: Path, either: Count | Share, perhaps: Count | None, number: float | None
) -> None:
    arrays: dict[str, dict[str, np.ndarray]] = {
        "a": {"x": np.arange(6).reshape(2, 3).T, "y": np.zeros(0, np.float32)},
        "b": {"x": np.array([True])},
    }
    value = Sample(either, perhaps, number, arrays, ("ü", "a\0b"))
    save_packed(value, tmp_path / "file", {"key": "value"})
    assert read_header(tmp_path / "file") == {"key": "value"}
    found = load_packed(Sample, tmp_path / "file")
    assert (found.either, found.perhaps, found.number, found.names) == (either, perhaps, number, value.names)
    assert {name: list(part) for name, part in found.by_name.items()} == {"a": ["x", "y"], "b": ["x"]}
    for name, part in arrays.items():
        for key, array in part.items():
            assert found.by_name[name][key].dtype == array.dtype
            np.testing.assert_array_equal(found.by_name[name][key], array)
