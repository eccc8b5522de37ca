"""The server of the page: its files, and its runs through Gradio's queue.

Many visitors wait their turn in the queue, and a run of the same settings is computed once.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI, Request, Response
from fastapi.staticfiles import StaticFiles

from .particles import particles
from .runs import Model, between, complete, describe, few, form, likelihood

WEB = Path(__file__).resolve().parent / "web"
AT_ONCE = 2  # runs that compute at the same time
WAITING = 48  # visitors in the queue; whoever comes after is asked to try again
REMEMBERED = 256  # results
# Nothing is loaded from elsewhere. A Space is shown in a frame of huggingface.co.
POLICY = "default-src 'self'; img-src 'self' data:; style-src 'self'; script-src 'self'; frame-ancestors *"


class Remembered:
    """The latest results by their settings; a run that was computed once is not computed again."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most, self._lock = most, threading.Lock()
        self._results: OrderedDict[str, list[Any]] = OrderedDict()

    def __call__(self, run: Callable[..., Any], name: str, model: Model | None, settings: dict) -> Iterator[Any]:
        """Yield the parts of a run; a run that returns has one."""
        key = json.dumps([name, model.name if model else "", settings], sort_keys=True)
        with self._lock:
            known = self._results.get(key)
            if known is not None:
                self._results.move_to_end(key)
        if known is not None:
            yield from known
            return
        found = run(**settings) if model is None else run(model, **settings)
        parts = []
        for part in found if isinstance(found, Iterator) else [found]:
            parts.append(part)
            yield part
        with self._lock:
            self._results[key] = parts
            while len(self._results) > self._most:
                self._results.popitem(last=False)


def endpoint(run: Callable[..., Any], models: dict[str, Model], remembered: Remembered) -> Callable[..., Any]:
    """The run as a function of one JSON object: the run's arguments and, under "model", the name of a model."""

    def answer(settings: dict) -> Iterator[dict]:
        settings = dict(settings)
        name = settings.pop("model", None)
        if models and name not in models:
            raise gr.Error(f"There is no model {name!r}; there are {', '.join(models)}.", print_exception=False)
        try:
            yield from remembered(run, run.__name__, models.get(name), settings)
        except (TypeError, ValueError) as error:  # an unknown setting, or one out of range
            raise gr.Error(str(error), print_exception=False) from error

    return answer


def build(models: dict[str, Model]) -> FastAPI:
    """The server: the page at /, its runs below /runs."""
    server, remembered = FastAPI(docs_url=None, redoc_url=None), Remembered()

    @server.middleware("http")
    async def guarded(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @server.get("/models")
    def described() -> list[dict[str, Any]]:
        return [describe(model) for model in models.values()]

    with gr.Blocks(analytics_enabled=False) as queue:
        limits = {"concurrency_limit": AT_ONCE, "concurrency_id": "runs"}
        for run in (form, complete, between, likelihood, few):
            gr.api(endpoint(run, models, remembered), api_name=run.__name__, **limits)
        gr.api(endpoint(particles, {}, remembered), api_name="particles", **limits)
    queue.queue(max_size=WAITING)
    gr.mount_gradio_app(server, queue, path="/runs")
    server.mount("/", StaticFiles(directory=WEB, html=True))
    return server
