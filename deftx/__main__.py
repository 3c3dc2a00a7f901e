"""``python -m deftx`` is the ``deftx`` command."""

from deftx.cli import main

if __name__ == "__main__":
    main()
