"""Tiny pipelines of every family with random weights, in the file formats of the full-size ones: 32 px pictures."""

import json
import shutil
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch

from tests.tiny import clip_vocabulary
from training.model.loading import load_pipeline
from training.model.reference import ModelRef

T5_WIDTH = 48
MERGES = 2000
WORDS = ["a", "the", "of", "and", "red", "blue", "green", "circle", "square", "picture", "thing", "two"]


@cache
def clip_tokenizer() -> Any:
    """CLIP's with the first 2000 of its merges: the whole vocabulary takes a second to load, twice a pipeline."""
    from transformers import CLIPTokenizer

    vocabulary, merges = clip_vocabulary()
    words = [*list(vocabulary)[: 512 + MERGES], "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=merges[:MERGES], model_max_length=77
    )


@cache
def t5_tokenizer() -> Any:
    """SentencePiece's unigram model over a few words and all letters, as T5's fast tokenizer keeps it."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -4.0) for word in WORDS] + [(letter, -6.0) for letter in string.ascii_letters]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def t5_encoder(width: int = T5_WIDTH) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def clip_encoder(width: int, projected: bool = True) -> Any:
    """projected: with the head whose output is the pooled embedding."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = len(clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=words, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=width, bos_token_id=words - 2, eos_token_id=words - 1, pad_token_id=words - 1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def tiny_vae(channels: int = 4, **config: Any) -> Any:
    """8 x 8 latents of 32 px pictures."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=channels, norm_num_groups=4, sample_size=32, **config,
    )  # fmt: skip


def flow_vae() -> Any:
    """As those of SD3 and Flux: 16 channels around a mean that is not zero."""
    return tiny_vae(16, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)


def save_sdxl(folder: Path, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16 + 24, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8,
    )  # fmt: skip
    schedule = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading",
        prediction_type=prediction_type,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=tiny_vae(scaling_factor=0.13025), text_encoder=clip_encoder(16, False), text_encoder_2=clip_encoder(24),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), unet=unet, scheduler=schedule,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_sd3(folder: Path, seed: int = 0) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=T5_WIDTH, caption_projection_dim=16, pooled_projection_dim=16 + 24,
        pos_embed_max_size=12,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        vae=flow_vae(), text_encoder=clip_encoder(16), text_encoder_2=clip_encoder(24), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_flux(folder: Path, seed: int = 0, dev: bool = True) -> Path:
    """dev: guidance as an input and a shift that grows with the picture, as FLUX.1 dev; else as schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=T5_WIDTH, pooled_projection_dim=16, guidance_embeds=dev, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if dev else {"shift": 1.0}
    FluxPipeline(
        vae=flow_vae(), text_encoder=clip_encoder(16, False), tokenizer=clip_tokenizer(), text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(), transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(**shift),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def with_empty_words(sdxl: Path, folder: Path) -> Path:
    """An SDXL whose empty prompt is embedded like any other; the published model's is zeros."""
    return _edited(sdxl, folder, force_zeros_for_empty_prompt=False)


def without_t5(sd3: Path, folder: Path) -> Path:
    """An SD3 without its third text encoder, as diffusers saves one."""
    return _edited(sd3, folder, text_encoder_3=[None, None], tokenizer_3=[None, None])


def _edited(base: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(base, folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    return folder


class FamilyBases:
    """Tiny models by name, saved when they are asked for, each loaded once by us and once as a user of diffusers
    would."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cache  # noqa: B019 there is one, as long as the tests run
    def folder(self, name: str) -> Path:
        folder = self._folder / name
        if name == "sdxl-words":
            return with_empty_words(self.folder("sdxl"), folder)
        if name == "sd3-no-t5":
            return without_t5(self.folder("sd3"), folder)
        save: dict[str, Callable[[Path], Path]] = {
            "sdxl": save_sdxl, "sd3": save_sd3, "flux-dev": save_flux,
            "flux-schnell": lambda folder: save_flux(folder, dev=False),
        }  # fmt: skip
        return save[name](folder)

    def ref(self, name: str) -> ModelRef:
        return ModelRef(str(self.folder(name)))

    @cache  # noqa: B019
    def ours(self, name: str) -> Any:
        return load_pipeline(self.ref(name))

    @cache  # noqa: B019
    def plain(self, name: str) -> Any:
        absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-no-t5" else {}
        pipeline = diffusers.DiffusionPipeline.from_pretrained(self.folder(name), **absent)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
