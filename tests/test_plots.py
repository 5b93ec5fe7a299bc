"""Figures carry alt text, show what they are given, and need no display."""

from __future__ import annotations

import html
import io
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from opticam_lite import plots


@pytest.fixture
def masks() -> Tensor:
    ramp = torch.linspace(0, 1, 32).expand(32, 32)
    return ramp.expand(3, 1, 32, 32).clone()


def test_the_overlay_mixes_grey_and_viridis(images: Tensor, masks: Tensor) -> None:
    mixed = plots.overlay(images[0], masks[0], strength=0.25)
    grey = images[0].mean(0)[5, 31].item()
    expected = 0.75 * grey + 0.25 * np.array(colormaps["viridis"](1.0)[:3])
    np.testing.assert_allclose(mixed[5, 31], expected, atol=1e-6)


@pytest.mark.parametrize("style", plots.STYLES)
def test_the_grid(style: str, images: Tensor, masks: Tensor) -> None:
    picture = plots.grid(
        images,
        {"one": masks, "two": 1 - masks},
        row_titles=["cat", "dog <3", "cow"],
        captions={"one": ["0.1 → 0.2"] * 3, "input": ["0.10"] * 3},
        style=style,
        title="A title",
    )
    panels = [a for a in picture.figure.axes if a.images]
    assert len(panels) == 9
    assert [a.get_title() for a in panels[:3]] == ["input", "one", "two"]
    assert [panels[i].get_ylabel() for i in (0, 3, 6)] == ["cat", "dog <3", "cow"]
    assert panels[1].get_xlabel() == "0.1 → 0.2"
    shown = np.asarray(panels[1].images[0].get_array())
    expected = {
        "overlay": plots.overlay(images[0], masks[0]),
        "mask": colormaps["viridis"](masks[0, 0].numpy())[..., :3],
        "masked": plots.to_array(images[0] * masks[0]),
    }[style]
    np.testing.assert_allclose(shown, expected, atol=1e-6)
    bars = [a for a in picture.figure.axes if a.get_ylabel() == "saliency"]
    assert len(bars) == (style != "masked")
    assert "Row 2 dog <3: input 0.10; one 0.1 → 0.2." in picture.alt
    assert picture.alt.startswith("A title: 3 images and their")


def test_the_grid_of_images_alone(images: Tensor) -> None:
    picture = plots.grid(images, {})
    assert len(picture.figure.axes) == 3
    assert picture.alt == "3 images and their saliency maps."
    assert plots.grid(images[:1], {}).alt == "1 image and its saliency map."


def test_alt_texts_count_and_name_what_is_there(images: Tensor, masks: Tensor) -> None:
    one = {"0.9 to 1, stretched": masks[:1], "two": masks[:1]}
    told = "1 image and its masked images by “0.9 to 1, stretched”, two."
    assert plots.grid(images[:1], one, style="masked").alt == told
    assert plots.gallery(images[:1], ["cup"], title="A title").alt == "A title: 1 image: cup."
    assert plots.gallery(images[:2], ["a", "b"]).alt == "2 images, by number: 0 a; 1 b."


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"style": "heat"}, "unknown style 'heat'"),
        ({"captions": {"won": ["a"] * 3}}, "unknown column 'won'; did you mean 'one'"),
        ({"probabilities": {"two": (torch.ones(3),) * 2}}, "unknown column 'two'"),
        ({"row_titles": ["a", "b"]}, "there are 2 row_titles for 3 images; one each is needed"),
        ({"row_titles": list("abcd")}, "there are 4 row_titles for 3"),
        ({"classes": ["a", "b"]}, "there are 2 classes for 3"),
        ({"captions": {"one": ["a", "b"]}}, "there are 2 captions of 'one' for 3"),
        (
            {"probabilities": {"one": (torch.ones(3), torch.ones(2))}},
            "there are 2 probabilities of 'one' for 3",
        ),
    ],
)
def test_bad_grids(wrong: dict, message: str, images: Tensor, masks: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        plots.grid(images, {"one": masks}, **wrong)
    with pytest.raises(ValueError, match="masks of 'one' have shape"):
        plots.grid(images, {"one": masks[:2]})


def test_nothing_lost_and_nothing_won_is_an_empty_chart() -> None:
    assert plots.lost_and_won({}).png.startswith(b"\x89PNG")


def test_a_picture_is_html_with_alt_text(images: Tensor, tmp_path: Path) -> None:
    picture = plots.grid(images[:1], {}, alt='a "quoted" <cat>')
    page = picture._repr_html_()
    assert html.unescape(re.search(r'<img alt="([^"]*)"', page)[1]) == 'a "quoted" <cat>'
    assert "data:image/png;base64," in page
    assert repr(picture) == 'Picture: a "quoted" <cat>'
    picture.save(tmp_path / "picture.png")
    with Image.open(io.BytesIO(picture.png)) as image:
        assert image.format == "PNG"
        assert min(image.size) > 100
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_curves_and_bars() -> None:
    picture = plots.curves(
        {"a": [0.0, 1.0, 4.0], "b": torch.tensor([2.0, 1.0, 0.5])}, xlabel="step", ylabel="value"
    )
    (ax,) = picture.figure.axes
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0, 1, 4], [2, 1, 0.5]]
    assert len({line.get_linestyle() for line in ax.lines}) == 2
    assert picture.alt == "value against step: a goes from 0 to 4; b goes from 2 to 0.5."
    named = plots.curves({"a": [1.0, 0.5]}, ticks=["first", "second"])
    assert [t.get_text() for t in named.figure.axes[0].get_xticklabels()] == ["first", "second"]
    one = plots.curves({"a": []}, title="Nothing")
    assert one.figure.axes[0].get_legend() is None
    assert one.alt == "Nothing against the index: ."
    bars = plots.bars({"x": 1.0, "y": 2.5}, ylabel="AD")
    assert [p.get_height() for p in bars.figure.axes[0].patches] == [1, 2.5]
    assert bars.alt == "Bar chart of AD: x 1; y 2.5."


def test_bars_have_the_digits_that_can_be_seen() -> None:
    values = {"fake-cam": 0.000165, "rollout": 36.12, "raw": 46.84}
    values |= {"none": float("nan"), "down": -0.01}
    picture = plots.bars(values, ylabel="AD")
    assert picture.alt == "Bar chart of AD: fake-cam 0; rollout 36.1; raw 46.8; none nan; down 0."
    assert [t.get_text() for t in picture.figure.axes[0].texts[:3]] == ["0", "36.1", "46.8"]
    # A table beside it has one decimal.
    assert plots.bars({"a": 37.5, "b": 62.5, "c": 100.0}).alt.endswith("a 37.5; b 62.5; c 100.")
    assert plots.bars({"a": 0.01234, "b": 0.0}).alt.endswith("a 0.0123; b 0.")
    assert plots.bars({"a": 0.0}).alt.endswith("a 0.")


def test_values_above_bars_stay_below_the_title() -> None:
    values = {f"a long name {i}": 40.0 for i in range(5)}  # leaves little height
    picture = plots.bars(
        values, intervals={"a long name 0": (0.5, 2.0)}, title="AG", size=(4.4, 2.9)
    )
    picture.png  # noqa: B018 - texts have their place once it is drawn
    (ax,) = picture.figure.axes
    gap = ax.title.get_window_extent().y0 - max(t.get_window_extent().y1 for t in ax.texts)
    assert gap > 6


def test_the_scale_of_a_tall_grid_is_no_taller_than_four_rows() -> None:
    picture = plots.grid(torch.rand(11, 3, 8, 8), {"a": torch.rand(11, 1, 8, 8)})
    picture.png  # noqa: B018
    *panels, scale = (ax.get_window_extent() for ax in picture.figure.axes)
    assert scale.height < 4.5 * panels[0].height
    assert abs(scale.y1 - panels[0].y1) < panels[0].height / 4


def test_bars_show_intervals_where_they_are_known() -> None:
    picture = plots.bars(
        {"a name": 10.0, "another name": 20.0, "a third name": 5.0},
        intervals={"a name": (8.5, 12.0), "another name": (math.nan, math.nan)},
        title="AD",
        size=(2.0, 2.0),
    )
    assert picture.alt == (
        "Bar chart of AD: a name 10 (8.5 to 12); another name 20; a third name 5."
    )
    (ax,) = picture.figure.axes
    (lines,) = ax.containers[0].lines[2]
    heights = [segment[:, 1].tolist() for segment in lines.get_segments() if len(segment)]
    assert [8.5, 12.0] in heights
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {35}


def test_what_is_lost_stands_left_of_the_names_and_what_is_won_right_of_them() -> None:
    values = {"grad-cam": (12.2, 17.6), "opti-cam": (1.5, 68.8)}
    marks = {"opti-cam": (2.0, 70.0), "cam": (9.0, 9.0)}
    picture = plots.lost_and_won(values, marks=marks, marked="theirs")
    picture.png  # noqa: B018 - axes have their place once they are drawn
    left, right = picture.figure.axes
    assert left.get_position().x1 < right.get_position().x0
    assert left.xaxis_inverted()
    assert not right.xaxis_inverted()
    for side, ax in enumerate((left, right)):
        figures = [pair[side] for pair in values.values()]
        assert [bar.get_width() for bar in ax.patches] == figures
        assert [t.get_text() for t in ax.texts] == [str(figure) for figure in figures]
        # Marks of names that are not drawn are left out.
        assert ax.collections[0].get_offsets().tolist() == [[marks["opti-cam"][side], 1]]
    assert [label.get_text() for label in right.get_yticklabels()] == ["grad-cam", "opti-cam"]
    assert left.yaxis_inverted()  # the first name is at the top
    assert [t.get_text() for t in picture.figure.legends[0].get_texts()] == ["theirs"]
    assert picture.alt == (
        "Bar chart of lost (AD, %) to the left and won (AG, %) to the right: "
        "grad-cam 12.2 and 17.6; opti-cam 1.5 and 68.8."
    )
    assert plots.lost_and_won(values).figure.legends == []


def test_pictures_are_drawn_in_any_thread(images: Tensor) -> None:
    def draw(i: int) -> int:
        return len(plots.grid(make_images(1, seed=i), {}, title=f"number {i}").png)

    with ThreadPoolExecutor(4) as pool:
        assert min(pool.map(draw, range(8))) > 1000


def test_the_grid_writes_class_and_probabilities_under_each_map(
    images: Tensor, masks: Tensor
) -> None:
    p, o = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.904, 0.5, 0.296])
    picture = plots.grid(
        images,
        {"one": masks, "two": masks},
        classes=["cat", "black-and-gold garden spider", "dog"],
        probabilities={"one": (p, o)},
        captions={"two": ["a", "b", "c"]},
    )
    panels = [a for a in picture.figure.axes if a.images]
    shown = [panels[i].get_xlabel() for i in (1, 4, 7)]
    assert shown == ["cat 0.10 → 0.90", "black-and-go… 0.20 → 0.50", "dog 0.30 → 0.30"]
    assert [panels[i].get_xlabel() for i in (0, 2, 5)] == ["", "a", "b"]
    assert "one black-and-gold garden spider 0.20 → 0.50; two b." in picture.alt
    bare = plots.grid(images, {"one": masks}, probabilities={"one": (p, o)})
    assert "Row 1: one 0.10 → 0.90." in bare.alt


def overlaps(texts: list) -> bool:
    """Whether any two texts of a drawn figure cover each other."""
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    return any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_long_titles_and_captions_stay_with_their_panel(images: Tensor, masks: Tensor) -> None:
    long = "great white shark, man-eater, man-eating shark, Carcharodon carcharias"
    picture = plots.grid(
        images,
        {long: masks, "a long title of a column": masks},
        row_titles=[long] * 3,
        captions={long: [long] * 3, "a long title of a column": ["one\ntwo", *[long] * 2]},
    )
    picture.png  # noqa: B018 - texts have their places when it is drawn
    panels = [a for a in picture.figure.axes if a.images]
    assert not overlaps([part for a in panels for part in (a.title, a.xaxis.label, a.yaxis.label)])
    assert panels[2].get_title() == "a long title of a\ncolumn"
    assert panels[0].get_ylabel().endswith("…")
    assert panels[1].get_xlabel().count("\n") == 1
    assert panels[2].get_xlabel() == "one\ntwo"
    # Nothing is cut for those who listen.
    assert picture.alt.count(long) == 1 + 3 + 3 + 3 + 2
    bare = plots.grid(images, {"one": masks})
    assert picture.figure.get_figheight() > bare.figure.get_figheight()


def test_long_captions_of_a_gallery_do_not_meet() -> None:
    captions = [f"class number {i} of a long name" for i in range(11)] + ["x" * 90]
    picture = plots.gallery(make_images(12), captions)
    picture.png  # noqa: B018
    titles = [a.title for a in picture.figure.axes]
    assert not overlaps(titles)
    assert titles[10].get_text() == "class number 10 of a long\nname"
    assert captions[11] in picture.alt


def test_what_is_counted_has_whole_ticks(images: Tensor, masks: Tensor) -> None:
    counted = plots.curves({"a": [0.1, 0.2, 0.3]}, x=range(1, 4))
    shares = plots.curves({"a": [0.1, 0.2, 0.3]}, x=[0.0, 0.25, 0.5])
    once = plots.trace(images[0], [1.0], {1: 0.5}, {1: masks[0]})
    assert " in 1 iteration." in once.alt
    for axes in (counted.figure.axes, once.figure.axes[:2]):
        assert all(float(tick).is_integer() for ax in axes for tick in ax.get_xticks())
    assert 0.1 in shares.figure.axes[0].get_xticks().round(2)


def test_the_trace_draws_two_curves_and_the_chosen_masks(images: Tensor, masks: Tensor) -> None:
    picture = plots.trace(
        images[0],
        torch.tensor([1.0, 2.0, 2.5, 2.25]),
        {1: 0.25, 2: 0.5, 4: 0.75},
        {1: masks[0], 4: 1 - masks[0]},
        whole=0.5,
        title="A title",
    )
    objective, probability, first, last = picture.figure.axes[:4]
    line, dots = objective.lines
    assert line.get_xydata().tolist() == [[1, 1], [2, 2], [3, 2.5], [4, 2.25]]
    assert dots.get_xydata().tolist() == [[1, 1], [4, 2.25]]
    line, dots, level = probability.lines
    assert line.get_xydata().tolist() == [[1, 0.25], [2, 0.5], [4, 0.75]]
    assert dots.get_xydata().tolist() == [[1, 0.25], [4, 0.75]]
    assert set(level.get_ydata()) == {0.5}
    assert [ax.get_title() for ax in (first, last)] == ["iteration 1", "iteration 4"]
    assert [ax.get_xlabel() for ax in (first, last)] == ["p = 0.25", "p = 0.75"]
    expected = plots.overlay(images[0], 1 - masks[0])
    np.testing.assert_allclose(np.asarray(last.images[0].get_array()), expected, atol=1e-6)
    assert picture.figure.axes[4].get_ylabel() == "saliency"
    assert picture.alt == (
        "A title: the objective goes from 1 to 2.25 in 4 iterations. The probability of the class "
        "is 0.50 in the whole image. Masks on the way and the probability with each: "
        "iteration 1 0.25; iteration 4 0.75."
    )
    assert picture.png.startswith(b"\x89PNG")


def test_a_trace_without_values_is_refused(images: Tensor, masks: Tensor) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.trace(images[0], [], {}, {1: masks[0]})
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.trace(images[0], [1.0], {1: 0.5}, {})
    for t, known in ((3, {3: 0.5}), (0, {0: 0.5}), (2, {1: 0.5})):
        with pytest.raises(ValueError, match=f"iteration {t} has a mask, but no objective or no"):
            plots.trace(images[0], [1.0, 2.0], known, {t: masks[0]})


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


NASTY = "_price_$10_vs_$20 <img src=x onerror=alert(1)> |*_`#\n# \x07\u202e \\ 日本 🦆 " + "n" * 200


@pytest.mark.parametrize("name", [NASTY, ""])
def test_any_name_is_drawn_as_it_is(name: str, images: Tensor, masks: Tensor) -> None:
    values, one = {name: 1.0, f"{name}2": 2.0}, images[:1]
    p = {name: (torch.tensor([0.1]), torch.tensor([0.2]))}
    series = {label: {label: (0.1, 0.0, 0.2)} for label in values}
    pairs = dict.fromkeys(values, (1.0, 2.0))
    texts = {"title": name, "xlabel": name, "ylabel": name}
    pictures = [
        plots.grid(
            one,
            {name: masks[:1]},
            row_titles=[name],
            classes=[name],
            probabilities=p,
            captions={"input": [name]},
            title=name,
        ),
        plots.gallery(one, [name], title=name),
        plots.curves({name: [1.0, 2.0], f"{name}2": [2.0, 1.0]}, **texts),
        plots.trace(one[0], [1.0], {1: 0.5}, {1: masks[0]}, title=name),
        plots.bars(values, intervals={name: (0.9, 1.1)}, ylabel=name, title=name),
        plots.lost_and_won(pairs, marks=pairs, marked=name, lost=name, won=name),
        plots.intervals(series, xlabel=name, title=name),
    ]
    for picture in pictures:
        assert not set("\n\x07") & set(picture.alt)
        width, height = picture.figure.get_size_inches()
        assert max(width, height) < 9
        assert Image.open(io.BytesIO(picture.png)).width < 1.6 * width * picture.figure.dpi
    legend = pictures[2].figure.axes[0].get_legend().get_texts()
    assert len(legend) == 2  # Matplotlib leaves names that begin with _ out


def test_a_dollar_stays_a_dollar() -> None:
    picture = plots.bars({"A$AP": 1.0, "$10 or $20": 2.0})
    picture.figure.canvas.draw()
    shown = [label.get_text() for label in picture.figure.axes[0].get_xticklabels()]
    assert shown == [r"A\$AP", r"\$10 or \$20"]  # how Matplotlib writes a dollar that is one
    assert "$10 or $20 2" in picture.alt


def test_a_letter_that_the_font_lacks_is_a_square() -> None:
    assert plots.fitted("é 鴨", 5, 10) == "é □"
