"""`python -m tide_cache` is `tide-cache`."""

from tide_cache.cli import main

if __name__ == "__main__":
    main()
