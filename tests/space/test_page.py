"""The page in a real browser, at the width of a desk and of a phone: make test-space."""

import json
import os
import threading
import time
from pathlib import Path

import diffusers
import pytest
import torch

gr = pytest.importorskip("gradio", reason="gradio is not installed: make test-space installs it")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-space does that")

import uvicorn  # noqa: E402

from diffusers_sde import ClassConditionalSDEPipeline, SDEPipeline, VPSDEScheduler  # noqa: E402

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
if not Path(CHROMIUM).exists():
    pytest.skip(f"there is no browser at {CHROMIUM}: name one in CHROMIUM", allow_module_level=True)
from diffusers_sde.space import runs, server  # noqa: E402

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}


def unet(size, **arguments):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=size,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=2,
        **arguments,
    )


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page with two models, one of them with classes and the other in colour."""
    grey, colour = (tmp_path_factory.mktemp(name) for name in ("grey", "colour"))
    v = {"prediction_type": "v_prediction"}
    network = unet(8, in_channels=1, out_channels=1, num_class_embeds=3)
    ClassConditionalSDEPipeline(
        network, VPSDEScheduler(**v), id2label={0: "zero", 1: "one"}, null_class=2
    ).save_pretrained(grey)
    SDEPipeline(unet(16, in_channels=3, out_channels=3), VPSDEScheduler(**v)).save_pretrained(colour)
    models = {name: runs.load_model(name, str(folder)) for name, folder in (("grey", grey), ("colour", colour))}
    running = uvicorn.Server(uvicorn.Config(server.build(models), port=0, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.1)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def page(request, address, browser):
    width, height = WIDTHS[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(60_000)
    playwright.expect.set_options(timeout=60_000)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(f"{address}/#form?seed=3&steps=6")
    for part in ("particles", "form"):
        playwright.expect(page.locator(f"#{part}-time output")).not_to_have_text("")
    playwright.expect(page.locator("#form-stage.working")).to_have_count(0)  # the first sampler is shown at once
    yield page
    page.close()
    assert faults == []


def ink(page, selector):
    """How much of a canvas is not black, from 0 to 1."""
    return page.eval_on_selector(
        selector,
        """(canvas) => {
            const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
            let lit = 0;
            for (let i = 0; i < data.length; i += 4) lit += data[i] + data[i + 1] + data[i + 2] > 90;
            return lit / (data.length / 4);
        }""",
    )


def drag(page, part, value):
    page.eval_on_selector(f"#{part}-time input", f"(range) => {{ range.value = {value}; range.oninput(); }}")


def test_nothing_is_wider_than_the_window_and_what_moves_is_seen_without_scrolling_far(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#particles-stage").bounding_box() is not None
    for button in page.locator("main button:visible").all():
        assert button.bounding_box()["height"] >= 36, button.inner_text()


def test_particles_and_pictures_form_and_time_can_be_dragged(page):
    for part, first in (("particles", 0), ("form", 200)):
        drag(page, part, first)
        early = page.locator(f"#{part}-time output").inner_text()
        drag(page, part, 1000)
        assert page.locator(f"#{part}-time output").inner_text() == "no noise" != early
    shown = page.locator("#particles-stage canvas:visible").count()
    assert shown == (1 if page.viewport_size["width"] < 500 else 3)
    assert ink(page, "#particles-stage .panel.chosen canvas") > 0.005
    assert all(ink(page, f"#form-stage .panel:nth-child({i}) canvas") > 0.005 for i in (1, 2, 3))
    assert page.locator("#form-names").inner_text() == "In this order: one, zero, one, zero, one, zero."


def test_a_link_carries_what_was_chosen(page, address, browser):
    page.click("#form-view button:has-text('The guess')")
    page.select_option("#form-class", "one")
    page.click("#particles-mixture button:has-text('Ring')")
    link = page.url
    assert "seed=3" in link and "steps=6" in link and "label=one" in link and "mixture=ring" in link
    other = browser.new_page()
    other.goto(link)
    playwright.expect(other.locator("#form-class")).to_have_value("one")
    assert other.locator("#particles-mixture [aria-pressed=true]").inner_text() == "Ring"
    assert other.locator("#form-view [aria-pressed=true]").inner_text() == "The guess"
    other.close()


def test_what_a_hand_covers_is_drawn_anew(page):
    canvas = page.locator("#complete-canvas")
    page.click("#complete-clear")
    page.click("#complete-run")
    page.wait_for_selector("#toast.shown:has-text('Nothing is to be drawn')")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.5 * box["height"], steps=8)
    page.mouse.up()
    assert ink(page, "#complete-canvas") > 0.05
    page.click("#complete-run")
    page.wait_for_selector("#complete-results canvas:nth-child(8)")


def test_one_walks_from_a_drawing_to_another_picture(page):
    page.locator("#between").scroll_into_view_if_needed()
    page.wait_for_selector("#between-strip canvas:nth-child(17)")
    before = page.eval_on_selector("#between-picture", "(canvas) => canvas.toDataURL()")
    page.eval_on_selector("#between-position", "(range) => { range.value = 16; range.oninput(); }")
    assert page.eval_on_selector("#between-picture", "(canvas) => canvas.toDataURL()") != before
    page.click("#between-drawing")
    playwright.expect(page.locator("#between-position")).to_have_value("0")


def test_a_drawing_is_measured(page):
    page.click("#likelihood-run")
    page.wait_for_selector("#likelihood-result svg")
    assert "pictures that the model drew" in page.locator("#likelihood-result").inner_text()
    assert page.locator("#likelihood-result circle").count() == 3 + runs.COMPARED


def test_six_calls_are_compared(page):
    page.locator("#few").scroll_into_view_if_needed()
    page.wait_for_selector("#few-rows .row:nth-child(3) canvas")
    assert "off by" in page.locator("#few-rows").inner_text()


def test_another_model_is_drawn_with_in_colour(page):
    page.click("#models button:has-text('colour')")
    page.wait_for_selector("#complete-colours button:nth-child(3)")
    assert page.locator("#form-class").is_hidden()
    assert "in colour" in page.locator("#facts").inner_text()
    assert "model=colour" in page.url


def test_what_is_asked_twice_is_computed_once_and_strangers_are_refused_in_words(address, browser):
    calls = []
    remembered = server.Remembered(most=2)

    def run(a):
        calls.append(a)
        return {"a": a}

    for a in (1, 1, 2, 3, 1):
        assert list(remembered(run, "run", None, {"a": a})) == [{"a": a}]
    assert calls == [1, 2, 3, 1]  # the first was forgotten when the third came
    page = browser.new_page()
    page.goto(address)
    for settings, message in (
        ({"model": "cats"}, "no model 'cats'; there are grey, colour"),
        ({"model": "grey", "speed": 1}, "unexpected keyword argument 'speed'"),
    ):
        found = page.evaluate(
            """async (settings) => {
                const body = JSON.stringify({data: [settings]});
                const head = {method: 'POST', headers: {'content-type': 'application/json'}, body};
                const {event_id: id} = await (await fetch('runs/gradio_api/call/few', head)).json();
                return (await fetch(`runs/gradio_api/call/few/${id}`)).text();
            }""",
            settings,
        )
        assert message in json.loads(found.split("data: ")[1].splitlines()[0])["error"]
    assert "default-src 'self'" in page.evaluate(
        "fetch('models').then((r) => r.headers.get('content-security-policy'))"
    )
    page.close()
