"""Model cards: what a person who meets a model on the Hub needs to know, from the pipeline and from measurements.

``results`` is a dictionary, read from one or several JSON files by ``scripts/push_to_hub.py``. All keys are optional:

    license            of the weights, such as "apache-2.0"
    description        what the model draws; default: one sentence
    dataset            {"name": "Fashion-MNIST", "id": "zalando-datasets/fashion_mnist", "split": "train"}
    training_command   one line of shell
    metrics            [{"name": "FID, 5000 images", "type": "fid", "value": 12.3, "on": "20 calls, test split"}]
    recipes            [{"options": {"predictor": "heun"}, "num_inference_steps": 20, "metrics": {"FID": 12.3}}]
    pictures           {"Samples": "path/to/samples.png"}; copied into the repository. Default: samples, and states on
                       the way to them, which the model draws itself; {} for none
    limitations        what the model cannot do; default: what follows from its kind, and a sentence

and what ``scripts/evaluate.py`` writes: its ``samplers`` become recipes, its numbers entries of the model-index.
"""

from __future__ import annotations

import inspect
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from ..basics.networks import describe_network
from .figures import draw_pictures
from .flattening import HOMEPAGE
from .version import __version__

TEMPLATE = Path(__file__).with_name("model_card_template.md")
KEYS = ("license", "description", "dataset", "training_command", "metrics", "recipes", "pictures", "limitations")
EVALUATION_KEYS = (
    *("samplers", "data", "num_samples", "features", "baseline", "bits_per_dim", "images"),
    "latent_bits_per_dim",
    *("model", "sde", "seed", "figure"),  # these are not used, because the pipeline itself knows them
)
TASK = "unconditional-image-generation"
# These options of a sampler in an evaluation belong to the pipeline; the last one names the scheduler's class.
CALL_OPTIONS = (
    *("num_inference_steps", "method", "rtol", "atol", "guidance_scale", "classifier_guidance_scale"),
    "scheduler",
)
SAMPLES_PER_DIMENSION = 2  # of features; see ``too_few_samples``
PICTURES = "images"
PICTURE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
RECIPES: Sequence[Mapping[str, Any]] = (
    {"options": {}, "num_inference_steps": 20},
    {"options": {"predictor": "reverse_diffusion", "corrector": "langevin"}, "num_inference_steps": 100},
    {"options": {"predictor": "heun", "corrector": None, "probability_flow": True}, "num_inference_steps": 10},
)
LIMITATIONS = (
    "The model draws what is like its training data, biases included, and knows nothing else. Nothing is filtered. "
    "It has not been tested for any use beyond research and teaching."
)
# Where pip finds the package: by its address until a release has put the name into the index.
PIP_NAME = f"git+{HOMEPAGE}" if "dev" in __version__ else "diffusers-sde"
SHARES = ("precision", "recall", "class_accuracy")  # of samples, so that their error follows from their number
STOCK_PREDICTIONS = ("epsilon", "sample", "v_prediction")

# For each class: the tag, the description, and a few lines of code that call it and run as they stand.
PIPELINES = {
    "SDEPipeline": (
        "unconditional-image-generation",
        "Draws images from noise.",
        "image = pipe(num_inference_steps=20).images[0]",
    ),
    "ClassConditionalSDEPipeline": (
        "class-conditional-image-generation",
        "Draws images of a class that you name.",
        "image = pipe(class_labels={label}, num_inference_steps=20).images[0]",
    ),
    "TextSDEPipeline": (
        "text-to-image",
        "Draws images of captions.",
        'image = pipe("{caption}", num_inference_steps=20).images[0]',
    ),
    "InpaintSDEPipeline": (
        "image-to-image",
        "Fills holes in images.",
        "from PIL import Image\n\n"
        'picture = Image.new("{mode}", ({width}, {height}), "grey")  # yours\n'
        'mask = Image.new("L", picture.size)\n'
        "mask.paste(255, (0, 0, {width} // 2, {height}))  # white: to be painted\n"
        "image = pipe(picture, mask, num_inference_steps=20).images[0]",
    ),
    "RestorationSDEPipeline": (
        "image-to-image",
        "Restores images from incomplete or noisy measurements.",
        "import torch\n\n"
        'operator = pipe.operators["Downsampling"](2, pipe.sample_shape)\n'
        "small = torch.zeros(1, *operator.measurement_shape)  # yours, in the network's range\n"
        "image = pipe(small, operator, noise_std=0.05, num_inference_steps=20).images[0]",
    ),
}


def model_card(pipe: Any, repo_id: str, results: Mapping[str, Any] | None = None) -> ModelCard:
    """The card of a pipeline.

    Args:
        pipe: A pipeline of this package.
        repo_id: Name of its repository, ``user/name``.
        results: What the pipeline does not know about itself; see the head of this module.

    Raises:
        ValueError: ``results`` hold something unknown, or a recipe that the scheduler refuses.
    """
    results = checked_results(results)
    unknown = sorted(set(results).difference(KEYS, EVALUATION_KEYS))
    if unknown:
        raise ValueError(f"results: unknown keys {', '.join(unknown)}; known are {', '.join(KEYS + EVALUATION_KEYS)}.")
    task, description, call = next(PIPELINES[c.__name__] for c in type(pipe).__mro__ if c.__name__ in PIPELINES)
    channels, height, width = pipe.image_shape
    label = min(pipe.labels, key=pipe.labels.__getitem__, default=0) if hasattr(pipe, "labels") else 0
    dataset = {**results.get("data", {}), **results.get("dataset", {})}
    metrics = _metrics(results)
    entries = [*metrics, *_sampler_metrics(results)]
    recipes: Sequence[Mapping[str, Any]] = [
        *results.get("recipes", []),
        *(_recipe(s, _with_errors(results, s)) for s in results.get("samplers", [])),
    ]
    recipes = recipes or RECIPES
    fitted = _fitted_plan(pipe.scheduler)
    if fitted is not None:
        call = call.replace("num_inference_steps=20", f"num_inference_steps={fitted['levels']}")
        recipes = [{"options": {}, "num_inference_steps": fitted["levels"]}, *map(_without_fit, recipes)]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK if task.endswith("conditional-image-generation") else task,
        license=results.get("license"),
        datasets=[dataset["id"]] if "id" in dataset else None,
        tags=["diffusers", "diffusers_sde", "score-based-generative-modeling", "sde", task],
        model_name=repo_id.split("/")[-1] if entries else None,
        eval_results=[
            EvalResult(
                task_type=TASK,
                dataset_type=dataset.get("id", "unknown"),
                dataset_name=dataset.get("name", "unknown"),
                dataset_split=dataset.get("split"),
                metric_type=metric["type"],
                metric_name=metric["name"],
                metric_value=metric["value"],
            )
            for metric in entries
        ]
        or None,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        version=f"diffusers_sde {__version__}",
        pip_name=PIP_NAME,
        description=results.get("description") or f"{description} A score model trained on {_name(dataset)}.",
        pictures=[{"title": t, "path": f"{PICTURES}/{Path(p).name}"} for t, p in results.get("pictures", {}).items()],
        call=call.format(
            caption="what you want to see",
            label=repr(label),
            mode="L" if channels == 1 else "RGB",
            width=width,
            height=height,
        ),
        stock=_stock(pipe),
        features=_features(results),
        recipes=_recipe_table(pipe.scheduler, recipes),
        example=next(
            (_text(r["options"]) for r in recipes if r.get("options") and r.get("scheduler") is None), "solver_order=2"
        ),
        facts=_table(["", ""], _facts(pipe, dataset)),
        measured=bool(metrics),
        metrics=_table(["metric", "value", "on"], [[m["name"], m["text"], m.get("on", "")] for m in metrics]),
        training_command=results.get("training_command"),
        limitations=results.get("limitations") or _limitations(pipe),
    )


def too_few_samples(results: Mapping[str, Any]) -> bool:
    """Return whether an evaluation has too few images for numbers about the distribution of their features.

    The covariance of n vectors of d dimensions is known to a relative error of about (d/n)^(1/2), and has rank n - 1 at
    most. For n vectors of an isotropic Gaussian that error alone makes a Frechet distance of about d/(4 n) of their
    variance to the Gaussian itself. ``SAMPLES_PER_DIMENSION`` keeps it to 13 per cent.

    Args:
        results: What ``evaluate`` returns, with samplers.
    """
    fewest = min(results["num_samples"], results["data"]["images"])
    return bool(fewest < SAMPLES_PER_DIMENSION * results["features"]["dimensions"])


def shown_metrics(results: Mapping[str, Any], sampler: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a sampler that a card shows: without deviations, and without what too few images say.

    Args:
        results: What ``evaluate`` returns.
        sampler: One of its samplers.
    """
    few = too_few_samples(results)
    return {
        name: value
        for name, value in sampler["metrics"].items()
        if not name.endswith("_std") and (name == "class_accuracy" or not few)
    }


def add_card(folder: str | os.PathLike, pipe: Any, repo_id: str, results: Mapping[str, Any] | None = None) -> None:
    """Write the card of a pipeline, README.md, into its folder, and its pictures there; see ``model_card``.

    Raises:
        ValueError: See ``model_card``; or the file of a picture is missing or is not a picture.
    """
    place = Path(folder) / PICTURES
    results = checked_results(results)
    if "pictures" in results:
        card = model_card(pipe, repo_id, results)
        for picture in checked_pictures(results["pictures"]):
            place.mkdir(exist_ok=True)
            shutil.copyfile(picture, place / Path(picture).name)
    else:
        model_card(pipe, repo_id, results)  # what is wrong with the results is found before anything is drawn
        card = model_card(pipe, repo_id, {**results, "pictures": draw_pictures(pipe, place)})
    card.save(Path(folder) / "README.md")


def checked_results(results: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check that every part of ``results`` has the form that the head of this module describes, and return them.

    Raises:
        ValueError: A part has another form.
    """
    results = dict(results or {})
    forms: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("license", "description", "training_command", "limitations"), (str, type(None))),
        **dict.fromkeys(("dataset", "data", "pictures", "features"), (Mapping, type(None))),
        **dict.fromkeys(("bits_per_dim", "latent_bits_per_dim"), (Mapping, type(None))),
        **dict.fromkeys(("metrics", "recipes", "samplers"), (list, tuple)),
    }
    words: dict[Any, str] = {str: "text", Mapping: "an object", list: "a list"}
    for key, allowed in forms.items():
        if key in results and not isinstance(results[key], allowed):
            raise ValueError(f"results: {key} must be {words[allowed[0]]}, got {results[key]!r}.")
        if key in results and results[key] is None:
            del results[key]
    entries: dict[str, dict[str, Any]] = {
        "metrics": {"name": str, "type": str, "value": Real},
        "recipes": {"num_inference_steps": (Integral, str)},
        "samplers": {"label": str, "options": Mapping, "calls_per_image": Real, "metrics": Mapping},
    }
    for key, parts in entries.items():
        for entry in results.get(key, []):
            for part, kind in parts.items():
                if not isinstance(entry, Mapping) or isinstance(entry.get(part), bool):
                    raise ValueError(
                        f"results: each of {key} must be an object with {', '.join(parts)}, got {entry!r}."
                    )
                if not isinstance(entry.get(part), kind):
                    raise ValueError(f"results: {key} must have a {part} each, got {entry.get(part)!r} in {entry!r}.")
    return results


def checked_pictures(pictures: Mapping[str, Any]) -> list[Path]:
    """Check that each file is an image that a card can show, with a name of its own, and return the files.

    Raises:
        ValueError: A file does not exist, or it holds something else, which must not be published.
    """
    paths = [Path(str(picture)) for picture in pictures.values()]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"pictures: there is no file {str(path)!r}.")
        try:
            with Image.open(path) as image:
                image.verify()
                kind = image.format
        except Exception as error:  # each format raises errors of its own
            raise ValueError(f"pictures: {str(path)!r} is no image that can be read: {error}") from error
        if kind not in PICTURE_FORMATS:
            raise ValueError(f"pictures: {str(path)!r} must be one of {', '.join(PICTURE_FORMATS)}, got {kind}.")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"pictures: their file names must differ, got {', '.join(names)}.")
    return paths


def _name(dataset: Mapping[str, Any]) -> str:
    return str(dataset.get("name") or dataset.get("id") or "images that this card does not name")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _facts(pipe: Any, dataset: Mapping[str, Any]) -> list[list[str]]:
    scheduler, unet = pipe.scheduler, pipe.unet
    channels, height, width = pipe.image_shape
    rows = []
    sde = getattr(scheduler, "sde", None)
    if sde is not None:  # then the scheduler is one of ours
        text = repr(sde)
        rows += [
            ["SDE", f"`{text if len(text) < 200 else type(sde).__name__}`"],
            ["the network predicts", f"`{scheduler.config.prediction_type}`"],
            ["it is fed", f"`{scheduler.config.time_conditioning}` time"],
        ]
    fitted = _fitted_plan(scheduler)
    if fitted is not None:
        rows.append(["its sampler was fitted for", _fit_in_words(fitted)])
    return [
        *rows,
        ["network", describe_network(unet)],
        ["images", f"{channels} x {height} x {width}"],
        ["range of the data", f"[{pipe.config.data_min:g}, {pipe.config.data_max:g}]"],
        ["training data", _name(dataset)],
    ]


def _with_errors(results: Mapping[str, Any], sampler: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a sampler that a card shows, each with its standard error where that is known.

    The evaluation has the errors of kernel distances and inception scores, as deviations between parts of the samples.
    A share p of n samples has the error (p (1 - p)/n)^(1/2), here with one sample more on either side, so that 0 and 1
    have an error too. A Frechet distance has none from a single set of samples.
    """
    texts = {}
    for name, value in shown_metrics(results, sampler).items():
        error = sampler["metrics"].get(f"{name}_std")
        if name in SHARES:
            n = results["num_samples"]
            share = (value * n + 1) / (n + 2)
            error = math.sqrt(share * (1 - share) / n)
        texts[name] = f"{value:.4g}" if error is None else f"{value:.4g} +- {error:.1g}"
    return texts


def _limitations(pipe: Any) -> str:
    """What a model of this kind cannot do, as a list."""
    channels, height, width = pipe.image_shape
    kind = {1: "grey ", 3: "colour "}.get(channels, "")
    asked = "of the classes that it was trained on" if getattr(pipe, "labels", None) else "as chance has them"
    told = "It understands no text."
    if hasattr(pipe, "embed"):
        asked, told = "of captions", "It understands such captions as it was trained on."
    return "\n".join(
        f"- {line}"
        for line in (
            f"It makes {kind}images of {height} x {width} pixels, {asked}. {told}",
            "It knows one SDE, that of its scheduler. Schedulers of another kind refuse it.",
            LIMITATIONS,
        )
    )


def _fitted_plan(scheduler: Any) -> Mapping[str, Any] | None:
    """What a scheduler's config says of a plan that was fitted to the network, or None."""
    return getattr(scheduler, "config", {}).get("fitted_plan")


def _without_fit(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of one of our schedulers, of the sampler that was not fitted."""
    if recipe.get("scheduler") is not None:
        return dict(recipe)
    return {**recipe, "options": {"fitted_plan": None, **recipe.get("options", {})}}


def _fit_in_words(entry: Mapping[str, Any]) -> str:
    """A fitted plan in a line."""
    report, levels = entry["report"] or {}, f"{entry['levels']} levels"
    if "fitted" not in report:
        return levels
    numbers = f"{report['fitted']:.4g}, unfitted {report['unfitted']:.4g} ({report['gain_error']:.1g})"
    scale = "" if report.get("guidance_scale", 1.0) == 1.0 else f", guidance scale {report['guidance_scale']:g}"
    return f"{levels}{scale}; {report['objective']} distance to {report['target']} on held-out noise {numbers}"


def _recipe(sampler: Mapping[str, Any], metrics: Mapping[str, str]) -> dict[str, Any]:
    """A sampler of an evaluation as a recipe, with these of its numbers."""
    options = dict(sampler["options"])
    if options.get("predictor", "") is None:
        options["predictor"] = "none"
    return {
        "label": ", ".join(f"{key}={options[key]!r}" for key in CALL_OPTIONS[1:] if key in options),
        "options": {key: value for key, value in options.items() if key not in CALL_OPTIONS},
        "scheduler": options.get("scheduler"),
        "num_inference_steps": options.get("num_inference_steps", ""),
        "calls": f"{sampler['calls_per_image']:g}",
        "metrics": dict(metrics),
    }


def _text(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def _recipe_table(scheduler: Any, recipes: Sequence[Mapping[str, Any]]) -> str:
    """The table of samplers. Where the calls of a sampler are not given, its plan is made to count them."""
    measures = list(dict.fromkeys(name for recipe in recipes for name in recipe.get("metrics", {})))
    rows = []
    for recipe in recipes:
        options, levels, calls = recipe.get("options", {}), recipe["num_inference_steps"], recipe.get("calls")
        if recipe.get("scheduler") is None:
            # The plan is made even if the calls are known, because a card must show options that the scheduler accepts.
            unknown = set(options) - set(inspect.signature(type(scheduler).__init__).parameters)
            if unknown:
                names = ", ".join(map(str, unknown))
                raise ValueError(f"results: {type(scheduler).__name__} has no option {names}, as in {recipe!r}.")
            try:
                sampler = type(scheduler).from_config(scheduler.config, **options)
                if isinstance(levels, Integral):
                    sampler.set_timesteps(int(levels))
                    calls = len(sampler.timesteps) if calls is None else calls
            except (ValueError, TypeError) as error:
                raise ValueError(f"results: no sampler has the options {_text(options)}: {error}") from error
        text = ", ".join(filter(None, [_text(options), recipe.get("label")]))
        values = [recipe.get("metrics", {}).get(name, "") for name in measures]
        rows.append([f"`{text}`" if text else "as it is", levels, calls, *values])
    return _table(["scheduler", "levels", "calls", *measures], rows)


def _features(results: Mapping[str, Any]) -> str | None:
    """What the numbers of samplers were measured on."""
    if not results.get("samplers"):
        return None
    features, data = results["features"], results["data"]
    real = (results.get("baseline") or {}).get("metrics") or {}
    frechet = next((name for name in real if name.startswith(("FD", "FID"))), None)
    floor = "" if frechet is None else f" {results['baseline']['label']}: {frechet} {real[frechet]:.4g}."
    if too_few_samples(results):
        return (
            f"{results['num_samples']} samples of each, which are too few for numbers about the distribution of their "
            f"{features['dimensions']} features."
        )
    return (
        f"{results['num_samples']} samples of each against {data['images']} images of {data['name']} "
        f"({data['split']}); features: {features['name']}, {features['dimensions']} dimensions. Such numbers compare "
        f"with each other only.{floor}"
    )


def _metrics(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Numbers about the model as a whole."""
    metrics = [{"text": f"{metric['value']:.4g}", **metric} for metric in results.get("metrics", [])]
    bits = results.get("bits_per_dim")
    if bits is not None:
        images = bits.get("images", results.get("images", "?"))
        metrics.append(
            {
                "name": "bits/dim",
                "type": "bits_per_dim",
                "value": bits["mean"],
                "text": f"{bits['mean']:.4f} +- {bits['standard_error']:.4f}",
                "on": f"{images} images, {bits['dequantization']} dequantisation, t = {bits['t_min']:g}, rtol "
                f"{bits['rtol']:g}",
            }
        )
    bits = results.get("latent_bits_per_dim")
    if bits is not None:
        metrics.append(
            {
                "name": "bits per latent dimension",
                "type": "latent_bits_per_dim",
                "value": bits["mean"],
                "text": f"{bits['mean']:.4f} +- {bits['standard_error']:.4f}",
                "on": f"latents of {bits.get('images', '?')} images, a density and no bits per pixel, t = "
                f"{bits['t_min']:g}, rtol {bits['rtol']:g}",
            }
        )
    return metrics


def _sampler_metrics(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Numbers about samplers, which the table of samplers shows already."""
    return [
        {
            "name": f"{name} ({sampler['label']}, {sampler['calls_per_image']:g} calls, {results.get('num_samples')} "
            "samples)",
            "type": name,
            "value": value,
        }
        for sampler in results.get("samplers", [])
        for name, value in shown_metrics(results, sampler).items()
    ]


def _stock(pipe: Any) -> str | None:
    """A remark for users of stock diffusers, or None if it cannot run this model."""
    config = pipe.scheduler.config
    if (
        type(pipe.scheduler).__name__ != "VPSDEScheduler"
        or type(pipe.unet).__name__ != "UNet2DModel"
        or config.prediction_type not in STOCK_PREDICTIONS
        or config.time_conditioning not in ("discrete", "continuous", "score_sde")
        or (pipe.config.data_min, pipe.config.data_max) != (-1.0, 1.0)
        or type(pipe).__name__ == "ClassConditionalSDEPipeline"
        or pipe.vae is not None
    ):
        return None
    if config.time_conditioning == "discrete":
        return " The table of noise levels is the one it was trained on."
    return (
        " The stock scheduler steps through the discrete table next to its SDE, and feeds the network a time that is a "
        "thousandth off."
    )
