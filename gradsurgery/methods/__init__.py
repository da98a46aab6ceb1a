"""Methods: rules that turn the Gram matrix of the task gradients into task weights."""

from __future__ import annotations

import difflib

from gradsurgery.methods._base import Method
from gradsurgery.methods.ags import AGS
from gradsurgery.methods.aligned_mtl import AlignedMTL
from gradsurgery.methods.cagrad import CAGrad
from gradsurgery.methods.config import ConFIG
from gradsurgery.methods.conicgrad import ConicGrad
from gradsurgery.methods.constant import Constant
from gradsurgery.methods.cr_mogm import CRMOGM
from gradsurgery.methods.dualproj import DualProj
from gradsurgery.methods.dwa import DWA
from gradsurgery.methods.fairgrad import FairGrad
from gradsurgery.methods.famo import FAMO
from gradsurgery.methods.gradops import GradOPS
from gradsurgery.methods.gradvac import GradVac
from gradsurgery.methods.imtl_g import IMTLG
from gradsurgery.methods.mean import Mean
from gradsurgery.methods.mgda import MGDA
from gradsurgery.methods.nash_mtl import NashMTL
from gradsurgery.methods.pcgrad import PCGrad
from gradsurgery.methods.random import Random
from gradsurgery.methods.rescaled import Rescaled
from gradsurgery.methods.stch import STCH
from gradsurgery.methods.sum import Sum
from gradsurgery.methods.uncertainty import Uncertainty
from gradsurgery.methods.upgrad import UPGrad

__all__ = [
    "AGS",
    "CRMOGM",
    "DWA",
    "FAMO",
    "IMTLG",
    "MGDA",
    "STCH",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "ConicGrad",
    "Constant",
    "DualProj",
    "FairGrad",
    "GradOPS",
    "GradVac",
    "Mean",
    "Method",
    "NashMTL",
    "PCGrad",
    "Random",
    "Rescaled",
    "Sum",
    "UPGrad",
    "Uncertainty",
    "available",
    "resolve",
]

_METHODS: tuple[type[Method], ...] = (
    AGS,
    AlignedMTL,
    CAGrad,
    ConFIG,
    ConicGrad,
    Constant,
    CRMOGM,
    DualProj,
    DWA,
    FairGrad,
    FAMO,
    GradOPS,
    GradVac,
    IMTLG,
    Mean,
    MGDA,
    NashMTL,
    PCGrad,
    Random,
    STCH,
    Sum,
    Uncertainty,
    UPGrad,
)


def available() -> tuple[str, ...]:
    """The names that `method=` takes, in alphabetical order.

    Example:
        >>> available()[:3]
        ('ags', 'aligned_mtl', 'cagrad')
    """
    return tuple(sorted(method.name for method in _METHODS))


def resolve(method: str | Method) -> Method:
    """The method that `method=` means: a name gives a new one with defaults, an instance itself.

    Raises:
        TypeError: neither a name nor an instance.
        ValueError: a name that no method has; the nearest one is offered.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        hint = ""
        if isinstance(method, type) and issubclass(method, Method):
            hint = f"; write {method.__name__}() with parentheses"
        raise TypeError(f"method must be a name or an instance of Method; got {method!r}{hint}")
    for candidate in _METHODS:
        if candidate.name == method:
            return candidate()
    near = difflib.get_close_matches(method.lower(), available(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"method {method!r} is unknown; {hint}The methods are: {', '.join(available())}"
    )
