"""demo/web: what the page finds in a real browser is what test_image.py finds; and it asks nobody else.

Needs Chromium and what `make web` downloads: skipped without them.
"""

import functools
import http.server
import json
import re
import shutil
import sys
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image, ImageCms
from runs import run_here

from demo.web import build
from src.boxes import DEFAULT_BOXES
from src.images import UPRIGHT, read_image
from src.usage import UserError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--use-fake-device-for-media-stream"]
PHOTOS = [build.PHOTOS / photo["file"] for photo in build.credited_photos()]
LOAD, DETECT = 60_000, 20_000  # milliseconds


class Handler(http.server.SimpleHTTPRequestHandler):
    """Static files; keeps the first line of every request, of those meant for other servers, too."""

    def end_headers(self):
        if self.server.isolated:  # which WebAssembly's threads need
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, form, *values):
        self.server.seen.append(self.requestline)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An HTTP server on loopback of what `make web` writes."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    if not all((build.RUNTIME / name).exists() for name in build.RUNTIME_FILES):
        pytest.skip(f"no {build.RUNTIME.name}: make web downloads it")
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["build.py", "--output", str(folder)])
        build.main()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    server.folder = folder
    server.isolated = True
    server.seen = []
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def browser(server):
    """Chromium, with a fake camera."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def open_page(browser, server, script=None, permissions=()):
    """The page in a context of its own, whose only way out is our server."""
    context = browser.new_context(proxy={"server": server.address, "bypass": "127.0.0.1"}, permissions=permissions)
    page = context.new_page()
    if script:
        page.add_init_script(script)
    page.goto(server.address)
    return page


def wait(page):
    """Wait for the detections of the image that was given last."""
    page.wait_for_function("document.getElementById('detections').ariaBusy === 'false'", timeout=LOAD)


@pytest.fixture(scope="module")
def page(browser, server):
    page = open_page(browser, server)
    wait(page)
    assert page.evaluate("crossOriginIsolated")  # with threads, where there are cores
    return page


def give(page, file):
    """Give an image file to the page, as its user chooses one."""
    page.evaluate("document.getElementById('image').ariaLabel = ''")  # the last one may have the same name
    page.set_input_files("#file", file)
    page.wait_for_selector(f'#image[aria-label="{file.name}"]', timeout=DETECT)
    wait(page)


def slide(page, score, nms):
    for name, value in ("score", score), ("nms", nms):
        page.locator(f"#{name}").fill(str(value))
    wait(page)


def listed(page):
    """The list of detections: (class, score, box) each."""
    read = "items => items.map(item => [item.innerText, ...[...item.querySelectorAll('data')].map(data => data.value)])"
    found = []
    for text, score, box in page.locator("#detections li").evaluate_all(read):
        score, box = float(score), [float(side) for side in box.split(",")]
        name, shown, *sides = re.fullmatch(r"(.+?)\s+(0\.\d\d|1.00)\s+(\d+), (\d+), (\d+), (\d+)", text).groups()
        assert float(shown) == pytest.approx(score, abs=0.0051)
        assert [float(side) for side in sides] == pytest.approx(box, abs=0.501)
        found.append((name, score, box))
    return found


@pytest.fixture(scope="module")
def reference(server):
    """The page's ONNX file in Python: reference(file, score, nms) -> what `listed` should give."""
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(server.folder / "detector.onnx")
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])

    def detect(file, score=0.3, nms=0.5):
        thresholds = {"score_threshold": np.array(score, np.float32), "nms_threshold": np.array(nms, np.float32)}
        boxes, labels, scores, _ = session.run(None, {"image": read_image(file)} | thresholds)
        return list(zip([classes[label] for label in labels], scores, boxes, strict=True))

    return detect


def assert_same(found, expected, score=1e-4, pixels=0.01):
    assert len(found) == len(expected) > 0
    for name, s, box in expected:
        same = [n == name and abs(s - t) <= score and np.abs(box - b).max() <= pixels for n, t, b in found]
        assert sum(same) == 1, f"{name} {s:.4f} {box} is not in {found}"


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """What a browser may read differently: a photo in all EXIF orientations, transparent, with a color profile."""
    folder = tmp_path_factory.mktemp("album")
    photo = Image.open(PHOTOS[0])
    for number in range(1, 9):
        exif = Image.Exif()
        exif[274] = number
        # Stored so that turning it upright gives the photo: 6 and 8 undo each other, the others themselves.
        turn = UPRIGHT.get({6: 8, 8: 6}.get(number, number))
        stored = photo if turn is None else photo.transpose(turn)
        stored.save(folder / f"orientation {number}.jpg", exif=exif, quality=95)
    alpha = np.tile(np.linspace(0, 255, photo.width).clip(60, 200) - 60, (photo.height, 1)).astype(np.uint8)
    see_through = photo.copy()
    see_through.putalpha(Image.fromarray(alpha))
    see_through.save(folder / "transparent.png")
    # sRGB with red and blue exchanged, which a browser that obeyed it would show.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"tXYZ").replace(b"bXYZ", b"rXYZ").replace(b"tXYZ", b"bXYZ")
    photo.save(folder / "profile.jpg", quality=95, icc_profile=profile)
    return folder


def test_finds_what_test_image_finds(page, tmp_path, monkeypatch):
    """Nearly: the ONNX file rounds resized pixels in another way, which moves scores of photos by up to 0.014."""
    files = ["--output", tmp_path / "drawn", "--json", tmp_path / "found.json"]
    options = ["--pretrained-model", build.CHECKPOINT, "--input", *PHOTOS]
    assert run_here(monkeypatch, "test_image.py", *options, *files) == 0
    for file, image in zip(PHOTOS, json.loads((tmp_path / "found.json").read_text())["images"], strict=True):
        give(page, file)
        expected = [(one["label"], one["score"], np.array(one["box"])) for one in image["detections"]]
        assert_same(listed(page), expected, score=0.02, pixels=0.01 * image["width"])


@pytest.mark.parametrize("name", [*(f"orientation {n}.jpg" for n in range(1, 9)), "transparent.png", "profile.jpg"])
def test_reads_a_file_as_read_image_does(page, reference, album, name):
    give(page, album / name)
    assert_same(listed(page), reference(album / name))


def test_the_sliders_are_the_thresholds(page, reference):
    give(page, PHOTOS[0])
    counts = set()
    for thresholds in (0.05, 0.5), (0.05, 0.2), (0.2, 1.0), (0.3, 0.5):
        slide(page, *thresholds)
        assert_same(listed(page), reference(PHOTOS[0], *thresholds))
        counts.add(len(listed(page)))
    assert len(counts) == 4
    slide(page, 0.99, 0.5)
    assert listed(page) == [] and "No detections" in page.locator("#status").inner_text()
    slide(page, 0.3, 0.5)


def test_see_inside_shows_the_default_box_of_a_detection(page, server):
    """The oracle: of all boxes of the network, the one with those corners; cells counted as the heads do."""
    give(page, PHOTOS[0])
    slide(page, 0.1, 0.5)
    model = onnx.load(server.folder / "detector.onnx")
    model.graph.output.append(onnx.helper.make_tensor_value_info("all_boxes", onnx.TensorProto.FLOAT, None))
    thresholds = {name: np.array(0.5, np.float32) for name in ("score_threshold", "nms_threshold")}
    image = read_image(PHOTOS[0])
    (boxes,) = onnxruntime.InferenceSession(model.SerializeToString()).run(["all_boxes"], {"image": image} | thresholds)
    boxes = boxes.clip(0, 1) * np.tile(image.shape[1::-1], 2)
    constants = DEFAULT_BOXES["ssdlite"]
    places = [
        (f"map {number} of 6 ({cells} × {cells} cells), row {row}, column {column}, default box {shape} of {shapes}:")
        for number, (cells, shapes) in enumerate(zip(constants.feature_maps, constants.per_cell, strict=True), 1)
        for shape in range(1, shapes + 1)
        for row in range(1, cells + 1)
        for column in range(1, cells + 1)
    ]
    found = listed(page)
    assert len({name for name, _, _ in found}) > 1  # whose order is that of scores, not of classes
    for k, (_, _, box) in enumerate(found):
        page.locator("#detections button").nth(k).focus()
        assert places[abs(boxes - box).sum(axis=1).argmin()] in page.locator("#origin").inner_text()
        assert page.locator("#inside > :last-child").is_visible()
    slide(page, 0.3, 0.5)


def test_boxes_lie_where_they_were_found(page):
    give(page, PHOTOS[0])
    frame, width = page.locator("#image").bounding_box(), Image.open(PHOTOS[0]).width
    for k, (_, _, box) in enumerate(listed(page)):
        shown = page.locator("#boxes li").nth(k).bounding_box()
        sides = shown["x"] - frame["x"], shown["y"] - frame["y"], shown["width"], shown["height"]
        left, top, right, bottom = box * np.array(frame["width"] / width)
        assert sides == pytest.approx((left, top, right - left, bottom - top), abs=1)


def test_the_photo_chosen_last_is_shown(page):
    """Though one chosen before takes longer to decode, as a large one does."""
    for file in PHOTOS[:2]:
        give(page, file)
    page.evaluate("""async () => {
        const decode = createImageBitmap, [last, first] = [...document.querySelectorAll("#strip button")].reverse();
        let late;
        globalThis.createImageBitmap = (...args) => {
            globalThis.createImageBitmap = decode;
            return late = new Promise((wake) => setTimeout(wake, 500)).then(() => decode(...args));
        };
        first.click();
        last.click();
        await late.then((bitmap) => 0, () => 0);
    }""")
    wait(page)
    assert page.locator("#image").get_attribute("aria-label") == PHOTOS[1].name


def test_a_new_image_comes_with_its_own_detections(page):
    give(page, PHOTOS[0])
    page.evaluate("""() => {
        const read = () => document.getElementById("detections").innerText;
        new MutationObserver((_, observer) => { observer.disconnect(); globalThis.atFirst = read(); })
            .observe(document.getElementById("image"), { attributeFilter: ["width"] });
    }""")
    page.set_input_files("#file", PHOTOS[1])
    page.wait_for_selector(f'#image[aria-label="{PHOTOS[1].name}"]', timeout=DETECT)
    wait(page)
    assert page.evaluate("atFirst") == page.evaluate("document.getElementById('detections').innerText")


def test_an_image_that_is_too_large_is_one_sentence(page, tmp_path, reference):
    Image.new("RGB", (70_000, 1), "white").save(tmp_path / "wide.png")
    page.set_input_files("#file", tmp_path / "wide.png")
    page.get_by_text("The detector failed on this image: it is too large for this browser").wait_for(timeout=DETECT)
    slide(page, 0.3, 0.5)
    assert listed(page) == []  # in particular not those of the image before
    give(page, PHOTOS[0])
    assert_same(listed(page), reference(PHOTOS[0]))


def test_a_file_that_is_no_image_is_one_sentence(page, tmp_path, reference):
    (tmp_path / "broken.jpg").write_bytes(PHOTOS[0].read_bytes()[:100])
    (tmp_path / "drawing.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"/>'
    )  # has no pixels
    expect = pytest.importorskip("playwright.sync_api").expect
    buttons = page.locator("#strip button").count()
    for name in "drawing.svg", "broken.jpg":
        page.set_input_files("#file", tmp_path / name)
        page.get_by_text(f"{name}: not an image that this browser can read.").wait_for(timeout=DETECT)
    expect(page.locator("#strip button")).to_have_count(buttons + 1)  # the drawing's
    page.evaluate("""() => { // the strip finds it broken before decoding does
        const decode = createImageBitmap;
        globalThis.createImageBitmap = async (...args) => {
            globalThis.createImageBitmap = decode;
            await new Promise((wake) => setTimeout(wake, 300));
            return decode(...args);
        };
    }""")
    page.set_input_files("#file", tmp_path / "broken.jpg")
    page.wait_for_timeout(600)
    assert page.locator("#image").is_visible()  # the one before
    page.set_input_files("#file", [PHOTOS[1], tmp_path / "broken.jpg"])
    page.wait_for_selector(f'#image[aria-label="{PHOTOS[1].name}"]', timeout=DETECT)
    wait(page)
    assert_same(listed(page), reference(PHOTOS[1]))
    expect(page.locator("#trouble")).to_have_text("broken.jpg: not an image that this browser can read.")
    give(page, PHOTOS[0])
    expect(page.locator("#trouble")).to_have_text("")


def test_no_camera_and_no_webassembly_are_one_sentence_each(page, browser, server):
    page.locator("#camera").click()
    page.get_by_text("No camera: there is none, or this page may not use it.").wait_for(timeout=DETECT)
    bare = open_page(browser, server, script="delete globalThis.WebAssembly")
    bare.get_by_text("This browser has no WebAssembly").wait_for(timeout=DETECT)


def test_until_it_is_loaded_it_takes_no_photo_and_loses_none(browser, server):
    page = open_page(browser, server, script="globalThis.Worker = class {}")
    page.get_by_text("Loading the detector").wait_for(timeout=DETECT)
    assert all(page.locator(control).evaluate("it => it.closest('[inert]')") for control in ("#file", "#score", "#nms"))
    for event in "dragover", "drop":  # which the browser would answer by leaving the page
        assert not page.evaluate(f"document.dispatchEvent(new DragEvent('{event}', {{ cancelable: true }}))")


def test_a_touch_beside_the_boxes_closes_see_inside(page):
    give(page, PHOTOS[1])
    touch = "item => item.dispatchEvent(new PointerEvent('pointerover', { bubbles: true, pointerType: 'touch' }))"
    page.locator("#boxes li").first.evaluate(touch)
    assert page.locator("#inside > div").count() == 2
    page.locator("#image").evaluate(touch)
    assert page.locator("#inside > div").count() == 0


def test_makes_no_request_after_loading_and_never_to_others(browser, server, reference, album):
    """Whatever is done with it, the camera included; from a plain server, without headers for threads."""
    server.isolated = False
    page = open_page(browser, server, permissions=["camera"])
    wait(page)
    assert not page.evaluate("crossOriginIsolated") and len(server.seen) > 5
    assert all(line.split()[1].startswith("/") for line in server.seen)  # no other server's, which come with its name
    shows, author, kind = re.search(r"(?m)^\| \[.+?\| (.+?) \| (.+?) \| \[(.+?)\]", build.CREDITS.read_text()).groups()
    assert page.locator("#credit").inner_text() == f"{shows}. Photo: {author}, {kind}"
    server.seen.clear()
    give(page, album / "transparent.png")
    assert_same(listed(page), reference(album / "transparent.png"))
    slide(page, 0.1, 1)
    page.locator("#strip button").nth(1).click()
    page.locator("#camera").click()
    page.wait_for_selector('#image[aria-label="Camera"]', timeout=DETECT)
    page.evaluate("""() => { // a photo, while the camera is coming
        document.getElementById("camera").click();
        document.getElementById("camera").click();
        document.querySelector("#strip button").click();
    }""")
    page.wait_for_selector(f'#image[aria-label="{shows}"]', timeout=DETECT)
    page.wait_for_selector("#camera[aria-pressed=false]")
    assert page.locator("#trouble").inner_text() == ""
    page.evaluate("""() => {
        const play = HTMLVideoElement.prototype.play;
        HTMLVideoElement.prototype.play = function () {
            globalThis.stream = this.srcObject;
            return play.call(this);
        };
    }""")
    page.locator("#camera").click()
    page.wait_for_selector('#image[aria-label="Camera"]', timeout=DETECT)
    page.evaluate("stream.getTracks()[0].stop()")  # unplugged
    page.get_by_text("No camera").wait_for(timeout=DETECT)
    page.wait_for_selector("#camera[aria-pressed=false]")
    assert server.seen == []
    page.evaluate("fetch('http://example.org/').catch(() => 0)")
    assert any("example.org" in line for line in server.seen)  # such a request would have been seen
    server.isolated = True


def test_the_page_is_small_and_credits_its_photos():
    assert sum(len((build.HERE / name).read_text().splitlines()) for name in build.PAGE) <= 400
    photos = build.credited_photos()
    assert len(photos) == 3 and all(photo["credit"].count('<a href="https://') == 2 for photo in photos)


def test_a_build_that_fails_changes_nothing_and_one_that_does_not_leaves_nothing_old(tmp_path, monkeypatch):
    folder = tmp_path / "dist"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(OSError), build.replacing(folder):
        raise OSError
    assert [file.name for file in tmp_path.rglob("*")] == ["dist", "old"]
    monkeypatch.setattr(sys, "argv", ["build.py", "--output", str(folder)])
    with pytest.raises(UserError, match="holds other files"):
        build.main()
    with build.replacing(folder) as new:
        (new / "new").touch()
    assert [file.name for file in tmp_path.rglob("*")] == ["dist", "new"]


def test_why_npm_fails_is_one_line(monkeypatch, tmp_path):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho npm error code E1 >&2; echo npm error FetchError: reason >&2; exit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(build, "RUNTIME", tmp_path / "none")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match=r"needs the network; start again \(FetchError: reason\)"):
        build.fetch_runtime()


def test_without_npm_make_web_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "RUNTIME", tmp_path / "none")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="npm is missing: install Node.js"):
        build.fetch_runtime()
