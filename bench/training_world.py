"""What the training benchmark trains on: models with random weights, a data set as the peers read it, our shards of it.

Sizes: "tiny" has the networks of Stable Diffusion at a hundredth of the size; its VAE costs 0.61 of a forward pass of
the UNet, that of "tiny-vae" 1.34 (Stable Diffusion 1.5 at 512 pixels: 1.39). "tiny-xl" is SDXL's architecture. "sd15"
and "sdxl" are the published sizes.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from data.ids import prompt_id
from data.manifest import make_manifest, write_manifest
from data.pictures import open_image
from data.preference_rows import Pairs, Side, preference_table
from data.schema import pair_schema
from data.shards import write_shard
from tests.tiny import ALL_MERGES, MERGES, SPECIAL, clip_tokenizer
from training.model.families import family_for
from training.model.reference import ModelRef

SPLIT = "train"
CLIP_WORDS = {"vocab_size": 49408}


@dataclass(frozen=True)
class Scale:
    """unet, vae: their configs. texts: those of the text encoders. pixels: of the pictures. batch: pairs a step."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    texts: list[dict[str, Any]]
    pixels: int
    batch: int
    merges: int = MERGES

    @property
    def xl(self) -> bool:
        return len(self.texts) == 2


def _vae(widths: tuple[int, ...], layers: int = 1, **more: Any) -> dict[str, Any]:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * len(widths)}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * len(widths)}
    return {"block_out_channels": widths, "layers_per_block": layers, "latent_channels": 4, **blocks, **more}


def _text(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, **more,
    }  # fmt: skip


TINY_UNET = {
    "sample_size": 16, "block_out_channels": (64, 128), "layers_per_block": 2, "cross_attention_dim": 96,
    "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}  # fmt: skip
TINY_XL_UNET = {
    **TINY_UNET, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 32 + 6 * 32,
}  # fmt: skip
SDXL_UNET = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
CLIP_L = _text(768, 12, 12, hidden_act="quick_gelu", projection_dim=768, **CLIP_WORDS)
BIG_G = _text(1280, 32, 20, hidden_act="gelu", projection_dim=1280, **CLIP_WORDS)
SCALES = {
    "tiny": Scale(TINY_UNET, _vae((32, 64, 128)), [_text(96, 2, 4, **SPECIAL)], pixels=64, batch=4),
    "tiny-vae": Scale(TINY_UNET, _vae((64, 128, 128)), [_text(96, 2, 4, **SPECIAL)], pixels=64, batch=4),
    "tiny-xl": Scale(
        TINY_XL_UNET, _vae((32, 64, 128)),
        [_text(64, 2, 4, **SPECIAL), _text(32, 2, 4, projection_dim=32, **SPECIAL)], pixels=64, batch=4,
    ),
    "sd15": Scale(
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        _vae((128, 256, 512, 512), 2, sample_size=512), [CLIP_L], pixels=512, batch=16, merges=ALL_MERGES,
    ),
    "sdxl": Scale(
        SDXL_UNET, _vae((128, 256, 512, 512), 2, sample_size=1024, scaling_factor=0.13025), [CLIP_L, BIG_G],
        pixels=1024, batch=8, merges=ALL_MERGES,
    ),
}  # fmt: skip


def save_base(scale: Scale, folder: Path) -> Path:
    """The pipeline with random weights, as diffusers saves it."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    schedule = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    texts = [kind(CLIPTextConfig(**config)) for kind, config in zip(kinds, scale.texts, strict=False)]
    parts = {"unet": diffusers.UNet2DConditionModel(**scale.unet), "vae": diffusers.AutoencoderKL(**scale.vae)}
    parts |= {"scheduler": schedule, "text_encoder": texts[0], "tokenizer": clip_tokenizer(merges=scale.merges)}
    if scale.xl:
        parts |= {"text_encoder_2": texts[1], "tokenizer_2": parts["tokenizer"]}
        diffusers.StableDiffusionXLPipeline(**parts).save_pretrained(folder)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        diffusers.StableDiffusionPipeline(**parts, **none).save_pretrained(folder)
    return folder


def save_data(folder: Path, pairs: int, pixels: int) -> Path:
    """A data set in Pick-a-Pic's columns: JPEGs of coloured gradients under noise. Every second winner is side 0."""
    rng, folder = np.random.default_rng(0), folder / "data"
    folder.mkdir(parents=True)
    columns = {name: [_picture(rng, pixels) for _ in range(pairs)] for name in ("jpg_0", "jpg_1")}
    labels = [float(index % 2) for index in range(pairs)]
    captions = [f"a picture of {index} things" for index in range(pairs)]
    pq.write_table(pa.table({**columns, "label_0": labels, "caption": captions}), folder / f"{SPLIT}.parquet")
    return folder


def _picture(rng: np.random.Generator, pixels: int) -> bytes:
    gradient = np.linspace(0, 200, pixels)[None, :, None] * rng.random(3)
    buffer = io.BytesIO()
    Image.fromarray((gradient + rng.integers(0, 56, (pixels, pixels, 3))).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


class Shards:
    """Makes our shards of such a data set: what a first epoch costs before its first step."""

    def __init__(self, base: Path, data: Path, device: str, dtype: torch.dtype) -> None:
        from training.model.loading import load_pipeline

        self.table = pq.read_table(data / f"{SPLIT}.parquet")
        self.family, self.device = family_for(ModelRef(str(base))), device
        self.pipeline = load_pipeline(ModelRef(str(base)), device, str(dtype).removeprefix("torch."))

    @torch.no_grad()
    def encode(self, rows: slice) -> dict[str, Any]:
        """Latents of both sides and embeddings of some rows, as arrays, and the rows."""
        table = self.table.slice(rows.start, rows.stop - rows.start)
        sides = [torch.stack([_tensor(data) for data in table[f"jpg_{side}"].to_pylist()]) for side in (0, 1)]
        latents = [self.family.encode(self.pipeline, side.to(self.device)).float().cpu().numpy() for side in sides]
        prompts = self.family.embed(self.pipeline, table["caption"].to_pylist()).map(lambda each: each.float().cpu())
        return {"latents": latents, "prompts": prompts, "rows": table}

    def write(self, folder: Path, batch: int) -> Path:
        """All of them, published."""
        parts = [self.encode(slice(start, start + batch)) for start in range(0, len(self.table), batch)]
        shape, prompts = parts[0]["latents"][0].shape[1:], parts[0]["prompts"]
        metadata = {"latent": {"shape": list(shape)}, "embedding": {"shape": list(prompts.tokens.shape[1:])}}
        pooled = None if prompts.pooled is None else prompts.pooled.shape[1]
        schema = pair_schema(int(np.prod(shape)), prompts.tokens[0].numel(), [], metadata, pooled)
        tables = [preference_table(_pairs(part), schema) for part in parts]
        record = write_shard(folder / "00000-of-00001.arrow", pa.concat_tables(tables), schema)
        write_manifest(folder, make_manifest({SPLIT: [record]}, "bench", "2026-01-01T00:00:00+00:00"))
        return folder


def _tensor(data: bytes) -> torch.Tensor:
    """(3, H, W) in [-1, 1]."""
    return torch.from_numpy(open_image(data).copy()).permute(2, 0, 1).float() / 127.5 - 1


def _pairs(part: dict[str, Any]) -> Pairs:
    """Encoded rows of the data set; see `Shards.encode`."""
    data, prompts = part["rows"], part["prompts"]
    captions, rows = data["caption"].to_pylist(), len(data)
    sides = [
        Side(
            images=data[f"jpg_{side}"].to_pylist(), latents=part["latents"][side], seeds=[side] * rows,
            models=["m"] * rows,
        )
        for side in (0, 1)
    ]  # fmt: skip
    return Pairs(
        prompt_ids=[prompt_id(caption) for caption in captions],
        captions=captions,
        sides=(sides[0], sides[1]),
        label_0=data["label_0"].to_pylist(),
        config_hashes=["bench"] * rows,
        prompt_embeddings=prompts.tokens.numpy(),
        pooled_embeddings=None if prompts.pooled is None else prompts.pooled.numpy(),
    )
