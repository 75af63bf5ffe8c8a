"""How much of the image a unit sees: in theory, as a gradient confirms it, and effectively (Luo et al. 2016)."""

from coss_eval.receptive_field.effective import EffectiveField as EffectiveField
from coss_eval.receptive_field.effective import effective as effective
from coss_eval.receptive_field.picture import FieldMap as FieldMap
from coss_eval.receptive_field.picture import draw as draw
from coss_eval.receptive_field.picture import field_map as field_map
from coss_eval.receptive_field.theoretical import theoretical as theoretical
