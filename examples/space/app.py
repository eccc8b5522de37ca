"""A demo in the browser: sample a score model, and repaint what a hand has covered, by any sampler of the package.

python examples/space/app.py --model outputs/demo

On a Hugging Face Space the variable MODEL_ID names the model.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from typing import Any

import gradio as gr
import runs
from PIL import Image
from runs import Frame, Model, Settings

from diffusers_sde.pipelines.diagnostics import diagnose
from diffusers_sde.sampling.correctors import CORRECTORS
from diffusers_sde.sampling.predictors import PREDICTORS
from diffusers_sde.sampling.time_grids import TIME_GRIDS

SIMULTANEOUS_RUNS = 4
STRIP = 12  # pictures in the strip below the images
CANVAS = 480  # pixels


def describe(model: Model) -> str:
    """One paragraph about the network."""
    found = diagnose(model.pipe)
    channels, height, width = model.shape
    classes = f", {len(model.classes)} classes" if model.classes else ""
    return (
        f"**{model.name}**: {height} x {width} pixels, {'grey' if channels == 1 else 'colour'}{classes}; trained on "
        f"the {model.sde} SDE; predicts {found.prediction_type}."
    )


def plan_line(model: Model, settings: Settings) -> str:
    """What the settings cost, or why they do not go together."""
    try:
        scheduler = settings.scheduler(model)
    except ValueError as error:
        trained = "" if settings.sde == model.sde else f" This network was trained on the {model.sde} SDE."
        return f"⚠️ {error}{trained}"
    return f"{settings.levels} noise levels, {len(scheduler.timesteps)} network calls for each image."


def show(frames: Iterator[Frame], before: list[Image.Image]) -> Iterator[tuple[Any, ...]]:
    """Frames as updates of (picture, strip, status, trajectory); ``before`` are tiles that head each picture."""
    trajectory: list[Image.Image] = []
    first: list[Image.Image] = []
    try:
        for frame in frames:
            tiles = before + [runs.picture(image) for image in frame.images]
            trajectory.append(runs.sheet(tiles, math.ceil(math.sqrt(len(tiles)))))
            first.append(tiles[len(before)])
            done = frame.call == frame.total
            strip = runs.sheet(_thinned(first), STRIP, width=1120) if done else gr.skip()
            status = f"{'Done' if done else 'Network call'}: {frame.call} of {frame.total}"
            bar = f'<progress value="{frame.call}" max="{frame.total}" style="width: 100%"></progress> {status}'
            yield trajectory[-1], strip, bar, trajectory
    except ValueError as error:
        raise gr.Error(str(error)) from error


def _thinned(images: list[Image.Image]) -> list[Image.Image]:
    """At most ``STRIP`` of them, evenly, the first and the last included."""
    n = min(len(images), STRIP)
    return [images[round(i * (len(images) - 1) / max(n - 1, 1))] for i in range(n)]


def build(model: Model) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="diffusers-sde", analytics_enabled=False) as page:
        gr.Markdown(f"# Sampling by stochastic differential equations\n{describe(model)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                sampler = _sampler_controls(model)
                settings = list(sampler.values())
                plan = gr.Markdown(plan_line(model, Settings(*(control.value for control in settings))), elem_id="plan")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, info="The same seed, the same images.")
                classes = [runs.EACH_IN_TURN, *model.classes]
                label = gr.Dropdown(classes, value=classes[0], label="Class", visible=bool(model.classes))
                denoised = gr.Checkbox(
                    False,
                    label="Show the denoised estimate on the way",
                    info="The mean of the result given the noisy state; one more network call for each picture shown.",
                )
            with gr.Column(scale=3, min_width=420):
                with gr.Tab("Generate"):
                    count = gr.Slider(1, runs.MAX_IMAGES, 9, step=1, label="Images")
                    guidance = gr.Slider(
                        0, 8, 1, step=0.5, label="Guidance scale", visible=model.null_class is not None
                    )
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                with gr.Tab("Inpaint"):
                    gr.Markdown(
                        "Upload a picture or take the first generated one, then paint over what is to be drawn anew."
                    )
                    editor = gr.ImageEditor(
                        type="pil",
                        format="png",
                        label="Orange: to be drawn anew",
                        elem_id="editor",
                        brush=gr.Brush(default_size=48, colors=["#ff8c00"], color_mode="fixed"),
                        sources=("upload", "clipboard"),
                        transforms=(),
                        layers=False,
                        canvas_size=(CANVAS, CANVAS),
                        height=CANVAS + 120,
                    )
                    with gr.Row():
                        take = gr.Button("Take the first generated image", elem_id="take")
                        repaint = gr.Button("Inpaint", variant="primary", elem_id="inpaint")
                    with gr.Row():
                        method = gr.Dropdown(
                            runs.INPAINT_POSTERIORS,
                            value=runs.INPAINT_POSTERIORS[0],
                            label="Method",
                            info="replacement is the paper's; repaint takes five times its calls",
                        )
                        completions = gr.Slider(1, runs.MAX_IMAGES - 1, 3, step=1, label="Completions")
                stop = gr.Button("Stop", size="sm", elem_id="stop")
                status = gr.HTML("Nothing sampled yet.", elem_id="status")
                output = gr.Image(label="Images", type="pil", format="png", elem_id="output", interactive=False)
                position = gr.Slider(
                    0, 100, 100, step=1, label="Position on the trajectory: 0 noise, 100 image", elem_id="position"
                )
                gr.Markdown("How the first image forms:")
                strip = gr.Image(
                    show_label=False, buttons=[], type="pil", format="png", elem_id="strip", interactive=False
                )
        trajectory = gr.State([])
        generated = gr.State(None)

        def on_generate(count: int, guidance: float, denoised: bool, label: str, seed: int, *chosen: Any) -> Iterator:
            frames = _checked(runs.generate, model, Settings(*chosen), count, seed, label, guidance, denoised)
            last: list[Frame] = []
            for update in show(_remembered(frames, last), []):
                yield *update, runs.picture(last[0].images[0])

        def on_inpaint(
            drawing: dict[str, Any], method: str, count: int, denoised: bool, label: str, seed: int, *chosen: Any
        ) -> Iterator:
            if not drawing or drawing["background"] is None:
                raise gr.Error("There is no picture yet: upload one or take a generated one.")
            image = runs.fit(drawing["background"], model.shape)
            mask = runs.painted(drawing["layers"], model.shape)
            frames = _checked(runs.inpaint, model, Settings(*chosen), image, mask, method, count, seed, label, denoised)
            yield from show(frames, [runs.with_hole(image, mask)])

        def on_take(image: Image.Image | None) -> Image.Image:
            if image is None:
                raise gr.Error("Nothing has been generated yet.")
            return runs.zoom(image, CANVAS)

        def on_position(percent: float, trajectory: list[Image.Image]) -> Any:
            return trajectory[round(percent / 100 * (len(trajectory) - 1))] if trajectory else gr.skip()

        common = [denoised, label, seed, *settings]
        shown = [output, strip, status, trajectory]
        limit = {"concurrency_limit": SIMULTANEOUS_RUNS, "concurrency_id": "network", "show_progress": "hidden"}
        rewind = {"fn": lambda: 100, "outputs": position, "show_progress": "hidden"}
        events = [
            start.click(**rewind).then(on_generate, [count, guidance, *common], [*shown, generated], **limit),
            repaint.click(**rewind).then(on_inpaint, [editor, method, completions, *common], shown, **limit),
        ]
        stop.click(None, cancels=events)
        take.click(on_take, generated, editor)
        position.release(on_position, [position, trajectory], output, show_progress="hidden")
        for control in settings:
            control.change(lambda *chosen: plan_line(model, Settings(*chosen)), settings, plan, show_progress="hidden")
    return page


def _sampler_controls(model: Model) -> dict[str, Any]:
    """A control for each field of ``Settings``, in its order."""
    names = ["none", *CORRECTORS]
    with gr.Row():
        sde = gr.Dropdown(
            list(runs.SDES), value=model.sde, label="SDE", info="the one the network knows", elem_id="sde"
        )
        dynamics = gr.Dropdown(
            [runs.REVERSE_SDE, runs.PROBABILITY_FLOW], label="Dynamics", info="noise or none on the way"
        )
    stochasticity = gr.Slider(
        0, 2, 1, step=0.1, label="Stochasticity of the reverse SDE", info="0 is the ODE, 1 Anderson's reverse SDE"
    )
    with gr.Row():
        predictor = gr.Dropdown(list(PREDICTORS), value="exponential", label="Predictor", elem_id="predictor")
        order = gr.Dropdown([1, 2, 3], value=2, label="Order of exponential")
    corrector = gr.Dropdown(names, value="none", label="Corrector (MCMC at each noise level)", elem_id="corrector")
    with gr.Row():
        correct_steps = gr.Slider(1, 5, 1, step=1, label="Corrector steps")
        snr = gr.Slider(0.01, 0.5, 0.1, step=0.01, label="Corrector snr")
    with gr.Row():
        grid = gr.Dropdown(list(TIME_GRIDS), value="sech", label="Time grid")
        levels = gr.Slider(1, 1000, 50, step=1, label="Noise levels", elem_id="levels")
    return {
        "sde": sde,
        "dynamics": dynamics,
        "stochasticity": stochasticity,
        "predictor": predictor,
        "solver_order": order,
        "corrector": corrector,
        "correct_steps": correct_steps,
        "snr": snr,
        "time_grid": grid,
        "levels": levels,
    }


def _checked(run: Any, *arguments: Any) -> Iterator[Frame]:
    """The frames of a run; what it refuses is shown as a message and not as a stack trace."""
    try:
        frames: Iterator[Frame] = run(*arguments)
    except ValueError as error:
        raise gr.Error(str(error)) from error
    return frames


def _remembered(frames: Iterator[Frame], last: list[Frame]) -> Iterator[Frame]:
    """The frames, the latest of which is kept in ``last``."""
    for frame in frames:
        last[:] = [frame]
        yield frame


def main() -> None:
    """Load the model and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL_ID"), help="folder or repository (default: $MODEL_ID)")
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860")
    arguments = parser.parse_args()
    if not arguments.model:
        parser.error("name a model by --model or in MODEL_ID: a folder that was trained here, or a repository")
    try:
        model = runs.load_model(arguments.model)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    build(model).queue().launch(server_port=arguments.port)


if __name__ == "__main__":
    main()
