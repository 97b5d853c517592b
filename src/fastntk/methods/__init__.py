"""Unlearning methods behind one interface: ``method(problem) -> Unlearned``."""

from fastntk.methods.fast_ntk import FastNTK
from fastntk.methods.golatkar import Golatkar
from fastntk.methods.problem import Method, Problem, Unlearned
from fastntk.methods.retrain import Retrain

__all__ = ["FastNTK", "Golatkar", "Method", "Problem", "Retrain", "Unlearned"]
