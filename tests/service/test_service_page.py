"""The page in a real browser: what a visitor sees and does with mouse, keyboard and phone, without barriers or errors.

DELF_MILVUS_CHROMIUM names the browser, else /usr/bin/chromium; without one these tests are skipped.
"""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_photo, save_photo
from service.serving import READ, WRITE, Process, png, process

from delf_milvus import DelfClient

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
axe_api = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")

CHROMIUM = Path(os.environ.get("DELF_MILVUS_CHROMIUM", "/usr/bin/chromium"))
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser {CHROMIUM} (DELF_MILVUS_CHROMIUM)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Process]:
    with process(tmp_path_factory.mktemp("page"), tiny_model, "--uploads", "uploads") as running:
        running.ready()
        yield running


@pytest.fixture
def stored(service: Process) -> Iterator[Process]:
    """The service with six photos of the years 2000 to 2005."""
    with DelfClient(service.address) as client:
        for seed in range(6):
            client.add(make_photo(seed), f"scenes/{seed}.png", {"year": 2000 + seed, "note": "x"})
        yield service
        client.delete([record.image_id for record in client.list(limit=1000).images])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("queries")
    for seed in (1, 2, 20, 21):
        save_photo(folder / f"{seed}.png", make_photo(seed))
    save_photo(folder / "part.png", np.ascontiguousarray(make_photo(1)[20:220, 30:310]))
    save_photo(folder / "stranger.png", make_photo(77))
    (folder / "bad.png").write_bytes(b"no photo")
    return folder


class Visit:
    """A page of a service. Its end fails for what the console said and for requests to anybody else."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(**(options or DESKTOP))
        self.page = self.context.new_page()
        self.address = address
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.set_default_timeout(30_000)
        self.page.on("console", lambda line: self.said.append(line.text) if line.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)

    def search(self, photo: Path) -> Any:
        """Choose a photo and wait for the answer, which is returned."""
        page = self.page
        with page.expect_response("**/v1/search") as answered:
            page.set_input_files("#file", photo)
        page.wait_for_selector("#verdict:visible")
        return answered.value.json()

    def barriers(self) -> list[str]:
        """What axe finds."""
        # A fading or moving thing has another contrast.
        self.page.wait_for_timeout(250)
        found = axe_api.Axe().run(self.page).response
        assert len(found["passes"]) > 10
        return [f"{one['id']}: {[node['target'] for node in one['nodes']]}" for one in found["violations"]]

    def end(self, *, expected: tuple[str, ...] = ()) -> None:
        self.context.close()
        assert [line for line in self.said if not any(word in line for word in expected)] == []
        allowed = (self.address, f"blob:{self.address}", "data:image/svg+xml")
        assert [url for url in self.asked if not url.startswith(allowed)] == []


def test_a_query_is_answered_with_proof_that_can_be_looked_at(browser: Any, stored: Process, photos: Path) -> None:
    visit = Visit(browser, stored.address)
    page = visit.page
    page.wait_for_selector("#collection:text('6 photos in delf')")
    answer = visit.search(photos / "part.png")
    first = page.locator(".hit").first
    assert "scenes/1.png" in first.inner_text()
    assert "✓ proved" in first.inner_text()
    assert "year: 2001" in first.inner_text()
    assert "same thing" in page.locator("#verdict h2").inner_text()
    # The tiny model has no calibration of its own.
    assert "rough guide" in page.locator("#verdict").inner_text()
    assert page.locator(".hit.unproved").count() == 5
    page.click("#options summary")
    page.uncheck("#unverified")
    assert page.locator(".hit.unproved").count() == 0

    first.click()
    # The query is a part of the stored photo, from (30, 20) on: laid over it, it lies there.
    base, over = page.wait_for_function(
        """() => {
            const places = [...document.querySelectorAll("#stage img")].map((image) => image.getBoundingClientRect());
            return places.length === 2 && places.every((place) => place.width) && places.map((place) => place.toJSON());
        }"""
    ).json_value()
    scale = base["width"] / 320
    (a, _, tx), (_, d, ty) = answer["hits"][0]["transform"]
    assert [(over["x"] - base["x"]) / scale, (over["y"] - base["y"]) / scale] == pytest.approx([tx, ty], abs=1)
    assert [over["width"] / scale, over["height"] / scale] == pytest.approx([280 * a, 200 * d], rel=0.05)
    assert [tx, ty] == pytest.approx([30, 20], abs=4)
    points = page.locator("#stage circle").count()
    assert points == len(answer["hits"][0]["correspondence"]["residuals"]) > 10
    clip = "document.querySelector('.swiped').style.clipPath"
    before = page.evaluate(clip)
    page.locator("#swipe").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(clip) != before
    page.mouse.move(base["x"] + 0.25 * base["width"], base["y"] + 20)
    assert page.evaluate(clip) == "inset(0px 0px 0px 25%)"
    page.check("input[value=pair]", force=True)
    assert page.locator("#stage line").count() == 2 * points
    page.uncheck("#lines")
    assert page.locator("#stage line").count() == 0
    page.keyboard.press("Escape")
    assert not page.locator("#compare").is_visible()
    visit.end()


def test_no_match_is_said_with_what_the_confidence_means(browser: Any, stored: Process, photos: Path) -> None:
    visit = Visit(browser, stored.address)
    page = visit.page
    page.click("#options summary")
    page.select_option("#bar", "0.001")
    visit.search(photos / "stranger.png")
    assert page.locator("#verdict h2").inner_text() == "No match"
    text = page.locator("#verdict").inner_text()
    assert "probability that it shows the same thing, if half of all queries have a match" in text
    assert "the bar is 1 in 1,000" in text
    assert page.locator(".hit:not(.unproved)").count() == 0
    assert page.locator(".hit.unproved").count() == 6
    visit.end()


def test_a_part_is_chosen_with_mouse_or_keyboard(browser: Any, stored: Process, photos: Path) -> None:
    visit = Visit(browser, stored.address)
    page = visit.page
    visit.search(photos / "1.png")
    place = page.locator("#query-image").bounding_box()
    scale = place["width"] / 320

    # What a form with a file sends is not shown to tests, so what is put into it is noted.
    page.evaluate("""() => {
        const set = FormData.prototype.set;
        FormData.prototype.set = function (name, ...rest) {
            if (name === "box") window.box = rest[0];
            return set.call(this, name, ...rest);
        };
    }""")

    def box_sent() -> list[float]:
        return [float(part) for part in page.evaluate("window.box").split(",")]

    page.mouse.move(place["x"] + 40 * scale, place["y"] + 30 * scale)
    page.mouse.down()
    page.mouse.move(place["x"] + 200 * scale, place["y"] + 150 * scale, steps=4)
    with page.expect_response("**/v1/search"):
        page.mouse.up()
    assert box_sent() == pytest.approx([40, 30, 200, 150], abs=2)
    page.wait_for_selector("#verdict:visible")
    with page.expect_response("**/v1/search"):
        page.get_by_role("button", name="Take the whole photo").press("Enter")
    page.get_by_role("button", name="Select a part").press("Enter")
    assert page.evaluate("document.activeElement.id") == "box"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    with page.expect_response("**/v1/search"):
        page.keyboard.press("Enter")
    assert box_sent() == pytest.approx([88, 60, 248, 186], abs=0.2)
    page.wait_for_selector("#verdict:visible")
    assert "160 × 126 px" in page.locator("#box-text").inner_text()
    page.locator("#box").press("Escape")
    assert not page.locator("#box").is_visible()
    assert page.evaluate("document.activeElement.id") == "box-button"
    visit.end()


def test_conditions_and_the_number_of_answers_count(browser: Any, stored: Process, photos: Path) -> None:
    visit = Visit(browser, stored.address)
    page = visit.page
    page.wait_for_selector("#collection:not(:empty)")
    page.click("#options summary")
    page.click("#filter-more")
    page.select_option(".filter-row select[aria-label=Comparison]", ">=")
    page.fill(".filter-row input", "2003")
    visit.search(photos / "1.png")
    names = page.locator(".hit-name").all_inner_texts()
    assert sorted(names) == ["scenes/3.png", "scenes/4.png", "scenes/5.png"]
    page.fill("#top", "2")
    with page.expect_response("**/v1/search"):
        page.keyboard.press("Enter")
    page.wait_for_selector(".hit")
    assert page.locator(".hit").count() == 2
    page.click("[aria-label='Remove this condition']")
    with page.expect_response("**/v1/search"):
        page.click("#search-button")
    page.wait_for_selector(".hit:not(.unproved)")
    assert page.locator(".hit-name").first.inner_text() == "scenes/1.png"
    visit.end()


def test_photos_are_dropped_and_pasted(browser: Any, stored: Process, photos: Path) -> None:
    visit = Visit(browser, stored.address)
    page = visit.page
    data = base64.b64encode((photos / "2.png").read_bytes()).decode()
    transfer = """(data) => {
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
        return transfer;
    }"""
    drop = (
        f"(data) => window.dispatchEvent(new DragEvent('drop', {{ dataTransfer: ({transfer})(data), bubbles: true }}))"
    )
    paste = f"(data) => document.dispatchEvent(new ClipboardEvent('paste', {{ clipboardData: ({transfer})(data) }}))"
    for way in (drop, paste):
        with page.expect_response("**/v1/search"):
            page.evaluate(way, data)
        page.wait_for_selector(".hit:not(.unproved)")
        assert page.locator(".hit-name").first.inner_text() == "scenes/2.png"
    visit.end()


def test_photos_are_added_each_with_its_own_outcome(browser: Any, stored: Process, photos: Path) -> None:
    visit = Visit(browser, stored.address)
    page = visit.page
    page.get_by_role("link", name="Add").click()
    page.fill("#prefix", "new/")
    page.fill("#add-fields input[name=year]", "1999")
    page.set_input_files("#add-files", [photos / "20.png", photos / "bad.png", photos / "21.png"])
    page.wait_for_selector("text=2 of 3 stored, 1 failed.")
    rows = page.locator(".upload").all_inner_texts()
    assert "300 features" in rows[0]
    assert "failed" in rows[1]
    assert "not a photo" in rows[1]
    with page.expect_response("**/v1/images"):
        page.click("#add-retry")
    page.wait_for_selector("text=2 of 3 stored, 1 failed.")
    assert page.locator(".problem").count() == 1
    page.wait_for_selector("#collection:text('8 photos in delf')")
    with DelfClient(stored.address) as client:
        assert client.show("new/20.png").metadata == {"year": 1999}
    page.click("#add-clear")
    assert page.locator(".upload").count() == 0
    visit.end(expected=("415",))


def test_stored_photos_are_listed_searched_and_deleted(browser: Any, stored: Process) -> None:
    visit = Visit(browser, stored.address)
    page = visit.page
    page.get_by_role("link", name="Stored").click()
    page.wait_for_selector("text=6 photos shown.")
    page.wait_for_selector(".card img")
    page.get_by_role("button", name="Delete scenes/5.png").click()
    page.get_by_role("button", name="Keep it").click()
    page.get_by_role("button", name="Delete scenes/5.png").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.wait_for_selector("text=scenes/5.png was deleted.")
    assert page.locator(".card").count() == 5
    page.fill("#stored-prefix", "scenes/4")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=1 photo shown.")
    with page.expect_response("**/v1/search"):
        page.get_by_role("button", name="Search with scenes/4.png").click()
    page.wait_for_selector(".hit:not(.unproved)")
    assert page.locator(".hit-name").first.inner_text() == "scenes/4.png"
    visit.end()


def test_what_is_stored_is_shown_whole_where_the_status_comes_late(browser: Any, stored: Process) -> None:
    visit = Visit(browser, stored.address)
    held: list[Any] = []

    def hold(route: Any) -> None:
        held.append(route)

    visit.page.route("**/v1/status", hold)
    visit.page.goto(f"{stored.address}#stored")
    with visit.page.expect_response("**/v1/images?*"):
        visit.page.reload()
    visit.page.wait_for_timeout(300)
    for one in held:
        one.continue_()
    visit.page.wait_for_selector(".card img")
    assert visit.page.get_by_role("button", name="Delete scenes/5.png").is_visible()
    visit.end()


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(
    browser: Any, tmp_path: Path, tiny_model: Path, photos: Path
) -> None:
    keys = {"DELF_MILVUS_SERVICE__READ_KEYS": READ, "DELF_MILVUS_SERVICE__WRITE_KEYS": WRITE}
    with process(tmp_path, tiny_model, **keys) as running:
        running.ready()
        visit = Visit(browser, running.address)
        page = visit.page
        page.wait_for_selector("#key-dialog[open]")
        assert visit.barriers() == []
        page.fill("#key", "wrong key, long enough")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=does not know that key")
        page.fill("#key", READ)
        page.keyboard.press("Enter")
        page.wait_for_selector("text=0 photos in delf")
        page.get_by_role("link", name="Add").click()
        assert page.locator("#add-refused").is_visible()
        assert not page.locator("#add-panel").is_visible()
        assert page.evaluate("Object.values(sessionStorage)") == [READ]
        assert page.evaluate("[document.cookie, localStorage.length]") == ["", 0]
        page.reload()
        page.wait_for_selector("text=0 photos in delf")
        page.get_by_role("link", name="Search").click()
        visit.search(photos / "1.png")
        assert "collection is empty" in page.locator("#verdict").inner_text()
        visit.end(expected=("401",))


def test_a_service_that_is_gone_and_a_photo_that_is_none_are_told(
    browser: Any, tmp_path: Path, tiny_model: Path, photos: Path
) -> None:
    with process(tmp_path, tiny_model) as running:
        running.ready()
        visit = Visit(browser, running.address)
        page = visit.page
        visit.search(photos / "bad.png")
        assert "not a photo of a supported format" in page.locator("#verdict").inner_text()
        assert page.locator("#query-none").is_visible()
        running.running.send_signal(signal.SIGTERM)
        running.ended()
        page.set_input_files("#file-again", photos / "1.png")
        page.wait_for_selector("text=does it still run?")
        assert page.locator(".skeleton").count() == 0
        visit.end(expected=("415", "ERR_CONNECTION_REFUSED"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_no_view_has_a_barrier_or_is_wider_than_the_window(
    browser: Any, stored: Process, photos: Path, device: dict[str, Any], scheme: str
) -> None:
    visit = Visit(browser, stored.address, **device, color_scheme=scheme)
    page = visit.page

    def check() -> None:
        assert visit.barriers() == []
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    page.wait_for_selector("#collection:not(:empty)")
    check()
    page.click("#options summary")
    page.click("#filter-more")
    visit.search(photos / "1.png")
    page.wait_for_selector(".hit .thumb img")
    page.click("#box-button")
    check()
    page.locator(".hit").first.click()
    page.wait_for_selector("#stage img")
    check()
    page.check("input[value=pair]", force=True)
    check()
    page.keyboard.press("Escape")
    for view in ("Add", "Stored"):
        page.get_by_role("link", name=view).click()
        page.wait_for_timeout(300)
        check()
    visit.end()


def test_the_first_paint_comes_within_a_second(browser: Any, service: Process) -> None:
    paints = []
    for _ in range(3):
        visit = Visit(browser, service.address)
        visit.page.wait_for_selector("#collection:not(:empty)")
        paints.append(visit.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        visit.end()
    assert min(paints) < 1000


def test_a_photo_may_be_any_the_service_reads(browser: Any, stored: Process) -> None:
    visit = Visit(browser, stored.address)
    tiff = {"name": "photo.tif", "mimeType": "image/tiff", "buffer": tiff_of(2)}
    with visit.page.expect_response("**/v1/search"):
        visit.page.set_input_files("#file", [tiff])
    visit.page.wait_for_selector(".hit:not(.unproved)")
    assert visit.page.locator(".hit-name").first.inner_text() == "scenes/2.png"
    visit.page.locator(".hit").first.click()
    visit.page.wait_for_selector("text=Your photo, laid over it is not shown")
    visit.end()


def tiff_of(seed: int) -> bytes:
    import io

    import PIL.Image

    stream = io.BytesIO()
    PIL.Image.open(io.BytesIO(png(make_photo(seed)))).save(stream, "TIFF")
    return stream.getvalue()
