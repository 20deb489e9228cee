"""How a setting is declared, once, and how values of it are checked, wherever they come from."""

import dataclasses
import re
import types
import typing

from etfzoo import files
from etfzoo.errors import EtfzooError, shown, unknown

_LONGEST = 4096  # letters of a text
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # the last: bytes that are not UTF-8
SEEDS = {"low": 0, "high": 2**32 - 1}  # what NumPy's generators take
MOST_IMAGES = 2**20  # of a batch
IMAGE_SIZES = {"low": 1, "high": 8192}  # pixels


def setting(
    group,
    default,
    text,
    *,
    low=None,
    high=None,
    choices=None,
    count=None,
    path=False,
    runtime=False,
):
    """A field of TrainConfig.

    Args:
        group: heading on the help page.
        default: its value where nothing else is said; a dataclasses.MISSING must be said.
        text: help, with the unit.
        low, high: limits of a number or of each of several, both allowed. Every number has them.
        choices: names that a string may be.
        count: how many values a list has; None is any.
        path: whether a string is a path.
        runtime: whether it tells where and how a run computes and not what, so that it may differ
            when the run is resumed.
    """
    facts = {"group": group, "help": text, "low": low, "high": high}
    facts |= {"choices": choices and tuple(choices), "count": count, "path": path}
    facts |= {"runtime": runtime}
    return dataclasses.field(default=default, metadata=facts)


def kind_of(field) -> tuple[type, bool]:
    """The type of a field's values, of which a tuple has several, and whether None is allowed."""
    kinds = field.type.__args__ if isinstance(field.type, types.UnionType) else (field.type,)
    (kind,) = (k for k in kinds if k is not type(None))
    return kind, len(kinds) > 1


def checked(field, value):
    """A field's value as it is kept; raises EtfzooError where it cannot be."""
    kind, optional = kind_of(field)
    if value is None and optional:
        return None
    parts = typing.get_args(kind)
    if not parts:
        _check(field, kind, value)
        return value
    if not isinstance(value, list | tuple):
        raise EtfzooError(f"{field.name} must be a list; got {shown(value)}")
    count = field.metadata["count"]
    if count is not None and len(value) != count:
        raise EtfzooError(f"{field.name} must be {count} values; got {shown(value)}")
    if not typing.get_args(parts[0]):
        for part in value:
            _check(field, parts[0], part)
        return tuple(value)
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise EtfzooError(f"{field.name} must be pairs of whole numbers; got {shown(value)}")
        for part in pair:
            _check(field, int, part)
    return tuple(map(tuple, value))


def _check(field, kind, value):
    facts = field.metadata
    check(field.name, kind, value, facts["low"], facts["high"], facts["choices"])
    if kind is str and facts["path"]:
        files.expand(value)


def check(name, kind, value, low=None, high=None, choices=None) -> None:
    """Checks a value of a setting or of a flag.

    Args:
        name: what it is called.
        kind: str, bool, int or float, which may be an int.
        value: anything.
        low, high, choices: see `setting`.

    Raises:
        EtfzooError: another type; a number out of its limits, or not finite; text that is empty,
            has control characters or is no choice.
    """
    wanted = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}[kind]
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise EtfzooError(f"{name} must be {wanted}; got {shown(value)}")
    if choices and value not in choices:
        raise unknown(name, value, choices)
    if kind is str and (not value or len(value) > _LONGEST or _CONTROL.search(value)):
        raise EtfzooError(f"{name} must be 1 to {_LONGEST} letters in one line; got {shown(value)}")
    if kind in (int, float) and not low <= value <= high:  # NaN ends here too
        raise EtfzooError(f"{name} must be between {low} and {high}; got {shown(value)}")
