"""Checked settings: what a field of a config, or an option of a router, may hold."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import numpy as np


@dataclass(frozen=True)
class Check:
    """fits(value): whether the value is allowed. expected: the allowed values, in words."""

    fits: Callable[[Any], bool]
    expected: str

    def require(self, name: str, value: Any) -> None:
        """Raise a ValueError that names the setting, its value and what was expected."""
        if not self.fits(value):
            text = repr(value)
            text = text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"
            raise ValueError(f"{name} {text} must be {self.expected}")

    def or_none(self) -> "Check":
        """The same check, but None is allowed too."""
        return Check(lambda value: value is None or self.fits(value), f"{self.expected}, or None")


def integer_from(least: int, below: int = 2**31) -> Callable[[Any], bool]:
    """A test for integers from `least` to `below` - 1. By default they are small enough for the length of an array."""
    return lambda value: isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= value < below


def is_finite_from_0(value: Any) -> bool:
    """Whether value is a finite number of at least 0."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and 0 <= value < np.inf


def one_of(*values: Any) -> Check:
    """One of some names or numbers."""
    return Check(lambda value: any(type(value) is type(one) and value == one for one in values),
                 f"one of {', '.join(map(str, values))}")


WHOLE = Check(integer_from(1), "a whole number of at least 1 (and below 2**31)")
COUNT = Check(integer_from(0), "a whole number of at least 0")
SEED = Check(integer_from(0, 2**64), "a whole number from 0 to 2**64 - 1")
DEPTH = Check(integer_from(1, 10_001), "a whole number from 1 to 10,000")
EVEN = Check(lambda value: COUNT.fits(value) and value and value % 2 == 0, "an even number of at least 2")
NOT_NEGATIVE = Check(is_finite_from_0, "a finite number of at least 0")
POSITIVE = Check(lambda value: is_finite_from_0(value) and value > 0, "a finite number above 0")
SHARE = Check(lambda value: is_finite_from_0(value) and value <= 1, "a number from 0 to 1")
FLAG = Check(lambda value: isinstance(value, bool), "true or false")
BY_TYPE = {int: WHOLE, float: NOT_NEGATIVE, bool: FLAG, str: Check(lambda value: isinstance(value, str), "a name")}


def check_of(annotation: Any) -> Check | None:
    """The check of an annotation: a type of BY_TYPE, a Literal, either of them or None; None for others."""
    if get_origin(annotation) is Literal:
        return one_of(*get_args(annotation))
    if type(None) in get_args(annotation) and len(get_args(annotation)) == 2:
        check = next(filter(None, map(check_of, get_args(annotation))), None)
        return check and check.or_none()
    return BY_TYPE.get(annotation)


def setting(default: Any, meaning: str, check: Check) -> Any:
    """A dataclass field with its meaning, for `cli.py options`, and its check, for `check_fields`."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "check": check})


def check_fields(config: Any) -> None:
    """Check each field by itself. NumPy's numbers become Python's, because JSON does not know them."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "check" in field.metadata:
            field.metadata["check"].require(field.name, value)
        object.__setattr__(config, field.name, _as_python(value))


def _as_python(value):
    if isinstance(value, dict):  # a tuple becomes a list, as it does in a file
        return {name: list(one) if isinstance(one, tuple) else _as_python(one) for name, one in value.items()}
    return value.item() if isinstance(value, np.generic) else value
