"""Starts a training in several processes and follows it. In one process it is just `trainer.train`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from training.loop.checkpoint import CheckpointRecord
from training.loop.diagnostics import TrainingDiverged
from training.loop.trainer import METRICS, Metrics, train
from training.plan import TrainingPlan

PLAN, LOG = "plan.json", "processes.log"


class TrainingFailed(RuntimeError):
    """A process of the training ended with an error; the message holds the end of its output."""


def process_count(asked: int, device: str, batch_size: int) -> int:
    """How many processes a training has. asked: 0 = one for each GPU, as far as the batch divides among them.

    Raises ValueError when the batch does not divide among the number asked for, or a single device is named.
    """
    import torch

    if asked > 1 and ":" in device:
        raise ValueError(f"execution.processes={asked}: execution.device={device!r} is a single one; use 'cuda'")
    if asked and batch_size % asked:
        raise ValueError(f"training.batch_size={batch_size}: must be a multiple of execution.processes={asked}")
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if gpus and asked > gpus:
        raise ValueError(f"execution.processes={asked}: this machine has {gpus} GPUs, and two cannot share one; use 0")
    if asked or device not in ("auto", "cuda"):
        return asked or 1
    return max(count for count in range(1, max(1, gpus) + 1) if batch_size % count == 0)


def launch(plan: TrainingPlan, processes: int, on_step: Callable[[int, Metrics], None]) -> CheckpointRecord:
    """`trainer.train` in so many processes of this machine. on_step is called here, with a delay of up to a second.

    Raises TrainingDiverged as `train` does, and TrainingFailed when a process ends otherwise; the same call resumes.
    """
    output = Path(plan.output)
    finished = CheckpointRecord.read(output)
    if finished:
        return finished
    output.mkdir(parents=True, exist_ok=True)
    if not (output / PLAN).is_file() or TrainingPlan.read(output / PLAN) != plan:
        plan.write(output / PLAN)  # also for whoever wants to go on by hand
    if processes == 1:
        return train(plan, on_step)
    process = _start(output, processes)
    try:
        _follow(process, output / METRICS, on_step)
    finally:
        _stop(process)
    record = CheckpointRecord.read(output)
    if record is None:
        raise _failure(output / LOG)
    return record


def _start(output: Path, processes: int) -> "subprocess.Popen[bytes]":
    """torchrun, which accelerate recognises by its environment; its output goes to a file of the training."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "training", str(output / PLAN), "--parent", str(os.getpid()), "--quiet"]
    with (output / LOG).open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _follow(process: "subprocess.Popen[bytes]", path: Path, on_step: Callable[[int, Metrics], None]) -> None:
    """Tell each new line of the metrics until the process ends."""
    told = 0
    while True:
        running = process.poll() is None  # before reading: what is written afterwards is read in the next round
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        for line in lines[told:]:
            metrics = json.loads(line)
            on_step(int(metrics["step"]), metrics)
        told = max(told, len(lines))
        if not running:
            return
        time.sleep(0.5)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End what still runs of it, the workers too."""
    for request in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, request)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            continue


def _failure(log: Path) -> Exception:
    text = log.read_text(errors="replace")
    for line in text.splitlines():
        if (told := f"{TrainingDiverged.__name__}: ") in line:  # not the line of code that raises it
            return TrainingDiverged(line.split(told, 1)[1])
    return TrainingFailed(f"the training's processes ended without a result; from {log}:\n{_first_error(text)[-3000:]}")


def _first_error(text: str) -> str:
    """What the process that failed first said last; the others, and the launcher, only tell that it is gone."""
    found = re.search(r"Root Cause.*?rank *: (\d+)", text, re.DOTALL)
    own = [line for line in text.splitlines() if found and line.startswith(f"[rank{found[1]}]")]
    return "\n".join(own) or text
