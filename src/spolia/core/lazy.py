"""`torch` and `np`, imported when they are first used, so that listing and planning never pay for them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
else:

    class _Lazy:
        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            value = getattr(import_module(self._name), attribute)
            setattr(self, attribute, value)  # the next use costs nothing
            return value

    torch, np = _Lazy("torch"), _Lazy("numpy")

__all__ = ["np", "torch"]
