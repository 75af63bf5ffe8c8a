"""How redundant the local representations of a network are: similarity, locality and spectrum, from one pass."""

from coss_eval.redundancy.measurement import measure as measure
