"""How alike two representations of the same images are: CKA, RSA and Procrustes, on arrays (N, D) and (N, D')."""

from coss_eval.similarity.cka import StreamedCKA as StreamedCKA
from coss_eval.similarity.cka import cka as cka
from coss_eval.similarity.geometry import dissimilarities as dissimilarities
from coss_eval.similarity.geometry import procrustes as procrustes
from coss_eval.similarity.geometry import rsa as rsa
from coss_eval.similarity.many import procrustes_matrix as procrustes_matrix
from coss_eval.similarity.many import rsa_matrix as rsa_matrix
