"""Which diffusion model, and how it is loaded. Knows nothing of prompts on disk, scores or Prefect.

A model is named by a `ModelRef`: a diffusers folder or hub id, and what training has put on top of it.
Today's family is Stable Diffusion 1.x/2.x (one text encoder, UNet, epsilon or v prediction); the family is
read from the checkpoint's own `model_index.json`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

FAMILIES = ("StableDiffusionPipeline",)
PREDICTION_TYPES = ("epsilon", "v_prediction")
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""The name diffusers gives a LoRA. Offline it must be said on loading: the libraries do not look for it then."""


class ModelError(ValueError):
    """A base model or adapter that cannot be used; the message says why and what would work."""


@dataclass(frozen=True)
class ModelRef:
    """A base model and what training put on top of it.

    base: diffusers folder or hub id. revision: hub revision (None = the hub's default branch).
    unet: folder of a fully tuned UNet that replaces the base's (None = the base's own).
    adapter: folder of a LoRA on top (None = none).
    """

    base: str
    revision: str | None = None
    unet: str | None = None
    adapter: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; `ModelRef(**d)` is the inverse."""
        return asdict(self)


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
        path = _hub_index(base, revision)
    index: dict[str, Any] = json.loads(path.read_text())
    return index


def _hub_index(base: str, revision: str | None) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HFValidationError

    if base.count("/") != 1 or base.startswith((".", "/")):
        raise ModelError(f"base_model={base!r}: no such folder; give a diffusers folder or a hub id 'owner/name'")
    try:
        # One quick look first: without a network the library would retry for half a minute.
        local = constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)
        return Path(hf_hub_download(base, "model_index.json", revision=revision, local_files_only=local))
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
        return _hub_index(base, revision).parent.name[:12]  # the cache keeps each commit in a folder of its name
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.suffix in (".json", ".safetensors", ".txt")):
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]


def check_prediction_type(base: str, revision: str | None = None) -> None:
    """Refuse a model that predicts something the losses have no target for."""
    from diffusers import DDPMScheduler

    config = DDPMScheduler.load_config(base, subfolder="scheduler", revision=revision)
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ModelError(f"base_model={base!r} predicts {kind!r}; supported: {', '.join(PREDICTION_TYPES)}")


def check_lora_targets(base: str, revision: str | None, targets: list[str]) -> None:
    """Refuse endings that no layer of the UNet has. Builds the UNet without weights."""
    import torch
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(base, subfolder="unet", revision=revision)
    with torch.device("meta"):
        names = [name for name, _ in UNet2DConditionModel.from_config(config).named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rsplit(".", 1)[-1] for name in names if name and not name[-1].isdigit()})
            raise ModelError(f"training.lora_targets: no layer of {base!r} ends in {target!r}; there are {known}")


def check_model(base: str, revision: str | None = None) -> None:
    """Refuse a model that does not exist or whose family is not supported, without loading weights."""
    family = model_index(base, revision).get("_class_name")
    if family not in FAMILIES:
        raise ModelError(f"base_model={base!r} is a {family}; supported: {', '.join(FAMILIES)}")


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


def load_pipeline(ref: ModelRef, device: str = "cpu", dtype: str = "auto") -> "StableDiffusionPipeline":
    """The whole pipeline, ready to sample: base, then a tuned UNet, then the adapter.

    The safety checker is left out: it would replace candidates by black images, which rank like pictures.
    """
    from diffusers import StableDiffusionPipeline

    check_model(ref.base, ref.revision)
    quiet_libraries()
    precision = resolve_dtype(dtype, device)
    parts = {"unet": load_unet(ref, device, dtype)} if ref.unet else {}
    pipeline = StableDiffusionPipeline.from_pretrained(
        ref.base, revision=ref.revision, dtype=precision, safety_checker=None, requires_safety_checker=False,
        **parts,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    if ref.adapter:
        fuse_adapter(pipeline.unet, ref.adapter)
    pipeline.to(device)
    prefer_channels_last(pipeline.unet)
    return pipeline


def fuse_adapter(unet: "UNet2DConditionModel", adapter: str) -> None:
    """Add a LoRA to the weights for good: sampling never needs the two apart, and fused layers cost nothing."""
    unet.load_lora_adapter(adapter, weight_name=ADAPTER_FILE, adapter_name="fused", prefix="unet")
    unet.fuse_lora(adapter_names=["fused"])
    unet.unload_lora()


def quiet_libraries() -> None:
    """No bars for loading weights: they interrupt ours and say nothing on tiny or cached models."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def prefer_channels_last(unet: "UNet2DConditionModel") -> None:
    """NHWC layout: about 30 % faster UNet convolutions on CPUs, and what tensor cores want."""
    import torch

    unet.to(memory_format=torch.channels_last)


def load_unet(ref: ModelRef, device: str = "cpu", dtype: str = "auto") -> "UNet2DConditionModel":
    """The UNet alone (tuned one where there is one), without any adapter."""
    from diffusers import UNet2DConditionModel

    precision = resolve_dtype(dtype, device)
    if ref.unet:
        unet = UNet2DConditionModel.from_pretrained(ref.unet, dtype=precision)
    else:
        unet = UNet2DConditionModel.from_pretrained(ref.base, subfolder="unet", revision=ref.revision, dtype=precision)
    return unet.to(device)


def load_noise_schedule(ref: ModelRef) -> "DDPMScheduler":
    """The forward (noising) process the base was trained with: its betas and prediction type."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_pretrained(ref.base, subfolder="scheduler", revision=ref.revision)
