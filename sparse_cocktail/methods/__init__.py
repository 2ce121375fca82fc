"""Published training methods, one file each over `base.py`."""

from .acdc import ACDC
from .ast import AST
from .base import Context, Method, Pass, Stage
from .cocktail import SparseCocktail
from .dynamic import SET, GraNet, RigL
from .gradual import GradualMagnitude
from .imp import IMP
from .lottery_pools import LotteryPools
from .mutualnet import MutualNet
from .refilling import Refilling
from .spartan import Spartan
from .sup_tickets import SupTickets

__all__ = ["METHODS", "Context", "Method", "Pass", "SparseCocktail", "Spartan", "Stage"]

METHODS: dict[str, type[Method]] = {
    "cocktail": SparseCocktail,
    "ast": AST,
    "mutualnet": MutualNet,
    "spartan": Spartan,
    "acdc": ACDC,
    "imp": IMP,
    "lottery-pools": LotteryPools,
    "refilling": Refilling,
    "set": SET,
    "rigl": RigL,
    "granet": GraNet,
    "gmp": GradualMagnitude,
    "sup-tickets": SupTickets,
}
