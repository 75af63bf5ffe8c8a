"""Damage inside a network: masking, noise and ablation at named sites, and how much accuracy survives it."""

from coss_eval.internal.corruption import DEFAULT_LEVELS as DEFAULT_LEVELS
from coss_eval.internal.corruption import KINDS as KINDS
from coss_eval.internal.corruption import Corruption as Corruption
from coss_eval.internal.corruption import check_level as check_level
from coss_eval.internal.corruption import kinds_at as kinds_at
from coss_eval.internal.hooks import calibrate as calibrate
from coss_eval.internal.hooks import corrupted as corrupted
