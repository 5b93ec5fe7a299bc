"""The door to the methods: one or several, tensors, files and folders, progress, interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_classifier, make_images
from test_every_method import assert_same, state_of
from torch import Tensor, nn
from torchvision.utils import save_image

import opticam_lite as ol


def test_several_methods(images: Tensor, targets: Tensor) -> None:
    classifier = make_classifier("cnn")
    masks = ol.explain(["fake-cam", "grad-cam"], classifier, images, targets)
    assert list(masks) == ["fake-cam", "grad-cam"]
    for method in masks:
        expected = ol.explain(method, classifier, images, targets)
        torch.testing.assert_close(masks[method], expected, rtol=0, atol=0)
    assert list(ol.explain(("cam",), classifier, images[:0], [])) == ["cam"]


def test_options_of_several_methods(images: Tensor, targets: Tensor) -> None:
    classifier = make_classifier("cnn")
    few = ol.explain("opti-cam", classifier, images, targets, iterations=2)
    shared = ol.explain(["grad-cam", "opti-cam"], classifier, images, targets, iterations=2)
    torch.testing.assert_close(shared["opti-cam"], few, rtol=0, atol=0)
    start = {"iterations": 2, "initial_u": torch.zeros(12)}  # one for all images
    same = ol.explain("opti-cam", classifier, images, targets, **start)
    torch.testing.assert_close(same, few, rtol=0, atol=1e-4)
    own = {"grad-cam": {}, "opti-cam": {"iterations": 2}}
    masks = ol.explain(own, classifier, images, targets, iterations=5)
    torch.testing.assert_close(masks["opti-cam"], few, rtol=0, atol=0)
    with pytest.raises(TypeError, match="none of cam, grad-cam has an option 'iterations'"):
        ol.explain(["cam", "grad-cam"], classifier, images, targets, iterations=2)
    with pytest.raises(TypeError, match="grad-cam has no option 'iterations'"):
        ol.explain({"grad-cam": {"iterations": 2}}, classifier, images, targets)
    with pytest.raises(ValueError, match="no method was given"):
        ol.explain([], classifier, images, targets)


def test_a_method_that_does_not_fit_names_those_that_do(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"cam can't explain .*: .* These can: .*opti-cam"):
        ol.explain(["grad-cam", "cam"], make_classifier("dense"), images)
    with pytest.raises(ValueError, match=r"rollout can't explain .*These can: .*grad-cam") as error:
        ol.explain("rollout", make_classifier("cnn"), images)
    assert "tibav" not in str(error.value).partition("These can:")[2]


def test_one_image(images: Tensor, targets: Tensor) -> None:
    classifier = make_classifier("cnn")
    mask = ol.explain("grad-cam", classifier, images[1], 3)
    assert mask.shape == (1, 1, 32, 32)
    expected = ol.explain("grad-cam", classifier, images, targets)[1:2]
    torch.testing.assert_close(mask, expected, rtol=0, atol=1e-5)


def test_a_dataset_and_its_targets(images: Tensor, targets: Tensor) -> None:
    classifier = make_classifier("cnn")
    dataset = ol.Images(images, targets)
    expected = ol.explain("grad-cam", classifier, images, targets)
    for batch_size in (None, 2):
        masks = ol.explain("grad-cam", classifier, dataset, batch_size=batch_size)
        torch.testing.assert_close(masks, expected, rtol=0, atol=1e-5)
    predicted = ol.explain("grad-cam", classifier, ol.Images(images))
    torch.testing.assert_close(predicted, ol.explain("grad-cam", classifier, images))
    chosen = ol.explain("grad-cam", classifier, dataset, 2)
    torch.testing.assert_close(chosen, ol.explain("grad-cam", classifier, images, 2))


def test_a_file_and_a_folder(tmp_path: Path) -> None:
    classifier = make_classifier("cnn")
    for i, image in enumerate(make_images(3)):
        save_image(image, tmp_path / f"{i}.png")
    read = torch.stack([ol.load_image(tmp_path / f"{i}.png", classifier) for i in range(3)])
    expected = ol.explain("grad-cam", classifier, read)
    folder = ol.explain("grad-cam", classifier, tmp_path, batch_size=2)
    torch.testing.assert_close(folder, expected, rtol=0, atol=1e-5)
    file = ol.explain("grad-cam", classifier, str(tmp_path / "1.png"))
    torch.testing.assert_close(file, expected[1:2], rtol=0, atol=1e-5)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ol.explain("grad-cam", classifier, tmp_path / "nowhere")


def test_images_that_can_not_be_read_have_a_mask_of_nan(tmp_path: Path) -> None:
    classifier = make_classifier("cnn")
    for i, image in enumerate(make_images(3)):
        save_image(image, tmp_path / f"{i}.png")
    expected = ol.explain("grad-cam", classifier, tmp_path)
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"^1 of 3 images can't be read, .*0\.png") as told:
        masks = ol.explain("grad-cam", classifier, tmp_path, batch_size=1)
    assert told[0].filename == __file__
    assert masks[0].isnan().all()
    torch.testing.assert_close(masks[1:], expected[1:], rtol=0, atol=1e-5)
    for i in (1, 2):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ol.ImageError, match=r"0\.png.*1\.png.*2\.png"):
        ol.explain("grad-cam", classifier, tmp_path)


def test_no_images_have_no_masks() -> None:
    found = ol.explain(["cam", "opti-cam"], make_classifier("cnn"), torch.zeros(0, 3, 32, 40), [])
    assert {name: tuple(m.shape) for name, m in found.items()} == {
        **{"cam": (0, 1, 32, 40), "opti-cam": (0, 1, 32, 40)}
    }


class Bar:
    """Stands in for tqdm and keeps what it is told."""

    def __init__(self, **settings: object) -> None:
        self.settings, self.n, self.told = settings, 0.0, []

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, more: float) -> None:
        self.n += more
        self.told.append(self.n)

    def set_description(self, *text: object, **settings: object) -> None:
        pass


def test_progress(images: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Bar] = []

    class Kept(Bar):
        def __init__(self, **settings: object) -> None:
            super().__init__(**settings)
            bars.append(self)

    monkeypatch.setattr("opticam_lite.methods.tqdm", Kept)
    seen = []
    ol.explain(
        ["grad-cam", "opti-cam"], make_classifier("cnn"), images, targets,
        batch_size=2, iterations=4, tolerance=0, callback=seen.append,
    )  # fmt: skip
    assert len(seen) == 8  # the caller's own callback is called, too
    assert bars[0].settings["total"] == 6
    assert bars[0].settings["delay"] == 2  # nothing is shown for what is quick
    assert bars[0].settings["leave"] is False
    assert bars[0].settings["disable"] is False
    steps = [2, 2.5, 3, 3.5, 4, 4, 5, 5.25, 5.5, 5.75, 6, 6]
    assert bars[0].told == pytest.approx(steps)
    ol.explain("grad-cam", make_classifier("cnn"), images, targets, progress=False)
    assert bars[1].settings["disable"] is True


def test_nothing_is_printed_for_what_is_quick(
    images: Tensor, targets: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    ol.explain("grad-cam", make_classifier("cnn"), images, targets)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("method", ["opti-cam", "score-cam"])
def test_control_c_leaves_the_network_as_found(
    method: str, images: Tensor, targets: Tensor
) -> None:
    classifier = make_classifier("cnn")
    expected = ol.explain(method, classifier, images, targets)
    before = state_of(classifier)

    def interrupt(step: ol.methods.Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ol.explain(method, classifier, images, targets, callback=interrupt)
    assert_same(before, state_of(classifier))
    again = ol.explain(method, classifier, images, targets)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


class Partly(ol.Dataset):
    """Two images, of which only the first has a target; it is not the predicted class."""

    name = "partly"

    def __init__(self, images: Tensor, target: int) -> None:
        self._images, self._target = images, target

    def __len__(self) -> int:
        return 2

    def sample(self, index: int) -> ol.Sample:
        return ol.Sample(str(index), self._images[index], self._target if index == 0 else None)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_image_without_a_target_takes_none_from_its_batch_mates(
    batch_size: int, images: Tensor
) -> None:
    classifier = make_classifier("cnn")
    predicted = classifier.predict(images)
    true = (int(predicted[0]) + 1) % classifier.classes
    dataset = Partly(images, true)
    found = ol.explain("grad-cam", classifier, dataset, batch_size=batch_size)
    expected = ol.explain("grad-cam", classifier, images[:2], [true, int(predicted[1])])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_classes_of_another_network_are_not_explained() -> None:
    scenes = ol.load_dataset("scenes")
    other = ol.Classifier(make_classifier("cnn").network, size=224, labels=list("abcde"))
    images, _ = scenes.batch(range(3))
    expected = ol.explain("grad-cam", other, images)
    told = r"Sequential does not know the classes of scenes \(.*the predicted classes"
    with pytest.warns(UserWarning, match=told):
        found = ol.explain("grad-cam", other, Firsts(scenes))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match=told):
        frame = ol.evaluate(other, Firsts(scenes), ["grad-cam"], ["AD"])
    assert frame["target"].tolist() == other.predict(images).tolist()
    with pytest.warns(UserWarning, match=told), pytest.raises(ValueError, match="boxes"):
        ol.evaluate(other, scenes, ["grad-cam"], ["LE"])


class Firsts(ol.Dataset):
    """The first three samples of the scenes."""

    def __init__(self, scenes: ol.Dataset) -> None:
        self.name, self.labels, self._scenes = scenes.name, scenes.labels, scenes

    def __len__(self) -> int:
        return 3

    def sample(self, index: int) -> ol.Sample:
        return self._scenes[index]


def test_a_size_that_the_network_does_not_take_is_named() -> None:
    for method in ("grad-cam", "raw-attention"):
        for h, w in ((40, 48), (24, 32)):
            with pytest.raises(ValueError, match=rf"fails on images of {h}×{w} .* for 32×32"):
                ol.explain(method, make_classifier("vit"), make_images(1, h, w), 0)
    dense = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 2))
    with pytest.raises(ValueError, match=r"fails on images of 8×9 \(.*mat1 and mat2.* for 8×8"):
        ol.explain("grad-cam", ol.Classifier(dense, "0", size=8), make_images(1, 8, 9), 0)
    masks = ol.explain("grad-cam", make_classifier("cnn"), make_images(1, 40, 48), 0)
    assert masks.shape == (1, 1, 40, 48)


def test_bad_calls(images: Tensor) -> None:
    classifier = make_classifier("cnn")
    with pytest.raises(ValueError, match="unknown method 'gradcam'; did you mean 'grad-cam'"):
        ol.explain("gradcam", classifier, images, 0)
    with pytest.raises(TypeError, match=r"grad-cam has no option 'iterations'.*no options"):
        ol.explain("grad-cam", classifier, images, 0, iterations=5)
    with pytest.raises(TypeError, match=r"no option 'iteration'; did you mean 'iterations'\?"):
        ol.explain("opti-cam", classifier, images, 0, iteration=5)
    with pytest.raises(TypeError, match=r"make one with ol\.load_model"):
        ol.explain("grad-cam", "resnet50", images, 0)  # type: ignore[arg-type]
    for rows in (2, 4):
        with pytest.raises(ValueError, match=rf"shape \({rows}, 12\); 3 images need one row each"):
            ol.explain("opti-cam", classifier, images, 0, initial_u=torch.zeros(rows, 12))
    with pytest.raises(ValueError, match="batch_size is 0"):
        ol.explain("grad-cam", classifier, images, 0, batch_size=0)
    with pytest.raises(ValueError, match="chunk is 0"):
        ol.explain("score-cam", classifier, images, 0, chunk=0)
