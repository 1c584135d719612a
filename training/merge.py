"""`python -m training.merge`; see `training.export.merge`."""

from training.export.merge import main

if __name__ == "__main__":
    raise SystemExit(main())
