"""`python -m bench.summary`; see `tasks.report.summary`."""

from tasks.report.summary import main

if __name__ == "__main__":
    raise SystemExit(main())
