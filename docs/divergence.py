"""Train twice at a learning rate at which the unclipped run diverges, and draw both losses.

    python docs/divergence.py          writes docs/images/divergence.png (needs `pip install '.[plot]'`)

The two runs are ``launch/train.py`` itself, alone, with ``--max-norm inf`` and with ``--max-norm 0.5``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import distclip as dc

ROOT = Path(__file__).parent.parent
OPTIONS = {"optimizer": "sgd", "learning-rate": 1, "steps": 120, "valid-every": 5, "checkpoint-every": 0}


def run(max_norm: str, folder: Path) -> list[dict[str, Any]]:
    record = folder / f"{max_norm}.jsonl"
    options = [f"--{name}={value}" for name, value in {**OPTIONS, "max-norm": max_norm, "record": record}.items()]
    command = [sys.executable, str(ROOT / "launch/train.py"), *options]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True, timeout=300)
    return dc.read_records(record).steps


def draw(unclipped: list[dict[str, Any]], clipped: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for steps, label, color in ((unclipped, "max_norm=inf", "tab:red"), (clipped, "max_norm=0.5", "tab:blue")):
        for key, kind, alpha in (("loss", "training", 0.3), ("valid", "validation", 1.0)):
            x, y = zip(*((step["step"], step[key]) for step in steps if key in step), strict=True)
            axes.plot(x, y, color=color, alpha=alpha, label=f"{label}, {kind} loss")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", yscale="log", ylim=(2, 100), yticks=[2, 5, 10, 20, 50, 100])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_title("launch/train.py, SGD with momentum, learning rate 1")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        draw(run("inf", Path(folder)), run("0.5", Path(folder)), ROOT / "docs/images/divergence.png")
