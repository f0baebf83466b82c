"""Conditions on the metadata of items: JSON in, a typed tree, a mask out. No text of a request becomes part of a query.

    {"year": {"gte": 1990, "lt": 2000}, "or": [{"place": {"eq": "Oslo"}}, {"not": {"colour": {"in": ["red"]}}}]}

All conditions of an object must hold. An item without a value fulfils neither a condition on it nor its negation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longclip.errors import DataError

MAX_DEPTH, MAX_CONDITIONS, MAX_VALUES = 8, 64, 1000
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": pc.equal,
    "ne": pc.not_equal,
    "lt": pc.less,
    "lte": pc.less_equal,
    "gt": pc.greater,
    "gte": pc.greater_equal,
}
OPERATORS = (*_COMPARISONS, "in")


@dataclass(frozen=True)
class Filter:
    """A condition on columns, ready to be evaluated."""

    kind: str
    """An operator, or `and`, `or`, `not`."""
    column: str = ""
    value: Any = None
    """A scalar, or an array for `in`, of the column's type."""
    parts: tuple["Filter", ...] = ()

    def mask(self, items: pa.Table) -> np.ndarray:
        """Which rows `[N]` fulfil the condition."""
        return pc.fill_null(self._evaluate(items), False).to_numpy()

    def _evaluate(self, items: pa.Table) -> pa.ChunkedArray:
        if self.kind == "not":
            return pc.invert(self.parts[0]._evaluate(items))
        if self.kind in ("and", "or"):
            combine = pc.and_kleene if self.kind == "and" else pc.or_kleene
            result = self.parts[0]._evaluate(items)
            for part in self.parts[1:]:
                result = combine(result, part._evaluate(items))
            return result
        column = items[self.column]
        if self.kind == "in":
            contained = pc.is_in(column, value_set=self.value)
            return pc.if_else(pc.is_valid(column), contained, pa.scalar(None, pa.bool_()))
        return _COMPARISONS[self.kind](column, self.value)


def parse_filter(value: Any, schema: Mapping[str, pa.DataType]) -> Filter:
    """Parse a filter of JSON values and check it against the columns.

    Args:
        value: an object of conditions.
        schema: types of the columns.

    Raises:
        DataError: it is not such an object, names an unknown column, or compares with a value of another type.
    """
    return _Parser(schema).conditions(value, 1)


class _Parser:
    """Parses one filter and counts its conditions."""

    def __init__(self, schema: Mapping[str, pa.DataType]) -> None:
        self.schema = schema
        self.count = 0

    def conditions(self, value: Any, depth: int) -> Filter:
        """An object: all of its conditions."""
        if depth > MAX_DEPTH:
            raise DataError(f"it is nested deeper than {MAX_DEPTH} levels")
        if not isinstance(value, dict) or not value:
            raise DataError(f'conditions must be an object such as {{"year": {{"gte": 1990}}}}, not {_shown(value)}')
        parts = []
        for key, part in value.items():
            if key in ("and", "or"):
                if not isinstance(part, list) or not part:
                    raise DataError(f"'{key}' takes a list of conditions, not {_shown(part)}")
                parts.append(Filter(key, parts=tuple(self.conditions(entry, depth + 1) for entry in part)))
            elif key == "not":
                parts.append(Filter("not", parts=(self.conditions(part, depth + 1),)))
            else:
                parts += self._comparisons(key, part)
        return parts[0] if len(parts) == 1 else Filter("and", parts=tuple(parts))

    def _comparisons(self, column: str, value: Any) -> list[Filter]:
        if column not in self.schema:
            known = ", ".join(self.schema) or "none"
            raise DataError(f"column {_shown(column)} does not exist; columns to filter by: {known}")
        if not isinstance(value, dict) or not value:
            raise DataError(f"'{column}' takes an object such as {{\"eq\": value}}, not {_shown(value)}")
        comparisons = []
        for operator, operand in value.items():
            self.count += 1
            if self.count > MAX_CONDITIONS:
                raise DataError(f"it has more than {MAX_CONDITIONS} conditions")
            if operator not in OPERATORS:
                raise DataError(f"'{column}': operator {_shown(operator)} is not one of {', '.join(OPERATORS)}")
            comparisons.append(Filter(operator, column, self._operand(column, operator, operand)))
        return comparisons

    def _operand(self, column: str, operator: str, operand: Any) -> Any:
        kind = self.schema[column]
        values = operand if operator == "in" else [operand]
        if not isinstance(values, list) or not 0 < len(values) <= MAX_VALUES:
            raise DataError(f"'{column}': 'in' takes a list of 1 to {MAX_VALUES} values")
        for value in values:
            if not _fits(value, kind):
                raise DataError(f"'{column}' holds {kind}, it cannot be compared with {_shown(value)}")
        try:
            array = pa.array(values, kind)
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(f"'{column}' holds {kind}, it cannot be compared with {_shown(values[0])}") from error
        return array if operator == "in" else array[0]


def _fits(value: Any, kind: pa.DataType) -> bool:
    if pa.types.is_boolean(kind):
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if pa.types.is_integer(kind):
        return isinstance(value, int)
    if pa.types.is_floating(kind):
        return isinstance(value, int | float)
    return isinstance(value, str)


def filterable(kind: pa.DataType) -> bool:
    """Whether a column of this type can be filtered by."""
    return (
        pa.types.is_boolean(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
