"""Which diffusion model, and how it is loaded. Knows nothing of prompts on disk, scores or Prefect.

A model is named by a `ModelRef`: a diffusers folder or hub id, and what training has put on top of it. Its family is
read from the checkpoint's own `model_index.json`; what families differ in lies behind `family.Family`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from training.family import Family, PromptEmbeddings

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""The name diffusers gives a LoRA. Offline it must be said on loading: the libraries do not look for it then."""


class ModelError(ValueError):
    """A base model or adapter that cannot be used; the message says why and what would work."""


@dataclass(frozen=True)
class ModelRef:
    """A base model and what training put on top of it.

    base: diffusers folder or hub id. revision: hub revision (None = the hub's default branch).
    network: folder of a fully tuned UNet or transformer that replaces the base's (None = the base's own).
    adapter: folder of a LoRA on top (None = none).
    """

    base: str
    revision: str | None = None
    network: str | None = None
    adapter: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "ModelRef":
        """The inverse of `to_dict`. Records of version 0.1 call the network `unet`."""
        return cls(**{"network" if name == "unet" else name: value for name, value in values.items()})


def model_index(base: str, revision: str | None = None) -> dict[str, Any]:
    """The checkpoint's `model_index.json`, from a folder or the hub (cache first). Loads no weights.

    Raises ModelError when there is none.
    """
    path = Path(base)
    if path.is_dir():
        path = path / "model_index.json"
        if not path.is_file():
            raise ModelError(f"base_model={base!r}: the folder has no model_index.json, so it is no diffusers model")
    else:
        path = hub_file(base, "model_index.json", revision)
    index: dict[str, Any] = json.loads(path.read_text())
    return index


def hub_file(base: str, name: str, revision: str | None) -> Path:
    """One file of a hub repository, from the cache or the hub. Raises ModelError when it is not to be had."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HFValidationError

    if base.count("/") != 1 or base.startswith((".", "/")):
        raise ModelError(f"base_model={base!r}: no such folder; give a diffusers folder or a hub id 'owner/name'")
    try:
        # One quick look first: without a network the library would retry for half a minute.
        local = constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)
        return Path(hf_hub_download(base, name, revision=revision, local_files_only=local))
    except (OSError, HFValidationError) as error:
        raise ModelError(
            f"base_model={base!r}: no such folder, not in the local hub cache and not to be had from the hub "
            f"({type(error).__name__}); give a diffusers folder or a reachable hub id"
        ) from error


def _reachable(url: str) -> bool:
    import httpx

    try:
        httpx.head(url, timeout=5)
    except httpx.HTTPError:
        return False
    return True


def model_digest(base: str, revision: str | None = None) -> str:
    """12 hex digits that change with the model: the hub's commit, or over the contents of a folder's files."""
    path = Path(base)
    if not path.is_dir():
        return hub_file(base, "model_index.json", revision).parent.name[
            :12
        ]  # the cache keeps each commit in a folder of its name
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.suffix in (".json", ".safetensors", ".txt")):
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]


def network_outline(ref: ModelRef) -> "torch.nn.Module":
    """The base's UNet or transformer without weights, on torch's meta device."""
    import diffusers
    import torch

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


def family_for(ref: ModelRef) -> "Family":
    """The family of a base model, by its `model_index.json`. Loads no weights. Raises ModelError for an unknown one."""
    from training.families import FAMILIES

    name = model_index(ref.base, ref.revision).get("_class_name")
    if name not in FAMILIES:
        raise ModelError(f"base_model={ref.base!r} is a {name}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def resolve_device(device: str) -> str:
    """'auto' is the first CUDA device where there is one, else the CPU; anything else is taken as it is."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: str, device: str) -> "torch.dtype":
    """'auto' is float16 on CUDA and float32 elsewhere (CPUs have no fast half precision)."""
    import torch

    if dtype == "auto":
        dtype = "float16" if device.startswith("cuda") else "float32"
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def load_pipeline(ref: ModelRef, device: str = "cpu", dtype: str = "auto") -> "DiffusionPipeline":
    """The whole pipeline, ready to sample: base, then a tuned network, then the adapter.

    The safety checker is left out: it would replace candidates by black images, which rank like pictures.
    """
    import diffusers
    import torch

    family = family_for(ref)
    quiet_libraries()
    precision = resolve_dtype(dtype, device)
    parts = _left_out(ref)
    if ref.network:
        parts[family.network] = load_network(ref, device, dtype)
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(
        ref.base, revision=ref.revision, dtype=precision, **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    if ref.adapter:
        fuse_adapter(getattr(pipeline, family.network), ref.adapter, family.network)
    _fuse_encoders(pipeline, ref)
    if precision == torch.float16 and pipeline.vae.config.force_upcast:
        pipeline.vae.to(torch.float32)  # SDXL's own decoder overflows float16: black pictures
    pipeline.to(device)
    prefer_channels_last(getattr(pipeline, family.network))
    return pipeline


def _left_out(ref: ModelRef) -> dict[str, Any]:
    """Parts that are not loaded: the safety checker, and what the checkpoint itself says it has not (SD3 without T5),
    which diffusers wants to be told."""
    index = model_index(ref.base, ref.revision)
    parts: dict[str, Any] = {name: None for name, kind in index.items() if kind == [None, None]}
    return parts | ({"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {})


def fuse_adapter(network: "torch.nn.Module", adapter: str, prefix: str) -> None:
    """Add a LoRA to the weights for good: sampling never needs the two apart, and fused layers cost nothing.

    prefix: the name of the network in its pipeline, which the adapter's keys begin with.
    """
    network.load_lora_adapter(adapter, weight_name=ADAPTER_FILE, adapter_name="fused", prefix=prefix)
    network.fuse_lora(adapter_names=["fused"])
    network.unload_lora()


def _fuse_encoders(pipeline: "DiffusionPipeline", ref: ModelRef) -> None:
    """The same for the text encoders, where the adapter has something for them."""
    if ref.adapter:
        from training.text_encoders import fuse_encoders

        fuse_encoders(pipeline, ref.adapter)


def quiet_libraries() -> None:
    """No bars for loading weights: they interrupt ours and say nothing on tiny or cached models."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def prefer_channels_last(network: "torch.nn.Module") -> None:
    """NHWC layout for UNets: about 30 % faster convolutions on CPUs, and what tensor cores want."""
    import torch

    if any(isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) for module in network.modules()):
        network.to(memory_format=torch.channels_last)


def load_network(ref: ModelRef, device: str = "cpu", dtype: str = "auto") -> "torch.nn.Module":
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
    import diffusers
    import torch

    family = family_for(ref)
    quiet_libraries()
    precision = resolve_dtype(dtype, device)
    parts = _left_out(ref) | {family.network: network_outline(ref)}
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(
        ref.base, revision=ref.revision, dtype=precision, **parts
    )
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
    import diffusers

    family = family_for(ref)
    quiet_libraries()
    parts = _left_out(ref) | {family.network: network_outline(ref), "vae": None}
    for name in model_index(ref.base, ref.revision):
        if name.startswith("text_encoder") and name not in family.text_encoders:
            parts |= {name: None, name.replace("text_encoder", "tokenizer"): None}
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(
        ref.base, revision=ref.revision, dtype=resolve_dtype(dtype, device), **parts
    )
    for name in family.text_encoders:
        getattr(pipeline, name).to(device)
    return pipeline


def embed_negative(ref: ModelRef) -> "PromptEmbeddings":
    """What guidance leads away from (see `sampling.negative_prompt`), computed on the CPU by the model's text encoders
    alone."""
    import diffusers

    from training.sampling import negative_prompt

    family = family_for(ref)
    # Nothing is drawn, but SD3 without T5 asks the network for the width of its embeddings.
    parts = _left_out(ref) | {family.network: network_outline(ref), "vae": None}
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(ref.base, revision=ref.revision, **parts)
    _fuse_encoders(pipeline, ref)
    embedded: PromptEmbeddings = negative_prompt(pipeline).map(lambda each: each.float())
    return embedded
