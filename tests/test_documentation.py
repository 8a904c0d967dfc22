"""The documentation's links lead somewhere, and its commands and their options exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vlm3d.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_commands_exist() -> None:
    known = {command.callback.__name__ for command in app.registered_commands}
    for page in PAGES:
        for command in re.findall(
            r"(?:^|`)vlm3d ([a-z]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE
        ):
            assert command in known, f"{page.name} names 'vlm3d {command}'"


def test_options_exist() -> None:
    from typer.main import get_command

    commands = get_command(app).commands  # type: ignore[attr-defined]
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, line in re.findall(r"(?:^|`|-m )vlm3d ([a-z]+)([^`\n#]*)", text, flags=re.MULTILINE):
            known = {option for parameter in commands[name].params for option in parameter.opts}
            for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line):
                assert option in known | {"--help"}, f"{page.name}: vlm3d {name} has no {option}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"`?make ([a-z]+)", page.read_text(encoding="utf-8")):
            assert target in targets or target in ("sure",), f"{page.name} names 'make {target}'"


def test_scripts_that_pages_run_exist() -> None:
    for page in PAGES:
        for script in re.findall(r"python ([a-z_/]+\.py)", page.read_text(encoding="utf-8")):
            assert (ROOT / script).exists(), f"{page.name} runs {script}"
