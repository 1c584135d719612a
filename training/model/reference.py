"""Which diffusion model: a folder or hub id, and what training put on top of it. Reads configurations, no weights."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data.files import file_sha256

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""The name diffusers gives a LoRA. Offline it must be said on loading: the libraries do not look for it then."""


Dtype = Literal["float32", "float16", "bfloat16"]
"""Number formats that weights are exported in."""


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

    def within(self, folder: Path) -> "ModelRef":
        """The model with the paths of its weights, where they are relative, taken as relative to a folder."""
        network, adapter = (str(folder / path) if path else None for path in (self.network, self.adapter))
        return replace(self, network=network, adapter=adapter)


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
        digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()[:12]


def read_config(ref: "ModelRef", part: str, file: str = "config.json") -> dict[str, Any]:
    """The configuration of one component of the base, from a folder or the hub. Loads no weights."""
    local = Path(ref.base) / part / file
    if local.is_file():
        config: dict[str, Any] = json.loads(local.read_text())
        return config
    from training.model.reference import hub_file

    config = json.loads(hub_file(ref.base, f"{part}/{file}", ref.revision).read_text())
    return config
