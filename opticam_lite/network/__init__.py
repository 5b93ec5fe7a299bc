"""The network: the classifier, its cut at a layer, its quick copy, the parts of a transformer.

`Classifier` is what the rest of the package uses. All optimisations for speed are here and in
`methods.search`: channels-last memory format, folded batch norms, frozen parameters, running the
head alone, CUDA graphs.
"""

from .ablation import ablation
from .activation import ACTIVATIONS
from .classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier, Preprocessing, Quick
from .cut import Rest
from .feature_maps import CutError, FeatureLayout, token_grid
from .quick_copy import dtype_of, exact, usual
from .recorded_step import RecordedStep
from .transformer import PLAIN, Block, Operations, Transformer

__all__ = [
    "ACTIVATIONS",
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
    "ablation",
    "dtype_of",
    "exact",
    "token_grid",
    "usual",
]
