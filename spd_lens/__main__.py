"""`python -m spd_lens`: the command line."""

from spd_lens.cli import run

if __name__ == "__main__":
    run()
