"""Other Diffusion-DPO training scripts, run unmodified by their path, and what is seen of them from outside.

None of their code is in here. A script runs through `runpy` as if from the command line; its steps are told apart by
torch's own hooks on optimizers, and what its loop computes with is noted where it calls a library. Packages that a
script asks for without needing them on this machine (wandb, xformers) are stub modules while it runs; xformers'
attention is then torch's own.
"""

import contextlib
import importlib.machinery
import importlib.util
import io
import os
import runpy
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from bench.training_world import SPLIT, Scale

EXAMPLES = "diffusers/examples/research_projects/diffusion_dpo"
Weights = dict[str, torch.Tensor]
NOTHING = torch.empty(0)


@dataclass(frozen=True)
class Peer:
    """A script. path: below the folder of peers. method: what it trains. options: those of its own. ways: by name, what
    its README's command adds, and what serves it best without changing the result."""

    name: str
    path: str
    method: str
    options: dict[str, str]
    ways: dict[str, list[str]]

    def file(self, peers: Path | None) -> Path | None:
        """None when it is not present."""
        path = peers / self.path if peers else None
        return path if path and path.is_file() else None


def peers_for(scale: Scale) -> list[Peer]:
    """LoRA, then full fine-tuning. Salesforce's SDXL branch needs CUDA, so there is no row of it; its SD 1.5 launcher
    checkpoints nothing."""
    script = "train_diffusion_dpo_sdxl.py" if scale.xl else "train_diffusion_dpo.py"
    lora = {"dataset_split_name": SPLIT, "rank": "8", "report_to": "tensorboard", "seed": "0"}
    workers = ["--dataloader_num_workers=8"] if torch.cuda.is_available() else []
    known = [
        Peer(
            "diffusers",
            f"{EXAMPLES}/{script}",
            "lora",
            lora,
            {"README": ["--gradient_checkpointing"], "tuned": workers},
        )
    ]
    full = {"split": SPLIT, "report_to": "tensorboard", "seed": "0"}
    if not scale.xl:
        known.append(Peer("Salesforce", "DiffusionDPO/train.py", "full", full, {"tuned": workers}))
    return known


@dataclass
class Step:
    """What one optimizer step of a script computed with, on the CPU. latents, noise, times: (2 n, ...), winners first.

    tokens, pooled, time_ids: the conditions, (2 n, ...). weights: the trained ones before the step. reference: those of
    the frozen copy where there is one. What the script has not computed yet is empty; pooled and time_ids are None for
    a model that takes none.
    """

    latents: torch.Tensor = NOTHING
    noise: torch.Tensor = NOTHING
    times: torch.Tensor = NOTHING
    tokens: torch.Tensor = NOTHING
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None
    loss: torch.Tensor = NOTHING
    weights: Weights = field(default_factory=dict)
    gradients: Weights = field(default_factory=dict)


def run_script(
    peer: Peer, file: Path, *, base: Path, data: Path, scale: Scale, steps: int, more: list[str],
    on_step: Callable[[], None] = lambda: None, precision: str = "no",
) -> None:  # fmt: skip
    """Train `steps` steps of a base on data; on_step() after each. more: arguments of the script.

    Raises RuntimeError with the end of what a failing script printed.
    """
    with tempfile.TemporaryDirectory() as folder, _undisturbed(), ExitStack() as stack:
        options = {
            "pretrained_model_name_or_path": base, "dataset_name": data, "output_dir": folder, "cache_dir": folder,
            "resolution": scale.pixels, "train_batch_size": scale.batch, "learning_rate": 1e-5, "lr_warmup_steps": 0,
            "max_train_steps": steps, "checkpointing_steps": 10**9, "mixed_precision": precision, **peer.options,
        }  # fmt: skip
        arguments = [str(file), *(f"--{name}={value}" for name, value in options.items()), *more]
        hook = register_optimizer_step_post_hook(lambda *_: on_step())
        stack.callback(hook.remove)
        printed = io.StringIO()
        stack.enter_context(mock.patch.object(sys, "argv", arguments))
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        try:
            runpy.run_path(str(file), run_name="__main__")
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"{file}: {error!r}\n{printed.getvalue()[-2000:]}") from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """accelerate keeps one state a process; the script gets its own, and afterwards ours is as it was."""
    import logging

    import diffusers.utils.logging
    import transformers.utils.logging
    from accelerate.state import AcceleratorState, GradientState, PartialState

    loggers = (diffusers.utils.logging, transformers.utils.logging)
    verbosity = [each.get_verbosity() for each in loggers]
    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    kept, handlers = [dict(state) for state in states], list(logging.root.handlers)
    cwd, attention = Path.cwd(), "enable_xformers_memory_efficient_attention"
    for state in states:
        state.clear()
    for each in loggers:
        each.disable_default_handler()  # it keeps writing to the terminal, whatever is redirected
    with _stubs(), mock.patch.object(diffusers.utils.import_utils, "is_xformers_available", lambda: True), \
            mock.patch.object(diffusers.UNet2DConditionModel, attention, lambda *_: None):  # fmt: skip
        try:
            yield
        finally:
            os.chdir(cwd)
            for each, level in zip(loggers, verbosity, strict=True):
                each.set_verbosity(level)
                each.enable_default_handler()
            logging.root.handlers[:] = handlers
            for state, values in zip(states, kept, strict=True):
                state.clear()
                state.update(values)


@contextmanager
def _stubs() -> Iterator[None]:
    found = {}
    for name in ("wandb", "xformers"):
        if importlib.util.find_spec(name) is None:
            found[name] = types.ModuleType(name)
            found[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
            found[name].__version__ = "0.0.35"  # type: ignore[attr-defined]
    sys.modules.update(found)
    try:
        yield
    finally:
        for name in found:
            del sys.modules[name]


@contextmanager
def captured() -> Iterator[list[Step]]:
    """The steps of the script that runs inside, as they come."""
    import diffusers

    steps = [Step()]
    modules: list[torch.nn.Module] = []
    add_noise, forward = diffusers.DDPMScheduler.add_noise, diffusers.UNet2DConditionModel.forward
    logsigmoid = torch.nn.functional.logsigmoid

    def noising(self: Any, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        steps[-1].latents, steps[-1].noise, steps[-1].times = _copied(latents), _copied(noise), _copied(times)
        return add_noise(self, latents, noise, times)

    def predicting(self: Any, noisy: Any, times: Any, tokens: torch.Tensor, **more: Any) -> Any:
        if torch.is_grad_enabled():
            added = more.get("added_cond_kwargs") or {}
            step, modules[:] = steps[-1], [self]
            step.tokens, step.pooled = _copied(tokens), _copied(added.get("text_embeds"))
            step.time_ids = _copied(added.get("time_ids"))
            step.weights = {name: _copied(p) for name, p in self.named_parameters() if p.requires_grad}
        return forward(self, noisy, times, tokens, **more)

    def judging(logits: torch.Tensor) -> torch.Tensor:
        found = logsigmoid(logits)
        steps[-1].loss = _copied(-found.mean())
        return found

    def stepping(*_: Any) -> None:
        named = modules[0].named_parameters()
        steps[-1].gradients = {name: _copied(p.grad) for name, p in named if p.grad is not None}
        steps.append(Step())

    hook = register_optimizer_step_pre_hook(stepping)
    with mock.patch.object(diffusers.DDPMScheduler, "add_noise", noising), \
            mock.patch.object(diffusers.UNet2DConditionModel, "forward", predicting), \
            mock.patch.object(torch.nn.functional, "logsigmoid", judging):  # fmt: skip
        try:
            yield steps
        finally:
            hook.remove()
            steps.pop()


def _copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """On the CPU; numbers that are not integers in float32."""
    if tensor is None:
        return None
    return (tensor.detach().float() if tensor.is_floating_point() else tensor).cpu().clone()
