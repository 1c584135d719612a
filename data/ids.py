"""The stable names of things: prompts, candidates, pairs, pictures and seeds, each a hash of what it is."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence


def canonical_json(value: object) -> str:
    """One text per value, whatever the order in which its keys were inserted."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def json_sha256(value: object) -> str:
    """64 hex digits over a JSON value, whatever the order of its keys."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def prompt_id(prompt: str) -> str:
    """16 hex digits that identify a prompt; composed and decomposed accents give the same id."""
    text = unicodedata.normalize("NFC", prompt).strip()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def candidate_id(prompt_id: str, seed: int, model: str, config_hash: str) -> str:
    """32 hex digits that identify an image before it exists, so that a rerun can recognise it."""
    key = {"prompt_id": prompt_id, "seed": int(seed), "model": model, "config_hash": config_hash}
    return json_sha256(key)[:32]


def pair_id(prompt_id: str, seed_0: int, seed_1: int, model_0: str, model_1: str, config_hash: str) -> str:
    """32 hex digits that identify a pair; the two orders of the same images are two ids."""
    key = {"prompt_id": prompt_id, "seed_0": int(seed_0), "seed_1": int(seed_1)}
    return json_sha256(key | {"model_0": model_0, "model_1": model_1, "config_hash": config_hash})[:32]


def imported_pair_id(prompt_id: str, row: int, image_uids: Sequence[str], config_hash: str) -> str:
    """32 hex digits that identify a pair of pictures that people compared.

    The same pictures may have been compared twice, and none has a seed: the row of the source tells pairs apart.
    """
    return json_sha256([config_hash, row, prompt_id, *image_uids])[:32]


def image_uid(data: bytes) -> str:
    """sha256 of the encoded image: identity, deduplication and the integrity of a row in one."""
    return hashlib.sha256(data).hexdigest()


def seed_for(cycle_seed: int, prompt_id: str, index: int) -> int:
    """The seed of candidate `index` of a prompt, in [0, 2**63): it depends on no batch, shard or device."""
    digest = hashlib.sha256(canonical_json([int(cycle_seed), prompt_id, int(index)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits fit an Arrow int64 and a torch generator


def scorer_slug(scorer: str) -> str:
    """A scorer's name as part of a column or file name: `My.pkg:Judge` becomes `my_pkg_judge`."""
    return re.sub(r"[^a-z0-9_]", "_", scorer.lower())


def score_column(scorer: str, side: int) -> str:
    """The column that holds the raw score of one side, in the scorer's own unit."""
    return f"score_{scorer_slug(scorer)}_{side}"
