"""Tiny real models with random weights, in the file formats of the full-size ones. No download, no mock."""

import gzip
import json
from functools import cache
from pathlib import Path

import torch

ALL_MERGES, MERGES = 48894, 2000
"""CLIP's and ours: with all of them each of a cycle's many loads parses megabytes of JSON, half of a cycle's time."""
WORDS = 512 + MERGES + 2
BOS, EOS = WORDS - 2, WORDS - 1
SPECIAL = {"vocab_size": WORDS, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}


@cache
def clip_vocabulary(merges: int = MERGES) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The first words of CLIP's byte-pair vocabulary, from the copy that open_clip ships: every text has tokens."""
    import open_clip

    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : merges + 1]
    pairs = [(a, b) for a, b in (line.split() for line in lines)]
    alphabet = list(open_clip.tokenizer.bytes_to_unicode().values())
    words = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in pairs)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}, pairs


def clip_tokenizer(length: int = 77, merges: int = MERGES) -> object:
    from transformers import CLIPTokenizer

    vocab, pairs = clip_vocabulary(merges)
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=length)


def save_pipeline(folder: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """A Stable Diffusion 1.5 shaped pipeline of about a million parameters, 32 px pictures."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, **SPECIAL)
    )  # fmt: skip
    schedule = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        prediction_type=prediction_type,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=clip_tokenizer(), unet=unet, scheduler=schedule, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_pickscore(folder: Path, seed: int = 1) -> Path:
    """A PickScore-format scorer: transformers CLIPModel and CLIPProcessor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(seed)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, **SPECIAL}, vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=clip_tokenizer()).save_pretrained(folder)
    return folder


def save_hpsv2(folder: Path, seed: int = 2) -> Path:
    """An HPSv2-format scorer: an open_clip config and its state dict."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


PRESET = """
base_model = "{folder}/base"
prompts = "{folder}/prompts.txt"
scorer = "pickscore"
judges = ["pickscore", "hpsv2"]
[scorers]
pickscore = {{ source = "{folder}/pickscore" }}
hpsv2 = {{ source = "{folder}/hpsv2" }}
[generation]
prompts_per_cycle = 8
candidates = 3
scheduler = "DPMSolverMultistepScheduler"
scheduler_options = {{ timestep_spacing = "trailing" }}
steps = 2
guidance = 1.0
height = 0
width = 0
image_format = "png"
[pairing]
rule = "best-vs-worst"
min_margin = 0.0
score_with_judges = true
[training]
method = "lora"
loss = "dpo"
label_smoothing = 0.0
soft_labels = false
sft_weight = 0.0
margin_offset = 0.0
margin_weights = false
sdpo_mu = 0.9
steps = 6
batch_size = 4
micro_batch_size = 4
learning_rate = 1e-3
warmup_steps = 0
weight_decay = 0.0
max_grad_norm = 1.0
beta = 2000.0
lora_rank = 4
lora_alpha = 4.0
lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
optimizer = "adamw"
schedule = "constant"
ema = 0.0
error_space = "prediction"
refresh_reference = 0
noise_draws = 0
prompt_dropout = 0.0
timestep_density = "logit-normal"
timestep_shift = 0.0
guidance_input = 1.0
heldout_share = 0.0
heldout_every = 50
lora_dora = false
text_encoders = false
checkpoint_every = 2
mixed_precision = "no"
[evaluation]
prompts = "split"
max_prompts = 12
null_control = true
[gate]
confidence = 0.95
[execution]
device = "cpu"
dtype = "auto"
batch_size = 8
score_batch_size = 8
processes = 0
gradient_checkpointing = false
compile = false
offload_reference = false
shard = false
trackers = []
images_per_shard = 12
"""


def save_world(folder: Path) -> Path:
    """A base model, two scorers, 200 prompts, and the preset file that binds them; returns the preset's path."""
    folder.mkdir(parents=True, exist_ok=True)
    save_pipeline(folder / "base")
    save_pickscore(folder / "pickscore")
    save_hpsv2(folder / "hpsv2")
    (folder / "prompts.txt").write_text("".join(f"a picture of {i} things\n" for i in range(200)))
    (folder / "tiny.toml").write_text(PRESET.format(folder=folder))
    return folder / "tiny.toml"
