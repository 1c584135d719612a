"""Weights divided over the processes of a training (FSDP), and tensors that are gathered from them and given back.

Every process holds a part of each weight, of its gradient and of its optimizer's state, and the whole of a block only
while that block is computed: Rajbhandari et al. 2019 (ZeRO stage 3, arXiv:1910.02054), here torch's `fully_shard`,
which accelerate calls. What the files hold is always whole, so a training may go on in another number of processes.

`gather` and a sharded network's forward pass are collective: every process makes the call, or all wait for ever.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARDED = "FSDP"
"""accelerate's name for it."""
ASKED = "ACCELERATE_USE_FSDP"
"""How `accelerate launch --use_fsdp` tells its processes."""


def check_sharding(optimizer: str, offload_reference: bool, text_encoders: bool, compiled: bool) -> None:
    """Raises ValueError for what does not go with sharded weights."""
    if optimizer != "adamw":
        raise ValueError(
            f"execution.shard=true with training.optimizer={optimizer!r}: its states cannot be divided; use adamw, of "
            "whose states each process holds its part only"
        )
    others = {
        "execution.offload_reference": (offload_reference, "the frozen copy is divided already"),
        "training.text_encoders": (text_encoders, "only the network can be divided"),
        "execution.compile": (compiled, "never tried together"),
    }
    for name, (asked, why) in others.items():
        if asked:
            raise ValueError(f"execution.shard=true with {name}=true: {why}; leave one of them out")


def make_accelerator(cpu: bool, mixed_precision: str, shard: bool) -> "Accelerator":
    """accelerate's view of this process, or of one of several that a launcher started (it reads their environment).

    shard: divide the weights where there are several processes; `accelerate launch --use_fsdp` asks for the same and
    brings settings of its own. Raises ValueError for FSDP's first version, and whatever else is not data parallel.
    """
    from accelerate import Accelerator

    plugin, by_hand = _plugin(shard), ASKED in os.environ
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision, fsdp_plugin=plugin)
    if plugin is not None:
        _use(accelerator, plugin)
    if not by_hand:
        os.environ.pop(ASKED, None)  # where accelerate notes what we asked for, as if a launcher had
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", SHARDED):
        raise ValueError(
            f"accelerate is set up for {kind}; supported are data parallel training and, to divide the weights among "
            "the processes as ZeRO stage 3 does, execution.shard=true or `accelerate launch --use_fsdp`"
        )
    return accelerator


def _plugin(shard: bool) -> Any:
    """accelerate's settings of FSDP: ours, or those of `accelerate launch`; None where nothing is to be divided."""
    by_hand = os.environ.get(ASKED, "false").lower() == "true"
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not (shard or by_hand):
        os.environ.pop(ASKED, None)  # one process has everything anyway
        return None
    from accelerate import FullyShardedDataParallelPlugin

    # Otherwise only the first process would read text encoders, and the others be left with empty ones.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if by_hand:
        return FullyShardedDataParallelPlugin()
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )


def _use(accelerator: "Accelerator", plugin: Any) -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import CPUOffloadPolicy

    if plugin.fsdp_version != 2:
        raise ValueError("accelerate is set up for version 1 of FSDP; set fsdp_version: 2")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy) or plugin.activation_checkpointing:
        raise ValueError(
            "accelerate is set up for FSDP with fsdp_offload_params or fsdp_activation_checkpointing; leave them out "
            "(execution.gradient_checkpointing=true does the second)"
        )
    if accelerator.device.type == "cpu" and torch.cuda.is_available():
        raise ValueError("execution.device='cpu': torch divides weights among GPUs where there are any; use 'cuda'")
    # accelerate divides weights among GPUs only; torch does it among CPU processes just as well.
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    # Autocast decides the precisions, as everywhere else; gradients are summed in float32.
    plugin.mixed_precision_policy = None


def is_sharded(accelerator: "Accelerator") -> bool:
    return bool(accelerator.distributed_type.value == SHARDED)


def prepare(
    accelerator: "Accelerator", network: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The network as it is to be called, and its optimizer: as they are, averaging gradients, or sharded."""
    if is_sharded(accelerator):
        _contiguous(network)
        plugin = accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = blocks(network)
    prepared: tuple[torch.nn.Module, torch.optim.Optimizer] = accelerator.prepare(network, optimizer)
    return prepared


def blocks(network: torch.nn.Module) -> list[str]:
    """The classes of the network's blocks: those of its `_no_split_modules` that it has, for a UNet need not have every
    kind, and accelerate refuses a name of none."""
    there = {type(module).__name__ for module in network.modules()}
    return [name for name in getattr(network, "_no_split_modules", None) or [] if name in there]


def shard_frozen(accelerator: "Accelerator", network: torch.nn.Module) -> None:
    """Divide a network that is not trained, in place. accelerate's `prepare` takes none without an optimizer."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    _contiguous(network)
    fsdp2_prepare_model(accelerator, network)


def parts(network: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and parameters; of a sharded network the parts that this process holds.

    A forward pass without gradients leaves whole copies in their place, which the next use of the network frees.
    """
    if torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    yield from network.named_parameters()


def _contiguous(network: torch.nn.Module) -> None:
    """`fully_shard` divides rows, and takes no channels-last weights."""
    network.to(memory_format=torch.contiguous_format)


def anywhere(accelerator: "Accelerator", here: bool) -> bool:
    """Whether it is so in any of the processes, where they must make the same forward passes; else whether it is here.

    Collective where weights are sharded: no process could run the network without the others.
    """
    if not is_sharded(accelerator):
        return here
    told = torch.tensor([float(here)], device=accelerator.device)
    return bool(accelerator.reduce(told, "sum").item())


def clip_gradients(accelerator: "Accelerator", parameters: list[torch.nn.Parameter], largest: float) -> torch.Tensor:
    """Scale the gradients of all processes down to this norm; returns the norm from before. Collective."""
    if not is_sharded(accelerator):
        norm: torch.Tensor = accelerator.clip_grad_norm_(parameters, largest)
        return norm
    # accelerate's own would take back float16's loss scale twice where not every parameter is trained.
    accelerator.unscale_gradients()
    return whole(torch.nn.utils.clip_grad_norm_(parameters, largest))


def gather(values: Any, keep: bool) -> Any:
    """A copy of nested dicts and lists with every sharded tensor whole, and all tensors in main memory.

    Collective. keep: False for a process that only takes part: its tensors are empty.
    """
    if isinstance(values, Mapping):
        return {name: gather(value, keep) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(gather(value, keep) for value in values)
    if not isinstance(values, torch.Tensor):
        return values
    full = whole(values)  # one at a time: all of them together need not fit the device
    return full.detach().cpu() if keep else torch.empty(0)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor all of whose parts the processes hold. Collective where it is sharded, else the tensor itself."""
    if not _is_sharded(tensor):
        return tensor
    full: torch.Tensor = tensor.full_tensor().clone()  # still being received, and a view of a padded one
    return full


def put(whole_tensor: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a whole tensor, or one that is sharded likewise, into a target of which this process may hold a part."""
    target.detach().copy_(_like(whole_tensor, target))


def spread_states(state: dict[str, Any], parameters: Sequence[torch.Tensor]) -> dict[str, Any]:
    """An optimizer's whole `state_dict` as it is for these parameters, in the optimizer's order.

    States of a parameter's own shape are divided as it is, or laid out as it is: fused kernels go through the memory of
    both in step, and would pair other elements. Others (steps, Adafactor's rows and columns) stay as they are.
    """
    return {**state, "state": {
        index: {name: _beside(value, parameters[index]) if _fits(value, parameters[index]) else value
                for name, value in states.items()}
        for index, states in state["state"].items()
    }}  # fmt: skip


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """In the order in which `state_dict` numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _like(tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Divided as the target is. Every process has the whole tensor, so nothing is sent."""
    if not _is_sharded(target) or _is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    divided: torch.Tensor = distribute_tensor(
        tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )
    return divided


def _beside(state: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if _is_sharded(parameter):
        return _like(state, parameter)
    return torch.empty_like(parameter, dtype=state.dtype, device=state.device).copy_(state)


def _fits(value: object, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _is_sharded(tensor: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
