"""Every bad input is one clear line of the documented kind, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.bad_inputs import BAD_INPUTS, BadInput
from vlm3d.io import read_volume


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_it_is_refused_in_one_line(bad: BadInput, tmp_path: Path) -> None:
    path = bad.build(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(bad.error) as raised:
        read_volume(path)
    message = str(raised.value)
    assert "\n" not in message
    assert "Traceback" not in message
    assert any(named.name in message for named in (path, *path.rglob("*")))
    assert len(message) < 400
    assert raised.value.exit_code == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_there_are_more_than_forty_kinds() -> None:
    assert len({bad.name for bad in BAD_INPUTS}) >= 40
