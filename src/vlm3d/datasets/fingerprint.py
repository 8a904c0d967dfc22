"""How a store was prepared: written once beside the data, compared before anything is added or trained on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vlm3d.config import PreprocessingConfig
from vlm3d.errors import ConfigError, DataError, OutputError
from vlm3d.io import write_atomically
from vlm3d.io.wording import reason

FINGERPRINT = "fingerprint.json"
SCHEMA_VERSION = 1
AnatomyMode = Literal["given", "classical", "mixed", "auto", "none"]


@dataclass(frozen=True)
class Fingerprint:
    """How the scans of a store were prepared; two stores with the same one can be trained on together.

    Attributes:
        preprocessing: Settings of the grid, the crop and the window.
        anatomy: Where regions come from.
        schema_version: Of the store's files.
    """

    preprocessing: PreprocessingConfig
    anatomy: AnatomyMode
    schema_version: int = SCHEMA_VERSION

    @property
    def sha256(self) -> str:
        """Of everything in it."""
        return hashlib.sha256(json.dumps(self._values(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Indented JSON with the checksum."""
        return json.dumps({**self._values(), "sha256": self.sha256}, indent=2) + "\n"

    def differences(self, other: Fingerprint) -> list[tuple[str, Any, Any]]:
        """Name, value here and value there of every setting that differs."""
        mine, others = self._flat(), other._flat()
        return [(name, mine.get(name), others.get(name)) for name in mine if mine[name] != others.get(name)]

    def _values(self) -> dict[str, Any]:
        return {
            "schema_version": self.schema_version,
            "anatomy": self.anatomy,
            "preprocessing": self.preprocessing.model_dump(mode="json"),
        }

    def _flat(self) -> dict[str, Any]:
        values = self._values()
        return {**values.pop("preprocessing"), **values}


def refuse_other(store: Path, found: Fingerprint, wanted: Fingerprint) -> None:
    """Refuse a store that was prepared otherwise.

    Raises:
        ConfigError: Names both fingerprints and the settings in which they differ.
    """
    if found.sha256 == wanted.sha256:
        return
    words = ", ".join(f"{name} {here} instead of {there}" for name, here, there in found.differences(wanted))
    raise ConfigError(
        f"{store} was prepared with fingerprint {found.sha256[:12]}, wanted is {wanted.sha256[:12]}: it has {words}. "
        "Use these settings, or another store."
    )


def read_fingerprint(store: Path) -> Fingerprint:
    """How a store was prepared.

    Raises:
        DataError: The folder is no store, or one of another version of vlm3d.
    """
    path = store / FINGERPRINT
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["schema_version"] != SCHEMA_VERSION:
            raise DataError(
                f"{store} has store version {values['schema_version']}, this vlm3d reads version {SCHEMA_VERSION}; "
                "prepare it again"
            )
        if values["anatomy"] not in get_args(AnatomyMode):
            raise ValueError("unknown anatomy")
        found = Fingerprint(PreprocessingConfig.model_validate(values["preprocessing"]), values["anatomy"])
    except FileNotFoundError as error:
        raise DataError(f"{store} is no store: it has no {FINGERPRINT}; vlm3d prepare makes one") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({reason(error)}); prepare the store again") from error
    if found.sha256 != values.get("sha256"):
        raise DataError(f"{path} was changed by hand: its sha256 is not that of its settings; restore it")
    return found


def open_store(store: Path, wanted: Fingerprint) -> None:
    """Make a store, or check that the one there was prepared alike.

    Raises:
        ConfigError: It was prepared otherwise.
        OutputError: Something that is no store is in its place, or it cannot be written.
    """
    if (store / FINGERPRINT).is_file():
        refuse_other(store, read_fingerprint(store), wanted)
        return
    try:
        if store.exists() and (
            not store.is_dir() or any(not path.name.startswith(".") for path in store.iterdir())
        ):
            raise OutputError(f"{store} exists and is no store of vlm3d; name a new folder")
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{store} cannot be written: {reason(error)}; choose another folder") from error
    write_atomically(store / FINGERPRINT, wanted.to_json())
