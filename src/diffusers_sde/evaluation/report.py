"""Results as a table, and as entries of a model card."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult

from ..shipping.cards import SAMPLES_PER_DIMENSION, shown_metrics, too_few_samples

TASK = "unconditional-image-generation"


def markdown_table(report: dict[str, Any]) -> str:
    """The results of ``evaluate`` as a Markdown table with a line that says what the numbers are."""
    lines = []
    if report.get("samplers"):
        baseline, rows = report["baseline"], report["samplers"]
        names = [name for name in (rows[0]["metrics"]) if not name.endswith("_std")]
        header = ["sampler", "calls", *names, "median distance to data", "share nearer than real images' 1 %"]
        lines = [_row(header), _row(["---"] + ["---:"] * (len(header) - 1))]
        for entry in (baseline, *rows):
            metrics = entry["metrics"] or {}
            cells = [_number(metrics.get(name)) for name in names]
            nearest = entry["nearest"]
            distances = [_number(nearest["median"]), _number(nearest["share_below"])]
            lines.append(_row([entry["label"], _number(entry.get("calls_per_image")), *cells, *distances]))
        data, features = report["data"], report["features"]
        accuracy = f", accuracy {features['accuracy']:.1%}" if "accuracy" in features else ""
        lines += [
            "",
            f"{report['num_samples']} samples of each sampler against {data['images']} images of {data['name']} "
            f"({data['split']}); features: {features['name']} ({features['dimensions']} dimensions{accuracy}).",
        ]
        if too_few_samples(report):
            lines += ["", warning_of_few_samples(report)]
    bits = report.get("bits_per_dim")
    if bits is not None:
        given = " given the class" if bits["given_class"] else ""
        lines += [
            "",
            f"{bits['mean']:.4f} +- {bits['standard_error']:.4f} bits/dim{given} on {bits['images']} images "
            f"({bits['split']}) at t = {bits['t_min']:g} ({bits['dequantization']} dequantisation, "
            f"{bits['importance_samples']} per image; {bits['num_probes']} probe(s), scatter "
            f"{bits['standard_error_of_one_image_from_probes']:.4f} per image; rtol {bits['rtol']:g}; "
            f"{bits['calls_per_image']:.1f} network calls per image)",
        ]
    bits = report.get("latent_bits_per_dim")
    if bits is not None:
        given = " given the class" if bits["given_class"] else ""
        lines += [
            "",
            f"Density of latents: {bits['mean']:.4f} +- {bits['standard_error']:.4f} bits per latent dimension{given} "
            f"on {bits['images']} images ({bits['split']}) at t = {bits['t_min']:g} ({bits['num_probes']} probe(s); "
            f"rtol {bits['rtol']:g}). It compares networks on the same autoencoder and is no number of bits per pixel.",
        ]
    return "\n".join(lines).strip("\n")


def warning_of_few_samples(report: dict[str, Any]) -> str:
    """What is wrong with the numbers of an evaluation of too few images; see ``too_few_samples``."""
    fewest, dimensions = min(report["num_samples"], report["data"]["images"]), report["features"]["dimensions"]
    return (
        f"{fewest} images are too few for {dimensions} features: take {SAMPLES_PER_DIMENSION * dimensions} or more. "
        "Numbers about features are then mostly the error of their moments, compare with nothing, and stay off model "
        "cards."
    )


def eval_results(report: dict[str, Any]) -> list[EvalResult]:
    """The results of ``evaluate`` as ``huggingface_hub`` takes them for the model-index of a model card.

    Numbers about distributions are left out where there are too few samples for them.
    """
    data = report["data"]
    common = {"task_type": TASK, "dataset_type": data["name"], "dataset_name": data["name"]}
    results = []
    for entry in report.get("samplers", []):
        for name, value in shown_metrics(report, entry).items():
            results.append(
                EvalResult(
                    **common,
                    dataset_split=data["split"],
                    metric_type=name,
                    metric_name=f"{name} ({entry['label']}, {entry['calls_per_image']:g} calls, "
                    f"{report['num_samples']} samples)",
                    metric_value=value,
                    metric_args=entry["options"] or None,
                )
            )
    bits = report.get("bits_per_dim")
    if bits is not None:
        results.append(
            EvalResult(
                **common,
                dataset_split=bits["split"],
                metric_type="bits_per_dim",
                metric_name=f"bits/dim ({bits['images']} images, {bits['dequantization']} dequantisation)",
                metric_value=bits["mean"],
            )
        )
    return results


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value == round(value) and abs(value) >= 1 else f"{value:.4g}"
