"""How much memory a training run will take, and which memory mode fits a card."""

from palp_fast.memory.choose import Choice, choose
from palp_fast.memory.estimate import Estimate, Phase, estimates

__all__ = ["Choice", "Estimate", "Phase", "choose", "estimates"]
