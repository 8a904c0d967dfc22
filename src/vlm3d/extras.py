"""Optional packages: import one, or say in one line how to install it."""

from __future__ import annotations

import importlib
from types import ModuleType

from vlm3d.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: Import name, such as ``"bitsandbytes"``.
        extra: The extra of this package that brings it, such as ``"quant"``.
        purpose: What the user wanted, as it continues 'is needed to …'.

    Raises:
        MissingExtraError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is needed to {purpose} and cannot be imported ({error}); type: pip install 'vlm3d[{extra}]'"
        ) from error
