"""The explorer: one image, one method, and sliders for its options (`ol.explore`).

`Controller` owns one immutable `State` (state.py) and runs one worker thread at a time; it imports
no widgets. `Explorer` (view.py) is the widget: a changed control calls `Controller.choose`, and
`look` (look.py) turns each new state into the values of all widgets. So a new feature needs a field
of the state, code in the controller that changes it, and code in `look` that shows it. An option of
methods gets a slider by an entry in `choices.RANGES`.

Why threads: a callback that computes would block the kernel, and with it the cancel button. The
thread of callbacks differs (the main thread with ipykernel 6, a subshell's thread with ipykernel 7
in JupyterLab), so nothing here relies on it: the state changes only under the controller's lock,
figures are drawn without pyplot under one lock, and no worker ever writes to an `Output` widget,
which would capture the output of every thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..models import load_model
from ..network import Classifier
from ..scene_networks import NETWORKS
from .controller import Controller
from .state import Result, Settings
from .view import Explorer

__all__ = ["Controller", "Explorer", "Result", "Settings", "explore"]


def explore(
    classifier: Classifier | str | Sequence[Classifier | str] | Mapping[str, Classifier | str],
    images: Tensor,
    targets: Tensor | Sequence[int] | None = None,
    *,
    run: bool = False,
) -> Explorer:
    """Return a widget that shows saliency maps of a network by any method, at any layer.

    Args:
        classifier: One classifier or several, as a list or a dict of names. Any of them may be a
            name of `ol.load_model`: the first is loaded at once, the others when they are chosen.
            With a single embedded network the other embedded ones can be chosen, too.
        images: `(N, 3, H, W)` or one `(3, H, W)`, float in [0, 1], not normalised.
        targets: `(N,)` class indices, selected at first for each image. Default: the predicted
            class.
        run: Start the first run at once. It does not wait; `explorer.join()` does.

    Raises:
        TypeError, ValueError: If an argument has a wrong type, shape or range.
    """
    networks = _networks(classifier)
    name, first = next(iter(networks.items()))
    if not isinstance(first, Classifier):
        first = networks[name] = load_model(first)
    if isinstance(images, Tensor) and images.ndim == 3:
        images = images[None]
    images = first.check_images(images).detach().cpu()
    if not len(images):
        raise ValueError("images is an empty batch; the explorer needs at least one image")
    if targets is not None:
        targets = first.check_targets(targets, len(images)).cpu()
    explorer = Explorer(Controller(networks, images, targets))
    if run:
        explorer.start()
    return explorer


def _networks(
    given: Classifier | str | Sequence[Classifier | str] | Mapping[str, Classifier | str],
) -> dict[str, Classifier | str]:
    if isinstance(given, (Classifier, str)):
        name = given if isinstance(given, str) else given.name
        siblings = [other for other in NETWORKS if other != name] if name in NETWORKS else []
        return {name: given, **{other: other for other in siblings}}
    if not isinstance(given, Mapping):
        names = [c if isinstance(c, str) else getattr(c, "name", "") for c in given]
        double = next((n for n in names if names.count(n) > 1), None)
        if double is not None:
            raise ValueError(
                f"two classifiers are called {double!r}; pass a dict that names them apart"
            )
        given = dict(zip(names, given, strict=True))
    if not given:
        raise ValueError("no classifier was given; pass one, a list or a dict of them")
    for name, one in given.items():
        if not isinstance(one, (Classifier, str)):
            raise TypeError(
                f"{name!r} is a {type(one).__name__}; a Classifier or a name that load_model "
                "knows is needed"
            )
    return dict(given)
