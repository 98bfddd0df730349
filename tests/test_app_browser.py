"""The app in headless Chromium, as a visitor uses it; skipped where Chromium or its driver are not installed."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from app_server import DATA, small_checkpoint
from PIL import Image

pytest.importorskip("gradio")
selenium = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
SPACE = Path(__file__).parents[1] / "hub_cards" / "space"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver"),
]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def served(command: list[str], port: int, **settings) -> subprocess.Popen:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **settings)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)
            return process
        except OSError:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.2)
    process.kill()
    raise AssertionError(f"nothing at port {port}")


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait(timeout=30)
    process.stderr.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    return [small_checkpoint(tmp_path_factory.mktemp(name), seed) for seed, name in enumerate(("first", "second"))]


@pytest.fixture(scope="module")
def app(models, tmp_path_factory):
    """(process, address, its folder for files) of `personvit app`."""
    port, files = free_port(), tmp_path_factory.mktemp("gradio")
    first, second = models
    command = [str(Path(sys.executable).with_name("personvit")), "app", "--model", f"first={first}"]
    command += ["--model", f"second={second}", "--gallery", f"demo={DATA}", "--port", str(port)]
    process = served(command, port, env=os.environ | {"GRADIO_TEMP_DIR": str(files)})
    yield process, f"http://127.0.0.1:{port}/", files
    stop(process)


@pytest.fixture(params=SIZES)
def browser(request, app):
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(CHROMEDRIVER))
    width, height = SIZES[request.param]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": request.param == "phone"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(app[1])
    WebDriverWait(driver, 60).until(lambda _: driver.find_elements(By.CSS_SELECTOR, "#query .pv-examples img"))
    yield driver
    driver.quit()


def results(browser) -> str:
    return browser.find_element(By.CSS_SELECTOR, "#results .prose").get_attribute("innerHTML")


def new_results(browser, before: str) -> str:
    WebDriverWait(browser, 90).until(lambda _: results(browser) != before)
    return results(browser)


def choose(browser, part: str, file: Path) -> None:
    browser.find_element(By.CSS_SELECTOR, f"#{part} input[type=file]").send_keys(str(file))


def screenshot(browser, name: str) -> None:
    """For eyes: written where PERSONVIT_SCREENSHOTS says."""
    if folder := os.environ.get("PERSONVIT_SCREENSHOTS"):
        width = browser.execute_script("return window.innerWidth")
        browser.save_screenshot(str(Path(folder) / f"{name}-{width}.png"))


def test_a_visit(browser, app, tmp_path):
    """Upload, search, switch the model, a bad file, a file that is too large, compare two."""
    start = results(browser)
    assert "Choose a picture" in start
    picture = tmp_path / "person.jpg"
    Image.new("RGB", (60, 120), (90, 20, 200)).save(picture)
    choose(browser, "query", picture)
    found = new_results(browser, start)
    assert found.count("<figure>") == 10 and re.search(r"person -?\d+<br>camera \d", found)
    WebDriverWait(browser, 60).until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, "#explanations img")) == 3)
    # nothing sticks out of the page, and every picture shows
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.execute_script("return [...document.querySelectorAll('#results img')].every(i => i.naturalWidth)")
    screenshot(browser, "search")

    box = browser.find_element(By.CSS_SELECTOR, "#model input")
    box.click()
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("second", Keys.ENTER)
    switched = new_results(browser, found)
    assert switched.count("<figure>") == 10

    # what the browser can't show is not sent, and its name is no markup; what stood there stays
    bad = tmp_path / "<img src=x onerror=alert(1)>.jpg"
    bad.write_bytes(b"not a picture at all")
    choose(browser, "query", bad)
    problem = lambda _: f"{bad.name} is not an image" in browser.find_element(By.ID, "query").text  # noqa: E731
    WebDriverWait(browser, 30).until(problem)
    assert results(browser) == switched
    screenshot(browser, "bad-file")

    gif = tmp_path / "moving.gif"  # what the browser alone can read
    Image.new("RGB", (60, 120)).save(gif)
    choose(browser, "query", gif)
    told = new_results(browser, switched)
    assert "not an image" in told and "<figure>" not in told

    large = tmp_path / "large.jpg"
    large.write_bytes(bytes(9 * 2**20))
    choose(browser, "query", large)
    problem = lambda _: "more than 8 MB" in browser.find_element(By.ID, "query").text  # noqa: E731
    WebDriverWait(browser, 30).until(problem)

    browser.find_element(By.CSS_SELECTOR, "#query .pv-examples button").click()
    assert new_results(browser, told).count("<figure>") == 10

    next(tab for tab in browser.find_elements(By.CSS_SELECTOR, "button[role=tab]") if "Compare" in tab.text).click()
    choose(browser, "first", picture)
    browser.find_element(By.CSS_SELECTOR, "#second .pv-examples button").click()
    compared = lambda _: "similarity" in browser.find_element(By.ID, "comparison").text  # noqa: E731
    WebDriverWait(browser, 60).until(compared)
    screenshot(browser, "compare")

    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors
    # nor does the browser keep anything
    stored = "const found = await indexedDB.databases(); return [found.map(d => d.name), Object.keys(localStorage)]"
    databases, keys = browser.execute_script(stored)
    assert not databases and not [key for key in keys if "theme" not in key and "locale" not in key]
    assert not [path for path in app[2].rglob("*") if path.is_file()]


@pytest.mark.parametrize("browser", ["desktop"], indirect=True)
def test_many_searches_in_a_row_take_no_more_memory(browser, app):
    server = psutil.Process(app[0].pid)
    buttons = len(browser.find_elements(By.CSS_SELECTOR, "#query .pv-examples button"))
    used, shown = [], results(browser)
    for i in range(80):
        # the same picture twice running would leave the page as it is
        browser.find_elements(By.CSS_SELECTOR, "#query .pv-examples button")[i % buttons].click()
        shown = new_results(browser, shown)
        assert shown.count("<figure>") == 10
        used.append(server.memory_info().rss / 2**20)
    # the first forty fill caches and the server's pools of memory; each search draws some 2 MB of pictures
    assert max(used[70:]) - max(used[40:50]) < 30, used


def test_the_space_serves_the_same_page(models, tmp_path):
    shutil.copytree(SPACE, tmp_path / "space")
    shutil.copytree(DATA, tmp_path / "space" / "data")
    card = (tmp_path / "space" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")
    import gradio

    assert front["sdk_version"].split(".")[0] == gradio.__version__.split(".")[0]
    port = free_port()
    command = [sys.executable, "app.py"]
    settings = {"cwd": tmp_path / "space", "env": os.environ | {"PERSONVIT_MODELS": models[0], "PORT": str(port)}}
    process = served(command, port, **settings)
    stop(process)
    missing = subprocess.run(
        command,
        cwd=tmp_path / "space",
        env={name: value for name, value in os.environ.items() if name != "PERSONVIT_MODELS"},
        capture_output=True,
        text=True,
    )
    assert missing.returncode != 0 and "PERSONVIT_MODELS" in missing.stderr
