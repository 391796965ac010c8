"""Trackers that a recorder writes to: wandb, swanlab, mlflow, TensorBoard, or what the user brings.

    dc.Recorder("runs/a.jsonl", sinks=["wandb"])
    dc.Recorder(None, sinks=[Wandb(project="llama", name="lr 1e-4"), print])

A tracker is made on every rank and used on rank 0 alone, in a thread of the recorder. If the program has a run of the
tracker when it records its first step, the numbers go into that run, and the program ends it.
"""

from __future__ import annotations

import inspect
import os
import re
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Protocol


class Tracker(Protocol):
    """What ``Recorder(sinks=[...])`` takes: the recorder calls these in a thread, in this order."""

    def start(self, config: dict[str, Any]) -> None:
        """Begin, before the first step is logged. ``config``: of the recorder, with versions, ranks and host."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Take the numbers of a step. ``step`` never falls."""

    def finish(self, status: str) -> None:
        """End. ``status`` is ``"finished"``, or ``"failed"`` after an exception."""


class Wandb:
    """Weights & Biases. Steps that its run has passed already, as after a resume, are logged at its present step.

    Args:
        **options: of ``wandb.init``, such as ``project`` and ``name``.
    """

    name = package = "wandb"

    def __init__(self, **options: Any):
        self._options, self._own, self._least = options, False, 0
        self._run: Any = None

    def find_run(self) -> None:
        import wandb

        self._run = wandb.run

    def start(self, config: dict[str, Any]) -> None:
        import wandb

        if self._run is None:
            mode = self._options.get("mode") or wandb.setup().settings.mode
            asks = "prompt" in inspect.signature(wandb.login).parameters  # older ones ask at the terminal
            if mode == "online" and asks and not wandb.login(prompt=False):
                raise RuntimeError("log in with `wandb login`, or set WANDB_MODE=offline")
            options = self._options | {"config": config | self._options.get("config", {})}
            self._run, self._own = wandb.init(**options), True
            self._least = self._run.step

    def log(self, numbers: dict[str, float], step: int) -> None:
        import wandb

        if not self._own and wandb.run is not self._run:
            return  # the program has ended its run
        least = self._least if self._own else self._run.step  # wandb drops older steps
        self._run.log(numbers, step=max(step, least))

    def finish(self, status: str) -> None:
        if self._own:
            self._run.finish(exit_code=int(status == "failed"))


class SwanLab:
    """SwanLab.

    Args:
        **options: of ``swanlab.init``, such as ``project`` and ``experiment_name``.
    """

    name = package = "swanlab"

    def __init__(self, **options: Any):
        self._options, self._own = options, False
        self._run: Any = None

    def find_run(self) -> None:
        import swanlab

        self._run = swanlab.get_run() if swanlab.has_run() else None

    def start(self, config: dict[str, Any]) -> None:
        import swanlab

        if self._run is None:
            settings = swanlab.Settings(interactive=False)  # a thread does not ask at the terminal
            options = {"settings": settings} | self._options | {"config": config | self._options.get("config", {})}
            self._run, self._own = swanlab.init(**options), True

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self._run.alive:  # or the program has ended its run
            self._run.log(numbers, step=step)

    def finish(self, status: str) -> None:
        if self._own:
            failed = status == "failed"
            self._run.finish(state="crashed" if failed else "success", error="the training failed" if failed else None)


class MLflow:
    """MLflow. Its server is where ``MLFLOW_TRACKING_URI`` says. Numbers are sent once a second at most.

    Args:
        **options: of ``mlflow.start_run``, such as ``run_name`` and ``experiment_id``.
    """

    name = package = "mlflow"
    most, pause_s = 100, 1.0  # parameters of a request; seconds between requests

    def __init__(self, **options: Any):
        self._options, self._id, self._own = options, "", False
        self._waiting: list[Any] = []
        self._sent = 0.0

    def find_run(self) -> None:
        import mlflow

        run = mlflow.active_run()
        self._id = run.info.run_id if run is not None else ""

    def start(self, config: dict[str, Any]) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        if not self._id:
            self._id, self._own = mlflow.start_run(**self._options).info.run_id, True
            params = [mlflow.entities.Param(_allowed(name), str(value)) for name, value in _dotted(config)]
            for first in range(0, len(params), self.most):
                self._client.log_batch(self._id, params=params[first : first + self.most])

    def log(self, numbers: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(_allowed(name), value, now, step) for name, value in numbers.items()]
        if time.monotonic() - self._sent > self.pause_s or len(self._waiting) > 500:
            self.flush()

    def flush(self) -> None:
        waiting, self._waiting, self._sent = self._waiting, [], time.monotonic()
        for first in range(0, len(waiting), 1000):  # more are refused
            self._client.log_batch(self._id, metrics=waiting[first : first + 1000])

    def finish(self, status: str) -> None:
        import mlflow

        try:
            self.flush()
        finally:
            if self._own:
                mlflow.end_run("FAILED" if status == "failed" else "FINISHED")


def _dotted(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _allowed(name: str) -> str:
    """A name that MLflow takes.

    >>> _allowed("grad_norm/layers.*.mlp")
    'grad_norm/layers._.mlp'
    """
    return re.sub(r"[^\w\-. :/]", "_", name)


class TensorBoard:
    """TensorBoard.

    Args:
        folder (path, optional): of the run. Default: ``runs/`` and the time of its start.
    """

    name, package = "tensorboard", "tensorboard.summary"

    def __init__(self, folder: str | os.PathLike[str] | None = None):
        self._folder = f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}" if folder is None else os.fspath(folder)

    def start(self, config: dict[str, Any]) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(self._folder)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def finish(self, status: str) -> None:
        self._writer.close()


TRACKERS: dict[str, type] = {tracker.name: tracker for tracker in (MLflow, SwanLab, TensorBoard, Wandb)}
