"""Where else the numbers of a record go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any


def board(folder: str | os.PathLike[str]) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise ImportError(
            "Recorder(tensorboard=...) needs the package tensorboard: pip install 'distclip[tensorboard]'"
        ) from error
    return Writer(os.fspath(folder))


def flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if name in ("kind", "step", "time", "rank_hosts"):
            continue
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from ((f"{prefix}{name}/{i}", float(one)) for i, one in enumerate(value))
        else:
            yield f"{prefix}{name}", float(value)
