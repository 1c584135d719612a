"""Names of repositories on the Hugging Face hub, told apart from folders."""

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(source: str) -> bool:
    """Whether a source is "owner/name" on the hub rather than a folder here.

    What exists is a folder. "owner/name" is taken for a folder that is missing when "owner" is a folder here,
    so that a mistyped path is reported as such and not looked up on the hub.
    """
    path = Path(source)
    return HUB_ID.fullmatch(source) is not None and not path.exists() and not path.parent.is_dir()
