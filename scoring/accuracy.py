"""`python -m scoring.accuracy`; see `scoring.tools.accuracy`."""

from scoring.tools.accuracy import main

if __name__ == "__main__":
    raise SystemExit(main())
