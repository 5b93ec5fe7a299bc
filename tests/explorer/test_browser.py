"""The explorer in JupyterLab, in a real browser: what no test of traits can see.

Needs Chromium; `CHROMIUM` may name its path. Without one the tests fail, and say why: whoever wants
to leave them out says so: `--ignore=tests/explorer/test_browser.py`.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Page, expect, sync_playwright

pytestmark = pytest.mark.slow
expect.set_options(timeout=120_000)  # a busy machine is no error

CELL = """\
import time
from pathlib import Path

import torch
import opticam_lite as ol
from opticam_lite.explorer import controller
from opticam_lite.methods import explain


def explain_unless_held(*given, **options):
    tell = options.get("callback")

    def tell_and_wait(step):
        tell(step)
        while Path("held").exists():
            time.sleep(0.01)

    return explain(*given, **options | ({"callback": tell_and_wait} if tell else {}))


controller.explain = explain_unless_held
torch.manual_seed(0)
network = torch.nn.Sequential(
    torch.nn.Conv2d(3, 24, 7, stride=2, padding=3), torch.nn.ReLU(),
    torch.nn.Conv2d(24, 48, 3, stride=2, padding=1), torch.nn.ReLU(),
    torch.nn.Conv2d(48, 48, 3, padding=1), torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(48, 4),
)
classifier = ol.Classifier(network, layer="5", size=224, labels=["cup", "key", "bolt", "ring"])
explorer = ol.explore(classifier, torch.rand(2, 3, 224, 224), targets=[0, 1])
explorer
"""


@pytest.fixture(scope="module")
def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None or not Path(path).exists():
        pytest.fail(
            f"no browser at {path or 'any of ' + ', '.join(names)}: install Chromium, name its "
            "path in CHROMIUM, or leave this file out with --ignore"
        )
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def lab(root: Path):
    """A JupyterLab of this environment's own, with a notebook of one cell; gives its address."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(CELL)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    nbformat.write(notebook, root / "explorer.ipynb")
    news = root / "settings" / "@jupyterlab" / "apputils-extension"
    news.mkdir(parents=True)
    (news / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        **{f"JUPYTER_{kind}_DIR": str(root / kind) for kind in ("CONFIG", "DATA", "RUNTIME")},
        "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"),
        "IPYTHONDIR": str(root / "ipython"),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
        *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"),
        *(f"--ServerApp.root_dir={root}", "--IdentityProvider.token=secret"),
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    log = (root / "lab.log").open("w")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"{address}/api?token=secret", timeout=5):
                    break
            except OSError:
                if server.poll() is not None or time.monotonic() > end:
                    pytest.fail(f"JupyterLab did not start:\n{(root / 'lab.log').read_text()}")
                time.sleep(0.2)
        yield f"{address}/doc/tree/explorer.ipynb?token=secret"
    finally:
        server.terminate()
        try:
            server.wait(20)  # it ends its kernels first
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


@pytest.fixture
def page(chromium: str, lab: str):
    """The notebook in a browser, its cell executed."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1500})
        page.set_default_timeout(120_000)
        page.goto(lab)
        try:
            # A cell run before the kernel has answered once would be forgotten.
            expect(page.get_by_text(re.compile(r"\| Idle$"))).to_be_visible(timeout=300_000)
            page.locator(".jp-CodeCell .cm-content").first.click()
            page.keyboard.press("Shift+Enter")
            expect(page.locator(".olx")).to_be_visible(timeout=300_000)
            yield page
        except BaseException:
            if "EXPLORER_SCREENSHOTS" in os.environ:
                page.screenshot(path=Path(os.environ["EXPLORER_SCREENSHOTS"]) / "failed.png")
            raise
        finally:
            browser.close()


def status(page: Page):
    return page.locator(".olx [role=status]")


def button(page: Page, name: str):
    return page.locator(".olx").get_by_role("button", name=name)


def keep(page: Page, name: str) -> None:
    """Keep a screenshot for people, where they asked for it."""
    if folder := os.environ.get("EXPLORER_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


@contextmanager
def held(root: Path) -> Iterator[None]:
    """Let a run wait after its step, so that however fast it is it can be looked at."""
    (root / "held").touch()
    try:
        yield
    finally:
        (root / "held").unlink()


def set_iterations(page: Page, number: int) -> None:
    readout = page.locator(".olx .widget-slider", has_text="Iterations").locator(".widget-readout")
    readout.click()
    page.keyboard.press("Control+A")
    page.keyboard.type(str(number))
    page.keyboard.press("Enter")


def shares(page: Page) -> float:
    """How much of the progress bar is filled, 0 to 1."""
    return page.locator(".olx .progress-bar").evaluate(
        "bar => bar.getBoundingClientRect().width / bar.parentElement.getBoundingClientRect().width"
    )


def test_a_run_is_seen_and_a_long_one_can_be_cancelled(page: Page, root: Path) -> None:
    expect(status(page)).to_have_text("Ready: press Run.")
    keep(page, "ready")

    set_iterations(page, 60)
    with held(root):
        button(page, "Run").click()
        expect(status(page)).to_have_text("Step 1 of 60")
        first = shares(page)
    page.wait_for_function("() => document.querySelectorAll('.olx img').length == 4")  # a preview
    keep(page, "running")
    expect(status(page)).to_have_text(re.compile(r"^Done in"))
    assert first < shares(page) == pytest.approx(1)
    pictures = page.locator(".olx img")
    alternatives = [pictures.nth(i).get_attribute("alt") for i in range(pictures.count())]
    assert len(alternatives) == 4
    assert "Saliency map of opti-cam for the class cup" in alternatives[1]
    assert all(pictures.nth(i).evaluate("image => image.naturalWidth > 0") for i in range(4))
    expect(page.locator(".olx")).to_contain_text("Probability of “cup”")
    keep(page, "done")

    set_iterations(page, 300)
    with held(root):
        button(page, "Run").click()
        expect(status(page)).to_have_text("Step 1 of 300")
        button(page, "Cancel").click()
        expect(status(page)).to_have_text("Cancelled after 1 of 300 steps.", timeout=30_000)
    assert shares(page) < 1
    expect(button(page, "Cancel")).to_be_disabled()
    keep(page, "cancelled")
    # The kernel is free, and the network as good as before.
    set_iterations(page, 5)
    button(page, "Run").click()
    expect(status(page)).to_have_text(re.compile(r"^Done in"))
    expect(page.locator(".jp-OutputArea .jp-RenderedText")).to_have_count(0)  # no stray output


def resize(page: Page, width: int) -> None:
    """Give the output that many pixels, by the width of the window."""
    output = page.locator(".jp-OutputArea-output").first
    page.set_viewport_size(
        {"width": 1100 - output.evaluate("o => o.clientWidth") + width, "height": 1500}
    )
    page.wait_for_function(
        "width => document.querySelector('.jp-OutputArea-output').clientWidth == width", arg=width
    )


def test_rows_stay_rows_beside_the_file_browser(page: Page) -> None:
    expect(status(page)).to_have_text("Ready: press Run.")
    resize(page, 848)  # what the file browser leaves of a window of 1280 pixels
    keep(page, "beside_the_file_browser")
    rows = page.locator(".olx > .widget-hbox").evaluate_all(
        "rows => rows.map(r => [...r.children].map(c => c.getBoundingClientRect().top))"
    )
    assert [len(row) for row in rows] == [2, 4, 3, 2]
    assert all(len(set(row)) == 1 for row in (rows[0], rows[2], rows[3]))


def test_the_widget_fits_a_column_and_shows_why_a_method_is_missing(page: Page, root: Path) -> None:
    expect(status(page)).to_have_text("Ready: press Run.")
    output = page.locator(".jp-OutputArea-output").first
    assert output.evaluate("o => o.scrollWidth <= o.clientWidth + 1")
    page.get_by_label("Method").select_option("grad-cam")
    button(page, "Run").click()
    expect(page.locator(".olx")).to_contain_text("grad-cam optimises nothing")
    expect(status(page)).to_have_text(re.compile(r"^Done in"))
    slider = page.locator(".olx .widget-slider", has_text="Iterations")
    expect(slider).to_be_hidden()
    keep(page, "grad_cam")
    layer = page.locator(".olx .widget-slider", has_text="Layer").locator(".noUi-target")
    expect(layer).not_to_have_attribute("disabled", "true")
    page.get_by_label("Method").select_option("lime")
    expect(layer).to_have_attribute("disabled", "true")
    expect(page.locator(".olx")).to_contain_text("lime uses no layer")
    with held(root):
        button(page, "Run").click()
        # How many steps it takes depends on the network's size.
        expect(status(page)).to_have_text(re.compile(r"^Step 1 of \d+$"))
        keep(page, "lime")
        button(page, "Cancel").click()
        expect(status(page)).to_have_text(
            re.compile(r"^Cancelled after 1 of \d+ steps"), timeout=30_000
        )
