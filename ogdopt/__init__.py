"""Orthogonal gradient descent for preference tuning: winners' likelihood up, losers' not, around any torch optimizer."""

from ogdopt.gram import Gram
from ogdopt.optimizer import GradientError, NonFiniteGradient, PairedGradient, ProjectedGradient, StepReport

__all__ = ["GradientError", "Gram", "NonFiniteGradient", "PairedGradient", "ProjectedGradient", "StepReport"]
__version__ = "0.1.0"
