"""Faults as developers make them, each at one place, for mutants.py to plant; no compiler and no import sees them.

`text` is as short as occurs once, so that it survives most of what moves code.
"""

from planted import cache, cpu, cuda, linear, package, parallel, sparse, tokens, triton
from planted.mutant import Mutant

MUTANTS = [
    *package.MUTANTS, *cache.MUTANTS, *linear.MUTANTS, *parallel.MUTANTS, *sparse.MUTANTS, *tokens.MUTANTS,
    *triton.MUTANTS, *cuda.MUTANTS, *cpu.MUTANTS,
]  # fmt: skip

__all__ = ["MUTANTS", "Mutant"]
