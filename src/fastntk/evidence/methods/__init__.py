"""Unlearning methods behind one interface: ``method(problem) -> Unlearned``."""

from fastntk.evidence.methods.bad_teacher import BadTeacher
from fastntk.evidence.methods.delete import Delete
from fastntk.evidence.methods.fast_ntk import FastNTK
from fastntk.evidence.methods.finetune import FineTune
from fastntk.evidence.methods.fisher import Dampening, FisherForgetting
from fastntk.evidence.methods.golatkar import Golatkar
from fastntk.evidence.methods.gradient_ascent import GradientAscent
from fastntk.evidence.methods.head_alone import HeadAlone
from fastntk.evidence.methods.iterated import Iterated
from fastntk.evidence.methods.newton import Newton
from fastntk.evidence.methods.problem import Method, Problem, Unlearned
from fastntk.evidence.methods.random_label import RandomLabel
from fastntk.evidence.methods.retrain import Retrain
from fastntk.evidence.methods.scrub import Scrub

__all__ = [
    "BadTeacher",
    "Dampening",
    "Delete",
    "FastNTK",
    "FineTune",
    "FisherForgetting",
    "Golatkar",
    "GradientAscent",
    "HeadAlone",
    "Iterated",
    "Method",
    "Newton",
    "Problem",
    "RandomLabel",
    "Retrain",
    "Scrub",
    "Unlearned",
]
