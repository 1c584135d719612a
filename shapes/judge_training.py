"""Trains the judges: `python -m shapes.judge_training JUDGE STAGE`.

Stage `clean` learns the rendered world; `unfinished` and `finished` continue on pictures of the base model in
the making and as shipped, mixed with rendered ones. Three terms: a regression of the whole picture-by-caption
matrix of oracle fractions, PickScore's pairwise term within each group, and an attribute head that is thrown
away.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from shapes.judge_data import (
    GROUP,
    Batch,
    Pool,
    attributes,
    draw,
    merged,
    oracle_matrix,
    rendered_pool,
    restored,
)
from shapes.oracle import Facts, check, claims, fraction
from shapes.prompts import read_set, training_scenes
from shapes.scorers import EMBEDDING, JUDGES, Judge, score
from shapes.stage import BUILD, average, begin, done, flat_then_linear, load_tensors, save_tensors, set_rate
from shapes.world import Scene, parse

GROUPS = 24  # a step: 24 captions with 4 pictures each
SEEDS = {"pickscore": 11, "hpsv2": 12}


@dataclass(frozen=True)
class Stage:
    """One learning-rate schedule; `after` = the stage it continues, `pictures` = generation settings."""

    steps: int
    rate: float
    share: float  # of a step's captions come with generated pictures, the others with rendered ones
    seed: int
    rendered: int = 5000  # groups
    canonical: bool = True  # captions tell their scene from the left or from the top only
    after: str | None = None
    pictures: tuple[str, ...] = ()


UNFINISHED = ("early", "middle", "first-round")
STAGES = {
    "clean": Stage(900, 1e-3, 0.0, 0, canonical=False),
    "unfinished": Stage(800, 8e-4, 0.6, 100, canonical=False, after="clean", pictures=UNFINISHED),
    "retold": Stage(800, 8e-4, 0.4, 150, after="unfinished", pictures=UNFINISHED),
    "finished": Stage(
        steps=450,
        rate=6e-4,
        share=0.8,
        seed=200,
        rendered=1500,
        after="retold",
        pictures=(*UNFINISHED, "half-way", "default", "few-steps", "guided", "ddim"),
    ),
}


class AttributeHead(nn.Module):
    """One linear layer that reads a scene's attributes from a picture's or a caption's embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(EMBEDDING, 6 * 5 + 6 * 3 + 3 + 72)
        self.scale, self.shift = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))

    def loss(self, embedding: Tensor, truth: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy over the attributes of (n, 128) embeddings."""
        shape, size, background, order = self.read(embedding).split([30, 18, 3, 72], dim=1)
        known = truth["order"].flatten(1) >= 0
        return (
            F.cross_entropy(shape.reshape(-1, 5), truth["shape"].flatten())
            + F.cross_entropy(size.reshape(-1, 3), truth["size"].flatten())
            + 0.3 * F.cross_entropy(background, truth["background"])
            + F.binary_cross_entropy_with_logits(order[known], truth["order"].flatten(1)[known])
        )


def pair_loss(scores: Tensor, truth: Tensor) -> Tensor:
    """-log sigmoid of the score gap over all pairs of a group that the oracle ranks; both (groups, GROUP)."""
    better = truth[:, :, None] > truth[:, None, :] + 1e-4
    gap = scores[:, :, None] - scores[:, None, :]
    return F.softplus(-gap)[better].mean()


def losses(judge: Judge, head: AttributeHead, batch: Batch, ids: dict[Scene, Tensor]) -> dict[str, Tensor]:
    """The three terms of one step."""
    scenes, images, facts = batch
    pictures, texts = judge.image(images), judge.text(torch.stack([ids[scene] for scene in scenes]))
    truth = oracle_matrix(facts, scenes)  # (n, m)
    cosine = F.normalize(pictures, dim=-1) @ F.normalize(texts, dim=-1).T
    own = torch.arange(len(scenes)).repeat_interleave(GROUP)
    mine, mine_truth = cosine.gather(1, own[:, None])[:, 0], truth.gather(1, own[:, None])[:, 0]
    guess = head.scale.exp() * cosine + head.shift
    said = attributes(facts)
    faithful = mine_truth == 1  # such a picture shows exactly what its caption says
    caption_side = {key: value[faithful] for key, value in said.items()}
    reading = head.loss(pictures, said)
    if faithful.any():
        reading = reading + head.loss(texts[own[faithful]], caption_side)
    return {
        "matrix": (guess - truth).square().mean(),
        "pair": pair_loss((mine * judge.log_scale.exp()).view(-1, GROUP), mine_truth.view(-1, GROUP)),
        "reading": reading,
    }


@torch.no_grad()
def agreement(judge: Judge, pool: Pool) -> tuple[float, int]:
    """Accuracy within groups over the pairs that the oracle ranks (ties of the judge count half); pairs."""
    captions = [scene.caption() for scene in pool.scenes for _ in range(GROUP)]
    guess = score(judge, pool.images.float() / 255, captions).view(-1, GROUP)
    truth = fraction(*check(pool.facts, claims([parse(caption) for caption in captions]))).view(-1, GROUP)
    better = truth[:, :, None] > truth[:, None, :] + 1e-4
    gap = guess[:, :, None] - guess[:, None, :]
    right = (gap > 0).float() + 0.5 * (gap == 0).float()
    return right[better].mean().item(), int(better.sum())


def generated_pool(names: Sequence[str]) -> Pool:
    """One pool of the pictures of some generation settings."""
    pools = []
    for name in names:
        captions = (BUILD / f"generated-{name}.txt").read_text().splitlines()
        pools.append(restored([parse(text) for text in captions], load_tensors(f"generated-{name}.safetensors")))
    return merged(pools)


def join(first: Batch, second: Batch) -> Batch:
    """One batch of two."""
    pairs = [(getattr(first[2], name), getattr(second[2], name)) for name in Facts.__annotations__]
    return first[0] + second[0], torch.cat([first[1], second[1]]), Facts(*map(torch.cat, pairs))


def retold(pool: Pool) -> Pool:
    """The same pictures, each caption told from the left or from the top."""
    return Pool([scene.canonical() for scene in pool.scenes], pool.images, pool.facts)


def rendered_scenes(count: int, random: Random) -> list[Scene]:
    """The captions of the rendered groups; one in eight describes one thing."""
    single, double = training_scenes()
    return [random.choice(single if random.random() < 0.12 else double) for _ in range(count)]


def checks_of(random: Random) -> dict[str, Pool]:
    """Validation pools, on tuning prompts only: rendered and, once there, generated by the finished base."""
    pools = {"clean": rendered_pool([parse(text) for text in read_set("tuning")], random)}
    if done("generated-tuning.safetensors"):
        pools["generated"] = generated_pool(["tuning"])
    return pools


def train(name: str, stage_name: str) -> None:
    """Runs one stage of one judge and writes its averaged weights."""
    stage = STAGES[stage_name]
    random = begin(SEEDS[name] + stage.seed)
    generator = torch.Generator().manual_seed(SEEDS[name] + stage.seed)
    judge, head = JUDGES[name](), AttributeHead()
    if stage.after:
        judge.load_state_dict(load_tensors(f"{name}-{stage.after}.safetensors"))
        head.load_state_dict(load_tensors(f"{name}-{stage.after}-head.safetensors"))
    rendered = rendered_pool(rendered_scenes(stage.rendered, random), random)
    generated = generated_pool(stage.pictures) if stage.pictures else None
    if stage.canonical:
        rendered, generated = retold(rendered), generated and retold(generated)
    checks = checks_of(random)
    known = list(dict.fromkeys(rendered.scenes + (generated.scenes if generated else [])))
    ids = dict(zip(known, judge.token_ids([scene.caption() for scene in known]), strict=True))
    optimizer = torch.optim.AdamW([*judge.parameters(), *head.parameters()], stage.rate, weight_decay=0.05)
    shadow = {key: value.clone() for key, value in judge.state_dict().items()}
    share = round(GROUPS * stage.share)
    bar = tqdm(range(stage.steps), desc=f"{name} {stage_name}", mininterval=10)
    for step in bar:
        set_rate(optimizer, stage.rate * flat_then_linear(step, stage.steps, warmup=100, flat=0.3))
        batch = draw(rendered, GROUPS - share, generator)
        if generated is not None:
            batch = join(draw(generated, share, generator), batch)
        terms = losses(judge, head, batch, ids)
        reading = 0.5 * max(0.1, 1 - step / (0.7 * stage.steps))  # the head leads only at first
        loss = 10 * terms["matrix"] + terms["pair"] + reading * terms["reading"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        average(shadow, judge, step, limit=0.99)
        if step % 100 == 0:
            tqdm.write(f"{step} { {key: round(value.item(), 3) for key, value in terms.items()} }")
    judge.load_state_dict(shadow)
    judge.eval()
    tqdm.write(f"final { {key: agreement(judge, pool) for key, pool in checks.items()} }")
    save_tensors(head.state_dict(), f"{name}-{stage_name}-head.safetensors")
    save_tensors(judge.state_dict(), f"{name}-{stage_name}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("judge", choices=tuple(JUDGES))
    parser.add_argument("stage", choices=tuple(STAGES))
    given = parser.parse_args()
    if not done(f"{given.judge}-{given.stage}.safetensors"):
        train(given.judge, given.stage)


if __name__ == "__main__":
    main()
