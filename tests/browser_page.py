"""The local page in a real browser: `make browser`. It needs Chromium on this machine (on Debian: apt-get install chromium)."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from playwright.sync_api import expect, sync_playwright

from medvlm3d import fetch

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SHOTS = Path(os.environ.get("SHOTS", ROOT/"site-shots"))
FLAGS = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
         "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
PATIENCE = 120_000                        # ms; a picture drawn without a graphics card takes its time


@pytest.fixture(scope="session")
def address(tmp_path_factory):
    "The address of a page with the demo's model and a second one."
    second = shutil.copytree(ROOT/"reports/demo/model", tmp_path_factory.mktemp("models")/"again")
    command = [sys.executable, "-m", "medvlm3d", "app", "--port", "0", "--device", "cpu", "--max-megabytes", "200",
               "--model", str(ROOT/"reports/demo/model"), "--model", str(second)]
    place = tmp_path_factory.mktemp("visits")
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(place)})
    yield process.stderr.readline().split()[2]
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert not said and not list(place.glob("medvlm3d-visits-*")), "nothing is logged, and nothing stays"


@pytest.fixture(scope="session")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, "no Chromium is installed"
    with sync_playwright() as play:
        engine = play.chromium.launch(executable_path=found, args=list(FLAGS))
        yield engine
        engine.close()


@pytest.fixture
def visit(browser, address):
    "A function that opens the page in a fresh context; what asks for another host, or fails, is an error."
    contexts, wrong = [], []

    def begin(width=1280, height=900):
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        page.on("request", lambda r: None if r.url.startswith((address, "blob:", "data:")) else wrong.append(r.url))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" and not {"400", "404"} & {*m.text.split()} else None)
        page.goto(address)
        page.wait_for_selector("body[data-ready=yes]")
        return page

    yield begin
    for context in contexts: context.close()
    assert not wrong


def bring(page, files, selector="#file"):
    page.set_input_files(selector, files)
    page.wait_for_selector("body[data-scan=shown], body[data-scan=failed]")


def shot(page, name):
    SHOTS.mkdir(exist_ok=True)
    page.wait_for_timeout(500)
    page.screenshot(path=SHOTS/f"{name}.png", full_page=True)


def lung():
    return Path(fetch("radiomics"))/"lung1_image.nrrd"


def colours(page):
    "How many pixels of the viewer are not grey: the cross and the heat."
    return page.evaluate("""async () => {
        nv.drawScene();
        const picture = new Image();
        picture.src = nv.gl.canvas.toDataURL();
        await picture.decode();
        const flat = new OffscreenCanvas(picture.width, picture.height).getContext('2d');
        flat.drawImage(picture, 0, 0);
        const d = flat.getImageData(0, 0, picture.width, picture.height).data;
        let n = 0;
        for (let i = 0; i < d.length; i += 4) if (d[i] - d[i + 2] > 60) n++;
        return n;
    }""")


def test_a_real_ct_is_seen_asked_about_and_its_heat_shown(visit):
    page = visit()
    page.select_option("#modality", "CT") if page.is_visible("#modality") else page.evaluate("modality.value = 'CT'")
    bring(page, lung())
    assert page.is_hidden("#error"), page.inner_text("#error")
    assert page.locator("#strip img").count() == 8 and page.locator(".marks b").count() == 8
    before = page.inner_text("output[for=axial]")
    page.focus("#axial")
    for _ in range(5): page.keyboard.press("ArrowRight")
    assert page.inner_text("output[for=axial]") != before and "mm" in before
    shot(page, "desktop-scan")
    plain = colours(page)
    page.fill("#question", "Where is the lesion?")
    page.click("#send")
    page.wait_for_selector("article.shown")
    assert page.inner_text("article .words").strip() not in ("", "…") and page.is_visible("article .warnings")
    assert colours(page) > plain + 500
    shot(page, "desktop-heat")


def test_a_series_of_dicom_is_read_from_its_folder(visit):
    page = visit()
    bring(page, str(fetch("brain-mr-dicom")), "#folder")
    assert page.is_hidden("#error"), page.inner_text("#error")
    page.fill("#choices", "liver\nbrain\nlung")
    page.fill("#question", "Which organ is shown?")
    page.click("#send")
    page.wait_for_selector("article .odds meter")
    page.wait_for_selector("article.shown")
    assert page.locator("article .odds meter").count() == 3
    shot(page, "desktop-mr")


def test_only_a_keyboard(visit):
    "The question is reached, asked and answered without a mouse, and the slices are reached as well."
    page = visit()
    bring(page, lung())
    page.keyboard.press("Tab")
    reached = set()
    for _ in range(60):
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label') || ''"))
        page.keyboard.press("Tab")
    assert {"file", "folder", "view", "window", "axial", "coronal", "sagittal", "opacity", "question", "choices", "send"} <= reached
    assert any(name.startswith("kept slice") for name in reached)
    page.focus("#question")
    page.keyboard.type("Where is the lesion?")
    page.keyboard.press("Enter")
    page.wait_for_selector("article.shown")


def test_a_phone(visit):
    page = visit(390, 844)
    bring(page, lung())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the screen"
    page.click("#send")
    page.wait_for_selector("article.shown")
    shot(page, "phone")
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    assert page.locator("#notice").bounding_box()["y"] >= 0, "the notice stays in view"
    page.screenshot(path=SHOTS/"phone-end.png")


def test_two_visitors_at_once(visit):
    one, other = visit(), visit()
    bring(one, lung())
    bring(other, str(fetch("brain-mr-dicom")), "#folder")
    for page in (one, other): page.click("#send")
    for page in (one, other): page.wait_for_selector("article.shown")
    ids = {page.evaluate("scan.id") for page in (one, other)}
    assert len(ids) == 2
    foreign = one.evaluate("fetch('volumes/' + %r + '/view.nii', {headers: {Authorization: 'Bearer ' + token}}).then(r => r.status)"
                           % other.evaluate("scan.id"))
    assert foreign == 404


def test_compared_with_another_model(visit):
    page = visit()
    bring(page, lung())
    page.evaluate("compare.checked = true; selection2.value = 'cosine'; rho2.value = 50")
    page.click("#send")
    page.wait_for_selector("article.shown")
    assert page.locator(".pair article").count() == 2
    assert "the model was trained with" in page.inner_text(".pair article:nth-child(2) .warnings")
    shot(page, "desktop-compare")


def test_an_upload_that_lies(visit, tmp_path):
    "Its reason is shown, and the next scan is read."
    page = visit()
    bad = tmp_path/"scan.nii.gz"
    bad.write_bytes(b"\x1f\x8b" + b"no scan at all" * 40)
    bring(page, bad)
    assert page.is_visible("#error") and "scan.nii.gz" in page.inner_text("#error") and "/tmp" not in page.inner_text("#error")
    shot(page, "desktop-refused")
    bring(page, lung())
    assert page.is_hidden("#error")
