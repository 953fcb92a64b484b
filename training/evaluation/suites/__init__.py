"""The suites by name, each a row of the paper."""

from __future__ import annotations

from .baseline import Baseline
from .corruptions import Corruptions
from .cost import Cost
from .guidances import Guidances
from .methods import Methods
from .mixing import Mixing
from .models import CrossModel, Layers
from .quality import NaturalAdversarial, OutOfDistribution, Quality
from .rcdm import BesideRCDM
from .sweep import Sweep
from .variability import Variability

SUITES = {
    suite.name: suite
    for suite in (
        Quality,
        Layers,
        CrossModel,
        Sweep,
        Variability,
        Mixing,
        Baseline,
        Corruptions,
        NaturalAdversarial,
        OutOfDistribution,
        BesideRCDM,
        Guidances,
        Cost,
        Methods,
    )
}
