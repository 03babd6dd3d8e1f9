"""Orthogonal gradient descent for preference tuning: winners' likelihood up, losers' not, around any torch optimizer."""

from ogdopt.errors import GradientError, NonFiniteGradient
from ogdopt.functional import project
from ogdopt.gram import Gram
from ogdopt.objectives import AlternatingObjective, MaxGapObjective, MixedObjective, SequentialObjective
from ogdopt.optimizer import PairedGradient, ProjectedGradient
from ogdopt.report import StepReport

__all__ = [
    "AlternatingObjective",
    "GradientError",
    "Gram",
    "MaxGapObjective",
    "MixedObjective",
    "NonFiniteGradient",
    "PairedGradient",
    "ProjectedGradient",
    "SequentialObjective",
    "StepReport",
    "project",
]
__version__ = "0.1.0"
