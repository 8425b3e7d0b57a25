"""Checked settings: what a field of a config, or an option of a router, may hold."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Check:
    """fits(value) tells whether a value is allowed; `expected` says in words what is."""

    fits: Callable[[Any], bool]
    expected: str

    def require(self, name: str, value: Any) -> None:
        """Raise a ValueError that names the setting, its value and what was expected."""
        if not self.fits(value):
            raise ValueError(f"{name} {shortened(value)} must be {self.expected}")

    def or_none(self) -> "Check":
        """The same check, but None is allowed too."""
        return Check(lambda value: value is None or self.fits(value), f"{self.expected}, or None")


def shortened(value: Any) -> str:
    """repr(value), cut in the middle where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether value is an integer of at least `least` that an array can have as its length."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= value < 2**31


def is_finite(value: Any) -> bool:
    """Whether value is a finite number of at least 0."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return number and 0 <= value < np.inf


WHOLE = Check(is_whole, "a whole number of at least 1 (and below 2**31)")
COUNT = Check(lambda value: is_whole(value, 0), "a whole number of at least 0")
EVEN = Check(lambda value: is_whole(value, 2) and value % 2 == 0, "an even number of at least 2")
NOT_NEGATIVE = Check(is_finite, "a finite number of at least 0")
POSITIVE = Check(lambda value: is_finite(value) and value > 0, "a finite number above 0")
SHARE = Check(lambda value: is_finite(value) and value <= 1, "a number from 0 to 1")
FLAG = Check(lambda value: isinstance(value, bool), "true or false")
NAME = Check(lambda value: isinstance(value, str), "a name")
BY_TYPE = {int: WHOLE, float: NOT_NEGATIVE, bool: FLAG, str: NAME}  # the check of an annotation


def one_of(*names: str) -> Check:
    """One of some names."""
    return Check(lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}")


def setting(default: Any, meaning: str, check: Check) -> Any:
    """A dataclass field with its meaning, for `cli.py options`, and its check, for `check_fields`."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "check": check})


def check_fields(config: Any) -> None:
    """Check each field by itself. NumPy's numbers become Python's, because JSON does not know them."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "check" in field.metadata:
            field.metadata["check"].require(field.name, value)
        if isinstance(value, np.generic):
            object.__setattr__(config, field.name, value.item())
