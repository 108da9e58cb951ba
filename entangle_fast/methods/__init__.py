"""methods: one file per method; each a dataclass of options and a process of numbered steps.

METHODS maps the name in a config file to the dataclass. ``config.start(model, data, loss, seed)`` gives the process.
"""

from .baselines import FineTune, GradientAscent, NegGradPlus, RandomLabels, Retrain
from .entangled import Entangled

METHODS = {cls.name: cls for cls in (Entangled, FineTune, GradientAscent, NegGradPlus, RandomLabels, Retrain)}

__all__ = ["METHODS", *sorted(cls.__name__ for cls in METHODS.values())]
