import pytest
import torch

from opticam_lite import plots


def test_gallery_shows_every_image_with_its_caption_and_tells_them_in_the_alt_text() -> None:
    images = torch.rand(5, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    names = ["duck", "car", "mug", "lamp", "chair"]
    picture = plots.gallery(images, names, columns=3, title="Five")
    shown = [ax for ax in picture.figure.axes if ax.images]
    assert len(picture.figure.axes) == 6  # two rows of three
    assert [ax.get_title() for ax in shown] == names
    for ax, image in zip(shown, images, strict=True):
        assert (ax.images[0].get_array() == image.permute(1, 2, 0).numpy()).all()
    assert picture.alt == "Five: 5 images, by number: 0 duck; 1 car; 2 mug; 3 lamp; 4 chair."
    assert picture.png.startswith(b"\x89PNG")


def test_gallery_needs_no_more_columns_than_images() -> None:
    picture = plots.gallery(torch.rand(2, 3, 20, 20), ["a", "b"], columns=4, alt="Two.")
    assert len(picture.figure.axes) == 2
    assert picture.alt == "Two."


@pytest.mark.parametrize("captions", [["a"], ["a", "b", "c"]])
def test_gallery_needs_a_caption_for_each_image(captions: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{len(captions)} captions were given for 2 images"):
        plots.gallery(torch.rand(2, 3, 20, 20), captions)


@pytest.mark.parametrize("columns", [0, 1.5])
def test_gallery_needs_a_whole_number_of_columns(columns: float) -> None:
    with pytest.raises(ValueError, match=f"columns is {columns}; a whole number ≥ 1 is needed"):
        plots.gallery(torch.rand(2, 3, 20, 20), ["a", "b"], columns=columns)


def test_gallery_needs_images() -> None:
    with pytest.raises(ValueError, match="0 images"):
        plots.gallery(torch.rand(0, 3, 20, 20), [])
