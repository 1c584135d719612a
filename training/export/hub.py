"""Publish a finished training on the Hugging Face hub: weights, the copy for ComfyUI, the card. On request only.

    python -m training.hub TRAINING_FOLDER --repo owner/name [--public]

The token is that of `hf auth login` or HF_TOKEN; it is never written anywhere.
"""

import json
from pathlib import Path

from training.export.model_card import KOHYA_FILE
from training.model.reference import ADAPTER_FILE

NETWORK_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")


class PushError(ValueError):
    """Nothing can be published; the message says why and what to do."""


def check_push(repo_id: str) -> str:
    """Refuse, before any work, what could not be published afterwards; returns the name of the token's owner.

    Raises PushError for a malformed repository, offline mode, no token, one that is refused or may only read, and a
    hub that does not answer.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    check_repo_id(repo_id)
    later = "or publish later with `python -m training.hub`"
    if constants.HF_HUB_OFFLINE:
        raise PushError(f"push to {repo_id!r}: HF_HUB_OFFLINE is set; unset it, {later}")
    if get_token() is None:
        raise PushError(f"push to {repo_id!r}: no token; run `hf auth login` or set HF_TOKEN, {later}")
    try:
        owner = HfApi().whoami()
    except HfHubHTTPError as error:
        raise PushError(f"push to {repo_id!r}: {constants.ENDPOINT} refuses the token: {error}") from error
    except HTTPError as error:
        raise PushError(f"push to {repo_id!r}: {constants.ENDPOINT} does not answer ({error}); {later}") from error
    role = owner.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PushError(f"push to {repo_id!r}: the token of {owner['name']} may only read; make one that may write")
    return str(owner["name"])


def check_repo_id(repo_id: str) -> None:
    """Raises PushError unless it has the form owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(f"push to {repo_id!r}: {error}") from error
    if "/" not in repo_id:
        raise PushError(f"push to {repo_id!r}: say whose it is: owner/name")


def push_files(training: Path) -> dict[str, Path]:
    """The files that go out, by their path in the repository: nothing but weights and their config.

    The adapter goes to the top, where `load_lora_weights("owner/name")` looks for it. Checkpoints, metrics and records
    stay: they are large, or name paths of this machine. Raises PushError where there are no weights.
    """
    files = {ADAPTER_FILE: training / "adapter" / ADAPTER_FILE, KOHYA_FILE: training / KOHYA_FILE}
    if network := _trained_network(training):
        weights = [file for pattern in NETWORK_FILES for file in (training / network).glob(pattern)]
        files |= {f"{network}/{file.name}": file for file in weights}
    there = {place: file for place, file in files.items() if file.is_file()}
    if not set(there) - {KOHYA_FILE}:
        raise PushError(f"{training}: holds no trained weights; give the folder of a finished training")
    return there


def _trained_network(training: Path) -> str | None:
    """The folder of a network of which every weight was trained, by its name in the pipeline; None for an adapter."""
    record = training / "checkpoint.json"
    values = json.loads(record.read_text()) if record.is_file() else {}
    return Path(values["model"]["network"]).name if values.get("method") == "full" else None


def push(training: Path, repo_id: str, private: bool = True, message: str = "Trained weights and model card") -> str:
    """Publish as one commit, into a repository that is made where there is none; returns the commit's address.

    private: whether a new repository is; one that exists stays as it is. Raises PushError or ModelError before
    anything is sent, and the library's errors for what the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_repo_id(repo_id)
    files = push_files(training)
    check_push(repo_id)
    from training.export.outputs import card_of  # loads torch: not before it is known that there is something to do

    operations = [CommitOperationAdd(place, file) for place, file in files.items()]
    operations.append(CommitOperationAdd("README.md", card_of(training, repo_id).encode()))
    api = HfApi(library_name="rlaif")
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.create_commit(repo_id, operations, commit_message=message).commit_url)
