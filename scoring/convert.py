"""`python -m scoring.convert`; see `scoring.tools.convert`."""

from scoring.tools.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
