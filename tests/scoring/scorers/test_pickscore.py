"""PickScore against the forward pass of the transformers model and its real processor."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

from scoring.scorers.pickscore import PickScore
from scoring.scorers.scorer import ScoringError
from scoring.scorers.transformers_clip import projected

pytestmark = pytest.mark.numerical


@pytest.fixture(scope="module")
def real(pickscore_folder: Path) -> tuple[CLIPModel, CLIPProcessor]:
    """The model and the processor as transformers loads them."""
    return CLIPModel.from_pretrained(pickscore_folder), CLIPProcessor.from_pretrained(pickscore_folder)


def test_scores_equal_the_forward_pass(
    real: tuple, pickscore_folder: Path, images: list[np.ndarray], captions: list[str]
) -> None:
    """CLIPModel.forward gives logits_per_image[i, i] with the scale in; PIL images have clear axes."""
    model, processor = real
    inputs = processor(
        text=captions, images=[Image.fromarray(image) for image in images], return_tensors="pt",
        padding=True, truncation=True, max_length=77,
    )  # fmt: skip
    with torch.inference_mode():
        expected = model(**inputs).logits_per_image.diagonal().numpy()
    ours = PickScore(str(pickscore_folder)).score(images, captions)
    assert np.ptp(expected) > 1 and ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6 * 100)  # 2e-6 of a cosine; the scale is 100


def test_scores_equal_the_forward_pass_one_by_one(
    real: tuple, pickscore_folder: Path, images: list[np.ndarray]
) -> None:
    """Scale exp(0) = 1 and no padding on either side: the bare cosine to 2e-6."""
    model, processor = copy.deepcopy(real[0]), real[1]
    scorer = PickScore(str(pickscore_folder)).load()
    scorer._model.logit_scale.zero_()
    model.logit_scale.data.zero_()
    for image in images:
        inputs = processor(text=["a blue square"], images=[Image.fromarray(image)], return_tensors="pt")
        with torch.inference_mode():
            expected = float(model(**inputs).logits_per_image)
        assert scorer.score([image], ["a blue square"])[0] == pytest.approx(expected, abs=2e-6)


def test_both_returns_of_transformers_are_understood() -> None:
    """transformers 4 returned the projected features, transformers 5 wraps them in an output."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    features = torch.ones(2, 3)
    assert projected(features) is features
    assert projected(BaseModelOutputWithPooling(pooler_output=features)) is features


def test_pickle_weights_load_and_poisoned_ones_do_not(pickscore_folder: Path, bomb: type, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pickscore_folder, tmp_path / "copy"))
    state = CLIPModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    image, prompt = [np.zeros((8, 9, 3), dtype=np.uint8)], ["x"]
    assert PickScore(str(folder)).score(image, prompt) == PickScore(str(pickscore_folder)).score(image, prompt)
    torch.save({**state, "logit_scale": bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    poisoned = PickScore(str(folder))
    with pytest.raises(ScoringError, match="pickle of more than tensors"):
        poisoned.load()
    assert not (tmp_path / "ran").exists()


def test_weights_with_a_tensor_missing_are_refused(pickscore_folder: Path, tmp_path: Path) -> None:
    """transformers alone would fill it with random numbers and score on."""
    folder = Path(shutil.copytree(pickscore_folder, tmp_path / "copy"))
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    CLIPModel.from_pretrained(folder)
    scorer = PickScore(str(folder))
    with pytest.raises(ScoringError, match=r"1 tensors of a CLIPModel are missing, first visual_projection.weight"):
        scorer.load()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ScoringError, match=f"{folder}: the weights do not load"):
        scorer.load()


def test_a_folder_without_processor_takes_the_published_one(pickscore_folder: Path, tmp_path: Path) -> None:
    """Offline and with an empty cache that has to fail with the name of the processor's repository."""
    folder = Path(shutil.copytree(pickscore_folder, tmp_path / "copy"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Exception, match=r"(?s)LocalEntryNotFound|offline|cached") as caught:
        PickScore(str(folder))
    assert "snapshot" in str(caught.value) or "cache" in str(caught.value)
