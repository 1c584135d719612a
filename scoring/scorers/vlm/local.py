"""A vision-language model in this process, by transformers: any that AutoModelForImageTextToText knows.

Greedy decoding whatever the model's own generation settings are. Importing this module does not load torch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.hub import is_hub_id
from scoring.scorers.scorer import ScoringError
from scoring.scorers.sources import contents_digest, first_file, local_copy
from scoring.scorers.vlm.model import CONFIG, NAME, PROCESSORS, WEIGHTS, Answer, Identity, Parts, picture

log = logging.getLogger(__name__)

SETTINGS, CODE, TENSORS = ("*.json", "*.jinja", "*.txt", "*.model"), ("*.py",), ("*.safetensors",)
# Penalties on repeated tokens may count the padding as said before, so that an answer depends on its batch mates.
GREEDY = {
    "do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None,
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
}  # fmt: skip


class LocalModel:
    """A model from a folder or a hub id, in float32 on the CPU, on CUDA in the precision of its checkpoint.

    That is bfloat16 for most; float16 would overflow in many of them. Rounding can tip a near tie between two
    tokens, and depends on the shapes of a batch: in float32 answers are those of single questions up to such
    ties, in bfloat16 only mostly. `batch_size=1` excludes it.
    """

    def __init__(
        self,
        name: str,
        revision: str | None,
        device: str,
        batch_size: int,
        max_tokens: int,
        max_side: int | None,
        remote_code: bool,
    ) -> None:
        """See `VisionLanguageJudge`. Fetches the files of a hub id and loads nothing."""
        if remote_code:
            log.warning("scorer %r: remote_code=true, RUNNING PYTHON CODE THAT COMES WITH THE MODEL %s", NAME, name)
        patterns = (*SETTINGS, *TENSORS, *(CODE if remote_code else ()))
        found = local_copy(name, revision, patterns, NAME)
        for names in (CONFIG, WEIGHTS, PROCESSORS):
            first_file(found.folder, names, NAME)
        self._dtype = "auto" if device.startswith("cuda") else "float32"
        self.identity = Identity(
            name if is_hub_id(name) else found.folder.resolve().name, found.origin, found.revision,
            weights=contents_digest(_files(found.folder, TENSORS)), facts={"dtype": self._dtype},
            files=_files(found.folder, patterns),
        )  # fmt: skip
        self._folder, self._device, self._remote_code = found.folder, device, remote_code
        self.at_once, self._max_tokens, self._max_side = batch_size, max_tokens, max_side
        self._model: Any = None

    def open(self) -> None:
        """Raises ScoringError for what is no vision-language model, and for weights that do not load or fit."""
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText, AutoProcessor

        options: dict[str, Any] = {"trust_remote_code": self._remote_code, "local_files_only": True}
        reading = {"dtype": self._dtype, "use_safetensors": True, "output_loading_info": True}
        try:
            self._processor: Any = AutoProcessor.from_pretrained(self._folder, **options)
            model, report = AutoModelForImageTextToText.from_pretrained(self._folder, **options, **reading)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise ScoringError(f"scorer {NAME!r}: {self._folder} does not load: {error}") from error
        # transformers fills what a checkpoint lacks with random numbers, and goes on.
        if missing := sorted(report["missing_keys"]):
            raise ScoringError(f"{self._folder}: {len(missing)} tensors are missing, first {missing[0]}")
        self._model = model.to(self._device).eval()
        self._prepare_processor()

    def close(self) -> None:
        import torch

        self._model = self._processor = None
        if torch.device(self._device).type == "cuda":
            torch.cuda.empty_cache()

    def ask(self, questions: Sequence[Parts]) -> list[Answer]:
        """`at_once` at a time, halved for good when the memory does not suffice."""
        import torch

        answers: list[Answer] = []
        while len(answers) < len(questions):
            try:
                answers += self._generated(questions[len(answers) : len(answers) + self.at_once])
            except torch.OutOfMemoryError:
                if self.at_once == 1:
                    raise
                self.at_once //= 2
                log.warning("%s: out of memory, going on with %d at once", NAME, self.at_once)
                torch.cuda.empty_cache()
        return answers

    def _prepare_processor(self) -> None:
        if not getattr(self._processor, "chat_template", None) or not hasattr(self._processor, "image_processor"):
            raise ScoringError(f"scorer {NAME!r}: {self._folder} has no chat template, or no image processor")
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"  # what is generated has to follow the question at once
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        own = [getattr(self._processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._control = sorted({token for token in (*own, *special) if token}, key=len, reverse=True)
        ends = self._model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends: list[int] = ends if isinstance(ends, list) else [ends]

    def _inputs(self, questions: Sequence[Parts]) -> Any:
        """Tokens, masks and pixels of the questions, padded on the left."""
        talks = [[{"role": "user", "content": [self._content(part) for part in parts]}] for parts in questions]
        return self._processor.apply_chat_template(
            talks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self._device, dtype=self._model.dtype)  # fmt: skip

    def _generated(self, questions: Sequence[Parts]) -> list[Answer]:
        import torch

        inputs, pad = self._inputs(questions), self._processor.tokenizer.pad_token_id
        ends = {"max_new_tokens": self._max_tokens, "eos_token_id": self._ends, "pad_token_id": pad}
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, **GREEDY, **ends)[:, inputs["input_ids"].shape[1] :]
        done = torch.isin(tokens.cpu(), torch.tensor(self._ends)).any(1).tolist()
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [Answer(text, cut=not finished) for text, finished in zip(texts, done, strict=True)]

    def _content(self, part: str | np.ndarray) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": self._harmless(part)}
        return {"type": "image", "image": picture(part, self._max_side)}

    def _harmless(self, text: str) -> str:
        """Text with a blank in each control token: "<image>" in a prompt would be taken for a further picture."""
        for token in self._control:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})
