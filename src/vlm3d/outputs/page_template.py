"""The templates of our pages: escaped, strict about names, and clean of control characters."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from vlm3d.outputs.report_text import printable


def asset(name: str) -> str:
    """A file beside the templates, as text."""
    return files("vlm3d.outputs").joinpath("templates").joinpath(name).read_text(encoding="utf-8")


def page_template(name: str, **filters: Callable[..., Any]) -> jinja2.Template:
    """A page's template with the page's own filters; keep it, since reading one takes milliseconds."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
    )
    environment.filters.update(filters)
    return environment.get_template(name)


def _clean(value: Any) -> Any:
    """Applied to everything that a template prints: text loses its control characters, then is escaped."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
