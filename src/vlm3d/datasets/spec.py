"""How a data set is named in one line: ``KIND:TARGET[:key=value,...]``, such as ``ct_rate:/data/ct_rate:split=valid``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from vlm3d.datasets.case import Split
from vlm3d.errors import ConfigError

SPLITS: tuple[Split, ...] = get_args(Split)
_OPTION = re.compile(r"[a-z_]+=[^,=]+")


@dataclass(frozen=True)
class Spec:
    """A data set's name, taken apart.

    Attributes:
        text: As given, for messages.
        target: A folder, or what the kind takes instead.
        options: The settings behind it.
    """

    text: str
    target: str
    options: Mapping[str, str]


def parse_spec(text: str, kind: str, allowed: Sequence[str]) -> Spec:
    """Take a specification apart.

    The settings are what follows the last colon, where that looks like settings; a folder's name may hold colons.

    Args:
        text: Such as ``npz:/data/cases:split=train``; ``KIND:`` may be missing.
        kind: The data source's name.
        allowed: Settings that it knows.

    Raises:
        ConfigError: There is no target, or a setting is unknown or given twice.
    """
    rest = text.removeprefix(f"{kind}:")
    target, colon, tail = rest.rpartition(":")
    parts = tail.split(",")
    if not colon or not all(_OPTION.fullmatch(part.strip()) for part in parts):
        if colon and "=" in tail and "/" not in tail:
            raise ConfigError(f"'{text}': '{tail}' is not of the form key=value,key=value")
        target, parts = rest, []
    if not target:
        raise ConfigError(
            f"'{text}' names no data: give {kind}:FOLDER, with settings behind it as :key=value"
        )
    options: dict[str, str] = {}
    for part in parts:
        key, _, value = part.strip().partition("=")
        if key not in allowed:
            raise ConfigError(f"'{text}': unknown setting '{key}'; {kind} takes {', '.join(allowed)}")
        if key in options:
            raise ConfigError(f"'{text}': '{key}' is given twice")
        options[key] = value.strip()
    return Spec(text, target, options)


def as_split(spec: Spec) -> Split | None:
    """The setting ``split``, or None.

    Raises:
        ConfigError: It is none of train, valid and test.
    """
    given = spec.options.get("split")
    for split in SPLITS:
        if given == split:
            return split
    if given is not None:
        raise ConfigError(f"'{spec.text}': split is one of {', '.join(SPLITS)}, got '{given}'")
    return None


def as_float(spec: Spec, key: str, above: float, up_to: float) -> float:
    """A setting as a number.

    Raises:
        ConfigError: It is no number, or outside (above, up_to].
    """
    try:
        value = float(spec.options[key])
    except ValueError:
        value = float("nan")
    if not above < value <= up_to:
        raise ConfigError(
            f"'{spec.text}': {key} is a number above {above:g} and up to {up_to:g}, got '{spec.options[key]}'"
        )
    return value
