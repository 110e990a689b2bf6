"""What a planted fault is."""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    text: str  # which occurs once in the file
    replacement: str
    breaks: str
    first: tuple[str, ...]  # the test files that are most likely to find it
    isas: str = "best"  # which instruction sets are compiled with it, if it is C++: the best one, or "all"
