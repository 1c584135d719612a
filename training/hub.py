"""`python -m training.hub`; see `training.export.hub`."""

from training.export.hub import main

if __name__ == "__main__":
    raise SystemExit(main())
