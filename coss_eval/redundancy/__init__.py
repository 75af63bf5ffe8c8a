"""How redundant the local representations of a network are: similarity, locality and spectrum, from one pass."""

from coss_eval.redundancy.measurement import measure as measure
from coss_eval.redundancy.saliency import heatmap as heatmap
from coss_eval.redundancy.saliency import heatmaps as heatmaps
from coss_eval.redundancy.saliency import location_means as location_means
from coss_eval.redundancy.similarity import mixing_weight as mixing_weight
