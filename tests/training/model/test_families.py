"""Every family draws what plain diffusers draws, and its training calls the network with what the pipeline gives it."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tests.families import FamilyBases, save_sdxl
from training.model.families import family_for
from training.model.family import Conditions, PromptEmbeddings
from training.model.loading import embed_negative, load_pipeline
from training.model.reference import ModelRef
from training.model.sampling import Sampler, embed_prompts, negative_prompt, sample_images, use_sampler

pytestmark = pytest.mark.numerical

PROMPTS = ["a red circle", "the picture of two things"]
NAMES = ["sdxl", "sdxl-words", "sd3", "sd3-no-t5", "flux-dev", "flux-schnell"]


def sampler_of(name: str, guidance: float, width: int = 32) -> Sampler:
    scheduler = "DDIMScheduler" if name.startswith("sdxl") else "FlowMatchEulerDiscreteScheduler"
    return Sampler(scheduler, 3, guidance, height=32, width=width)


@pytest.mark.parametrize(
    ("name", "guidance"),
    [(name, 4.5) for name in NAMES] + [(name, 1.0) for name in ("sdxl", "sd3", "flux-dev")],
)
def test_pictures_are_those_of_the_plain_pipeline(bases: FamilyBases, name: str, guidance: float) -> None:
    """The plain pipeline is given the words; ours rounds their embeddings, and the latents, to float16."""
    ours, plain, sampler = bases.ours(name), bases.plain(name), sampler_of(name, guidance)
    embeddings, negative = embed_prompts(ours, PROMPTS), negative_prompt(ours)
    latents, images = sample_images(ours, embeddings, negative, [11, 12], sampler, 2)
    use_sampler(plain, sampler)
    drawn = plain(
        PROMPTS, num_inference_steps=3, guidance_scale=guidance, height=32, width=32, output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in (11, 12)],
    ).images  # fmt: skip
    assert latents.shape[1:] == (plain.vae.config.latent_channels, 8, 8)
    assert np.abs(images.astype(float) - drawn * 255).max() <= 2.5
    assert np.abs(images[0].astype(int) - images[1]).max() > 10


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux-dev"])
def test_guidance_changes_the_picture(bases: FamilyBases, name: str) -> None:
    """So that equal pictures above mean something; Flux takes it as an input of the network."""
    pipeline = bases.ours(name)
    embeddings, negative = embed_prompts(pipeline, PROMPTS[:1]), negative_prompt(pipeline)
    drawn = [
        sample_images(pipeline, embeddings, negative, [1], sampler_of(name, guidance), 1)[0] for guidance in (1.0, 4.5)
    ]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-2


def test_flux_pictures_need_not_be_square_and_are_whole_tokens(bases: FamilyBases) -> None:
    """44 pixels are 11 latent pixels, of which the pipeline draws 10."""
    pipeline = bases.ours("flux-dev")
    embeddings, negative = embed_prompts(pipeline, PROMPTS[:1]), negative_prompt(pipeline)
    latents, images = sample_images(pipeline, embeddings, negative, [1], sampler_of("flux-dev", 1.0, width=44), 1)
    assert latents.shape == (1, 16, 8, 10) and images.shape == (1, 32, 40, 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_empty_prompt_is_what_guidance_leads_away_from(bases: FamilyBases, name: str) -> None:
    """Also when it is embedded without the rest of the pipeline, as the trainer does for prompt dropout."""
    plain = bases.plain(name)
    if name.startswith("sdxl"):
        found = plain.encode_prompt("anything", device="cpu", do_classifier_free_guidance=True)
        tokens, pooled = found[1], found[3]
    elif name.startswith("sd3"):
        _, tokens, _, pooled = plain.encode_prompt("anything", None, None, device="cpu")
    else:
        tokens, pooled, _ = plain.encode_prompt("", None, device="cpu")
    for empty in (
        negative_prompt(bases.ours(name)),
        embed_negative(bases.ref(name)),
    ):
        torch.testing.assert_close(empty.tokens.float(), tokens, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(known(empty.pooled).float(), pooled, rtol=1e-3, atol=1e-3)
    assert (tokens.abs().max() == 0) == (name == "sdxl")


def calls_of(network: torch.nn.Module, run: Callable[[], Any]) -> list[dict[str, torch.Tensor]]:
    """The tensors that each call of the network was given, by parameter, while `run` runs."""
    calls: list[dict[str, torch.Tensor]] = []

    def record(_: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = inspect.signature(type(network).forward).bind(network, *args, **named).arguments
        given |= given.pop("added_cond_kwargs", None) or {}
        calls.append({key: value.detach().clone() for key, value in given.items() if torch.is_tensor(value)})

    hook = network.register_forward_pre_hook(record, with_kwargs=True)
    run()
    hook.remove()
    return calls


def embeddings_in(call: dict[str, torch.Tensor]) -> PromptEmbeddings:
    """Those that a call of the network was given."""
    pooled = call["text_embeds"] if "text_embeds" in call else call["pooled_projections"]
    return PromptEmbeddings(call["encoder_hidden_states"], pooled)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux-dev", "flux-schnell"])
def test_training_calls_the_network_as_the_pipeline_does(bases: FamilyBases, name: str) -> None:
    """In every step of a real drawing of a picture that is no square: same tensors, and so the same prediction."""
    ref = bases.ref(name)
    family, plain = family_for(ref), bases.plain(name)
    use_sampler(plain, sampler_of(name, 1.0))
    network = getattr(plain, family.network)
    told = 3.5 if name.startswith("flux") else 1.0
    options = {"num_inference_steps": 3, "guidance_scale": told, "height": 32, "width": 48, "output_type": "latent"}
    theirs = calls_of(network, lambda: plain(PROMPTS, generator=torch.Generator().manual_seed(5), **options))
    prompts = embeddings_in(theirs[0])
    embedded = family.embed(plain, PROMPTS)
    torch.testing.assert_close(embedded.tokens, prompts.tokens, rtol=0, atol=1e-4)
    torch.testing.assert_close(embedded.pooled, prompts.pooled, rtol=0, atol=1e-4)
    assert len(theirs) == 3
    for step, call in enumerate(theirs):
        noisy = call["sample" if name.startswith("sdxl") else "hidden_states"]
        if name.startswith("flux"):
            noisy = plain._unpack_latents(noisy, 32, 48, plain.vae_scale_factor)
        times = plain.scheduler.sigmas[step].expand(2) if family.flow else call["timestep"].expand(2)
        sizes = torch.tensor([[32.0, 48, 0, 0, 32, 48]]).repeat(2, 1) if family.takes_time_ids else None
        conditions = Conditions(prompts, sizes, told)
        ours = calls_of(network, lambda: family.predict(network, noisy, times, conditions))[0]  # noqa: B023 runs now
        call["timestep"] = call["timestep"].expand(2)
        assert ours.keys() == call.keys()
        for key, expected in call.items():
            torch.testing.assert_close(ours[key], expected, rtol=1e-6, atol=0, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux-dev", "flux-schnell"])
def test_every_input_reaches_the_prediction(bases: FamilyBases, name: str) -> None:
    ref = bases.ref(name)
    family, pipeline = family_for(ref), bases.ours(name)
    network, prompts = getattr(pipeline, family.network), family.embed(pipeline, PROMPTS)
    noisy = torch.randn(2, pipeline.vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.3, 0.6]) if family.flow else torch.tensor([300, 600])
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(2, 1) if family.takes_time_ids else None

    @torch.no_grad()
    def predict(noisy: torch.Tensor = noisy, times: torch.Tensor = times, **changes: Any) -> torch.Tensor:
        return family.predict(network, noisy, times, Conditions(prompts, sizes, 1.0)._replace(**changes))

    first = predict()
    assert first.shape == noisy.shape
    others = {
        "times": predict(times=times.flip(0)), "noisy": predict(noisy.flip(0)),
        "tokens": predict(prompts=PromptEmbeddings(prompts.tokens.flip(0), prompts.pooled)),
        "pooled": predict(prompts=PromptEmbeddings(prompts.tokens, known(prompts.pooled).flip(0))),
    }  # fmt: skip
    if sizes is not None:
        others["crop"] = predict(time_ids=sizes + torch.tensor([0.0, 0, 16, 0, 0, 0]))
    if name == "flux-dev":
        others["guidance"] = predict(guidance=4.0)
    same = [key for key, other in others.items() if torch.allclose(other, first, rtol=0, atol=1e-6)]
    assert same == []
    if name == "flux-schnell":
        torch.testing.assert_close(predict(guidance=4.0), first, rtol=0, atol=0)


def known(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None
    return value


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux-dev"])
def test_encoding_and_decoding_are_the_pipelines(bases: FamilyBases, name: str) -> None:
    pipeline = bases.ours(name)
    family, config = family_for(bases.ref(name)), pipeline.vae.config
    pictures = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = family.encode(pipeline, pictures)
        mean = pipeline.vae.encode(pictures).latent_dist.mode()
        torch.testing.assert_close(latents, (mean - (config.shift_factor or 0)) * config.scaling_factor)
        torch.testing.assert_close(
            family.decode(pipeline, latents), pipeline.vae.decode(mean).sample, rtol=1e-4, atol=1e-5
        )


def test_latents_are_normalised_channel_by_channel_where_the_autoencoder_says_so(tmp_path: Path) -> None:
    """As plain diffusers' SDXL pipelines do, to pictures and from pictures."""
    folder = save_sdxl(tmp_path / "playground")
    config = json.loads((folder / "vae" / "config.json").read_text())
    config |= {"latents_mean": [-1.6, 1.2, 0.4, -0.6], "latents_std": [8.4, 6.5, 3.2, 7.1], "scaling_factor": 0.5}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    ours, plain = load_pipeline(ModelRef(str(folder))), diffusers.DiffusionPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    sampler = sampler_of("sdxl", 1.0)
    _, images = sample_images(ours, embed_prompts(ours, PROMPTS[:1]), negative_prompt(ours), [7], sampler, 1)
    use_sampler(plain, sampler)
    seven = torch.Generator().manual_seed(7)
    drawn = plain(PROMPTS[0], num_inference_steps=3, guidance_scale=1.0, generator=seven, output_type="np").images
    assert np.abs(images - drawn * 255).max() <= 2.5
    pictures = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    again = diffusers.StableDiffusionXLImg2ImgPipeline(**plain.components)
    plain.vae.encode = lambda each, own=plain.vae.encode: _means(own(each))
    with torch.no_grad():
        found = family_for(ModelRef(str(folder))).encode(ours, pictures)
        wanted = again.prepare_latents(
            pictures, None, 1, 1, torch.float32, "cpu", torch.Generator().manual_seed(0), add_noise=False
        )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def _means(encoded: Any) -> Any:
    """The same, but a sample of it is its mean: what the shards keep."""
    encoded.latent_dist.std = torch.zeros_like(encoded.latent_dist.std)
    return encoded
