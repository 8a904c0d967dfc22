"""What the tests of training share and do not change: small pretrained models and a store of coarse phantoms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.training_store import phantom_store, training_config, write_small_pretrained


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_small_pretrained(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, pretrained: dict[str, Any]) -> Path:
    return phantom_store(tmp_path_factory.mktemp("data") / "store", training_config(pretrained))
