"""`python -m training.kohya`; see `training.export.kohya`."""

from training.export.kohya import main

if __name__ == "__main__":
    raise SystemExit(main())
