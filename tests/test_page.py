"""Tests of the page in a real browser: what is clicked, painted and uploaded, and what comes back.

They need chromium and its driver; on Debian, `apt-get install chromium chromium-driver`. Where
REQUIRE_BROWSER is set, they fail without them and do not let themselves be skipped.
"""

import io
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import tiny
from PIL import Image
from quick import environment

from conprediff_jax.common import images
from conprediff_jax.data.holes import Hole
from conprediff_jax.train.loop import train

ROOT = pathlib.Path(__file__).parent.parent
NEEDED = ("chromium", "chromedriver")
WAIT = 120  # seconds, on a busy machine

reached = set()  # the hosts that this process has connected to


@pytest.fixture(scope="module")
def workdirs(one_device, tmp_path_factory):
    """A run with two classes and guidance, and a copy of it that lacks the log."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("cats", "dogs"):
        tiny.write_images(folder / "data" / name, 8)
    config = tiny.get_config()
    config.data.update(name=str(folder / "data"), threads=1)
    config.model.num_classes = 2
    config.condition.dropout = 0.1
    config.train.update(steps=4, checkpoint_every=4, sample_every=2)
    train(config, str(folder / "first"))
    shutil.copytree(folder / "first" / "checkpoints", folder / "second" / "checkpoints")
    return [str(folder / "first"), str(folder / "second")]


@pytest.fixture(scope="module")
def shown(workdirs, tmp_path_factory):
    pytest.importorskip("gradio", reason="gradio is not installed")
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("uploads"))
    sys.addaudithook(note_connections)
    from conprediff_jax.page import layout

    options = {"step": None, "batch_size": 4}
    names = layout.names_of(workdirs)
    return [
        layout.open_workdir(workdir, name, tiny.mesh_of(), **options)
        for workdir, name in zip(workdirs, names, strict=True)
    ]


def note_connections(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        reached.add(arguments[1][0])


@pytest.fixture(scope="module")
def address(shown):
    from conprediff_jax.page import layout

    page = layout.make(shown, lambda error: None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield layout.serve(page, "127.0.0.1", port)
    page.close(verbose=False)


class Page:
    """The page, as somebody sees it who has a mouse."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def wait(self, condition):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        ignored = [StaleElementReferenceException]
        waiting = WebDriverWait(self.driver, WAIT, 0.1, ignored_exceptions=ignored)
        return waiting.until(lambda _: condition())

    def all(self, selector):
        found = self.driver.find_elements("css selector", selector)
        return [element for element in found if element.is_displayed()]

    def one(self, selector, text=""):
        return self.wait(lambda: [e for e in self.all(selector) if text in e.text])[0]

    def open(self, tab):
        self.driver.get(self.address)
        self.one("button[role=tab]", tab).click()
        self.one("button.draw")

    def choose(self, number):
        """Clicks a number of images or fillings."""
        (radio,) = [e for e in self.all("fieldset label") if e.text == str(number)]
        radio.click()

    def pictures(self, selector, count):
        """The pixels of so many pictures, as soon as they are there."""
        found = self.wait(lambda: len(e := self.all(selector)) == count and e)
        sources = self.wait(lambda: [e.get_attribute("src") for e in found])
        return [pixels_at(source) for source in sources]

    def upload(self, file):
        """Chooses a file in the dialog that the visible button opens."""
        button = self.one("button", "Upload photo")
        within = "let e = arguments[0], s = 'input[type=file]';"
        within += "while (!e.querySelector(s)) e = e.parentElement; return e.querySelector(s)"
        self.driver.execute_script(within, button).send_keys(str(file))

    def message(self):
        """The message of an error, which is closed again."""
        toast = self.one("[data-testid=toast-body]")
        said = self.wait(lambda: toast.get_attribute("textContent"))
        self.one("[data-testid=toast-close]").click()
        self.wait(lambda: not self.all("[data-testid=toast-body]"))
        return said


def pixels_at(source):
    with urllib.request.urlopen(source) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())))


@pytest.fixture(scope="module")
def page(address):
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing:
        reason = f"there is no {' and no '.join(missing)}"
        (pytest.fail if "REQUIRE_BROWSER" in os.environ else pytest.skip)(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,1400"):
        options.add_argument(f"--{option}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield Page(driver, address)
    driver.quit()


def test_images_are_drawn_and_one_of_them_alone_from_noise(page, shown):
    page.open("Sample")
    labels = page.driver.find_element("css selector", "body").text
    assert "Class" in labels and "Guidance" in labels and "Captions" not in labels
    page.choose(4)
    page.one("button.draw").click()
    expected = shown[0].model.sample(4, batch_size=4)
    np.testing.assert_array_equal(page.pictures(".grid img", 4), expected)

    page.all(".grid img")[2].click()
    page.wait(lambda: "Image 2 of seed 0, after 3 of 3 calls" in page.one("body").text)
    alone, predicted = page.pictures(".larger img", 2)
    np.testing.assert_array_equal(alone, shown[0].model.sample(1, first=2)[0])
    np.testing.assert_array_equal(alone, predicted)  # DDIM ends at its last prediction
    from selenium.webdriver.common.keys import Keys

    slider = page.one("input[type=range][aria-label*='From noise']")
    slider.send_keys(Keys.HOME)
    page.wait(lambda: "after 0 of 3 calls" in page.one("body").text)
    (noise,) = page.pictures(".larger img", 1)
    first, *_ = shown[0].model.stages(16, 0, index=2)
    np.testing.assert_array_equal(noise, first.points[0])


def test_what_is_painted_over_is_filled(page, shown, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    page.open("Inpaint")
    photo = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    page.upload(tmp_path / "photo.png")
    page.wait(lambda: page.all(".editor canvas"))
    page.choose(2)

    page.one("button.draw").click()
    assert "Nothing is painted over" in page.message()
    canvas = page.one(".editor canvas")
    mouse = ActionChains(page.driver).move_to_element_with_offset(canvas, -50, -50)
    mouse.click_and_hold().move_by_offset(80, 20).move_by_offset(10, 70).release().perform()
    page.one("button.draw").click()
    known, *filled = page.pictures(".grid img", 3)
    hole = (known == 128).all(-1)
    assert 0.05 < hole.mean() < 0.6
    np.testing.assert_array_equal(known[~hole], photo[~hole])
    expected = shown[0].model.fillings(Hole("photo", photo, ~hole), 2, batch_size=2, quality="fast")
    np.testing.assert_array_equal(filled, expected)
    assert (filled[0] != filled[1]).any(-1)[hole].mean() > 0.9


def test_bad_uploads_and_numbers_are_one_message(page, tmp_path):
    page.open("Inpaint")
    page.one("button.draw").click()
    assert "There is no picture: upload a photo" in page.message()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "large.png").write_bytes(bytes(21 * 2**20))
    Image.new("1", (5000, 5000)).save(tmp_path / "wide.png")
    for name, said in (("text", "not an image"), ("large", "20"), ("wide", "5,000 x 5,000 pixels")):
        page.upload(tmp_path / f"{name}.png")
        assert said in page.message(), name
    seed = page.one("input[aria-label=Seed]")
    seed.clear()
    seed.send_keys("-1")
    page.one("button", "Draw sample").click()
    assert "seed is -1: it must be a whole number from 0" in page.message()


def test_two_users_get_what_each_has_asked_for(page, shown):
    driver, windows = page.driver, []
    for seed in ("5", "6"):
        driver.switch_to.new_window("tab")
        windows.append(driver.current_window_handle)
        page.open("Sample")
        field = page.one("input[aria-label=Seed]")
        field.clear()
        field.send_keys(seed)
        page.one("button.draw").click()
    for seed, window in zip((5, 6), windows, strict=True):
        driver.switch_to.window(window)
        expected = shown[0].model.sample(16, seed, batch_size=4)
        np.testing.assert_array_equal(page.pictures(".grid img", 16), expected)


def test_two_models_lie_over_each_other(page, shown):
    page.open("Compare")
    page.choose(4)
    page.one("button.draw").click()
    left, right = page.pictures("[data-testid=imageslider-image]", 2)
    np.testing.assert_array_equal(left, right)  # a model and its copy
    grid = images.grid(shown[0].model.sample(4, batch_size=4))
    scale = len(left) / len(grid)
    rows, columns = (((np.arange(side) + 0.5) / scale).astype(int) for side in left.shape[:2])
    np.testing.assert_array_equal(left, grid[rows][:, columns])


def test_a_run_is_watched(page, workdirs):
    page.driver.get(page.address)
    page.one("button[role=tab]", "Watch").click()
    page.wait(lambda: "Step 4" in page.one("body").text)
    page.wait(lambda: page.all(".vega-embed canvas, .vega-embed svg"))
    (grid,) = page.pictures(".larger img", 1)
    expected = Image.open(pathlib.Path(workdirs[0]) / "samples" / "step_0000004.png")
    np.testing.assert_array_equal(grid, expected)


def test_nothing_is_fetched_from_elsewhere(page):
    asked = [
        json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")
    ]
    sent = [m["params"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    addresses = {params["request"]["url"] for params in sent}
    local = (page.address, "data:", "blob:", "about:", "chrome:")
    assert len(addresses) > 50 and not [url for url in addresses if not url.startswith(local)]
    assert reached == {"127.0.0.1"}


# Imports what the command needs once, and then starts it in a process for each case.
START = """
import json, os, runpy, sys
import conprediff_jax.runs.restore

out, cases = sys.argv[1], json.loads(sys.argv[2])
for number, (gradio, arguments) in enumerate(cases):
    child = os.fork()
    if not child:
        os.dup2(os.open(f"{out}/{number}", os.O_WRONLY | os.O_CREAT), 2)
        if not gradio:
            sys.modules["gradio"] = None
        sys.argv = ["app", *arguments]
        try:
            runpy.run_module("conprediff_jax.app", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            os._exit(end.code)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2, open(f"{out}/{number}").read()
"""


def test_what_the_command_lacks_is_said_in_one_line(workdirs, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        good = f"--workdir={workdirs[0]}"
        cases = [
            (False, [good], 'needs gradio, which is not installed: pip install -e ".[app]"'),
            (True, [good, f"--port={port}"], f"--port is {port}: another program uses it"),
            (True, [good, "--host=no.such.host"], "--host is no.such.host: this machine knows no"),
            (True, [f"{good}/nothing"], "a workdir is a folder that training wrote"),
        ]
        given = json.dumps([case[:2] for case in cases])
        subprocess.run(
            [sys.executable, "-c", START, str(tmp_path), given],
            cwd=ROOT, env=environment(), check=True,
        )  # fmt: skip
    for number, (*_, message) in enumerate(cases):
        (line,) = (tmp_path / str(number)).read_text().splitlines()
        assert line.startswith("error: ") and message in line
