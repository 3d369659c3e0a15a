"""`python -m rlhfjax COMMAND`, as `rlhfjax COMMAND`."""

from rlhfjax.cli.main import main

if __name__ == "__main__":
    main()
