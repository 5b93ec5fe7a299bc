"""A network in one place: the classifier, its cut at a layer, its quick copy, its description.

`Classifier` is what the other rooms use. Speed lives here and in the search engine of the methods:
channels last, folded batch norms, frozen parameters, the head alone, recorded steps.
"""

from .classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier, Preprocessing, Quick
from .cut import Rest
from .feature_maps import CutError, FeatureLayout, token_grid
from .quick_copy import dtype_of, exact
from .recorded_step import RecordedStep
from .transformer import PLAIN, Block, Operations, Transformer

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PLAIN",
    "Block",
    "Classifier",
    "CutError",
    "FeatureLayout",
    "Operations",
    "Preprocessing",
    "Quick",
    "RecordedStep",
    "Rest",
    "Transformer",
    "dtype_of",
    "exact",
    "token_grid",
]
