"""The two small judges: a CLIP in PickScore's format and a different one in HPSv2's.

Both are trained by `shapes.judge_training`; here are their shapes, their encoders and their folders on disk.
Scores: PickScore = exp(logit_scale) * cosine, HPSv2 = cosine.
"""

import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from shapes.stage import declare_float32
from shapes.tokenizer import CONTEXT, build_tokenizer, vocabulary, write_open_clip

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own, as both scorers' pipelines apply them
STD = (0.26862954, 0.26130258, 0.27577711)
SIDE, PATCH = 32, 4

TEXT_TOWER = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=CONTEXT,
)
IMAGE_TOWER = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=PATCH,
)
EMBEDDING = 128


def pickscore_config() -> CLIPConfig:
    """Patch 4, width 128, 3 layers: 0.9 M parameters with its text tower."""
    return CLIPConfig(
        text_config={**TEXT_TOWER, **vocabulary(), "projection_dim": EMBEDDING},
        vision_config={**IMAGE_TOWER, "projection_dim": EMBEDDING},
        projection_dim=EMBEDDING,
        dtype="float32",
    )


def hpsv2_config() -> dict[str, object]:
    """open_clip's `model_cfg`: patch 4, width 96, 4 layers."""
    vision = dict(image_size=SIDE, patch_size=PATCH, width=96, head_width=24, layers=4, mlp_ratio=2.0)
    text = dict(
        context_length=CONTEXT,
        vocab_size=vocabulary()["vocab_size"],
        width=96,
        heads=4,
        layers=2,
        mlp_ratio=2.0,
    )
    return dict(embed_dim=EMBEDDING, vision_cfg=vision, text_cfg=text)


def standardise(images: Tensor) -> Tensor:
    """(n, 3, 32, 32) in [0, 1] -> CLIP's mean and deviation."""
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


class PickScoreJudge(nn.Module):
    """A transformers CLIPModel with the encoders that training needs; embeddings are not normalised."""

    name = "pickscore"

    def __init__(self, clip: CLIPModel | None = None) -> None:
        super().__init__()
        self.clip = clip or CLIPModel(pickscore_config())

    def token_ids(self, captions: list[str]) -> Tensor:
        """(n, 20) ids, padded with the end token."""
        return build_tokenizer()(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def image(self, images: Tensor) -> Tensor:
        """(n, 3, 32, 32) in [0, 1] -> (n, 128)."""
        return self.clip.visual_projection(self.clip.vision_model(standardise(images)).pooler_output)

    def text(self, ids: Tensor) -> Tensor:
        """(n, 20) -> (n, 128)."""
        return self.clip.text_projection(self.clip.text_model(ids).pooler_output)

    @property
    def log_scale(self) -> Tensor:
        return self.clip.logit_scale

    def save(self, folder: Path) -> None:
        """save_pretrained of model and processor: half-precision weights that load as float32."""
        clip = CLIPModel(pickscore_config())
        clip.load_state_dict(self.clip.state_dict())
        clip.half().save_pretrained(folder)
        declare_float32(folder / "config.json")
        picture = CLIPImageProcessor(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_mean=MEAN,
            image_std=STD,
        )
        CLIPProcessor(picture, build_tokenizer()).save_pretrained(folder)


class HPSv2Judge(nn.Module):
    """An open_clip CLIP with the same face; embeddings are not normalised."""

    name = "hpsv2"

    def __init__(self, clip: open_clip.CLIP | None = None) -> None:
        super().__init__()
        self.clip = clip or open_clip.CLIP(**hpsv2_config())

    def token_ids(self, captions: list[str]) -> Tensor:
        """(n, 20) ids, padded with zero as open_clip does."""
        rows = build_tokenizer()(captions, truncation=True).input_ids
        return torch.tensor([row + [0] * (CONTEXT - len(row)) for row in rows])

    def image(self, images: Tensor) -> Tensor:
        """(n, 3, 32, 32) in [0, 1] -> (n, 128)."""
        return self.clip.encode_image(standardise(images))

    def text(self, ids: Tensor) -> Tensor:
        """(n, 20) -> (n, 128)."""
        return self.clip.encode_text(ids)

    @property
    def log_scale(self) -> Tensor:
        return self.clip.logit_scale

    def save(self, folder: Path) -> None:
        """The layout of open_clip's hub folders; weights in half precision."""
        folder.mkdir(parents=True, exist_ok=True)
        preprocess = dict(size=SIDE, mode="RGB", mean=MEAN, std=STD, interpolation="bicubic", resize_mode="longest")
        config = {"model_cfg": hpsv2_config(), "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {key: value.half().contiguous() for key, value in self.clip.state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")
        write_open_clip(folder)


Judge = PickScoreJudge | HPSv2Judge
JUDGES: dict[str, type[PickScoreJudge] | type[HPSv2Judge]] = {
    "pickscore": PickScoreJudge,
    "hpsv2": HPSv2Judge,
}


def load_judge(name: str, folder: Path) -> Judge:
    """A shipped judge, by the stock libraries, ready to score."""
    judge: Judge
    if name == "pickscore":
        judge = PickScoreJudge(CLIPModel.from_pretrained(folder, dtype=torch.float32))
        judge.eval()
        return judge
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    clip = open_clip.CLIP(**config)
    clip.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    judge = HPSv2Judge(clip)
    judge.eval()
    return judge


@torch.no_grad()
def score(judge: Judge, images: Tensor, captions: list[str]) -> Tensor:
    """Pictures (n, 3, 32, 32) in [0, 1] against n captions -> (n,), in the scorer's own unit."""
    pictures = torch.cat([judge.image(chunk) for chunk in images.split(64)])
    texts = torch.cat([judge.text(chunk) for chunk in judge.token_ids(captions).split(64)])
    cosine = (F.normalize(pictures, dim=-1) * F.normalize(texts, dim=-1)).sum(-1)
    return cosine * judge.log_scale.exp() if judge.name == "pickscore" else cosine
