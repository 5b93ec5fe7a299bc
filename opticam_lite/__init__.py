"""opticam_lite: saliency maps for image classifiers, and metrics of their quality.

Conventions, the same everywhere:

| thing | form |
|---|---|
| images | float32 `(N, 3, H, W)`, RGB in [0, 1], not normalised: the classifier normalises inside |
| targets | int64 `(N,)`, class indices |
| feature maps | `(N, K, h, w)`; tokens are reshaped to this, without the class token |
| masks | float32 `(N, 1, H, W)` in [0, 1]: `images * masks` is the masked image, 0 is black |
| probabilities | softmax (sigmoid where the classifier says so), float32, fractions in [0, 1] |
| device | that of the classifier; masks are returned on the device of the images |

The map of an image does not depend on the rest of its batch except for rounding (which long
searches amplify in single pixels, not in the objective), and no call changes the network.
"""

import importlib
import os
from typing import TYPE_CHECKING

from .stopping import while_importing

while_importing()  # what follows takes seconds

# By default PyTorch's threads wait for each other in busy loops, so that one other busy process
# makes two of them at least three times as slow. It is read when PyTorch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from . import methods, metrics
from .datasets import Dataset, ImageError, Images, Sample, load_dataset, load_image
from .masking import masked_probabilities, normalize, to_masks, upsample
from .methods import explain, list_methods
from .metrics import list_metrics
from .models import HubError, list_models, load_model
from .network import IMAGENET_MEAN, IMAGENET_STD, Classifier, CutError, Preprocessing

if TYPE_CHECKING:
    from . import plots
    from .checks import check
    from .evaluation import StoreError, evaluate, summarize
    from .explorer import explore
    from .trace import Trace
else:
    # These rooms import matplotlib, pandas, pyarrow and ipywidgets, which together take a quarter
    # of the time of PyTorch, torchvision and timm: each room is loaded when its name is first used.
    _ROOMS = {"StoreError": "evaluation", "Trace": "trace", "check": "checks"}
    _ROOMS |= {"evaluate": "evaluation", "explore": "explorer", "plots": "plots"}
    _ROOMS["summarize"] = "evaluation"

    def __getattr__(name: str) -> object:
        if name not in _ROOMS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        room = importlib.import_module(f".{_ROOMS[name]}", __name__)
        return room if name == "plots" else getattr(room, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__version__ = "0.1.0"

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Classifier",
    "CutError",
    "Dataset",
    "HubError",
    "ImageError",
    "Images",
    "Preprocessing",
    "Sample",
    "StoreError",
    "Trace",
    "check",
    "evaluate",
    "explain",
    "explore",
    "list_methods",
    "list_metrics",
    "list_models",
    "load_dataset",
    "load_image",
    "load_model",
    "masked_probabilities",
    "methods",
    "metrics",
    "normalize",
    "plots",
    "summarize",
    "to_masks",
    "upsample",
]
