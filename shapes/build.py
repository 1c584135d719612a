"""Builds the embedded world's models from nothing: `python -m shapes.build [STAGE ...]`.

Stages run in order, each in a process of its own and only if its result is not in the build folder yet
(build/shapes, or SHAPES_BUILD); delete a file there to repeat its stage. One thread a stage: stages that do
not depend on each other may be started side by side by naming them.
"""

import argparse
import subprocess
import sys

STAGES: dict[str, tuple[str, ...]] = {
    "prompts": ("shapes.prompts",),
    "vae": ("shapes.vae",),
    "decoder": ("shapes.vae", "decoder"),
    "pickscore-clean": ("shapes.judge_training", "pickscore", "clean"),
    "hpsv2-clean": ("shapes.judge_training", "hpsv2", "clean"),
    "base": ("shapes.base",),
    "generated": ("shapes.generate",),
    "pickscore-unfinished": ("shapes.judge_training", "pickscore", "unfinished"),
    "hpsv2-unfinished": ("shapes.judge_training", "hpsv2", "unfinished"),
    "pickscore-retold": ("shapes.judge_training", "pickscore", "retold"),
    "hpsv2-retold": ("shapes.judge_training", "hpsv2", "retold"),
    "pickscore-finished": ("shapes.judge_training", "pickscore", "finished"),
    "hpsv2-finished": ("shapes.judge_training", "hpsv2", "finished"),
    "export": ("shapes.export",),
    "reconstruction": ("shapes.reconstruction",),
    "agreement": ("bench.agreement",),
}


def run_stage(name: str) -> None:
    """Runs one stage and stops the build with its error if it fails."""
    print(f"== {name}", flush=True)
    subprocess.run([sys.executable, "-m", *STAGES[name]], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"default: all of {', '.join(STAGES)}")
    wanted = parser.parse_args().stages
    unknown = sorted(set(wanted) - set(STAGES))
    if unknown:
        parser.error(f"unknown stages {unknown}; known are {list(STAGES)}")
    for name in STAGES:
        if not wanted or name in wanted:
            run_stage(name)


if __name__ == "__main__":
    main()
