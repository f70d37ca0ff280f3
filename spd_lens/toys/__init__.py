"""Small models and texts that ship with the package and need neither network nor GPU."""

from spd_lens.toys.tiny_lm import load_moby_dick, load_tiny_lm

__all__ = ["load_moby_dick", "load_tiny_lm"]
