"""Imported preference rows as rows of our own shards: with latents and embeddings by the base model's encoders."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from data.human import Counts, HumanPair, decision, read_pair
from data.ids import image_uid, imported_pair_id, prompt_id
from data.preference_rows import Pairs, Side, preference_table
from data.schema import pair_schema

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from training.model.family import PromptEmbeddings

GROUP = 64
"""Rows whose decoded pictures are in memory at a time."""


class PairEncoder:
    """Encodes pictures and captions with the base model's own encoders.

    height, width: of the pictures. batch_size: pictures a forward pass. time_ids: whether the model takes them.
    """

    def __init__(self, pipeline: "DiffusionPipeline", height: int, width: int, batch_size: int, time_ids: bool) -> None:
        self.pipeline, self.height, self.width, self.batch_size = pipeline, height, width, batch_size
        self.time_ids = time_ids

    def schema(self, metadata: Mapping[str, Any]) -> pa.Schema:
        """Of the shards; metadata: their provenance, to which the shapes are added."""
        blank = np.zeros((1, self.height, self.width, 3), np.uint8)
        latent, prompt = self.latents(blank).shape[1:], self.embed([""])
        shapes = {"latent": {"shape": list(latent)}, "embedding": {"shape": list(prompt.tokens.shape[1:])}}
        pooled = None if prompt.pooled is None else prompt.pooled.shape[1]
        return pair_schema(
            math.prod(latent), prompt.tokens[0].numel(), [], {**metadata, **shapes}, pooled_size=pooled,
            time_ids=self.time_ids,
        )  # fmt: skip

    def embed(self, captions: Sequence[str]) -> "PromptEmbeddings":
        """One float16 row a caption, on the CPU."""
        from training.model.sampling import embed_prompts

        embedded: PromptEmbeddings = embed_prompts(self.pipeline, captions).to("cpu")
        return embedded

    def latents(self, pictures: np.ndarray) -> np.ndarray:
        """Float16 (n, C, h, w), in model space: the mode of the posterior. pictures: uint8 (n, H, W, 3).

        Raises FloatingPointError where they are not finite.
        """
        import torch

        from training.model.families import family_of

        parts = []
        with torch.no_grad():
            for start in range(0, len(pictures), self.batch_size):
                pixels = torch.from_numpy(pictures[start : start + self.batch_size]).permute(0, 3, 1, 2)
                encoded = family_of(self.pipeline).encode(self.pipeline, pixels.float() / 127.5 - 1)
                parts.append(encoded.to("cpu", torch.float16))
        latents: np.ndarray = torch.cat(parts).numpy()
        if not np.isfinite(latents).all():
            raise FloatingPointError(
                f"encoded pictures are not finite in {self.pipeline.vae.dtype}; use execution.dtype=float32"
            )
        return latents

    def batches(
        self, rows: Sequence[Mapping[str, Any]], first: int, limit: int, counts: Counts, schema: pa.Schema, config: str
    ) -> Iterator[pa.RecordBatch]:
        """The shard of these rows, at most `limit` pairs; counts what becomes of each row looked at.

        first: the place of the first row in the source. config: hash of the import, part of every pair's id.
        """
        verdicts = [decision(row) for row in rows]
        labelled = [row["caption"] for row, kind in zip(rows, verdicts, strict=True) if kind == "labelled"]
        distinct = dict.fromkeys(text for text in labelled if isinstance(text, str))
        captions = {text: place for place, text in enumerate(distinct)}
        embedded = self.embed(list(captions)) if captions else None
        for start in range(0, len(rows), GROUP):
            taken: list[HumanPair] = []
            for index in range(start, min(start + GROUP, len(rows))):
                if counts.pairs == limit:
                    break
                pair = self._judge(rows[index], first + index, verdicts[index], counts)
                taken += [pair] if pair else []
            if taken and embedded is not None:
                yield from self._table(taken, captions, embedded, schema, config).to_batches()

    def _judge(self, row: Mapping[str, Any], index: int, verdict: str, counts: Counts) -> HumanPair | None:
        counts.rows += 1
        pair = read_pair(row, index, self.height, self.width) if verdict == "labelled" else None
        reason = verdict if verdict != "labelled" else "pairs" if pair else "broken"
        setattr(counts, reason, getattr(counts, reason) + 1)
        return pair

    def _table(
        self,
        taken: Sequence[HumanPair],
        captions: Mapping[str, int],
        embedded: "PromptEmbeddings",
        schema: pa.Schema,
        config: str,
    ) -> pa.Table:
        """Rows of pairs; captions: the place of each in `embedded`."""
        own = [captions[pair.caption] for pair in taken]
        latents = self.latents(np.concatenate([np.stack([pair.pictures[side] for pair in taken]) for side in (0, 1)]))
        first, second = np.split(latents, 2)
        prompts = [prompt_id(pair.caption) for pair in taken]
        uids = [(image_uid(pair.files[0]), image_uid(pair.files[1])) for pair in taken]
        rows = zip(prompts, taken, uids, strict=True)
        pairs = Pairs(
            ids=[imported_pair_id(prompt, pair.row, files, config) for prompt, pair, files in rows],
            prompt_ids=prompts,
            captions=[pair.caption for pair in taken],
            sides=(_side(taken, 0, first, uids), _side(taken, 1, second, uids)),
            label_0=[pair.label_0 for pair in taken],
            config_hashes=[config] * len(taken),
            prompt_embeddings=embedded.tokens[own].numpy(),
            pooled_embeddings=None if embedded.pooled is None else embedded.pooled[own].numpy(),
        )
        return preference_table(pairs, schema)


def _side(taken: Sequence[HumanPair], side: int, latents: np.ndarray, uids: Sequence[tuple[str, str]]) -> Side:
    """The pictures on one side; uids: of both sides, a pair each."""
    return Side(
        images=[pair.files[side] for pair in taken],
        uids=[both[side] for both in uids],
        latents=latents,
        seeds=[-1] * len(taken),
        models=[pair.models[side] for pair in taken],
        time_ids=[pair.time_ids[side] for pair in taken],
    )
