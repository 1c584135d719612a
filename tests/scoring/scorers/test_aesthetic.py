"""The aesthetic predictors against an evaluation in float64 written from the original, on a tiny random backbone."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection

from scoring.scorers import aesthetic
from scoring.scorers.aesthetic import HEADS, Aesthetic, build_head
from scoring.scorers.registry import check_scorer, load_scorer
from scoring.scorers.scorer import ScoringError
from scoring.tools.convert import convert

pytestmark = pytest.mark.numerical

WIDTH = 16
GREY = [np.full((20, 30, 3), 90, dtype=np.uint8)]


def original_head(variant: str, width: int = WIDTH) -> nn.Module:
    """As in simple_inference.py of improved-aesthetic-predictor, and in the notebook of aesthetic-predictor."""
    torch.manual_seed(0)
    head = nn.Linear(width, 1)
    if variant == "v2":
        head = nn.Module()
        head.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip
    with torch.no_grad():  # the default initialisation is so small that all images would score the same
        for parameter in head.parameters():
            parameter.mul_(2 if variant == "v2" else 20)
    return head


@pytest.fixture(params=["v2", "v1"])
def variant(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def head_folder(variant: str, tmp_path: Path) -> Path:
    """The state dict under its published name, by torch.save as it was published."""
    folder = tmp_path / "head"
    folder.mkdir()
    torch.save(original_head(variant).state_dict(), folder / f"{HEADS[variant].file}.pth")
    return folder


def _scorer(head_folder: Path, backbone: Path, variant: str = "v2") -> Aesthetic:
    return Aesthetic(str(head_folder), variant=variant, backbone=str(backbone), batch_size=4)


def test_scores_equal_the_original_in_float64(
    variant: str, head_folder: Path, pickscore_folder: Path, images: list[np.ndarray], captions: list[str]
) -> None:
    clip = CLIPModel.from_pretrained(pickscore_folder)
    processor = CLIPImageProcessor.from_pretrained(pickscore_folder)
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = clip.double().get_image_features(pixel_values=pixels.double()).pooler_output
        features = features / features.norm(dim=-1, keepdim=True)
        original = original_head(variant).double().eval()
        expected = (original if variant == "v1" else original.layers)(features).squeeze(-1).numpy()
    scorer = _scorer(head_folder, pickscore_folder, variant)
    scores = scorer.score(images, captions)
    assert np.ptp(expected) > 0.1 and scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=0, atol=5e-6)
    tensor = torch.from_numpy(np.stack([images[1]] * 2)).permute(0, 3, 1, 2)
    np.testing.assert_allclose(scorer.score(tensor, captions[:2]), expected[[1, 1]], rtol=0, atol=5e-6)
    np.testing.assert_allclose(scorer.score([images[2]], ["x"]), expected[2:3], rtol=0, atol=5e-6)


def test_the_published_layout_fits() -> None:
    """Names and sizes of the published v2 file, 768-1024-128-64-16-1, as its repository gives them."""
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    state = {f"layers.{i}.weight": torch.randn(*shape) / shape[1] ** 0.5 for i, shape in sizes.items()}
    state |= {f"layers.{i}.bias": torch.randn(shape[0]) for i, shape in sizes.items()}
    assert original_head("v2", 768).state_dict().keys() == state.keys()
    head, inputs = build_head(state, HEADS["v2"].layers, 768, "here"), torch.randn(5, 768)
    original = original_head("v2", 768).eval()
    original.load_state_dict(state)
    torch.testing.assert_close(head(inputs), original.layers(inputs), rtol=0, atol=0)


def test_the_prompt_is_ignored_and_info_says_so(head_folder: Path, variant: str, pickscore_folder: Path) -> None:
    scorer = _scorer(head_folder, pickscore_folder, variant)
    a, b = scorer.score(GREY * 2, ["a cat", "nothing of the kind"])
    assert a == pytest.approx(b, rel=0, abs=5e-6)  # a row's place in a batch may change its last digit
    info = scorer.info
    assert (info.name, info.version, info.unit, info.needs_prompt) == ("aesthetic", variant, "points", False)
    assert info.preference_scale is None and info.lowest is None and info.highest is None
    assert info.licence == {"v2": "Apache-2.0", "v1": "MIT"}[variant]


def test_found_by_name(head_folder: Path, variant: str, pickscore_folder: Path) -> None:
    spec = f"aesthetic:{variant}?source={head_folder}&backbone={pickscore_folder}"
    check_scorer(spec, {})
    expected = _scorer(head_folder, pickscore_folder, variant).score(GREY, ["x"])
    assert load_scorer(spec, {}).score(GREY, ["x"]) == expected


def test_a_converted_head_scores_the_same(head_folder: Path, variant: str, pickscore_folder: Path) -> None:
    expected = _scorer(head_folder, pickscore_folder, variant).score(GREY, ["x"])
    path = head_folder / f"{HEADS[variant].file}.pth"
    convert(path, path.with_suffix(".safetensors"))
    path.unlink()
    assert _scorer(head_folder, pickscore_folder, variant).score(GREY, ["x"]) == expected


def test_fingerprint_covers_head_and_backbone(head_folder: Path, variant: str, pickscore_folder: Path) -> None:
    backbone = Path(shutil.copytree(pickscore_folder, head_folder / "backbone"))
    before = _scorer(head_folder, pickscore_folder, variant).info
    assert _scorer(head_folder, backbone, variant).info.fingerprint == before.fingerprint
    processor = backbone / "processor_config.json"
    processor.write_text(processor.read_text() + " ")
    other = _scorer(head_folder, backbone, variant).info
    assert other.fingerprint != before.fingerprint and other.weights == before.weights
    state = load_file(backbone / "model.safetensors")
    save_file({**state, "logit_scale": torch.tensor(1.0)}, backbone / "model.safetensors", metadata={"format": "pt"})
    other = _scorer(head_folder, backbone, variant).info
    assert other.weights != before.weights
    path = head_folder / f"{HEADS[variant].file}.pth"
    torch.save({name: value + 1 for name, value in original_head(variant).state_dict().items()}, path)
    changed = _scorer(head_folder, pickscore_folder, variant).info
    assert changed.fingerprint != before.fingerprint and changed.weights != before.weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layers.7.bias"), "instead of layers.0.weight"),
        (lambda state: state.update({"layers.9.weight": torch.ones(1)}), "holds .*layers.9.weight"),
        (lambda state: state.update({"layers.0.weight": torch.ones(1024, 12)}), r"\(1024, 12\) after a layer of 16"),
        (lambda state: state.update({"layers.6.bias": torch.ones(15)}), r"layers.6.weight has shape \(16, 64\)"),
        (
            lambda state: state.update({"layers.7.weight": torch.ones(2, 16), "layers.7.bias": torch.ones(2)}),
            "ends in 2 numbers instead of one",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    change: object, message: str, pickscore_folder: Path, tmp_path: Path
) -> None:
    state = dict(original_head("v2").state_dict())
    change(state)  # type: ignore[operator]
    torch.save(state, tmp_path / f"{HEADS['v2'].file}.pth")
    with pytest.raises(ScoringError, match=f"(?s){HEADS['v2'].file.replace('+', '.')}.pth: .*{message}"):
        _scorer(tmp_path, pickscore_folder).load()


def test_a_poisoned_head_runs_nothing(pickscore_folder: Path, bomb: type, tmp_path: Path) -> None:
    torch.save({"layers.0.weight": bomb(tmp_path / "ran")}, tmp_path / f"{HEADS['v2'].file}.pth")
    with pytest.raises(ScoringError, match="not a checkpoint of plain tensors"):
        _scorer(tmp_path, pickscore_folder).load()
    assert not (tmp_path / "ran").exists()


def test_the_copy_on_the_hub_has_to_be_the_original(
    pickscore_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is somebody's copy: another content is refused, the published content is taken."""
    path = tmp_path / f"{HEADS['v2'].file}.pth"
    torch.save(original_head("v2").state_dict(), path)
    head = replace(HEADS["v2"], default=str(tmp_path))
    monkeypatch.setitem(aesthetic.HEADS, "v2", head)
    with pytest.raises(ScoringError, match=r"is not the published head, its sha256 is .* instead of 21dd590f3ccdc646"):
        Aesthetic(backbone=str(pickscore_folder))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(aesthetic.HEADS, "v2", replace(head, digest=digest))
    assert Aesthetic(backbone=str(pickscore_folder)).load().info.version == "v2"


def test_what_cannot_work_is_refused_at_once(pickscore_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown variant 'v3', not v2 or v1"):
        check_scorer("aesthetic:v3", {})
    with pytest.raises(
        ValueError, match=r"v1 needs a source, .*sa_0_4_vit_l_14_linear.pth from https://github.com/LAION"
    ):
        check_scorer("aesthetic:v1", {})
    with pytest.raises(ValueError, match="'camenduru/improved-aesthetic-predictor' is not in the cache"):
        check_scorer("aesthetic", {})
    with pytest.raises(ValueError, match=r"lacks .*linearMSE.pth; it holds nothing"):
        check_scorer(f"aesthetic?source={tmp_path}", {})
    (tmp_path / f"{HEADS['v2'].file}.pth").touch()
    with pytest.raises(ValueError, match=r"'openai/clip-vit-large-patch14' is not in the cache"):
        check_scorer(f"aesthetic?source={tmp_path}", {})
    with pytest.raises(ValueError, match=r"lacks config\.json"):
        check_scorer(f"aesthetic?source={tmp_path}&backbone={tmp_path}", {})


@pytest.mark.slow
def test_the_published_sizes(tmp_path: Path, images: list[np.ndarray]) -> None:
    """A ViT-L/14 in OpenAI's configuration with the head of 768, against the vision tower by itself."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    torch.manual_seed(0)
    clip = CLIPModel(
        CLIPConfig(
            text_config=text, vision_config={**vision, "patch_size": 14, "projection_dim": 768}, projection_dim=768
        )
    )
    clip.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor().save_pretrained(tmp_path / "clip")
    torch.save(original_head("v2", 768).state_dict(), tmp_path / f"{HEADS['v2'].file}.pth")
    del clip
    vision_tower = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip")
    pixels = CLIPImageProcessor()([Image.fromarray(image) for image in images[:3]], return_tensors="pt")
    assert pixels["pixel_values"].shape == (3, 3, 224, 224) and vision_tower.config.hidden_act == "quick_gelu"
    with torch.no_grad():
        features = vision_tower(**pixels).image_embeds
        expected = original_head("v2", 768).eval().layers(features / features.norm(dim=-1, keepdim=True)).squeeze(-1)
    scores = _scorer(tmp_path, tmp_path / "clip").score(images[:3], ["x"] * 3)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=5e-6)
    assert len(set(scores.tolist())) == 3
