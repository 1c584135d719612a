"""A vision-language model behind a server with OpenAI's chat completions (vLLM, SGLang, llama.cpp, a paid service).

One request a question, so an answer cannot depend on others. Pictures travel as PNG, which loses nothing.
"""

from __future__ import annotations

import base64
import io
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from scoring.scorers.scorer import ScoringError
from scoring.scorers.sources import fingerprint
from scoring.scorers.vlm.model import NAME, Answer, Identity, Parts, picture

TRIES = 5
"""How often a request is sent that fails in a way that passes: no connection, no time left, 429, 5xx."""
BACKOFF, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the second try, doubled before each further one; no wait is longer, whatever a server asks for."""
FIRST_TRIES, FIRST_TIMEOUT = 3, 10.0
"""For the first contact, which is there to fail early."""
SHORTEST_SECRET = 8
"""Characters of a key from which on it is cut out of answers and messages."""


class Endpoint:
    """A model at a URL. The key is read when the connection is opened, and cut out of whatever is reported."""

    def __init__(
        self,
        url: str,
        model: str,
        api_key_env: str,
        parallel: int,
        timeout: float,
        max_tokens: int,
        max_side: int | None,
    ) -> None:
        """See `VisionLanguageJudge`. Contacts nobody."""
        self.at_once = 16 * parallel  # so many that waiting for the last one of a call is rare
        facts = {"endpoint": url, "model": model}
        self.identity = Identity(model, f"{model} at {url}", None, fingerprint([], model=model), facts)
        self._url, self._model, self._key_name, self._key = url, model, api_key_env, ""
        self._parallel, self._timeout = parallel, timeout
        self._max_tokens, self._max_side = max_tokens, max_side

    def open(self) -> None:
        """Raises ScoringError when nobody answers at the URL, or the key cannot be sent."""
        self._key = os.environ.get(self._key_name, "").strip()
        if not re.fullmatch(r"[!-~]*", self._key):
            raise ScoringError(f"scorer {NAME!r}: {self._key_name} holds blanks or other characters that no key has")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=self._parallel, max_keepalive_connections=self._parallel)
        self._client = httpx.Client(headers=headers, timeout=self._timeout, limits=limits)
        try:
            self._reach()
        except ScoringError:
            self.close()
            raise

    def close(self) -> None:
        self._client.close()

    def ask(self, questions: Sequence[Parts]) -> list[Answer]:
        """Raises ScoringError when the server refuses, answers something else, or does not answer in `TRIES`."""
        with ThreadPoolExecutor(self._parallel) as pool:
            return list(pool.map(self._answer, questions))  # the first error cancels what has not begun

    def _reach(self) -> None:
        """Any answer will do, also one that there is no list of models: it is a server."""
        address, seconds, error = f"{self._url}/models", min(self._timeout, FIRST_TIMEOUT), None
        for attempt in range(FIRST_TRIES):
            try:
                self._client.get(address, timeout=seconds)
                return
            except httpx.TransportError as caught:
                error = caught
                time.sleep(BACKOFF * 2**attempt if attempt + 1 < FIRST_TRIES else 0)
        raise ScoringError(
            f"scorer {NAME!r}: no server answers at {self._url}; tried GET {address} {FIRST_TRIES} times with "
            f"{seconds:g} s each, last {self._named(error)}. Start one (vllm serve {self._model}) or correct endpoint="
        ) from error

    def _answer(self, parts: Parts) -> Answer:
        body = {
            "model": self._model, "temperature": 0, "max_tokens": self._max_tokens,
            "messages": [{"role": "user", "content": [self._content(part) for part in parts]}],
        }  # fmt: skip
        response = self._post(f"{self._url}/chat/completions", body)
        if not response.is_success:
            raise ScoringError(
                f"scorer {NAME!r}: {self._url} refuses: {self._said(response)}{self._key_hint(response)}"
            )
        try:
            choice = response.json()["choices"][0]
            text, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
            # Nothing but thoughts comes as null, and is no answer.
            return Answer(self._masked("" if text is None else str(text)), cut)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ScoringError(
                f"scorer {NAME!r}: {self._url} answers with something else than a chat completion: "
                f"{self._said(response)}"
            ) from error

    def _content(self, part: str | np.ndarray) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        file = io.BytesIO()
        picture(part, self._max_side).save(file, "PNG", compress_level=1)  # the default level takes 0.4 s at 1024^2
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    def _post(self, address: str, body: dict[str, Any]) -> httpx.Response:
        """The first response that another try would not change."""
        for attempt in range(TRIES):
            wait = BACKOFF * 2**attempt
            try:
                response = self._client.post(address, json=body)
                if response.status_code != 429 and response.status_code < 500:
                    return response
                problem, wait = self._said(response), max(wait, retry_after(response))
            except httpx.TransportError as error:
                problem = self._named(error)
            if attempt + 1 < TRIES:
                time.sleep(min(wait, LONGEST_WAIT))
        raise ScoringError(f"scorer {NAME!r}: {address} gave no answer in {TRIES} tries, the last one: {problem}")

    def _said(self, response: httpx.Response) -> str:
        return f"HTTP {response.status_code}, {self._masked(response.text)[:200]!r}"

    def _key_hint(self, response: httpx.Response) -> str:
        if response.status_code not in (401, 403):
            return ""
        return f"; the key in {self._key_name} was sent" if self._key else "; no key, see api_key_env"

    def _named(self, error: Exception | None) -> str:
        return self._masked(f"{type(error).__name__}: {error}")

    def _masked(self, text: str) -> str:
        """Without the key; "x" and "EMPTY", which servers without keys are given, are no secrets but may be words."""
        return text.replace(self._key, "***") if len(self._key) >= SHORTEST_SECRET else text


def retry_after(response: httpx.Response) -> float:
    """Seconds that the header Retry-After asks to wait, given as such or as a date (RFC 9110, 10.2.3); 0 = none."""
    value = response.headers.get("retry-after", "")
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def is_base_url(value: object) -> bool:
    """Whether it is http(s)://host[:port][/path], without a secret in it and without the path of a request."""
    try:
        url = urlsplit(value if isinstance(value, str) else "")
        clean = url.port != 0 and not (url.username or url.password or url.query or url.fragment)
    except ValueError:  # a port that is no number
        return False
    path = url.path.rstrip("/")
    return url.scheme in ("http", "https") and bool(url.hostname) and clean and not path.endswith("/completions")
