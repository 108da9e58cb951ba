"""methods: one file per method; each a dataclass of options and a process of numbered steps.

METHODS maps the name in a config file to the dataclass. ``config.start(model, data, loss, seed)`` gives the process.
"""

from .baselines import FineTune, GradientAscent, L1Sparse, NegGradPlus, RandomLabels, Retrain
from .dampening import Ssd
from .entangled import Entangled
from .geometric import Geometric
from .influence import Influence
from .lookahead import Lookahead
from .options import named
from .orthograd import OrthoGrad
from .pgu import Pgu
from .rosu import Rosu
from .saliency import SalUn
from .scrub import Scrub
from .woodbury import Woodbury

METHODS = {cls.name: named(cls) for cls in (
    Entangled, FineTune, Geometric, GradientAscent, Influence, L1Sparse, Lookahead, NegGradPlus, OrthoGrad, Pgu, RandomLabels,
    Retrain, Rosu, SalUn, Scrub, Ssd, Woodbury,
)}  # fmt: skip

__all__ = ["METHODS", *sorted(cls.__name__ for cls in METHODS.values())]
