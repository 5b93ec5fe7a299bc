"""Published datasets in their real layouts, with the faults that real trees have."""

from __future__ import annotations

import hashlib
import pickle
import re
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import cnn, make_classifier
from PIL import Image, ImageDraw
from timm.data import ImageNetInfo
from torch import Tensor
from torchvision.datasets import Imagenette

import opticam_lite as ol
from opticam_lite.datasets.imagenet import synsets
from opticam_lite.datasets.images import SourceError, crop_boxes, crop_image
from opticam_lite.datasets.medical import KVASIR_CLASSES
from opticam_lite.datasets.protocol import knows_classes, of_known_classes
from opticam_lite.network import Preprocessing

RED = (255, 0, 0)
# The first ten images of the official ground truth: ids of the kit, and classes as everybody's
# networks have them (65 is the sea snake).
IDS = [490, 361, 171, 822, 297, 482, 13, 704, 599, 164]
CLASSES = [65, 970, 230, 809, 516, 57, 334, 415, 674, 332]
SYNSETS = ImageNetInfo().label_names()


def picture(path: Path, size: tuple[int, int] = (48, 40), colour: object = "blue") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, "JPEG" if path.suffix == ".JPEG" else None)
    return path


def touch(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}"


def annotation(
    synset: str, *boxes: tuple[int, ...], size: tuple[int, int] = (48, 40), objects: str = ""
) -> str:
    """The XML of an image, as ILSVRC2012_bbox_val_v3.tgz has it."""
    for x0, y0, x1, y1 in boxes:
        objects += (
            f"<object><name>{synset}</name><pose>Unspecified</pose><bndbox><xmin>{x0}</xmin>"
            f"<ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        )
    return (
        "<annotation><folder>val</folder><source><database>ILSVRC_2012</database></source>"
        f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
        f"{objects}</annotation>"
    )


def official(root: Path, n: int = 3) -> Path:
    """The three official archives, each unpacked in its folder."""
    for i in range(1, n + 1):
        picture(root / "ILSVRC2012_img_val" / f"{name(i)}.JPEG", colour=RED if i == 1 else "blue")
        xml = root / "ILSVRC2012_bbox_val_v3" / "val" / f"{name(i)}.xml"
        touch(xml, annotation(SYNSETS[CLASSES[i - 1]], (8, 4, 23, 19)).encode())
    truth = root / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    touch(truth, "".join(f"{i}\n" for i in IDS).encode())
    return root


def small(size: int = 32, resize: int = 36) -> ol.Classifier:
    classifier = make_classifier("cnn")
    classifier.preprocessing = Preprocessing((size, size), resize)
    return classifier


def targets(dataset: ol.Dataset) -> list[int | None]:
    return [dataset[i].target for i in range(len(dataset))]


def ids(dataset: ol.Dataset) -> list[str]:
    return [file for file, _ in dataset.files]


# ------------------------------------------------------------------------------------------- boxes


def coloured(image: Tensor) -> tuple[int, ...]:
    """The box of the red pixels of a blue image."""
    rows, columns = torch.where(image[0] > image[2])
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("settings", [((32, 32), 36), ((40, 24), 40), ((32, 32), 20)], ids=str)
@pytest.mark.parametrize("size", [(64, 64), (83, 50), (40, 97), (300, 20), (20, 233)], ids=str)
def test_a_box_goes_where_its_pixels_go(
    size: tuple[int, int], settings: tuple[tuple[int, int], int]
) -> None:
    """Larger, smaller and padded crops, and images so long that only the middle is kept."""
    width, height = size
    box = (3 * width // 8, height // 4, 9 * width // 16, 7 * height // 8)
    image = Image.new("RGB", size, "blue")
    image.paste(RED, box)
    preprocessing = Preprocessing(*settings)
    found = coloured(crop_image(image, preprocessing))
    boxes = crop_boxes(torch.tensor([box], dtype=torch.float64), width, height, preprocessing)
    assert boxes.dtype == torch.int64
    assert torch.allclose(boxes[0], torch.tensor(found), atol=1, rtol=0)


def test_a_box_is_clipped_and_vanishes_outside_the_crop() -> None:
    preprocessing = Preprocessing((20, 20), 20)
    boxes = torch.tensor([[0, 0, 30, 20], [0, 0, 9, 20], [0, 0, 100, 20], [89, 0, 100, 20]])
    cropped = crop_boxes(boxes.double(), 100, 20, preprocessing)  # columns 40 to 60 are kept
    assert cropped.tolist() == [[0, 0, 20, 20]]
    assert crop_boxes(torch.zeros(0, 4), 100, 20, preprocessing).shape == (0, 4)
    narrow = torch.tensor([[500, 0, 501, 1000]])
    assert crop_boxes(narrow.double(), 1000, 1000, preprocessing).shape == (0, 4)


# ---------------------------------------------------------------------------------------- ImageNet


def test_the_kit_numbers_the_synsets_differently() -> None:
    assert list(synsets()) == sorted(SYNSETS) == SYNSETS
    assert list(synsets().values()) == list(range(1000))


def test_the_official_layout(tmp_path: Path) -> None:
    dataset = ol.load_dataset(f"imagenet:{official(tmp_path, 10)}", classifier=small())
    assert isinstance(dataset, ol.Dataset)
    assert dataset.name == "imagenet"
    assert dataset.has_boxes
    assert ids(dataset) == [f"{name(i)}.JPEG" for i in range(1, 11)]
    assert targets(dataset) == CLASSES
    assert dataset.labels[65] == "sea snake"
    assert dataset[0].image.shape == (3, 32, 32)
    assert dataset[0].image[0].mean() > 0.9 > dataset[1].image[0].mean()
    # 48×40 is resized to 43×36 and columns 5 (43 − 32 = 11, halved, to even: 6) and rows 2 go.
    (box,) = dataset[0].boxes.tolist()
    assert box == pytest.approx([8 * 0.9 - 6, 4 * 0.9 - 2, 24 * 0.9 - 6, 20 * 0.9 - 2], abs=1)


def test_the_kaggle_layout(tmp_path: Path) -> None:
    solution = "ImageId,PredictionString\n"
    for i in (2, 1, 3):
        synset = SYNSETS[CLASSES[i - 1]]
        picture(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"{name(i)}.JPEG")
        picture(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "train" / synset / f"{synset}_1.JPEG")
        picture(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "test" / f"ILSVRC2012_test_{i:08}.JPEG")
        xml = tmp_path / "ILSVRC" / "Annotations" / "CLS-LOC" / "val" / f"{name(i)}.xml"
        touch(xml, annotation(synset, (8, 4, 23, 19), (0, 0, 47, 39)).encode())
        solution += f"{name(i)},{synset} 8 4 23 19 {synset} 0 0 47 39 \n"
    touch(tmp_path / "LOC_val_solution.csv", solution.encode())
    dataset = ol.load_dataset(f"imagenet:{tmp_path}")
    assert ids(dataset) == [f"{name(i)}.JPEG" for i in (1, 2, 3)]
    assert targets(dataset) == CLASSES[:3]
    assert len(dataset[1].boxes) == 2
    assert dataset[1].boxes[1].tolist() == [0, 0, 224, 224]
    touch(tmp_path / "LOC_val_solution.csv", solution.replace("n01751748 8", "n99 8").encode())
    with pytest.raises(ValueError, match=r"LOC_val_solution\.csv: 'n99' is none of ImageNet's"):
        ol.load_dataset(f"imagenet:{tmp_path}")
    touch(tmp_path / "LOC_val_solution.csv", solution.replace("ImageId", "Image").encode())
    with pytest.raises(ValueError, match="needs the columns ImageId and PredictionString"):
        ol.load_dataset(f"imagenet:{tmp_path}")


@pytest.mark.parametrize("xml", ["beside", "in one folder", "by synset", "none"])
def test_a_folder_for_each_synset(xml: str, tmp_path: Path) -> None:
    for i, c in ((1, 970), (2, 65)):
        place = {
            "beside": tmp_path / "val" / SYNSETS[c],
            "in one folder": tmp_path / "Annotations",
            "by synset": tmp_path / "Annotations" / SYNSETS[c],
        }
        picture(tmp_path / "val" / SYNSETS[c] / f"{name(i)}.JPEG")
        if xml != "none":
            content = annotation(SYNSETS[c], (8, 4, 23, 19))
            touch(place[xml] / f"{name(i)}.xml", content.encode())
    dataset = ol.load_dataset(f"imagenet:{tmp_path}", classifier=small())
    assert ids(dataset) == [f"{SYNSETS[65]}/{name(2)}.JPEG", f"{SYNSETS[970]}/{name(1)}.JPEG"]
    assert targets(dataset) == [65, 970]
    assert dataset.has_boxes == (xml != "none")
    assert len(dataset[0].boxes) == (xml != "none")


def test_labels_are_the_networks_where_it_has_all_classes(tmp_path: Path) -> None:
    labels = [f"name {c}" for c in range(1000)]
    classifier = ol.Classifier(cnn(1000), "4", labels=labels, size=32, device="cpu")
    dataset = ol.load_dataset(f"imagenet:{official(tmp_path)}", classifier=classifier)
    assert dataset.labels == labels


def test_labels_without_a_network_are_those_of_torchvision_and_timm_networks(
    tmp_path: Path,
) -> None:
    dataset = ol.load_dataset(f"imagenet:{official(tmp_path)}")
    for name in ("squeezenet1_1", "vit_tiny_patch16_224"):
        classifier = ol.load_model(name, weights="random", device="cpu")
        assert knows_classes(classifier, dataset)


def test_a_fingerprint_is_of_the_image_and_its_annotation(tmp_path: Path) -> None:
    root = official(tmp_path)
    dataset = ol.load_dataset(f"imagenet:{root}")
    before = [dataset.fingerprint(i) for i in range(3)]
    assert len(set(before)) == 3
    xml = next(root.rglob(f"{name(1)}.xml"))
    xml.write_bytes(xml.read_bytes().replace(b"<xmin>", b"<xmin> ", 1))
    picture(next(root.rglob(f"{name(2)}.JPEG")), colour="red")
    assert [dataset.fingerprint(i) == f for i, f in enumerate(before)] == [False, False, True]
    next(root.rglob(f"{name(3)}.xml")).unlink()
    assert dataset.fingerprint(2) != before[2]


def rectangle(corners: list[float]) -> Image.Image:
    image = Image.new("RGB", (80, 60), "blue")
    ImageDraw.Draw(image).rectangle([round(c) for c in corners], RED)
    return image


def encloses(
    root: Path, image: Image.Image, orientation: int, box: tuple[int, ...], stated: tuple[int, int]
) -> bool:
    """Whether the box of an image that is stored so encloses its red pixels."""
    official(root, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(root / "ILSVRC2012_img_val" / f"{name(1)}.JPEG", "JPEG", exif=exif, quality=95)
    xml = root / "ILSVRC2012_bbox_val_v3" / "val" / f"{name(1)}.xml"
    xml.write_text(annotation("n01751748", box, size=stated))
    (sample,) = ol.load_dataset(f"imagenet:{root}", classifier=small(60, 60))
    assert sample.boxes.shape == (1, 4)
    return torch.allclose(sample.boxes[0], torch.tensor(coloured(sample.image)), atol=1, rtol=0)


@pytest.mark.parametrize("stated", [(80, 60), (160, 120), (40, 90)], ids=str)
@pytest.mark.parametrize("orientation", [1, 6])
def test_boxes_scale_from_the_stated_to_the_upright_size(
    orientation: int, stated: tuple[int, int], tmp_path: Path
) -> None:
    """The rectangle of the XML, drawn on the upright image, is what the box encloses."""
    x0, y0, x1, y1 = (3 * stated[0] // 8, stated[1] // 4, 5 * stated[0] // 8, stated[1] // 2)
    kx, ky = 80 / stated[0], 60 / stated[1]
    image = rectangle([kx * x0, ky * y0, kx * (x1 + 1) - 1, ky * (y1 + 1) - 1])
    if orientation == 6:
        image = image.transpose(Image.Transpose.ROTATE_90)
    assert encloses(tmp_path, image, orientation, (x0, y0, x1, y1), stated)


@pytest.mark.parametrize("stated", [(80, 60), (160, 120), (53, 40), (0, 0)], ids=str)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_on_the_stored_pixels_turn_with_them(
    orientation: int, stated: tuple[int, int], tmp_path: Path
) -> None:
    w, h = stated if any(stated) else (80, 60)
    box = (w // 4, h // 2, w // 2, 7 * h // 8)
    image = rectangle([80 / w * c for c in box])
    assert encloses(tmp_path, image, orientation, box, stated)


def test_boxes_of_an_annotation_without_size_or_beyond_it(tmp_path: Path) -> None:
    official(tmp_path, 1)
    xml = tmp_path / "ILSVRC2012_bbox_val_v3" / "val" / f"{name(1)}.xml"
    xml.write_text(annotation("n01751748", (-3, -3, 60, 60), size=(0, 0)))
    dataset = ol.load_dataset(f"imagenet:{tmp_path}", classifier=small(60, 40))
    assert dataset[0].boxes.tolist() == [[6, 10, 54, 50]]  # the image, and not its padding


def test_imagenet_with_faults(tmp_path: Path) -> None:
    """A broken image or XML is its own sample's; a missing XML means no boxes."""
    official(tmp_path, 5)
    images, boxes = tmp_path / "ILSVRC2012_img_val", tmp_path / "ILSVRC2012_bbox_val_v3" / "val"
    whole = (images / f"{name(1)}.JPEG").read_bytes()
    touch(images / f"{name(1)}.JPEG", whole[: len(whole) // 2])
    (boxes / f"{name(2)}.xml").unlink()
    touch(boxes / f"{name(3)}.xml", b"<annotation><size>")
    touch(boxes / f"{name(4)}.xml", annotation("n01440764", (1, 1, 9, 9)).encode())
    for stray in (".DS_Store", f"._{name(1)}.JPEG", "Thumbs.db", "notes.txt", "mine.jpg"):
        touch(images / stray, b"no image")
    dataset = ol.load_dataset(f"imagenet:{tmp_path}", classifier=small())
    assert len(dataset) == 5
    with pytest.raises(ol.ImageError, match=rf"{name(1)}\.JPEG is damaged or incomplete"):
        dataset[0]
    assert dataset[1].boxes.shape == (0, 4)
    assert dataset[1].boxes.dtype == torch.int64
    with pytest.raises(ol.ImageError, match=rf"{name(3)}\.xml is no annotation that can be read"):
        dataset[2]
    with pytest.raises(ol.ImageError, match=r"shows n01440764, but .* of the class n04263257"):
        dataset[3]
    assert len(dataset[4].boxes) == 1


def test_boxes_that_move_away_are_not_taken_for_none(tmp_path: Path) -> None:
    dataset = ol.load_dataset(f"imagenet:{official(tmp_path)}", classifier=small())
    boxes = tmp_path / "ILSVRC2012_bbox_val_v3"
    away = boxes.rename(tmp_path / "away")
    for use in (dataset.__getitem__, dataset.fingerprint):
        with pytest.raises(SourceError, match=r"the folder .*val is gone; bring it back"):
            use(0)
    away.rename(boxes)
    assert len(dataset[0].boxes) == 1


def test_imagenet_with_a_class_folder_too_many(tmp_path: Path) -> None:
    picture(tmp_path / SYNSETS[0] / "1.JPEG")
    for harmless in (".cache", "__MACOSX"):
        picture(tmp_path / harmless / "1.JPEG")
    (tmp_path / "lost+found").mkdir()
    assert len(ol.load_dataset(f"imagenet:{tmp_path}")) == 1
    for folder in ("n99999999", "others"):
        picture(tmp_path / folder / "1.JPEG")
        with pytest.raises(ValueError, match=rf"{folder} is none of ImageNet's 1,000 synsets"):
            ol.load_dataset(f"imagenet:{tmp_path}")
        (tmp_path / folder / "1.JPEG").unlink()


def test_imagenet_without_a_part(tmp_path: Path) -> None:
    official(tmp_path / "set")
    truth = next(tmp_path.rglob("*ground_truth.txt"))
    (tmp_path / "void").mkdir()

    def fails(error: type[Exception], message: str, folder: str = "set") -> None:
        with pytest.raises(error, match=message):
            ol.load_dataset(f"imagenet:{tmp_path / folder}")

    truth.write_text("490\n361\n")
    fails(ValueError, r"truth\.txt knows 2 images, but not ILSVRC2012_val_00000003\.JPEG")
    truth.write_text("490\n1001\n171\n")
    fails(ValueError, "line 2: '1001' is no id from 1 to 1000")
    truth.unlink()
    fails(FileNotFoundError, r"copy ILSVRC2012_validation_ground_truth\.txt")
    picture(tmp_path / "set" / "val" / SYNSETS[0] / "1.JPEG")
    fails(ValueError, r"images in .*img_val and in .*val; name one")
    fails(FileNotFoundError, "there are no validation images below", "void")
    fails(FileNotFoundError, r"there is no folder at .*nowhere", "nowhere")


# -------------------------------------------------------------------------------------- Imagenette


@pytest.mark.parametrize("folder", ["imagenette2-320", "imagenette2", "imagenette2-160"])
def test_imagenette_that_is_there(folder: str, tmp_path: Path) -> None:
    for split, synset in (("val", SYNSETS[0]), ("val", SYNSETS[701]), ("train", SYNSETS[217])):
        picture(tmp_path / folder / split / synset / f"{synset}_1.JPEG")
    touch(tmp_path / folder / "noisy_imagenette.csv")
    for path in (tmp_path, tmp_path / folder):
        assert targets(ol.load_dataset(f"imagenette:{path}")) == [0, 701]
    train = ol.load_dataset(f"imagenette:{tmp_path}:train")
    assert train.name == "imagenette-train"
    assert targets(train) == [217]
    assert "English springer" in train.labels[217]
    assert not train.has_boxes
    with pytest.raises(ValueError, match="unknown split 'vale'; did you mean 'val'"):
        ol.load_dataset(f"imagenette:{tmp_path}:vale")
    picture(tmp_path / folder / "val" / "n00000000" / "1.JPEG")
    with pytest.raises(ValueError, match="n00000000 is none of ImageNet's 1,000 synsets"):
        ol.load_dataset(f"imagenette:{tmp_path}")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """A server with a small Imagenette; call it with the archive's name to have it downloaded."""
    folder = tmp_path / "served"
    for split in ("train", "val"):
        picture(folder / "imagenette2-320" / split / SYNSETS[0] / "n01440764_1.JPEG")
    with tarfile.open(folder / "imagenette2-320.tgz", "w:gz") as file:
        file.add(folder / "imagenette2-320", "imagenette2-320")
    handler = partial(QuietHandler, directory=str(folder))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def use(name: str, md5: str | None = None) -> str:
            url = f"http://127.0.0.1:{server.server_port}/{name}"
            md5 = md5 or hashlib.md5((folder / name).read_bytes()).hexdigest()
            monkeypatch.setattr(Imagenette, "_ARCHIVES", {"320px": (url, md5)})
            return url

        yield use
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_imagenette_is_downloaded(
    served: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served("imagenette2-320.tgz")
    place = tmp_path / "new" / "data"
    assert targets(ol.load_dataset(f"imagenette:{place}")) == [0]
    assert [p.name for p in place.iterdir()] == ["imagenette2-320"]
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(Imagenette, "_ARCHIVES", {})  # nothing is downloaded twice
    assert targets(ol.load_dataset(f"imagenette:{place}")) == [0]


@pytest.mark.parametrize("fault", ["no network", "damaged"])
def test_imagenette_that_cannot_be_downloaded(
    fault: str, served: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = served("imagenette2-320.tgz", "0" * 32)
    if fault == "no network":
        url = "http://127.0.0.1:1/imagenette2-320.tgz"
        monkeypatch.setattr(Imagenette, "_ARCHIVES", {"320px": (url, "0" * 32)})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConnectionError) as caught:
        ol.load_dataset(f"imagenette:{tmp_path / 'data'}")
    message = str(caught.value)
    assert url in message
    assert f"unpack it to {tmp_path / 'data' / 'imagenette2-320'}" in message
    assert sorted(tmp_path.iterdir()) == before  # not even an empty folder is left


# ----------------------------------------------------------------------------------------- medical


def test_chest_xrays(tmp_path: Path) -> None:
    """The archive's twice nested folder, greyscale files, macOS's leftovers."""
    for split, n in (("train", 3), ("val", 1), ("test", 2)):
        for kind, grey in (("NORMAL", 40), ("PNEUMONIA", 200)):
            for i in range(n):
                path = touch(tmp_path / "chest_xray" / split / kind / f"{kind}-{i}.jpeg")
                Image.new("L", (70, 50), grey).save(path)
            touch(tmp_path / "chest_xray" / split / kind / ".DS_Store")
        touch(tmp_path / "chest_xray" / split / ".DS_Store")
    touch(tmp_path / "chest_xray" / "__MACOSX" / "chest_xray" / "test" / "._NORMAL")
    test = ol.load_dataset(f"chest-xray:{tmp_path}", classifier=small())
    assert test.name == "chest-xray-test"
    assert test.labels == ["NORMAL", "PNEUMONIA"]
    assert ids(test) == [f"{k}/{k}-{i}.jpeg" for k in ("NORMAL", "PNEUMONIA") for i in (0, 1)]
    assert targets(test) == [0, 0, 1, 1]
    image = 255 * test[3].image
    assert image.shape == (3, 32, 32)
    assert image.flatten(1).mean(1).tolist() == pytest.approx([200] * 3, abs=1)
    for split, n in (("train", 6), ("val", 2)):
        assert len(ol.load_dataset(f"chest-xray:{tmp_path / 'chest_xray'}:{split}")) == n
    with pytest.raises(ValueError, match="unknown split 'tests'; did you mean 'test'"):
        ol.load_dataset(f"chest-xray:{tmp_path}:tests")
    (tmp_path / "chest_xray" / "test" / "NORMALS").mkdir()
    with pytest.raises(ValueError, match=r"one class folder too many: .* did you mean 'NORMAL'"):
        ol.load_dataset(f"chest-xray:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="has no folder 'test', nor has chest_xray in it"):
        ol.load_dataset(f"chest-xray:{tmp_path / 'chest_xray' / 'train'}")


def test_a_network_with_another_order_of_the_same_classes(tmp_path: Path) -> None:
    for kind in ("NORMAL", "PNEUMONIA"):
        picture(tmp_path / "test" / kind / "1.jpeg")
    swapped = ol.Classifier(cnn(2), "4", labels=["pneumonia", "normal"], size=32, device="cpu")
    dataset = ol.load_dataset(f"chest-xray:{tmp_path}", classifier=swapped)
    assert dataset.labels == ["pneumonia", "normal"]
    assert [(d.id, d.target) for d in dataset] == [("NORMAL/1.jpeg", 1), ("PNEUMONIA/1.jpeg", 0)]
    other = ol.Classifier(cnn(2), "4", labels=["cat", "dog"], size=32, device="cpu")
    with pytest.warns(UserWarning, match="does not know the classes of chest-xray-test"):
        assert loaded(tmp_path, other) == [None, None]
    more = ol.Classifier(cnn(3), "4", labels=["Pneumonia", "covid", "normal"], size=32)
    assert loaded(tmp_path, more) == [2, 0]
    assert loaded(tmp_path, ol.Classifier(cnn(2), "4", size=32)) == [0, 1]  # without names
    with pytest.warns(UserWarning, match="does not know the classes of chest-xray-test"):
        assert loaded(tmp_path, ol.Classifier(cnn(3), "4", size=32)) == [None, None]
    twice = ol.Classifier(cnn(3), "4", labels=["normal", "pneumonia", "Normal"], size=32)
    with pytest.raises(ValueError, match="Sequential has 2 classes of this name"):
        loaded(tmp_path, twice)


def loaded(path: Path, classifier: ol.Classifier) -> list[int | None]:
    """The targets of chest X-rays, as `evaluate` takes them."""
    dataset = ol.load_dataset(f"chest-xray:{path}", classifier=classifier)
    return targets(of_known_classes(classifier, dataset))


def test_kvasir_at_its_real_size(tmp_path: Path) -> None:
    for kind in KVASIR_CLASSES:
        (tmp_path / "kvasir-dataset-v2" / kind).mkdir(parents=True)
        for i in range(1000):
            (tmp_path / "kvasir-dataset-v2" / kind / f"{i:04}.jpg").touch()
    splits = {s: ol.load_dataset(f"kvasir:{tmp_path}:{s}") for s in ("train", "val", "test")}
    assert {s: len(d) for s, d in splits.items()} == {"train": 6000, "val": 1000, "test": 1000}
    assert ids(ol.load_dataset(f"kvasir:{tmp_path}")) == ids(splits["test"])
    assert len({i for d in splits.values() for i in ids(d)}) == 8000
    for split, n in (("train", 750), ("val", 125), ("test", 125)):
        of = [c for _, c in splits[split].files]
        assert [of.count(c) for c in range(8)] == [n] * 8
        assert all(file.startswith(KVASIR_CLASSES[c] + "/") for file, c in splits[split].files)
    # The order of each class, once more: it must never change, or results can't be compared.
    for kind in KVASIR_CLASSES:
        names = [f"{kind}/{i:04}.jpg" for i in range(1000)]
        names.sort(key=lambda n: hashlib.sha256(f"0 {n}".encode()).hexdigest())
        assert {i for i in ids(splits["test"]) if i.startswith(f"{kind}/")} == {*names[875:]}
        assert {i for i in ids(splits["val"]) if i.startswith(f"{kind}/")} == {*names[750:875]}
    other = ol.datasets.kvasir(tmp_path, "test", seed=1)
    assert len(other) == 1000
    assert ids(other) != ids(splits["test"])


@pytest.mark.parametrize(("each", "sizes"), [(1, (6, 1, 1)), (2, (12, 2, 2)), (10, (60, 10, 10))])
def test_kvasir_in_small(each: int, sizes: tuple[int, ...], tmp_path: Path) -> None:
    for kind in KVASIR_CLASSES:
        for i in range(each):
            picture(tmp_path / kind / f"{i}.jpg")
        touch(tmp_path / kind / "notes.txt")
    parts = [ol.load_dataset(f"kvasir:{tmp_path}:{s}") for s in ("train", "val", "test")]
    assert tuple(map(len, parts)) == sizes
    assert len({i for part in parts for i in ids(part)}) == 8 * each
    assert parts[0][0].image.shape == (3, 224, 224)
    assert parts[0].labels == list(KVASIR_CLASSES)
    (tmp_path / "polyp").mkdir()
    with pytest.raises(ValueError, match=r"polyp is one class folder too many.* mean 'polyps'"):
        ol.load_dataset(f"kvasir:{tmp_path}")
    (tmp_path / "polyp").rmdir()
    (tmp_path / "polyps").rename(tmp_path.parent / f"polyps-{each}")
    with pytest.raises(FileNotFoundError, match="has no class folder 'polyps'"):
        ol.load_dataset(f"kvasir:{tmp_path}")


# ---------------------------------------------------------------------------- a folder for a class


def birds(root: Path) -> Path:
    for bird, n in (("duck", 2), ("Mute_swan", 1), ("goose", 1)):
        for i in range(n):
            picture(root / bird / f"{i}.png")
    picture(root / "goose" / "more" / "9.JPG")
    picture(root / "stray.png")
    touch(root / "goose" / ".DS_Store")
    touch(root / "goose" / "._0.png")
    touch(root / "duck" / "Thumbs.db")
    (root / ".git").mkdir()
    return root


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    dataset = ol.load_dataset(f"folders:{birds(tmp_path / 'birds')}")
    assert dataset.name == "birds"
    assert dataset.labels == ["Mute_swan", "duck", "goose"]
    birds_and_files = "Mute_swan/0.png duck/0.png duck/1.png goose/0.png goose/more/9.JPG"
    assert ids(dataset) == birds_and_files.split()
    assert targets(dataset) == [0, 1, 1, 2, 2]
    touch(tmp_path / "birds" / "duck" / "0.png", b"no image")
    with pytest.raises(ol.ImageError, match=r"duck/0\.png is not an image"):
        dataset[1]
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="there are no images in"):
        ol.load_dataset(f"folders:{tmp_path / 'void'}")


def test_folders_are_the_networks_classes(tmp_path: Path) -> None:
    birds(tmp_path)
    labels = ["goose", "crane", "duck", "crane", "mute swan"]
    classifier = ol.Classifier(cnn(5), "4", labels=labels, size=32, device="cpu")
    dataset = ol.load_dataset(f"folders:{tmp_path}", classifier=classifier)
    assert dataset.labels == labels
    found = {d.id.split("/")[0]: d.target for d in dataset}
    assert found == {"Mute_swan": 4, "duck": 2, "goose": 0}
    (tmp_path / "ducks").mkdir()
    with pytest.raises(ValueError, match=r"ducks is no class of Sequential: .* mean 'duck'"):
        ol.load_dataset(f"folders:{tmp_path}", classifier=classifier)
    (tmp_path / "ducks").rename(tmp_path / "crane")
    with pytest.raises(ValueError, match="crane: Sequential has 2 classes of this name"):
        ol.load_dataset(f"folders:{tmp_path}", classifier=classifier)


def test_folders_for_a_network_without_class_names(tmp_path: Path) -> None:
    birds(tmp_path)
    nameless = ol.Classifier(cnn(3), "4", size=32, device="cpu")
    assert targets(ol.load_dataset(f"folders:{tmp_path}", classifier=nameless)) == [0, 1, 1, 2, 2]
    (tmp_path / "heron").mkdir()
    with pytest.raises(ValueError, match="has 4 class folders and Sequential 3 classes without"):
        ol.load_dataset(f"folders:{tmp_path}", classifier=nameless)


# ------------------------------------------------------------------------------ names and protocol


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("imagnet:/data", ValueError, "unknown dataset 'imagnet'; did you mean 'imagenet'"),
        ("chest_xray:/data", ValueError, "did you mean 'chest-xray'"),
        ("imagenet", ValueError, "'imagenet' needs the path of the images: imagenet:PATH"),
        ("kvasir:", ValueError, "'kvasir:' needs the path"),
        ("C:/nowhere", FileNotFoundError, "neither an existing folder or image nor one of scenes"),
        ("folders:/nowhere/at/all", FileNotFoundError, "there is no folder at /nowhere/at/all"),
    ],
)
def test_wrong_names(given: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ol.load_dataset(given)


def test_paths_with_colons_and_tildes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    birds(tmp_path / "of:today")
    assert len(ol.load_dataset("folders:~/of:today")) == 5
    for kind in ("NORMAL", "PNEUMONIA"):
        picture(tmp_path / "x:train" / "train" / kind / "1.jpeg")
    assert len(ol.load_dataset(f"chest-xray:{tmp_path}/x:train:train")) == 2
    with pytest.raises(FileNotFoundError, match="has no folder 'test'"):
        ol.load_dataset(f"chest-xray:{tmp_path}/x:train")
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "folders" / "1.png")
    assert ol.load_dataset("folders").name == "folders"


def test_which_have_boxes(images: Tensor) -> None:
    assert ol.load_dataset("scenes").has_boxes
    assert ol.load_dataset("scenes-swapped").has_boxes
    assert not ol.load_dataset("scenes-empty").has_boxes
    assert not ol.Images(images).has_boxes


def test_workers_get_datasets_without_networks(tmp_path: Path) -> None:
    """Pickled, they are small; read by threads, samples are the same."""
    classifier = make_classifier("cnn")
    weights = sum(p.numel() * 4 for p in classifier.network.parameters())
    assert weights > 4000
    picture(tmp_path / "photos" / "1.png")
    for given in (
        f"imagenet:{official(tmp_path / 'imagenet')}",
        f"folders:{birds(tmp_path / 'birds')}",
        tmp_path / "photos",
        "scenes",
    ):
        dataset = ol.load_dataset(given, classifier=None if "birds" in str(given) else classifier)
        pickled = pickle.dumps(dataset)
        assert b"Conv2d" not in pickled
        copy = pickle.loads(pickled)
        n = min(len(dataset), 4)
        with ThreadPoolExecutor(4) as threads:
            samples = [*threads.map(copy.__getitem__, range(n))]
        for i, sample in enumerate(samples):
            assert sample.id == dataset[i].id
            assert torch.equal(sample.image, dataset[i].image)
            assert torch.equal(sample.boxes, dataset[i].boxes)
