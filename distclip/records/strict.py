"""Values as JSON has them: numbers, and text where JSON has no number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def plain(found: Any) -> Any:
    """Arrays as Python numbers; mappings and lists of them too. Evaluates."""
    if isinstance(found, Mapping):
        return {str(name): plain(value) for name, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [plain(value) for value in found]
    return found.tolist() if hasattr(found, "tolist") else found


def strict(found: Any) -> Any:
    """The same with infinities and NaNs as text, which JSON has no numbers for."""
    if isinstance(found, dict):
        return {name: strict(value) for name, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [strict(value) for value in found]
    return str(found) if isinstance(found, float) and not math.isfinite(found) else found
