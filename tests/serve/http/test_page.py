"""The page in a real browser, served with its real policy; skipped where there is none."""

import asyncio
import json
import shutil
import subprocess
import threading
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from trainkit.serve.bundle import open_bundle
from trainkit.serve.classifier import Classifier
from trainkit.serve.http.app import application
from trainkit.serve.http.model import InferenceResult
from trainkit.serve.http.settings import Limits, Settings
from trainkit.serve.http.sockets import DrainingServer, bound, listen, url

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
EVIL = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


def needs_browser(test):
    """Mark a test as ``browser``; it is skipped without Chromium."""
    no_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
    return pytest.mark.browser(no_browser(test))


class Served(dict):
    """Models by name; nobody counts their batches."""

    def observe(self, on_batch):
        pass


class InProcess:
    """A model of the golden bundle whose session runs in this process."""

    ready = True

    def __init__(self, name, folder, labels=None):
        opened = open_bundle(folder)
        self.name, self.manifest, self.version = name, opened.manifest, opened.manifest.sha256[:12]
        self.classifier = Classifier.load(folder, threads=1)
        if labels:
            self.classifier.labels = labels
        self.vocabulary_size = 177
        self.max_length = opened.manifest.max_length

    def stats(self):
        return {"queued_rows": 0, "queued_tokens": 0, "restarts": 0}

    async def tokens(self, texts):
        return self.classifier.tokens(texts)

    async def infer(self, rows, timeout_s=None):
        logits = self.classifier.logits_of(rows).astype(np.float32)
        return InferenceResult(logits, 0.001, 0.002)


@pytest.fixture(scope="module")
def serving():
    """Return a function that serves an application on a free port until the module's end."""
    ends = []

    def start(app):
        listener = bound("127.0.0.1", 0)
        listen(listener)
        state = SimpleNamespace()
        up = threading.Event()

        async def main():
            state.loop, state.leave = asyncio.get_running_loop(), asyncio.Event()
            up.set()
            await DrainingServer(app, listener, 1.0).run_until(state.leave, asyncio.Event())

        thread = threading.Thread(target=lambda: asyncio.run(main()))
        address = url(listener)
        thread.start()
        assert up.wait(10)
        ends.append((state, thread))
        return address

    yield start
    for state, thread in ends:
        state.loop.call_soon_threadsafe(state.leave.set)
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, serving):
    """Return a function that opens the page of these models; any fault in the console fails."""
    contexts, faults = [], []

    def start(*models, scheme="light", token=None, limits=None):
        settings = Settings(limits=limits or Limits())
        app = application(Served((one.name, one) for one in models), settings, token=token)
        context = browser.new_context(color_scheme=scheme, viewport={"width": 900, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            lambda line: (
                line.type == "error"
                and "Failed to load resource" not in line.text
                and faults.append(line.text)
            ),
        )
        page.goto(serving(app))
        return page

    yield start
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture(scope="module")
def golden(golden_bundle):
    return InProcess("questions", golden_bundle)


@pytest.fixture(scope="module")
def golden_bundle():
    return Path(__file__).parents[2] / "golden" / "bundle"


def classify(page, text):
    page.get_by_label("Text").fill(text)
    page.get_by_label("Text").press("Control+Enter")


@needs_browser
def test_ctrl_enter_shows_every_label_with_its_share(opened, golden):
    page = opened(golden)
    classify(page, "Who wrote the Odyssey?")
    page.get_by_role("rowheader").first.wait_for()
    expected = golden.classifier("Who wrote the Odyssey?")
    ranked = sorted(expected.scores.items(), key=lambda item: -item[1])
    assert page.get_by_role("rowheader").all_inner_texts() == [label for label, _ in ranked]
    shown = page.locator("td.number").all_inner_texts()
    assert shown == [f"{100 * score:.1f}%" for _, score in ranked]
    widths = page.locator(".fill").evaluate_all("bars => bars.map(b => b.offsetWidth)")
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 10 * widths[-1]
    times = page.locator("#times").inner_text()
    assert "queue 1.0 ms, infer 2.0 ms" in times
    assert not page.get_by_text("longer than the model takes").is_visible()
    assert not page.get_by_role("alert").is_visible()


@needs_browser
def test_a_long_text_is_said_to_be_cut(opened, golden):
    page = opened(golden)
    classify(page, "Who was it ? " * 40)
    page.get_by_text("longer than the model takes").wait_for()


@needs_browser
def test_an_error_is_one_sentence_and_goes_away(opened, golden):
    page = opened(golden, limits=Limits(characters=50))
    classify(page, "")
    page.get_by_role("alert").wait_for()
    assert "text 1 of 1 is empty" in page.get_by_role("alert").inner_text()
    classify(page, "x" * 51)
    page.get_by_text("51 characters").wait_for()
    classify(page, "Who?")
    page.get_by_role("rowheader").first.wait_for()
    assert not page.get_by_role("alert").is_visible()


@needs_browser
def test_markup_in_a_text_or_a_label_stays_text(opened, golden_bundle):
    labels = (EVIL, "DESC", "ENTY", "HUM", "LOC", "NUM")
    page = opened(InProcess("questions", golden_bundle, labels))
    classify(page, EVIL)
    page.get_by_role("rowheader").first.wait_for()
    assert EVIL in page.get_by_role("rowheader").all_inner_texts()
    assert page.locator("img").count() == 0
    assert page.title() == "trainkit: classify a text"


@needs_browser
def test_several_models_give_a_choice_and_its_facts(opened, golden, golden_bundle):
    page = opened(golden, InProcess("mood", golden_bundle, ("a", "b", "c", "d", "e", "f")))
    page.get_by_label("Model").select_option("mood")
    assert "mood" in page.locator("#facts").inner_text()
    classify(page, "Who?")
    page.get_by_role("rowheader").first.wait_for()
    assert sorted(page.get_by_role("rowheader").all_inner_texts()) == list("abcdef")
    assert '"model":"mood"' in page.locator("#curl").inner_text()
    single = opened(golden)
    single.locator("#facts dd").first.wait_for()
    assert not single.get_by_label("Model").is_visible()


@needs_browser
def test_the_curl_line_works_in_a_shell(opened, golden, tmp_path):
    page = opened(golden)
    page.locator("#facts dd").first.wait_for()
    page.get_by_label("Text").fill('Who\'s "that" $HOME `id`?\nNext line')
    line = page.locator("#curl").inner_text()
    done = subprocess.run(["sh", "-c", f"{line} -s"], capture_output=True, check=True, timeout=20)
    (prediction,) = json.loads(done.stdout)["predictions"]
    expected = golden.classifier('Who\'s "that" $HOME `id`?\nNext line')
    assert prediction["label"] == expected.label
    assert prediction["score"] == pytest.approx(expected.score, abs=1e-6)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_keyboard_reaches_everything_and_both_schemes_differ(scheme, opened, golden):
    page = opened(golden, scheme=scheme)
    page.locator("#facts dd").first.wait_for()
    page.get_by_label("Text").focus()
    reached = []
    for _ in range(3):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert reached == ["send", "curl", "copy"]
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    levels = [int(part) for part in back[4:-1].split(",")]
    assert (sum(levels) > 384) == (scheme == "light")


def test_nothing_in_the_page_comes_from_elsewhere_or_becomes_markup():
    text = resources.files("trainkit.serve.http").joinpath("page.html").read_text("utf-8")
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "http:",
        "https:",
        " onclick",
        " onload",
        " style=",
    ):
        assert word not in text
