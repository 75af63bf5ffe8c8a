"""How alike two representations of the same images are: CKA, RSA and Procrustes, on arrays (N, D) and (N, D').

Arrays (images, locations, units) and (images, repeats, units) do, too, and are averaged over the middle; to set
locations side by side instead, give ``x.reshape(len(x), -1)``. ``noise_ceiling``: what recordings let a model reach.
"""

from coss_eval.similarity.cka import StreamedCKA as StreamedCKA
from coss_eval.similarity.cka import cka as cka
from coss_eval.similarity.geometry import dissimilarities as dissimilarities
from coss_eval.similarity.geometry import procrustes as procrustes
from coss_eval.similarity.geometry import rsa as rsa
from coss_eval.similarity.many import procrustes_matrix as procrustes_matrix
from coss_eval.similarity.many import rsa_matrix as rsa_matrix
from coss_eval.similarity.recordings import AgainstRecordings as AgainstRecordings
from coss_eval.similarity.recordings import NoiseCeiling as NoiseCeiling
from coss_eval.similarity.recordings import Recordings as Recordings
from coss_eval.similarity.recordings import against_recordings as against_recordings
from coss_eval.similarity.recordings import noise_ceiling as noise_ceiling
