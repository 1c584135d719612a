"""Trains the judges.

`python -m shapes.judge_training pickscore clean` learns the clean world; `... pickscore generated` continues on
pictures of the base model mixed with clean ones. Three terms: a regression of the whole picture-by-caption matrix of
oracle fractions, PickScore's pairwise term within each group, and an attribute head that is thrown away afterwards.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from shapes.judge_data import GROUP, Pool, attributes, draw, oracle_matrix, pool_of, rendered_pool
from shapes.prompts import read_set, training_scenes
from shapes.scorers import EMBEDDING, JUDGES, Judge, score
from shapes.stage import BUILD, average, begin, done, flat_then_linear, load_tensors, save_tensors, set_rate
from shapes.world import Scene, parse

GROUPS = 24  # a step: 24 captions with 4 pictures each
STEPS = {"clean": 900, "generated": 1500}
RATE = {"clean": 1.0e-3, "generated": 8e-4}
SEEDS = {"pickscore": 11, "hpsv2": 12}
RENDERED_GROUPS = 5000
GENERATED_SHARE = 0.7  # of the captions of a step, once generated pictures exist


class AttributeHead(nn.Module):
    """One linear layer that reads a scene's attributes from an embedding, the picture's and the caption's alike."""

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


def losses(judge: Judge, head: AttributeHead, batch: tuple, ids: dict[Scene, Tensor]) -> dict[str, Tensor]:
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
    """Pairwise accuracy within groups over the pairs that the oracle ranks, ties of the judge counted half; pairs."""
    captions = [scene.caption() for scene in pool.scenes for _ in range(GROUP)]
    guess = score(judge, pool.images.float() / 255, captions).view(-1, GROUP)
    from shapes.oracle import check, claims, fraction

    truth = fraction(*check(pool.facts, claims([parse(caption) for caption in captions]))).view(-1, GROUP)
    better = truth[:, :, None] > truth[:, None, :] + 1e-4
    gap = guess[:, :, None] - guess[:, None, :]
    right = (gap > 0).float() + 0.5 * (gap == 0).float()
    return right[better].mean().item(), int(better.sum())


def generated_pools() -> tuple[list[Pool], Pool | None]:
    """Training pools (one a generation setting) and the validation pool on tuning prompts, as far as they exist."""
    pools, check_pool = [], None
    for path in sorted(BUILD.glob("generated-*.safetensors")):
        stored = load_tensors(path.name)
        captions = (BUILD / path.name.replace(".safetensors", ".txt")).read_text().splitlines()
        pool = pool_of([parse(caption) for caption in captions], stored["images"].float() / 255)
        if "tuning" in path.name:
            check_pool = pool
        else:
            pools.append(pool)
    return pools, check_pool


def merge(pools: list[Pool]) -> Pool:
    """One pool of all groups."""
    facts = type(pools[0].facts)
    joined = facts(*(torch.cat([getattr(p.facts, name) for p in pools]) for name in facts.__annotations__))
    return Pool([scene for p in pools for scene in p.scenes], torch.cat([p.images for p in pools]), joined)


def join(first: tuple, second: tuple) -> tuple:
    """One batch of two."""
    facts = type(first[2])
    rows = facts(
        *(torch.cat([getattr(b[2], name) for b in (first, second)]) for name in facts.__annotations__)
    )
    return first[0] + second[0], torch.cat([first[1], second[1]]), rows


def train(name: str, stage: str, steps: int) -> None:
    """Runs one stage of one judge and writes its averaged weights."""
    random = begin(SEEDS[name] + 100 * (stage == "generated"))
    generator = torch.Generator().manual_seed(SEEDS[name])
    judge, head = JUDGES[name](), AttributeHead()
    single, double = training_scenes()
    scenes = [random.choice(single if random.random() < 0.12 else double) for _ in range(RENDERED_GROUPS)]
    rendered = rendered_pool(scenes, random)
    tuning = [parse(text) for text in read_set("tuning")]
    checks = {"clean": rendered_pool(tuning, random)}
    generated = None
    if stage == "generated":
        judge.load_state_dict(load_tensors(f"{name}-clean.safetensors"))
        head.load_state_dict(load_tensors(f"{name}-clean-head.safetensors"))
        pools, check_pool = generated_pools()
        generated = merge(pools)
        if check_pool is not None:
            checks["generated"] = check_pool
    known = list(dict.fromkeys(rendered.scenes + (generated.scenes if generated else [])))
    ids = dict(zip(known, judge.token_ids([scene.caption() for scene in known]), strict=True))
    optimizer = torch.optim.AdamW([*judge.parameters(), *head.parameters()], RATE[stage], weight_decay=0.05)
    shadow = {key: value.clone() for key, value in judge.state_dict().items()}
    bar = tqdm(range(steps), desc=f"{name} {stage}", mininterval=10)
    for step in bar:
        set_rate(optimizer, RATE[stage] * flat_then_linear(step, steps, warmup=100, flat=0.3))
        if generated is None:
            batch = draw(rendered, GROUPS, generator)
        else:
            share = round(GROUPS * GENERATED_SHARE)
            batch = join(draw(generated, share, generator), draw(rendered, GROUPS - share, generator))
        terms = losses(judge, head, batch, ids)
        reading = 0.5 * max(
            0.1, 1 - step / (0.7 * steps)
        )  # the head leads first, the score itself decides later
        loss = 10 * terms["matrix"] + terms["pair"] + reading * terms["reading"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        average(shadow, judge, step, limit=0.99)
        if step % 100 == 0 or step == steps - 1:
            results = (
                {key: agreement(judge.eval(), pool) for key, pool in checks.items()}
                if step % 200 == 0
                else {}
            )
            judge.train()
            shown = {key: f"{value.item():.3f}" for key, value in terms.items()}
            tqdm.write(f"{step} {shown} {results}")
    judge.load_state_dict(shadow)
    tqdm.write(f"final { ({key: agreement(judge.eval(), pool) for key, pool in checks.items()}) }")
    save_tensors(head.state_dict(), f"{name}-{stage}-head.safetensors")
    save_tensors(judge.state_dict(), f"{name}-{stage}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("judge", choices=tuple(JUDGES))
    parser.add_argument("stage", choices=tuple(STEPS))
    parser.add_argument("--steps", type=int, help="default: the schedule of the shipped models")
    given = parser.parse_args()
    if not done(f"{given.judge}-{given.stage}.safetensors"):
        train(given.judge, given.stage, given.steps or STEPS[given.stage])


if __name__ == "__main__":
    main()
