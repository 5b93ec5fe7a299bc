"""Progress bars, one a method: images done, rate and remaining time by the method's seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tqdm.auto import tqdm

from ..text import log_lines

Progress = bool | Callable[[str, int, int], object] | None
SECONDS_BEFORE = 2.0  # a shorter run shows no bars


class Tracker:
    """Counts the images that each method has done, and shows it.

    Args:
        progress: True for bars, a function of (method, images done, images in all), or neither.
        done: Method → images that are done already.
        total: Images in all.
    """

    def __init__(self, progress: Progress, done: Mapping[str, int], total: int) -> None:
        self._call = progress if callable(progress) else None
        self._done, self._total = dict(done), total
        self._seconds = dict.fromkeys(done, 0.0)
        self._bars: dict[str, tqdm] = {}
        if progress is True:
            width = max(map(len, done))
            notebook = any(c.__module__ == "tqdm.notebook" for c in tqdm.__mro__)
            log = log_lines(tqdm)
            # A notebook's font is proportional: labels are aligned by a width, not by spaces.
            bar = "{bar} {percentage:3.0f}%" if notebook else "{percentage:3.0f}% {bar}"
            self._bars = {
                method: tqdm(
                    desc=method if notebook else f"{method:<{width}}",
                    total=total,
                    initial=count,
                    delay=SECONDS_BEFORE,
                    leave=not notebook,  # in a notebook the result follows directly
                    bar_format=f"{{desc}} {bar} {{n_fmt}}/{{total_fmt}}{{postfix}}",
                    dynamic_ncols=not (notebook or log),
                    **log,
                )
                for method, count in done.items()
            }
            for shown in self._bars.values() if notebook else ():
                left, _, right = shown.container.children
                left.layout.width, right.layout.width = f"{width + 1}ch", "42ch"

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def update(self, method: str, images: int, seconds: float) -> None:
        """Count images of a method as done, and the seconds that they took."""
        self._done[method] += images
        self._seconds[method] += seconds
        if self._call is not None:
            self._call(method, self._done[method], self._total)
        if method in self._bars:
            bar = self._bars[method]
            rate = (self._done[method] - bar.initial) / max(self._seconds[method], 1e-9)
            left = (self._total - self._done[method]) / rate
            bar.set_postfix_str(
                f"{rate_in_words(rate)}, {tqdm.format_interval(left)} left", refresh=False
            )
            bar.update(images)


def rate_in_words(rate: float) -> str:
    """Return images a second with two digits or more, or seconds an image if there are few."""
    if rate < 0.1:
        return f"{1 / rate:.0f} s/img"
    return f"{rate:.0f} img/s" if rate >= 9.95 else f"{rate:.1f} img/s"
