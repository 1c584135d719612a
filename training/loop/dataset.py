"""Preference pairs as the trainer reads them: memory-mapped latents and prompt embeddings.

Which pair comes at which position is a pure function of the seed, so a resumed run, another micro-batch size or
another number of processes sees the same pairs in the same order.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from data.columns import latents, trainable
from data.manifest import read_manifest
from data.schema import read_metadata
from data.shards import ShardError, open_shard
from training.model.family import TIME_IDS, PromptEmbeddings

Place = tuple[int, int]
"""Epoch and index of a pair."""
COLUMNS = ("latent_0", "latent_1", "prompt_embedding", "pooled_embedding")


class PairBatch(NamedTuple):
    """winner, loser: latents (pairs, C, h, w) float32. prompts: embeddings, float32. time_ids: (pairs, 2, 6) of winner
    and loser, None where the shards do not tell them.

    soft_label: P(labelled winner is preferred), (pairs,) float32. margin: the scorer's, over the mean margin of all
    trainable pairs, (pairs,) float32. Both NaN where not known. draws: for each pair its id and how often the data set
    was passed before (the key of its noise). indices: the pairs' places among all. captions: of their prompts.
    """

    winner: torch.Tensor
    loser: torch.Tensor
    prompts: PromptEmbeddings
    time_ids: torch.Tensor | None
    soft_label: torch.Tensor
    margin: torch.Tensor
    draws: list[tuple[str, int]]
    indices: list[int]
    captions: list[str]


class _Row(NamedTuple):
    batch: int
    row: int
    winner: int
    pair_id: str
    prompt_id: str
    soft_label: float
    margin: float


class PreferencePairs:
    """The trainable pairs of a sealed preference folder (label 0 or 1, images differ), by position.

    heldout_share: the pairs of about this share of prompts come last and do not count as part of it; they are read at
    the positions after its length. Which prompts these are depends on nothing but the prompt.
    Raises ShardError when the folder has no manifest, no trainable pair, or no prompt embeddings.
    """

    def __init__(self, folder: Path, heldout_share: float = 0.0) -> None:
        manifest = read_manifest(folder)
        batches = [batch for shard in manifest.shards for batch in _mapped_batches(folder / shard.file)]
        self._rows = [row for index, batch in enumerate(batches) for row in _trainable_rows(index, batch)]
        if not self._rows:
            raise ShardError(f"{folder}: no trainable pair: all are tied, unlabelled or of identical images")
        self._rows.sort(key=lambda row: _held_out(row.prompt_id, heldout_share))  # stable: else as in the shards
        self.heldout = sum(_held_out(row.prompt_id, heldout_share) for row in self._rows)
        if self.heldout == len(self._rows):
            raise ShardError(
                f"training.heldout_share={heldout_share}: holds back {self.heldout} of the {len(self._rows)} pairs in "
                f"{folder}; change it, or use 0"
            )
        schema = open_shard(folder / manifest.shards[0].file).schema
        if "prompt_embedding" not in schema.names:
            raise ShardError(f"{folder}: no column prompt_embedding; the trainer reads embeddings from the shards")
        metadata = read_metadata(schema)
        self.latent_shape = tuple(metadata["latent"]["shape"])
        self.embedding_shape = tuple(metadata["embedding"]["shape"])
        self._mean_margin = float(np.mean([row.margin for row in self._rows]))
        self._folder = folder
        there = [name for name in COLUMNS if name in schema.names]
        self._columns = {name: [latents(batch.column(name)) for batch in batches] for name in there}
        self._captions = [batch.column("caption") for batch in batches]
        self._time_ids = None
        if "time_ids_0" in schema.names:
            self._time_ids = [[_time_ids(batch, side) for side in (0, 1)] for batch in batches]

    def __len__(self) -> int:
        return len(self._rows) - self.heldout

    @property
    def pooled_width(self) -> int | None:
        """Of the pooled text embedding; None when the shards have none."""
        return self._columns["pooled_embedding"][0].shape[1] if "pooled_embedding" in self._columns else None

    def require_soft_labels(self) -> None:
        """Raises ShardError unless every pair has a soft label."""
        self._require("training.soft_labels=true", "soft label", [row.soft_label for row in self._rows])

    def require_margins(self) -> None:
        """Raises ShardError unless every pair has a margin and their mean is positive."""
        asks = "training.margin_offset and training.margin_weights"
        self._require(asks, "margin", [row.margin for row in self._rows])
        if not self._mean_margin > 0:
            raise ShardError(f"{self._folder}: the mean margin is {self._mean_margin}; {asks} need a positive one")

    def _require(self, asks: str, name: str, values: list[float]) -> None:
        if missing := int(np.isnan(values).sum()):
            raise ShardError(f"{self._folder}: {missing} of {len(values)} pairs have no {name}, which {asks} needs")

    def read(self, positions: Sequence[tuple[int, int]]) -> PairBatch:
        """The pairs at (epoch, index) positions."""
        rows = [self._rows[index] for _, index in positions]
        both = [[self._columns[f"latent_{side}"][row.batch][row.row] for side in (row.winner, 1 - row.winner)]
                   for row in rows]  # fmt: skip
        stacked = torch.from_numpy(np.asarray(both, np.float32)).view(len(rows), 2, *self.latent_shape)
        tokens = self._vectors("prompt_embedding", rows).view(len(rows), *self.embedding_shape)
        pooled = self._vectors("pooled_embedding", rows) if self.pooled_width else None
        return PairBatch(
            winner=stacked[:, 0],
            loser=stacked[:, 1],
            prompts=PromptEmbeddings(tokens, pooled),
            time_ids=self._sizes(rows),
            soft_label=torch.tensor([row.soft_label for row in rows]),
            margin=torch.tensor([row.margin for row in rows]) / self._mean_margin,
            draws=[(row.pair_id, epoch) for row, (epoch, _) in zip(rows, positions, strict=True)],
            indices=[index for _, index in positions],
            captions=[self._captions[row.batch][row.row].as_py() for row in rows],
        )

    def _vectors(self, column: str, rows: Sequence[_Row]) -> torch.Tensor:
        return torch.from_numpy(np.asarray([self._columns[column][row.batch][row.row] for row in rows], np.float32))

    def _sizes(self, rows: Sequence[_Row]) -> torch.Tensor | None:
        """(rows, 2, 6): the winner's, then the loser's."""
        if self._time_ids is None:
            return None
        sides = [[self._time_ids[row.batch][side][row.row] for side in (row.winner, 1 - row.winner)] for row in rows]
        return torch.from_numpy(np.asarray(sides, np.float32))


def _mapped_batches(path: Path) -> list[pa.RecordBatch]:
    """One shard's. The mapping outlives the reader, and with it the open file: systems allow about a thousand."""
    reader = open_shard(path)
    return [reader.get_batch(index) for index in range(reader.num_record_batches)]


def _time_ids(batch: pa.RecordBatch, side: int) -> np.ndarray:
    return np.asarray(batch.column(f"time_ids_{side}").flatten()).reshape(-1, TIME_IDS)


def _held_out(prompt_id: str, share: float) -> bool:
    digest = hashlib.sha256(f"held-out:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _trainable_rows(index: int, batch: pa.RecordBatch) -> list[_Row]:
    mask = trainable(pa.Table.from_batches([batch])).to_pylist()
    winners = pc.cast(pc.equal(batch.column("label_1"), 1.0), pa.int8()).to_pylist()
    ids, prompts = batch.column("pair_id").to_pylist(), batch.column("prompt_id").to_pylist()
    margins = _numbers(batch, "margin")
    sure = [_numbers(batch, f"soft_label_{side}") for side in (0, 1)]
    return [
        _Row(index, row, winners[row], ids[row], prompts[row], sure[winners[row]][row], margins[row])
        for row, keep in enumerate(mask)
        if keep
    ]


def _numbers(batch: pa.RecordBatch, name: str) -> list[float]:
    """A column's values, NaN for null and for a column that is not there (soft labels before schema 1.1)."""
    if name not in batch.schema.names:
        return [math.nan] * batch.num_rows
    return [math.nan if value is None else value for value in batch.column(name).to_pylist()]


def positions_of_step(step: int, batch_size: int, pairs: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, index) of each pair of one optimizer step; every epoch is a fresh permutation of all pairs."""
    positions = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(place, pairs)
        positions.append((epoch, int(_permutation(seed, epoch, pairs)[offset])))
    return positions


@lru_cache(maxsize=2)  # of two epochs where a step crosses from one to the next
def _permutation(seed: int, epoch: int, pairs: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(pairs)


def share_of(places: Sequence[Place], process: int, processes: int) -> tuple[list[Place], int]:
    """What one of several processes reads of some places (at least one), and how many of it count, the first ones.

    All read equally many, some of them places that count elsewhere: where processes meet in each forward pass, one more
    would wait for ever.
    """
    own = list(places[process::processes])
    return [*own, *places[: -(-len(places) // processes) - len(own)]], len(own)
