"""Image files of every kind become RGB in [0, 1]; broken ones are named; scenes know the truth."""

from __future__ import annotations

import errno
import json
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_classifier
from PIL import Image, features

import opticam_lite as ol
from opticam_lite import datasets
from opticam_lite.datasets import Photos, Scenes
from opticam_lite.datasets.files import images_of
from opticam_lite.datasets.images import SourceError, unreadable_kind
from opticam_lite.datasets.protocol import check_readable
from opticam_lite.network import Preprocessing
from opticam_lite.paths import data_dir

RED, BLUE = (200, 40, 20), (0, 0, 255)


def grey(value: int) -> tuple[int, ...]:
    return (value,) * 3


def small(classifier: ol.Classifier | None = None) -> ol.Classifier:
    """A classifier whose images are 32×32, resized to exactly that."""
    classifier = classifier or make_classifier("cnn")
    classifier.preprocessing = Preprocessing((32, 32), 32)
    return classifier


def halves(mode: str, left: object, right: object) -> Image.Image:
    """A 64×64 image whose left and right halves have one colour each."""
    image = Image.new(mode, (64, 64), left)
    image.paste(right, (32, 0, 64, 64))
    return image


def read(path: Path) -> list[list[float]]:
    """The colours in the middle of the left and of the right half, in 0…255."""
    pixels = 255 * ol.load_image(path, small())
    return [pixels[:, 16, x].round().tolist() for x in (8, 24)]


def palette(**info: int) -> Image.Image:
    image = halves("P", 0, 1)
    image.putpalette([*RED, 0, 0, 255])
    image.info.update(info)
    return image


def numbers(left: float, right: float, kind: type) -> Image.Image:
    values = np.full((64, 64), left, kind)
    values[:, 32:] = right
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (halves("RGB", RED, BLUE), "png", [RED, BLUE]),
        (halves("L", 10, 250), "png", [grey(10), grey(250)]),
        (halves("1", 0, 1), "png", [grey(0), grey(255)]),
        (palette(), "gif", [RED, BLUE]),
        (palette(transparency=1), "png", [RED, grey(255)]),
        (halves("RGBA", (*RED, 255), (0, 0, 0, 0)), "png", [RED, grey(255)]),
        (halves("LA", (10, 255), (10, 0)), "png", [grey(10), grey(255)]),
        (halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), "tif", [(255, 0, 0), grey(0)]),
        (halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), "jpg", [(255, 0, 0), grey(0)]),
        # 16 bits are scaled, not clipped, and a dark image of 16 bits stays dark.
        (numbers(257 * 60, 257 * 200, np.uint16), "png", [grey(60), grey(200)]),
        (numbers(257 * 60, 257 * 200, np.uint16), "tif", [grey(60), grey(200)]),
        (numbers(200, 200, np.uint16), "png", [grey(1), grey(1)]),
        (numbers(0.2, 1.0, np.float32), "tif", [grey(51), grey(255)]),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_modes(image: Image.Image, suffix: str, expected: list, tmp_path: Path) -> None:
    image.save(tmp_path / f"image.{suffix}", quality=95)
    found = np.array(read(tmp_path / f"image.{suffix}"))
    assert np.abs(found - expected).max() <= (6 if suffix == "jpg" else 0)


def test_a_dark_ppm_of_sixteen_bits_stays_dark(tmp_path: Path) -> None:
    (tmp_path / "dark.pgm").write_bytes(b"P5 64 64 1023 " + 64 * 64 * b"\x00\x03")
    assert read(tmp_path / "dark.pgm") == [[1, 1, 1], [1, 1, 1]]


def test_fractions_above_one_are_refused(tmp_path: Path) -> None:
    numbers(2e5, 1e6, np.float32).save(tmp_path / "odd.tif")
    with pytest.raises(ol.ImageError, match=r"odd\.tif has pixel values from"):
        read(tmp_path / "odd.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    """All eight files show the same upright picture."""
    upright = Image.new("RGB", (48, 48), "white")
    upright.paste((255, 0, 0), (0, 0, 24, 24))
    upright.paste((0, 0, 255), (24, 0, 48, 24))
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    pixels = ol.load_image(tmp_path / "photo.png", small())
    assert pixels[:, 6, 6].tolist() == [1, 0, 0]
    assert pixels[:, 6, 26].tolist() == [0, 0, 1]
    assert pixels[:, 26, 6].tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", [(16, 16), (16, 300), (17, 40), (301, 200), (16, 5000)])
def test_any_size_is_resized_and_cropped(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, RED).save(tmp_path / "image.png")
    pixels = ol.load_image(tmp_path / "image.png")
    assert pixels.shape == (3, 224, 224)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 100, 100], torch.tensor(RED) / 255)


def test_the_crop_is_the_one_of_torchvision(tmp_path: Path) -> None:
    from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

    noise = np.random.default_rng(0).integers(0, 255, (300, 421, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.save(tmp_path / "image.png")
    expected = Compose([Resize(256), CenterCrop(224), ToTensor()])(image)
    torch.testing.assert_close(ol.load_image(tmp_path / "image.png"), expected, rtol=0, atol=0)


def test_broken_files_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:1500])
    (tmp_path / "text.jpg").write_text("this is no image")
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (15, 40)).save(tmp_path / "tiny.png")
    for name, message in {
        "text.jpg": "is not an image that Pillow can read",
        "cut.jpg": "is damaged or incomplete",
        "empty.png": "is not an image that Pillow can read",
        "tiny.png": "is 15×40 pixels; at least 16",
    }.items():
        path = tmp_path / name
        with pytest.raises(ol.ImageError, match=f"{re.escape(str(path))} {re.escape(message)}"):
            ol.load_image(path)
    with pytest.raises(FileNotFoundError, match=r"there is no image file at .*nowhere"):
        ol.load_image(tmp_path / "nowhere.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pixels", [200, 150])
def test_a_decompression_bomb_is_refused(
    pixels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow warns above its limit and fails above twice that; both are too much for a class."""
    Image.new("L", (100, pixels)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 80)
    with pytest.raises(ol.ImageError, match=r"bomb\.png has too many pixels to be opened safely"):
        ol.load_image(tmp_path / "bomb.png")


# ------------------------------------------------------------------------------------------ photos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in (("b.png", "red"), ("a.JPG", "blue"), ("c.webp", "lime")):
        Image.new("RGB", (40, 40), colour).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_a_folder_without_labels(folder: Path) -> None:
    photos = ol.load_dataset(folder, classifier=small())
    assert len(photos) == 3
    assert [photos[i].id for i in range(3)] == ["a.JPG", "b.png", "c.webp"]
    images, targets = photos.batch([1, 2])
    assert images.shape == (2, 3, 32, 32)
    assert images[0, :, 5, 5].tolist() == [1, 0, 0]
    assert targets is None
    assert photos[-1].id == "c.webp"
    with pytest.raises(IndexError, match="photos has 3 images; there is no image 3"):
        photos[3]
    with pytest.raises(ValueError, match="at least one index"):
        photos.batch([])


def test_a_single_file(folder: Path) -> None:
    (photo,) = ol.load_dataset(folder / "b.png", classifier=small())
    assert photo.id == "b.png"


@pytest.mark.parametrize(
    "table",
    [
        "file,class_index\nb.png,2\na.JPG,0\n",
        "file,target,note\nb.png,2,x\na.JPG,0,y\n",
        "\ufefffile,label\nb.png,class 2\na.JPG,class 0\n",
        "file;label;note\nb.png;class 2;1,5\na.JPG;class 0;2,5\n",
        "file\ttarget\nb.png\t2\na.JPG\t0\n",
    ],
)
def test_labels(table: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(table, encoding="utf-8")
    photos = ol.load_dataset(folder, labels=tmp_path / "labels.csv", classifier=small())
    assert [photos[i].id for i in range(len(photos))] == ["b.png", "a.JPG"]
    assert photos.batch(range(2))[1].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ("file\nb.png\n", ValueError, "has the columns file; it needs"),
        ("", ValueError, "has the columns (none)"),
        ("file,target\nz.png,0\n", FileNotFoundError, "line 2: there is no image at"),
        ("file,target\nb.png,5\n", ValueError, "line 2: class 5 does not exist"),
        ("file,target\nb.png,-1\n", ValueError, "'-1' is neither a class index nor a class name"),
        ("file,label\nb.png,class 9\n", ValueError, "did you mean"),
        ("file,label\nb.png\n", ValueError, "'' is neither"),
        ("file,target\n", ValueError, "labels.csv names no image"),
        ("target,file\n3\n", ValueError, "line 2: there is no file name"),
        ("file,target\nb.png,²\n", ValueError, "'²' is neither a class index"),
        ("file,target\nb.png,0\nb.png,2\n", ValueError, "names b.png 2 times"),
        ("file,target\nb.png," + 140_000 * "1", ValueError, "labels.csv can't be read as a table"),
        ("file,label\nb.png,Häher\n".encode("latin-1"), ValueError, "can't be read as a table"),
    ],
)
def test_bad_tables(
    table: str | bytes, error: type[Exception], message: str, folder: Path, tmp_path: Path
) -> None:
    data = table if isinstance(table, bytes) else table.encode()
    (tmp_path / "labels.csv").write_bytes(data)
    with pytest.raises(error, match=re.escape(message)):
        Photos(folder, tmp_path / "labels.csv", small())


def test_a_name_of_two_classes_is_no_label(folder: Path, tmp_path: Path) -> None:
    cranes = ol.Classifier(small().network, labels=["duck", "crane", "crane", "a", "b"], size=32)
    (tmp_path / "labels.csv").write_text("file,label\nb.png,crane\n")
    with pytest.raises(ValueError, match="line 2: the network has 2 classes named 'crane'; give"):
        Photos(folder, tmp_path / "labels.csv", cranes)
    (tmp_path / "labels.csv").write_text("file,class_index\nb.png,2\n")
    assert Photos(folder, tmp_path / "labels.csv", cranes)[0].target == 2


def test_all_broken_files_of_a_batch_are_named(folder: Path) -> None:
    photos = ol.load_dataset(folder, classifier=small())
    whole = photos.batch(range(len(photos)))[0]
    (folder / photos.id(0)).write_bytes(b"nothing")
    with pytest.raises(ol.ImageError, match=rf"^\S*{re.escape(photos.id(0))} is not an image"):
        photos.batch(range(len(photos)))
    (folder / photos.id(1)).write_bytes(b"nothing")
    with pytest.raises(ol.ImageError) as caught:
        photos.batch(range(len(photos)))
    assert all(photos.id(i) in str(caught.value) for i in (0, 1))
    assert len(whole) == len(photos)


def test_a_name_that_is_not_utf8_is_refused(folder: Path) -> None:
    (folder / "zz\udcff.png").write_bytes((folder / "b.png").read_bytes())
    with pytest.raises(ValueError, match=r"the name 'zz\\udcff\.png' is not UTF-8, .* rename it"):
        ol.load_dataset(folder)


def test_missing_places(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither an existing folder or image nor one of"):
        ol.load_dataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no folder or image"):
        Photos(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no table of labels"):
        Photos(folder, tmp_path / "nowhere.csv")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="there are no images in"):
        ol.load_dataset(tmp_path / "void")
    with pytest.raises(ValueError, match="scenes has its own labels"):
        ol.load_dataset("scenes", labels="labels.csv")
    with pytest.raises(ValueError, match=r"has its own labels; leave labels='t\.csv' out"):
        ol.load_dataset(f"folders:{tmp_path}", labels="t.csv")
    with pytest.raises(TypeError, match="name is 123; the name of a dataset or a path is needed"):
        ol.load_dataset(123)  # type: ignore[arg-type]


def test_images_in_memory(images: torch.Tensor) -> None:
    dataset = ol.Images(images, [2, 0, 1], "mine")
    batch, targets = dataset.batch([2, 0])
    assert torch.equal(batch, images[[2, 0]])
    assert targets.tolist() == [1, 2]
    assert ol.Images(images)[0].target is None
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\) is needed"):
        ol.Images(images[0])
    with pytest.raises(ValueError, match="3 images need as many targets, not 1"):
        ol.Images(images, [0])
    for wrong in ([1.9, 0.0, 2.0], torch.ones(3), [True, False, True]):
        with pytest.raises(TypeError, match=r"targets are torch\.\w+; class indices \(int64\)"):
            ol.Images(images, wrong)
    assert len(ol.Images(images[:0], [])) == 0


def test_images_of_another_shape_have_another_fingerprint(images: torch.Tensor) -> None:
    other = ol.Images(images.reshape(3, 3, 16, 64))
    assert other.fingerprint(0) != ol.Images(images).fingerprint(0)
    assert ol.Images(images.clone()).fingerprint(0) == ol.Images(images).fingerprint(0)


def moves_away(dataset: ol.Dataset, folder: Path, message: str, index: int = 0) -> None:
    """Check that a folder's absence is an error of its own, and of no image."""
    before = dataset.fingerprint(index)
    away = folder.rename(folder.with_name("away"))
    for use in (dataset.__getitem__, dataset.fingerprint):
        with pytest.raises(SourceError, match=message):
            use(index)
    away.rename(folder)
    assert dataset[index].id == dataset.id(index)
    assert dataset.fingerprint(index) == before


def test_a_class_folder_that_moves_away_is_no_fault_of_its_images(folder: Path) -> None:
    dataset = ol.load_dataset(f"folders:{folder.parent}", classifier=None)
    moves_away(dataset, folder, r"the folder .*photos is gone; bring it back, and repeat")
    (folder / "a.JPG").unlink()
    with pytest.raises(FileNotFoundError, match="there is no image file at"):
        dataset[0]


def test_a_place_without_its_disk_is_no_fault_of_its_images(folder: Path) -> None:
    dataset = ol.load_dataset(folder)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(SourceError, match=r"the folder .*photos is empty; bring it back"):
        dataset[0]


# ------------------------------------------------------------------------------------------ scenes


@pytest.fixture
def copied_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the data with the first scenes alone, which `Scenes` reads."""
    (tmp_path / "networks").mkdir()
    about = json.loads((data_dir() / "scenes" / "annotations.json").read_text())
    about["scenes"] = about["scenes"][:3]
    for scene in about["scenes"]:
        for file in (scene["image"], scene["mask"], scene["twins"]["swapped"]["image"]):
            copy = tmp_path / "scenes" / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((data_dir() / "scenes" / file).read_bytes())
    (tmp_path / "scenes" / "annotations.json").write_text(json.dumps(about))
    monkeypatch.setenv("OPTICAM_DATA", str(tmp_path))
    return tmp_path / "scenes"


def test_a_fingerprint_is_of_all_that_a_scene_tells(copied_scenes: Path) -> None:
    def fingerprints() -> list[str]:
        return [d.fingerprint(0) for d in (Scenes(), Scenes("swapped"))]

    before = fingerprints()
    assert before[0] != before[1]
    assert fingerprints() == before
    changed = []
    for file, other in (("images/0000.jpg", "images/0001.jpg"), ("masks/0000.png",) * 2):
        path = copied_scenes / file
        whole = path.read_bytes()
        path.write_bytes((copied_scenes / other).read_bytes() + b" ")
        changed.append([a != b for a, b in zip(fingerprints(), before, strict=True)])
        path.write_bytes(whole)
    about = json.loads((copied_scenes / "annotations.json").read_text())
    about["scenes"][0]["boxes"][0][0] += 1
    (copied_scenes / "annotations.json").write_text(json.dumps(about))
    changed.append([a != b for a, b in zip(fingerprints(), before, strict=True)])
    assert changed == [[True, False], [True, True], [True, True]]


@pytest.mark.parametrize("place", ["", "images", "masks"])
def test_scenes_that_move_away(place: str, copied_scenes: Path) -> None:
    moves_away(Scenes(), copied_scenes / place, r"the folder .* is gone; bring it back")


def test_the_embedded_scenes() -> None:
    scenes = ol.load_dataset("scenes")
    assert len(scenes) >= 240
    assert len(scenes.labels) >= 8
    images, targets = scenes.batch(range(8))
    assert images.shape == (8, 3, 224, 224)
    assert images.dtype == torch.float32
    assert targets.max() < len(scenes.labels)
    for i in range(0, len(scenes), 37):
        sample = scenes[i]
        masks = sample.extra["masks"]
        assert len(masks) == len(sample.boxes) >= 1
        name = scenes.labels[sample.target]
        assert sample.extra["home"] == (scenes.home[name] == sample.extra["environment"])
        for mask, (x0, y0, x1, y1) in zip(masks, sample.boxes.tolist(), strict=True):
            rows, columns = torch.where(mask)
            assert (columns.min(), rows.min()) == (x0, y0)
            assert (columns.max() + 1, rows.max() + 1) == (x1, y1)


def test_the_twins() -> None:
    scenes = Scenes()
    swapped, empty = scenes.twin("swapped"), ol.load_dataset("scenes-empty")
    for i in range(3):
        before, other, without = scenes[i], swapped[i], empty[i]
        assert before.id == other.id == without.id
        assert before.target == other.target == without.target
        assert before.extra["environment"] == without.extra["environment"]
        assert before.extra["environment"] != other.extra["environment"]
        assert not other.extra["home"]
        assert torch.equal(before.boxes, other.boxes)
        assert len(without.boxes) == 0
        inside = before.extra["masks"].any(0)
        difference = (before.image - other.image).abs().mean(0)
        assert difference[inside].mean() < difference[~inside].mean() / 2
        gone = (before.image - without.image).abs().mean(0)
        assert gone[inside].mean() > 2 * gone[~inside].mean()
    with pytest.raises(ValueError, match="unknown twin 'swap'; did you mean 'swapped'"):
        scenes.twin("swap")


def test_missing_data_say_where_they_were_sought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTICAM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set OPTICAM_DATA"):
        ol.load_dataset("scenes")


def test_digits_are_a_class_index_unless_the_column_says_label(
    folder: Path, tmp_path: Path
) -> None:
    classifier = ol.Classifier(make_classifier("cnn").network, size=32, labels=list("12345"))
    for column, target in {"class_index": 1, "target": 1, "label": 0}.items():
        table = tmp_path / f"{column}.csv"
        table.write_text(f"file,{column}\nb.png,1\n")
        assert Photos(folder, table, classifier)[0].target == target


def test_a_table_for_one_image(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,target\nb.png,3\n")
    photo = ol.load_dataset(folder / "b.png", labels=tmp_path / "labels.csv")
    assert photo[0].target == photo.target(0) == 3


def test_targets_are_known_without_reading_images() -> None:
    scenes = ol.load_dataset("scenes")
    assert [scenes.target(i) for i in (0, 40, 200)] == [scenes[i].target for i in (0, 40, 200)]
    assert datasets.Unlabelled(scenes).target(0) is None


# ------------------------------------------------------------------------------ hostile folders

BROKEN = Path(__file__).parent / "broken"


@pytest.fixture
def hostile(folder: Path) -> Path:
    """The folder of photographs with everything in it that looks like an image and is none."""
    for file in BROKEN.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "dangling.jpg").symlink_to(folder / "nowhere")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    return folder


BAD = {
    *("tall_tiff.png", "dds.png", "avif.png", "dangling.jpg", "loop.jpg", "folder.jpg"),
    "pipe.jpg",
}


def test_whatever_is_no_image_is_one_image_error_that_names_the_file(hostile: Path) -> None:
    dataset = ol.load_dataset(hostile)
    for i in range(len(dataset)):
        if dataset.id(i) in BAD:
            with pytest.raises(ol.ImageError, match=re.escape(str(hostile / dataset.id(i)))):
                dataset[i]
        else:
            assert dataset[i].id == dataset.id(i)
        dataset.fingerprint(i)  # which must not wait for a pipe either
    assert {dataset.id(i) for i in range(len(dataset))} > BAD


def test_explain_leaves_out_what_can_not_be_read(hostile: Path) -> None:
    classifier = ol.load_model("scenes_resnet")
    dataset = ol.load_dataset(hostile, classifier=classifier)
    with pytest.warns(UserWarning, match=r"images can't be read, so their masks are NaN: .*pipe"):
        masks = ol.explain(["fake-cam", "cam"], classifier, dataset, batch_size=4)
    for i in range(len(dataset)):
        assert masks["cam"][i].isnan().all() == (dataset.id(i) in BAD)
    good = [i for i in range(len(dataset)) if dataset.id(i) not in BAD]
    expected = ol.explain("cam", classifier, dataset.batch(good)[0])
    torch.testing.assert_close(masks["cam"][good], expected, rtol=0, atol=1e-5)
    with pytest.raises(ol.ImageError, match="pipe"):
        ol.explain("cam", classifier, hostile / "pipe.jpg")


def test_evaluate_leaves_out_what_can_not_be_read(hostile: Path) -> None:
    classifier = ol.load_model("scenes_resnet")
    dataset = ol.load_dataset(hostile, classifier=classifier)
    frame = ol.evaluate(classifier, dataset, ["fake-cam"], ["AD"], progress=False)
    assert set(frame.loc[frame["error"].notna(), "image"]) == BAD


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "can't be opened: Permission denied"),
        (KeyError("tag"), "is damaged or incomplete ('tag')"),
        (ZeroDivisionError("0/0"), "is damaged or incomplete (0/0)"),
        (AssertionError(), "is damaged or incomplete ()"),
        (RecursionError("too deep"), "is damaged or incomplete (too deep)"),
    ],
)
def test_whatever_pillow_raises_is_an_image_error(
    error: Exception, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("opticam_lite.datasets.images.Image.open", fails)
    with pytest.raises(ol.ImageError, match=re.escape(f"{folder / 'b.png'} {message}")):
        ol.load_image(folder / "b.png")


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_an_error_that_may_pass_is_no_fault_of_the_image(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("opticam_lite.datasets.images.Image.open", fails)
    with pytest.raises(type(error)):
        ol.load_dataset(folder)[0]


def test_a_folder_without_permission_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="photos"):
        images_of(folder.parent, "photos")


def test_a_small_image_of_one_colour_is_no_absurd_header(tmp_path: Path) -> None:
    for name in ("flat.webp", "flat.png", "flat.tif", "flat.bmp"):
        Image.new("RGB", (600, 600), "white").save(tmp_path / name, lossless=True)
        assert ol.load_image(tmp_path / name).min() == 1


def test_avif_is_read_where_pillow_reads_it(tmp_path: Path) -> None:
    reads = bool(features.check("avif"))
    assert unreadable_kind("a.AVIF") != reads
    if reads:  # Pillow from 11.3 on, but for some platforms
        Image.new("RGB", (64, 64), "white").save(tmp_path / "a.avif")
        assert ol.load_dataset(tmp_path)[0].image.min() > 0.98


def test_kinds_that_are_not_read_are_counted_and_named(folder: Path) -> None:
    for name in ("IMG_1.HEIC", "x.dng", "y.svg"):
        (folder / name).write_bytes((folder / "b.png").read_bytes())
    with pytest.warns(UserWarning, match=r"images of .* \(3\): IMG_1\.HEIC, x\.dng, y\.svg; conv"):
        dataset = ol.load_dataset(folder)
    assert dataset.unread == ["IMG_1.HEIC", "x.dng", "y.svg"]
    assert not {dataset.id(i) for i in range(len(dataset))} & set(dataset.unread)
    for file in set(folder.iterdir()) - {folder / name for name in dataset.unread}:
        file.unlink()
    with pytest.raises(ValueError, match=r"no images in .*images of kinds .*\(3\).*IMG_1"):
        ol.load_dataset(folder)


def test_one_image_has_one_name(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    for again in ("./b.png", "x/../b.png", str(folder / "b.png")):
        table.write_text(f"file,class_index\nb.png,1\n{again},2\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"labels\.csv names b\.png 2 times"):
            Photos(folder, table)


@pytest.mark.parametrize(("there", "given"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_found_in_either_form(there: str, given: str, tmp_path: Path) -> None:
    def form(kind: str, text: str) -> str:
        return unicodedata.normalize(kind, text)

    folder = tmp_path / form(there, "Vögel") / form(there, "Gänse")
    folder.mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(folder / form(there, "é.png"))
    network = make_classifier("cnn").network
    classifier = ol.Classifier(network, size=32, labels=[form(given, "Gänse"), *"abcd"])
    table = tmp_path / "t.csv"
    table.write_text(form(given, "file,label\né.png,Gänse\n"), encoding="utf-8")
    photos = ol.load_dataset(form(given, str(folder)), labels=table, classifier=classifier)
    assert (photos.id(0), photos.target(0)) == (form(there, "é.png"), 0)
    assert photos[0].image.shape == (3, 32, 32)
    folders = ol.load_dataset(f"folders:{form(given, str(folder.parent))}", classifier=classifier)
    assert folders.target(0) == 0


def test_a_link_back_is_followed_once(tmp_path: Path) -> None:
    (tmp_path / "val" / "n01440764").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "val" / "n01440764" / "a.JPEG")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "back").symlink_to(tmp_path)
    assert len(ol.load_dataset(f"imagenet:{tmp_path}")) == 1


def test_thousands_of_broken_files_are_told_of_before_all_are_tried(
    folder: Path, tmp_path: Path
) -> None:
    class Broken(ol.Images):
        tried = 0

        def sample(self, index: int) -> ol.Sample:
            self.tried += 1
            if index != 19_999:
                raise ol.ImageError(f"{index}.jpg is damaged")
            return super().sample(0)

    dataset = Broken(torch.zeros(1, 3, 32, 32).expand(20_000, -1, -1, -1), name="many")
    classifier = make_classifier("cnn")
    for use in (
        lambda: ol.evaluate(classifier, dataset, ["fake-cam"], progress=False),
        lambda: ol.explain("fake-cam", classifier, dataset),
    ):
        dataset.tried = 0
        with pytest.raises(ol.ImageError, match=r"none of 200 .* of many, .*20000.*: 0\.jpg is"):
            use()
        assert dataset.tried == 200
    with pytest.raises(ol.ImageError, match="none of 200 images"):
        check_readable(dataset, range(10_000))
    check_readable(dataset, range(19_000, 20_000, 3))
