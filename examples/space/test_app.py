"""The page in a real browser: python -m pytest examples/space/test_app.py."""

import os
import sys
from pathlib import Path

import diffusers
import pytest
import torch

gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install -c constraints-space.txt -e '.[space]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from diffusers_sde import SDEPipeline, VPSDEScheduler  # noqa: E402

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
if not Path(CHROMIUM).exists():
    pytest.skip(f"there is no browser at {CHROMIUM}: name one in CHROMIUM", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))
import app  # noqa: E402
import runs  # noqa: E402

FLAGS = ["--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--disable-background-networking"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=2,
    )
    SDEPipeline(unet, VPSDEScheduler()).save_pretrained(folder)
    demo = app.build(runs.load_model(str(folder)))
    _, url, _ = demo.queue().launch(prevent_thread_lock=True, quiet=True)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        page.set_default_timeout(60_000)
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_selector("#generate")
        yield page
        browser.close()
    demo.close()


def choose(page, element, option):
    page.locator(f"{element} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def test_images_form(page):
    page.click("#generate")
    page.wait_for_selector("#status:has-text('Done: 50 of 50')")
    page.wait_for_selector("#output img")
    page.wait_for_selector("#strip img")


def test_a_hole_painted_by_hand_is_filled(page):
    page.get_by_role("tab", name="Inpaint").click()
    page.click("#inpaint")
    page.wait_for_selector("text=There is no picture yet")
    page.click("#take")
    page.wait_for_timeout(3000)
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y)
    page.mouse.down()
    page.mouse.move(x + 60, y)
    page.mouse.move(x - 60, y + 40)
    page.mouse.up()
    page.click("#inpaint")
    page.wait_for_selector("#status:has-text('Done: 246 of 246')")


def test_the_line_below_the_settings_says_what_they_cost_or_why_not(page):
    choose(page, "#corrector", "langevin")
    page.wait_for_selector("#plan:has-text('100 network calls')")
    choose(page, "#sde", "VE")
    page.wait_for_selector("#plan:has-text('VESDEScheduler cannot represent')")
