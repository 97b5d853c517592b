"""Unlearning methods behind one interface: ``method(problem) -> Unlearned``."""

from fastntk.methods.bad_teacher import BadTeacher
from fastntk.methods.fast_ntk import FastNTK
from fastntk.methods.finetune import FineTune
from fastntk.methods.fisher import Dampening, FisherForgetting
from fastntk.methods.golatkar import Golatkar
from fastntk.methods.gradient_ascent import GradientAscent
from fastntk.methods.iterated import Iterated
from fastntk.methods.newton import Newton
from fastntk.methods.problem import Method, Problem, Unlearned
from fastntk.methods.random_label import RandomLabel
from fastntk.methods.retrain import Retrain
from fastntk.methods.scrub import Scrub

__all__ = [
    "BadTeacher",
    "Dampening",
    "FastNTK",
    "FineTune",
    "FisherForgetting",
    "Golatkar",
    "GradientAscent",
    "Iterated",
    "Method",
    "Newton",
    "Problem",
    "RandomLabel",
    "Retrain",
    "Scrub",
    "Unlearned",
]
