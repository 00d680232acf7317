"""The page in a real browser: Chromium with a microphone that plays a file."""

import base64
import contextlib
import io
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

pytest.importorskip("gradio", reason="the page needs the extra page")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "before.tar.xz"
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address of a page with three small models, their folder, a recording)."""
    from ext_common.page import Settings
    from ext_common.page.__main__ import build, listen
    from ext_common.page.find import find

    folder = tmp_path_factory.mktemp("models")
    shutil.unpack_archive(GOLDEN, folder)
    beat = np.sign(np.sin(2 * np.pi * 120 * np.arange(4 * 48000) / 48000)) * 0.2
    soundfile.write(folder / "voice.wav", beat, 48000, subtype="PCM_16")
    jobs = ("speaker", "translation", "diffusion")
    line = '[x][INFO] {"epoch": 1, "train_loss": "2", "train_num_updates": "9"}\n'
    (folder / "speaker" / "train.log").write_text(line)
    settings = Settings(port=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        page = build(find(folder / job / "checkpoint.pt" for job in jobs)[0], settings)
        yield listen(page, settings), folder
        page.close(verbose=False)


@pytest.fixture(scope="module")
def browser(served):
    """Chromium."""
    _, folder = served
    fake = f"--use-file-for-fake-audio-capture={folder / 'voice.wav'}"
    flags = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*flags, fake])
        yield browser
        browser.close()


@pytest.fixture
def page(served, browser):
    """The page as it opens; fails on a request to the outside and on an error of its scripts."""
    outside, errors = [], []
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    page.on("request", lambda r: ours(r.url) or outside.append(r.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(served[0])
    page.get_by_role("tab", name="Speaker").wait_for(timeout=60_000)
    yield page
    page.close()
    assert not outside and not errors


def ours(url):
    return url.startswith(("http://127.0.0.1:", "data:", "blob:"))


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def test_a_voice_is_recorded_and_named(page, served):
    from fairseq_ext.speaker import SpeakerModel

    _, folder = served
    expected = SpeakerModel.from_checkpoint(folder / "speaker" / "checkpoint.pt").identify(
        str(folder / "voice.wav")
    )
    open_tab(page, "Speaker")
    page.get_by_role("button", name="Record", exact=True).first.click()
    time.sleep(2)
    page.get_by_role("button", name="Stop", exact=True).first.click()
    name = page.locator("#speaker-name h2")
    sync_api.expect(name).to_have_text(expected.speaker, timeout=30_000)
    assert page.locator("figure.wide img").count() == 1


def test_a_line_is_translated(page):
    open_tab(page, "Translation")
    page.get_by_label("Text, a sentence a line").fill("I like red apples.")
    page.get_by_role("button", name="Translate", exact=True).click()
    page.locator(".looks .t0").hover(timeout=30_000)
    shade = "getComputedStyle(document.querySelector('.looks .s0')).backgroundColor"
    before = page.evaluate(shade)
    page.locator(".looks .t1").focus()  # what a mouse can see, the keyboard can
    assert page.locator("textarea").nth(1).input_value()
    page.mouse.move(0, 0)
    assert page.evaluate(shade) != before or page.locator(".looks .s1").count()


def test_what_is_not_painted_over_stays(page):
    open_tab(page, "Pictures")
    for label, value in (("Steps", "3"), ("Images", "1")):
        page.get_by_label(f"number input for {label}").fill(value)
        page.keyboard.press("Tab")
    page.get_by_text("Paint over what is").click()
    page.get_by_role("button", name="Take the first that was drawn").click()
    canvas = page.locator("canvas").first
    canvas.wait_for(timeout=30_000)
    filled_image = page.locator("#filled img")
    for seconds in (1, 2, 4, 8, 8):  # a stroke before the image is there is lost
        time.sleep(seconds)
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 20, y - 20)
        page.mouse.down()
        page.mouse.move(x + 20, y + 20, steps=5)
        page.mouse.up()
        time.sleep(1)
        page.get_by_role("button", name="Fill", exact=True).click()
        with contextlib.suppress(sync_api.TimeoutError):
            filled_image.wait_for(timeout=8_000)
            break
    filled = small(filled_image.get_attribute("src"))
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#drawn img").wait_for(timeout=60_000)
    time.sleep(3)
    drawn = small(page.locator("#drawn img").get_attribute("src"))
    height, width = drawn.shape[:2]
    changed = np.argwhere((filled != drawn).reshape(height, width, -1).any(-1))
    # the brush is a fifth of the picture wide, in its middle
    assert len(changed)
    assert (abs(changed - [height / 2, width / 2]) <= max(2, height / 4)).all()


def small(source):
    """The one image in a grid, at the size of the model."""
    data = base64.b64decode(re.sub("^data:image/png;base64,", "", source))
    image = np.asarray(Image.open(io.BytesIO(data)))
    scale = next(k for k in range(1, 200) if not (len(image) % k or (len(image) // k - 4) % 2))
    while len(image) % (scale + 1) == 0 and scale < 199 and same_blocks(image, scale + 1):
        scale += 1
    return image[::scale, ::scale][2:-2, 2:-2]


def same_blocks(image, scale):
    return np.array_equal(image, image[::scale, ::scale].repeat(scale, 0).repeat(scale, 1))


@pytest.mark.parametrize("scheme,width", [("light", 1100), ("dark", 400)])
def test_nothing_serious_stands_in_anybodys_way(page, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 1000})
    page.reload()
    page.get_by_role("tab", name="Speaker").wait_for(timeout=60_000)
    for name in ("Speaker", "Translation", "Pictures", "Training"):
        open_tab(page, name)
        for closed in page.get_by_role("button", expanded=False).all():
            if closed.is_visible():
                closed.click()
        for seconds in (0.3, 1, 2):  # colours fade in
            time.sleep(seconds)
            found = Axe().run(page).response["violations"]
            bad = [(v["id"], v["nodes"][0]["html"][:120]) for v in found if v["impact"] in SERIOUS]
            if not bad:
                break
        assert not bad, name
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, name


def test_everything_is_reached_by_keyboard(page):
    """Each button and field of a tab has the focus at some time while the tab key is pressed."""
    for name in ("Speaker", "Translation", "Pictures", "Training"):
        open_tab(page, name)
        for closed in page.get_by_role("button", expanded=False).all():
            if closed.is_visible():
                closed.click()
        wanted = page.evaluate(NUMBER_CONTROLS)
        assert wanted
        page.get_by_role("tab", name=name, exact=True).focus()
        for _ in range(3 * len(wanted)):
            page.keyboard.press("Tab")
            wanted.pop(page.evaluate("document.activeElement.dataset.control"), None)
            if not wanted:
                break
        assert not wanted, name


# {number: what it is} of what can be pressed, chosen or written into
NUMBER_CONTROLS = """() => Object.fromEntries(
    [...document.querySelectorAll('[role=tabpanel] :is(button, input, textarea, select)')]
        .filter(one => one.checkVisibility({visibilityProperty: true}) && !one.disabled)
        .map((one, k) => {
            one.dataset.control = k
            return [k, one.getAttribute('aria-label') || one.innerText || one.outerHTML.slice(0, 150)]
        }))"""
