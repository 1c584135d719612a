"""A CLIP tokenizer cut down to the words of the world: the same ids in transformers and in open_clip.

CLIP's byte pairs are replayed on the vocabulary and only the merges that were used are kept (in their
order), so the words split exactly as in CLIP. Any other text still has ids, letter by letter.
"""

import gzip
import itertools
from pathlib import Path

from transformers import CLIPTokenizer

from shapes.world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES

CONTEXT = 20  # tokens, start and end included; the longest caption has 19
OPEN_CLIP_FILE = "bpe_simple_vocab.txt.gz"


def words() -> list[str]:
    """Every word of the grammar, each once."""
    text = " ".join(["a on background", *SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, *RELATIONS])
    return sorted(set(text.split()))


def _merges_used(word: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    parts, used = [*word[:-1], word[-1] + "</w>"], set()
    while len(parts) > 1:
        pair = min(itertools.pairwise(parts), key=lambda p: ranks.get(p, len(ranks)))
        if pair not in ranks:
            break
        used.add(pair)
        joined, position = [], 0
        while position < len(parts):
            take = 2 if tuple(parts[position : position + 2]) == pair else 1
            joined.append("".join(parts[position : position + take]))
            position += take
        parts = joined
    return used


def kept_merges() -> list[tuple[str, str]]:
    """CLIP's merges that the world's words need, in CLIP's order."""
    from open_clip.tokenizer import SimpleTokenizer

    ranks = SimpleTokenizer().bpe_ranks
    used = set().union(*(_merges_used(word, ranks) for word in words()))
    return sorted(used, key=ranks.__getitem__)


def write_open_clip(folder: Path) -> None:
    """Writes open_clip's merges file; time stamp zero, so that equal content gives equal bytes."""
    lines = ["# merges of CLIP's byte-pair vocabulary that the shapes world needs"]
    lines += [" ".join(pair) for pair in kept_merges()]
    (folder / OPEN_CLIP_FILE).write_bytes(gzip.compress("\n".join(lines).encode("utf-8"), mtime=0))


def build_tokenizer() -> CLIPTokenizer:
    """The transformers tokenizer: 512 byte tokens, the kept merges, start and end (= padding)."""
    from open_clip.tokenizer import bytes_to_unicode

    merges = kept_merges()
    letters = list(bytes_to_unicode().values())
    entries = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={entry: index for index, entry in enumerate(entries)}, merges=merges, model_max_length=CONTEXT
    )


def vocabulary() -> dict[str, int]:
    """What model configurations need: vocabulary size and special ids (padding equals the end token)."""
    size = 512 + len(kept_merges()) + 2
    return {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
