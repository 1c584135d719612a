"""`python -m shapes.export [PART ...]`: writes the trained stages into shapes/models, as stock libraries read
them.
"""

import argparse
from pathlib import Path

from shapes.base import export as export_base
from shapes.judge_training import STAGES
from shapes.scorers import JUDGES
from shapes.stage import MODELS, done, load_tensors


def export_judge(name: str, folder: Path) -> None:
    """The judge's last finished stage."""
    stage = [stage for stage in STAGES if done(f"{name}-{stage}.safetensors")][-1]
    judge = JUDGES[name]()
    judge.load_state_dict(load_tensors(f"{name}-{stage}.safetensors"))
    judge.save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="base, pickscore or hpsv2; default: all")
    wanted = parser.parse_args().parts or ["base", *JUDGES]
    for part in wanted:
        if part == "base":
            export_base("base.safetensors")
        else:
            export_judge(part, MODELS / part)


if __name__ == "__main__":
    main()
