"""Draw docs/images/thresholds.png: what each rule allows, on made-up gradient norms with three spikes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import mlx.core as mx
import numpy as np

import distclip as dc

matplotlib.use("agg")
from matplotlib import pyplot as plt

STEPS = 300
RULES: dict[str, Any] = {
    "AutoClip(10)": dc.AutoClip(10),
    "ZClip(max_norm=inf)": dc.ZClip(max_norm=float("inf")),
    "AdaGC(), one group": dc.AdaGC(),
}


def trace() -> list[float]:
    rng = np.random.default_rng(0)
    norms = (0.4 + 1.6 * np.exp(-np.arange(STEPS) / 60)) * np.exp(0.15 * rng.standard_normal(STEPS))
    norms[[120, 180, 240]] = [20.0, 3.0, 60.0]
    return [float(norm) for norm in norms]


def main() -> None:
    norms = trace()
    figure, axes = plt.subplots(len(RULES), 1, figsize=(8, 7), sharex=True, sharey=True)
    for axis, (name, rule) in zip(axes, RULES.items(), strict=True):
        state, allowed = rule.init(1), []
        for step, norm in enumerate(norms):
            threshold, state = rule.update(state, mx.array(norm), mx.array([norm]), mx.array(step))
            mx.eval(threshold, state)
            allowed.append(min(norm, float(threshold.max().item())))
        axis.semilogy(norms, color="tab:red", linewidth=0.8, label="norm before clipping")
        axis.semilogy(allowed, color="tab:blue", linewidth=0.8, label="norm after clipping")
        axis.set_title(name, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(loc="upper right", fontsize=8)
    axes[-1].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "images/thresholds.png", dpi=110)


if __name__ == "__main__":
    main()
