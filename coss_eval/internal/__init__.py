"""Damage inside a network: of activations at named sites, or of the weights, and how much accuracy survives it."""

from coss_eval.internal.damage import DEFAULT_LEVELS as DEFAULT_LEVELS
from coss_eval.internal.damage import KINDS as KINDS
from coss_eval.internal.damage import Damage as Damage
from coss_eval.internal.damage import Kind as Kind
from coss_eval.internal.damage import check_level as check_level
from coss_eval.internal.damage import find_kind as find_kind
from coss_eval.internal.damage import kinds_at as kinds_at
from coss_eval.internal.hooks import NETWORK as NETWORK
from coss_eval.internal.hooks import WeightDamage as WeightDamage
from coss_eval.internal.hooks import calibrate as calibrate
from coss_eval.internal.hooks import corrupted as corrupted
from coss_eval.internal.hooks import mixed as mixed
