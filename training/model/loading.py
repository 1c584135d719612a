"""Loads diffusion models: the whole pipeline, its network alone, or only what encodes. Knows nothing of scores.

What families differ in lies behind `training.model.family.Family`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from training.adapter.encoders import fuse_encoders
from training.model.devices import resolve_dtype
from training.model.families import family_for
from training.model.family import PromptEmbeddings
from training.model.reference import ADAPTER_FILE, ModelError, ModelRef, model_index
from training.model.sampling import negative_prompt

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def network_outline(ref: ModelRef) -> torch.nn.Module:
    """The base's UNet or transformer without weights, on torch's meta device."""
    import diffusers

    family = family_for(ref)
    kind = getattr(diffusers, family.network_class)
    config = kind.load_config(ref.base, subfolder=family.network, revision=ref.revision)
    with torch.device("meta"):
        outline: torch.nn.Module = kind.from_config(config)
    return outline


def check_lora_targets(base: str, revision: str | None, targets: list[str]) -> None:
    """Refuse endings that no layer of the network has. Builds the network without weights."""
    names = [name for name, _ in network_outline(ModelRef(base, revision)).named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rsplit(".", 1)[-1] for name in names if name and not name[-1].isdigit()})
            raise ModelError(f"training.lora_targets: no layer of {base!r} ends in {target!r}; there are {known}")


def load_pipeline(ref: ModelRef, device: str = "cpu", dtype: str = "auto") -> "DiffusionPipeline":
    """The whole pipeline, ready to sample: base, then a tuned network, then the adapter.

    The safety checker is left out: it would replace candidates by black images, which rank like pictures.
    """
    family = family_for(ref)
    precision = resolve_dtype(dtype, device)
    parts: dict[str, Any] = {}
    if ref.network:
        parts[family.network] = load_network(ref, device, dtype)
    pipeline = _load(ref, precision, parts)
    pipeline.set_progress_bar_config(disable=True)
    if ref.adapter:
        fuse_adapter(getattr(pipeline, family.network), ref.adapter, family.network)
    _fuse_encoders(pipeline, ref)
    if precision == torch.float16 and pipeline.vae.config.force_upcast:
        pipeline.vae.to(torch.float32)  # SDXL's own decoder overflows float16: black pictures
    pipeline.to(device)
    prefer_channels_last(getattr(pipeline, family.network))
    return pipeline


def _load(ref: ModelRef, precision: torch.dtype, parts: Mapping[str, Any]) -> "DiffusionPipeline":
    """The base's pipeline by its family's class. parts: components that are given, or left out by None."""
    import diffusers

    quiet_libraries()
    kind = getattr(diffusers, family_for(ref).pipeline)
    pipeline: DiffusionPipeline = kind.from_pretrained(
        ref.base, revision=ref.revision, dtype=precision, **{**_left_out(ref), **parts}
    )
    return pipeline


def _left_out(ref: ModelRef) -> dict[str, Any]:
    """Parts that are not loaded: the safety checker, and what the checkpoint itself says it has not (SD3 without T5),
    which diffusers wants to be told."""
    index = model_index(ref.base, ref.revision)
    parts: dict[str, Any] = {name: None for name, kind in index.items() if kind == [None, None]}
    return parts | ({"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {})


def fuse_adapter(network: torch.nn.Module, adapter: str, prefix: str) -> None:
    """Add a LoRA to the weights for good: sampling never needs the two apart, and fused layers cost nothing.

    prefix: the name of the network in its pipeline, which the adapter's keys begin with.
    """
    network.load_lora_adapter(adapter, weight_name=ADAPTER_FILE, adapter_name="fused", prefix=prefix)
    network.fuse_lora(adapter_names=["fused"])
    network.unload_lora()


def _fuse_encoders(pipeline: "DiffusionPipeline", ref: ModelRef) -> None:
    """The same for the text encoders, where the adapter has something for them."""
    if ref.adapter:
        fuse_encoders(pipeline, ref.adapter)


def quiet_libraries() -> None:
    """No bars for loading weights: they interrupt ours and say nothing on tiny or cached models."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def prefer_channels_last(network: torch.nn.Module) -> None:
    """NHWC layout for UNets: about 30 % faster convolutions on CPUs, and what tensor cores want."""

    if any(isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) for module in network.modules()):
        network.to(memory_format=torch.channels_last)


def load_network(ref: ModelRef, device: str = "cpu", dtype: str = "auto") -> torch.nn.Module:
    """The UNet or transformer alone (the tuned one where there is one), without any adapter."""
    import diffusers

    family = family_for(ref)
    kind, precision = getattr(diffusers, family.network_class), resolve_dtype(dtype, device)
    if ref.network:
        network = kind.from_pretrained(ref.network, dtype=precision)
    else:
        network = kind.from_pretrained(ref.base, subfolder=family.network, revision=ref.revision, dtype=precision)
    loaded: torch.nn.Module = network.to(device)
    return loaded


def load_encoders(ref: ModelRef, device: str = "cpu", dtype: str = "auto") -> "DiffusionPipeline":
    """The pipeline with an outline of its network only: enough to embed prompts and to encode pictures.

    The autoencoder is in float32 where half precision would cost it digits (bfloat16) or overflow: what it encodes is
    kept.
    """
    family = family_for(ref)
    precision = resolve_dtype(dtype, device)
    parts: dict[str, Any] = {family.network: network_outline(ref)}
    pipeline = _load(ref, precision, parts)
    if precision == torch.bfloat16 or (precision == torch.float16 and pipeline.vae.config.force_upcast):
        pipeline.vae.to(torch.float32)
    _fuse_encoders(pipeline, ref)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name != family.network:
            part.to(device)
    return pipeline


def load_trainable_encoders(ref: ModelRef, device: str = "cpu", dtype: str = "auto") -> "DiffusionPipeline":
    """The pipeline with nothing but the base's own `Family.text_encoders`, without any adapter, and an outline of its
    network: enough for `Family.embed_anew`."""
    family = family_for(ref)
    parts: dict[str, Any] = {family.network: network_outline(ref), "vae": None}
    for name in model_index(ref.base, ref.revision):
        if name.startswith("text_encoder") and name not in family.text_encoders:
            parts |= {name: None, name.replace("text_encoder", "tokenizer"): None}
    pipeline = _load(ref, resolve_dtype(dtype, device), parts)
    for name in family.text_encoders:
        getattr(pipeline, name).to(device)
    return pipeline


def embed_negative(ref: ModelRef) -> PromptEmbeddings:
    """What guidance leads away from (see `sampling.negative_prompt`), computed on the CPU by the model's text encoders
    alone."""
    family = family_for(ref)
    # Nothing is drawn, but SD3 without T5 asks the network for the width of its embeddings.
    parts: dict[str, Any] = {family.network: network_outline(ref), "vae": None}
    pipeline = _load(ref, torch.float32, parts)
    _fuse_encoders(pipeline, ref)
    embedded: PromptEmbeddings = negative_prompt(pipeline).map(lambda each: each.float())
    return embedded
