"""``python -m detrkit``: the same program as ``detrkit``."""

from detrkit.cli import main

if __name__ == "__main__":
    main()
