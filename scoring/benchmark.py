"""`python -m scoring.benchmark`; see `scoring.tools.benchmark`."""

from scoring.tools.benchmark import main

if __name__ == "__main__":
    raise SystemExit(main())
