"""What both policies do with a network: compile its blocks, and put tensors in the place of its own."""

from collections.abc import Mapping

import torch

from training.loop.sharding import put

VARIANTS = 64
"""Of one block that the compiler may keep; see `compile_blocks`."""


def compile_blocks(network: torch.nn.Module) -> None:
    """Compile the network's repeated blocks.

    They are one function to the compiler, which has a variant for each width and picture size, with and without
    gradients, adapter and reference: after 8 of them it would run the rest uncompiled.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    network.compile_repeated_blocks()


def put_all(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into those of the same names. Raises KeyError when a tensor has no place."""
    for name, tensor in source.items():
        put(tensor, target[name])
