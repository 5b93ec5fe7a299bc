"""A network or a method that fails on an image costs the run that image, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import cnn, make_classifier, make_images
from torch import Tensor, nn

import opticam_lite as ol
from opticam_lite.evaluation import read
from opticam_lite.methods import METHODS
from opticam_lite.methods.registry import Method

WHITE = 4  # the image on which networks and methods fail


@torch.fx.wrap
def refuse_white(x: Tensor) -> Tensor:
    if (x.mean((1, 2, 3)) > 0.95).any():
        raise RuntimeError("too\nbright")
    return x


class Fussy(nn.Module):
    """The small network; on a white image it raises, or gives NaN."""

    def __init__(self, raises: bool) -> None:
        super().__init__()
        self.inner, self.raises = cnn(), raises

    def forward(self, x: Tensor) -> Tensor:
        if self.raises:
            return self.inner(refuse_white(x))
        return self.inner(x).where(x.mean((1, 2, 3))[:, None] < 0.95, torch.nan)


def fussy(raises: bool) -> ol.Classifier:
    return ol.Classifier(Fussy(raises), "inner.4", size=32, device="cpu")


def with_white(n: int = 7, *white: int) -> ol.Dataset:
    images = make_images(n)
    images[list(white or [WHITE])] = 1
    return ol.Images(images, [i % 5 for i in range(n)])


def measure(
    classifier: ol.Classifier,
    dataset: ol.Dataset,
    methods: Any = ("grad-cam", "fake-cam"),
    **more: Any,
) -> pd.DataFrame:
    return ol.evaluate(classifier, dataset, methods, **{"batch_size": 3, "progress": None, **more})


def assert_near(a: pd.DataFrame, b: pd.DataFrame) -> None:
    """The same rows but for the seconds; other batch-mates change the last digits."""
    a, b = (x.drop(columns=["seconds", "network", "layer"]).reset_index(drop=True) for x in (a, b))
    pd.testing.assert_frame_equal(a, b, rtol=1e-3, atol=1e-3, check_dtype=False)


REASONS = {
    True: "the network raised RuntimeError: too bright",
    False: "the network's output is not finite",
}


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("raises", REASONS)
def test_a_network_that_fails_on_an_image(raises: bool, batch_size: int, tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path, None):  # the second time everything is there already
        frame = measure(fussy(raises), with_white(), batch_size=batch_size, out=out)
        (error,) = frame[frame["error"].notna()].to_dict("records")
        assert (error["image"], error["error"]) == (str(WHITE), REASONS[raises])
        assert pd.isna(error["method"])
        assert ol.summarize(frame)["broken"].tolist() == [1, 1]
        others = measure(ol.Classifier(cnn(), "4", size=32, device="cpu"), with_white())
        assert_near(frame[frame["error"].isna()], others[others["image"] != str(WHITE)])
    added = measure(fussy(raises), with_white(), ["cam"], batch_size=batch_size, out=tmp_path)
    assert added["error"].notna().sum() == 1
    assert len(added) == 1 + 6 * 3


@pytest.mark.parametrize("raises", REASONS)
def test_a_network_that_fails_on_all_images(raises: bool) -> None:
    with pytest.raises(ValueError, match=rf"none of the 3 images of images .*{REASONS[raises]}"):
        measure(fussy(raises), with_white(3, 0, 1, 2))


def test_a_network_that_fails_whatever_the_image_ends_the_run_at_once() -> None:
    classifier = make_classifier("cnn")
    with torch.no_grad():
        next(classifier.network.parameters())[0] = torch.nan
    with pytest.raises(ValueError, match="the network's output is not finite") as caught:
        measure(classifier, with_white())
    assert caught.value.__notes__ == ["while the network was measured on the images 0, 1, 2"]


def register(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    monkeypatch.setitem(METHODS._entries, "mine", Method("mine", function, "Mine", "here"))


def cautious(classifier: ol.Classifier, images: Tensor, targets: Tensor) -> Tensor:
    refuse_white(images)
    return images.mean(1, keepdim=True)


def careless(classifier: ol.Classifier, images: Tensor, targets: Tensor) -> Tensor:
    masks = images.mean(1, keepdim=True)
    return masks.where(masks.mean((1, 2, 3), keepdim=True) < 0.95, torch.nan)


@pytest.mark.parametrize(
    ("method", "reason"),
    [(cautious, "mine raised RuntimeError: too bright"), (careless, "the mask is not finite")],
)
def test_a_method_that_fails_on_an_image_loses_its_own_rows_only(
    method: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, method)
    classifier, dataset = make_classifier("cnn"), with_white()
    methods = ["fake-cam", "mine"]
    for metrics in (["AD"], ["AD", "AI"], ["AD", "AI"]):  # one is added, then nothing is left
        frame = measure(classifier, dataset, methods, metrics=metrics, out=tmp_path)
        (error,) = frame[frame["error"].notna()].to_dict("records")
        told = (error["image"], error["method"], error["error"])
        assert told == (str(WHITE), "mine", reason)
        assert len(frame) == (7 + 6) * len(metrics) + 1
        for rows in (frame, tmp_path):
            table = ol.summarize(rows, common=False)
            assert table["broken"].to_dict() == {"fake-cam": 0, "mine": 1}
    # A method that is mended measures its images again.
    register(monkeypatch, lambda classifier, images, targets: images.mean(1, keepdim=True))
    with pytest.warns(UserWarning, match="the code of mine has changed"):
        mended = measure(classifier, dataset, methods, metrics=["AD", "AI"], out=tmp_path)
    assert mended["error"].isna().all()
    assert_near(mended, measure(classifier, dataset, methods, metrics=["AD", "AI"]))


def test_a_method_that_fails_on_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, cautious)
    dataset = with_white(3, 0, 1, 2)
    with pytest.raises(ValueError, match=r"none of the 3 .* measured with mine; .* too bright"):
        measure(make_classifier("cnn"), dataset, ["fake-cam", "mine"], out=tmp_path)
    kept = read(tmp_path)
    assert kept.loc[kept["error"].isna(), "method"].unique().tolist() == ["fake-cam"]

    def broken(classifier: ol.Classifier, images: Tensor, targets: Tensor) -> Tensor:
        raise KeyError("a slip")

    register(monkeypatch, broken)
    with pytest.raises(KeyError, match="a slip") as caught:
        measure(make_classifier("cnn"), with_white(), ["mine"])
    assert caught.value.__notes__ == ["while mine was measured on the images 0, 1, 2"]


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        OSError(28, "No space left on device"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_what_no_image_can_help_ends_the_run(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mine(classifier: ol.Classifier, images: Tensor, targets: Tensor) -> Tensor:
        if (images.mean((1, 2, 3)) > 0.95).any():
            raise fault
        return images.mean(1, keepdim=True)

    register(monkeypatch, mine)
    with pytest.raises(type(fault)):
        measure(make_classifier("cnn"), with_white(), ["mine"], out=tmp_path)
    kept = read(tmp_path)
    assert kept["error"].isna().all()
    assert len(kept) == 3 * 3


def test_an_image_of_a_size_that_the_network_does_not_take() -> None:
    class Sizes(ol.Images):
        def sample(self, index: int) -> ol.Sample:
            size = 40 if index == 1 else 32
            return ol.Sample(str(index), make_images(1, size, size, seed=index)[0], 0)

    frame = measure(make_classifier("vit"), Sizes(make_images(3)), ["fake-cam"], batch_size=1)
    assert frame.loc[frame["error"].notna(), "image"].tolist() == ["1"]
    assert "the network raised" in frame["error"].dropna().item()
    assert len(frame) == 2 * 3 + 1
