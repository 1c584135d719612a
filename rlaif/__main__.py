"""`python -m rlaif` is the command `rlaif`."""

from rlaif.cli import main

if __name__ == "__main__":
    main()
