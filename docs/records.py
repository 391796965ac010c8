"""Train twice on three ranks, where rank 2 has bad data at times, and draw both records.

    python docs/records.py          writes docs/images/records.png (needs `pip install '.[plot]'`)

The runs are ``launch/train.py``, with a fixed threshold and with AutoClip, and a ``rank_batch`` for the Clipper,
so that the record has the ranks' own norms. Rank 2's loss is 40 times too large in four steps, and NaN in two.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RANKS, ROWS, STEPS = 3, 12, 200
LARGE, NAN = (60, 61, 110, 165), (90, 150)
OPTIONS = ["--checkpoint-every=0", "--valid-every=10", f"--steps={STEPS}", f"--batch-size={ROWS}"]


def train_with_bad_data(options: list[str]) -> None:
    """Train as one of the ranks."""
    sys.path.insert(0, str(ROOT / "launch"))
    import train

    import distclip as dc

    good_batch, good_loss, factor = train.Text.batch, train.loss_fn, 1.0

    def batch(self: Any, part: str, rows: int, step: int, *reader: int) -> Any:
        nonlocal factor
        bad = part == "train" and dc.init().rank == 2
        factor = 40.0 if bad and step + 1 in LARGE else float("nan") if bad and step + 1 in NAN else 1.0
        return good_batch(self, part, rows, step, *reader)

    def loss_fn(model: Any, tokens: Any) -> Any:
        return good_loss(model, tokens) * factor

    train.Text.batch, train.loss_fn = batch, loss_fn
    dc.Clipper = partial(dc.Clipper, rank_batch=ROWS // RANKS)  # type: ignore[assignment,misc]
    train.train(train.parse([*OPTIONS, *options]))


def main() -> None:
    """Train twice, and draw both records."""
    with tempfile.TemporaryDirectory() as folder:
        records = [Path(folder) / f"{rule}.jsonl" for rule in ("fixed", "autoclip")]
        for record in records:
            command = [str(ROOT / "launch/local.sh"), __file__, f"--threshold={record.stem}", f"--record={record}"]
            subprocess.run(command, check=True, timeout=300, env=os.environ | {"NP": str(RANKS)})
        picture = ROOT / "docs/images/records.png"
        command = [sys.executable, "-m", "distclip", "report", *map(str, records), "--png", str(picture)]
        subprocess.run(command, check=True, timeout=60)


if __name__ == "__main__":
    if sys.argv[1:]:
        train_with_bad_data(sys.argv[1:])
    else:
        main()
