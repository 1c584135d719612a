"""`python -m scoring.contract`, and what the test suite of a plug-in imports; see `scoring.tools.contract`."""

from scoring.tools.contract import Broken, Outcome, Skipped, Trial, check_contract, clauses, main

__all__ = ["Broken", "Outcome", "Skipped", "Trial", "check_contract", "clauses"]

if __name__ == "__main__":
    raise SystemExit(main())
