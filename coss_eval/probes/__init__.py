"""Probes of a frozen representation: features, linear and nearest-neighbour classifiers, and their scores."""

from coss_eval.probes.features import Features as Features
from coss_eval.probes.features import extract as extract
from coss_eval.probes.features import extract_known as extract_known
from coss_eval.probes.fit import few_label_probe as few_label_probe
from coss_eval.probes.fit import fit_classifier as fit_classifier
from coss_eval.probes.fit import fitted_probe as fitted_probe
from coss_eval.probes.fit import known_classifier as known_classifier
from coss_eval.probes.fit import probe_beside as probe_beside
from coss_eval.probes.forward import Predictions as Predictions
from coss_eval.probes.forward import predict as predict
from coss_eval.probes.forward import scores as scores
from coss_eval.probes.linear import LinearProbe as LinearProbe
from coss_eval.probes.linear import fit_probe as fit_probe
from coss_eval.runtime.device import Compute as Compute
from coss_eval.runtime.device import resolve_device as resolve_device
