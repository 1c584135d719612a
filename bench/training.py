"""How fast preference training is: ours and the scripts of others in one run, on the same random weights and pictures.

    OMP_NUM_THREADS=1 python -m bench.training [--scale tiny] [--peers DIR] [--parity] [--profile] [--json FILE]

Ways, each for LoRA (rank 8) and for full fine-tuning: a peer's script as its README runs it and tuned; ours in a first
epoch (latents and embeddings still have to be made), with both cached, and with the reference's errors kept too. On a
CPU seconds are those of the process, on CUDA those of the clock. The ways take turns, so that a busy machine slows all
of them. --parity instead does the peers' own steps again with our loss. DIR holds clones of the peers under their
repositories' names; a script that is missing is said so.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import training_device, training_profile
from bench.training_parity import compare
from bench.training_peers import Peer, captured, peers_for, run_script
from bench.training_world import SCALES, Scale, Shards, save_base, save_data
from training.adapter.lora import ATTENTION
from training.loop.run import Run
from training.model.loading import quiet_libraries
from training.plan import TrainingPlan

METHODS = ("lora", "full")
CACHED = "ours, cached latents"
CHANGES: dict[str, dict[str, Any]] = {CACHED: {}, "ours, and reference kept": {"noise_draws": 1}}
"""How the plans of our ways differ."""
Seconds = dict[str, list[float]]
Way = Callable[[], list[float]]
"""Trains some steps and returns the seconds of each."""


class Bench:
    """The world of one run, on disk and on the device."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder, self.scale = given, folder, SCALES[given.scale]
        self.cuda = given.device.startswith("cuda")
        batch = given.batch or self.scale.batch
        self.scale = Scale(**{**vars(self.scale), "batch": batch})
        self.base = save_base(self.scale, folder / "base")
        self.data = save_data(folder, 4 * batch, self.scale.pixels)
        self.shards = Shards(self.base, self.data, given.device, torch.bfloat16 if self.cuda else torch.float32)
        self.pairs = self.shards.write(folder / "pairs", batch)
        self.runs: dict[str, Run] = {}
        self.steps: dict[str, int] = {}

    def plan(self, method: str, **changes: Any) -> TrainingPlan:
        """The peers' settings. beta: 5000 in Salesforce's convention is their default, 2500 in diffusers' SD script."""
        batch = self.scale.batch
        return TrainingPlan.from_dict({
            "model": {"base": str(self.base)}, "pairs": str(self.pairs), "output": str(self.folder / "out"),
            "method": method, "lora": {"rank": 8, "alpha": 8.0, "targets": ATTENTION, "dora": False},
            "steps": 10**6, "batch_size": batch, "micro_batch_size": batch,
            "learning_rate": 1e-5, "warmup_steps": 0, "weight_decay": 1e-2, "max_grad_norm": 1.0, "beta": 5000.0,
            "checkpoint_every": 10**6, "seed": 0, "device": self.given.device, "compile": self.given.compile,
            "mixed_precision": "bf16" if self.cuda else "no", **changes,
        })  # fmt: skip

    def clock(self) -> float:
        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def run(self, name: str, method: str) -> Run:
        """Kept between turns, warmed up by an epoch: afterwards kept reference errors are all there."""
        if name not in self.runs:
            self.runs[name] = Run(self.plan(method, **CHANGES[name]))
            self.steps[name] = 4
            for step in range(4):
                self.runs[name].step(step)
        return self.runs[name]

    def make_room(self, name: str) -> None:
        """On the device only this run stays, so that its memory can be told."""
        self.runs = {kept: run for kept, run in self.runs.items() if kept == name}
        self.shards.pipeline.to("cpu")
        torch.cuda.empty_cache()

    def ours(self, name: str, method: str, encode: bool) -> list[float]:
        """encode: make the latents and embeddings of as many pairs as well."""
        run, seconds = self.run(name, method), []
        if encode:
            self.shards.pipeline.to(self.given.device)
        for _ in range(self.given.steps):
            start = self.clock()
            if encode:
                self.shards.encode(slice(0, self.scale.batch))
            run.step(self.steps[name])
            self.steps[name] += 1
            seconds.append(self.clock() - start)
        return seconds

    def peer(self, peer: Peer, file: Path, more: list[str], precision: str) -> list[float]:
        """The seconds between its optimizer steps; the first two warm up. Without what comes before and after."""
        times: list[float] = []
        run_script(
            peer, file, base=self.base, data=self.data, scale=self.scale, steps=self.given.steps + 2, more=more,
            on_step=lambda: times.append(self.clock()), precision=precision,
        )  # fmt: skip
        return [after - before for before, after in pairwise(times[1:])]


def ways_of(bench: Bench, method: str) -> tuple[dict[str, Way], list[str]]:
    """Ways by name, peers first, and the names of the peers that are not present."""
    ways: dict[str, Way] = {}
    absent = []
    for peer in (peer for peer in peers_for(bench.scale) if peer.method == method):
        file = peer.file(bench.given.peers)
        if file is None:
            absent.append(peer.name)
            continue
        for name, more in peer.ways.items():
            precision = ("fp16" if name == "README" else "bf16") if bench.cuda else "no"
            ways[f"{peer.name}, {name}"] = partial(bench.peer, peer, file, more, precision)
    ways["ours, first epoch"] = partial(bench.ours, CACHED, method, True)
    ways |= {name: partial(bench.ours, name, method, False) for name in CHANGES}
    return ways, absent


def timed(ways: Mapping[str, Way], repeats: int) -> Seconds:
    """Median seconds a step of every repeat of every way."""
    seconds: Seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(median(way()))
    return seconds


def ratios(seconds: Seconds, other: str, name: str) -> list[float]:
    """How much faster than another way, in each repeat."""
    return [theirs / ours for theirs, ours in zip(seconds[other], seconds[name], strict=True)]


def spread(values: list[float], digits: int = 2) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def report(method: str, seconds: Seconds, absent: list[str], batch: int) -> None:
    """One row a way: median and range over the repeats; ratios are taken within a repeat."""
    others = [name for name in seconds if not name.startswith("ours")]
    print(f"\n{method}: seconds a step of {batch} pairs, pairs a second, times as fast as {' / '.join(others) or '-'}")
    for name, values in seconds.items():
        gains = [spread(ratios(seconds, other, name)) + "x" for other in others]
        print(f"  {name:<26}{spread(values, 3):>22}{spread([batch / v for v in values]):>22}  {'  '.join(gains)}")
    for name in absent:
        print(f"  {name:<26}not present")


def parity(bench: Bench) -> list[dict[str, Any]]:
    """Each peer's steps again through our loss."""
    rows = []
    for peer in peers_for(bench.scale):
        file = peer.file(bench.given.peers)
        if file is None:
            print(f"{peer.name}, {peer.method}: not present")
            continue
        rate = 1e-3 if peer.method == "lora" else 1e-4  # so that a few steps lead away from the reference
        more = ["--max_grad_norm=1e9", f"--learning_rate={rate}"]
        with captured() as steps:
            run_script(
                peer, file, base=bench.base, data=bench.data, scale=bench.scale, steps=bench.given.steps, more=more
            )
        run = Run(bench.plan(peer.method, mixed_precision="no"))
        for as_theirs in (True, False):
            found = compare(run, steps, as_theirs)
            rows.append({"peer": peer.name, "method": peer.method, "as_theirs": as_theirs, **found._asdict()})
            print(f"{peer.name}, {peer.method}: {found.told()}, in {'their' if as_theirs else 'our'} memory layout")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", type=Path, help="folder of clones: diffusers, DiffusionDPO")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, default=3, help="of each way in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, help="pairs a step")
    parser.add_argument("--compile", action="store_true", help="ours with compiled blocks")
    parser.add_argument("--parity", action="store_true", help="compare losses and gradients instead of times")
    parser.add_argument("--profile", action="store_true", help="also where our step's time goes")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    given = parser.parse_args()
    quiet_libraries()
    found: dict[str, Any] = {"given": {name: str(value) for name, value in vars(given).items()}}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, Path(folder))
        print(f"{given.scale}, batch {bench.scale.batch}, {training_device.describe(given.device)}")
        if given.parity:
            found["parity"] = parity(bench)
        for method in () if given.parity else given.methods:
            ways, absent = ways_of(bench, method)
            found[method] = {"seconds": timed(ways, given.repeats), "absent": absent}
            report(method, found[method]["seconds"], absent, bench.scale.batch)
            found[method] |= {name: of_our_step(bench, method, name, found[method]["seconds"]) for name in CHANGES}
            bench.runs.clear()
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


def of_our_step(bench: Bench, method: str, name: str, seconds: Seconds) -> dict[str, Any]:
    """Counted operations; on CUDA their share of what the device reaches; with --profile the parts of the time."""
    if bench.cuda:
        bench.make_room(name)
    run = bench.run(name, method)
    work = training_device.count(lambda: run.step(bench.steps[name]))
    rate = work.operations / median(seconds[name])
    print(f"  {name}: {work.operations / bench.scale.batch / 1e9:.3f} GFLOP a pair, {rate / 1e9:.1f} GFLOP/s")
    found: dict[str, Any] = {"operations": work.operations, "kernels": len(work.kernels)}
    if bench.cuda:
        shares = training_device.shares(work, median(seconds[name]), lambda: run.step(bench.steps[name]))
        print("  " + ", ".join(f"{key} {value:.3g}" for key, value in shares.items()))
        found |= shares
    if bench.given.profile:
        found["parts"] = training_profile.parts(run, range(bench.steps[name], bench.steps[name] + 4), bench.clock)
        print("  " + ", ".join(f"{key} {share:.1%}" for key, share in found["parts"].items()))
    return found


if __name__ == "__main__":
    main()
