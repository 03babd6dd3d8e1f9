"""`python -m ogdopt_harness` is `ogdopt`."""

from ogdopt_harness.cli import main

if __name__ == "__main__":
    main()
