"""What several benchmarks know of a memory, since they prepared it."""

from fastntk.memory.memory import Memory
from fastntk.solve.convex import Convex
from fastntk.solve.ridge import Calibration


def automatic(memory: Memory) -> Calibration:
    """Of a ridge that was not given."""
    if memory.calibration is None:
        raise TypeError("this memory's ridge was given")
    return memory.calibration


def rows_held(memory: Memory) -> Convex:
    """Its solution, in a form that holds the rows and their kernel: dual or convex."""
    if not isinstance(memory.state.solution, Convex):
        raise TypeError(f"the form {memory.form} holds no rows")
    return memory.state.solution
