"""The live page: `GET /`, static files, and the settings that they need. No build step, no token.

index.html   the content
page.css     the style, light and dark, from 360 px on
page.js      the behaviour: token, header, list, stream
api.js       requests and the stream, as any client would make them
card.js      one task on the page
results.js   its pictures, video and audio; the large view
detail.js    a task's own page
form.js      the form that starts a task
loras.js     the trained models that its image uses
datasets.js  what its training is trained on
fields.js    fields of forms
json.js      JSON with exact whole numbers
loss.js      a training's loss curve
words.js     the language: strings, dates, numbers
en.js, zh.js every string, in English and in Chinese

Its headers forbid the browser to run other scripts, to send a referrer, and to show the page in a frame.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Response

from comfyui_temporal.contracts.fields import OwnModel

FOLDER: Final = Path(__file__).parent
FILES: Final = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    **{
        f"{name}.js": "text/javascript; charset=utf-8"
        for name in (
            *("page", "api", "card", "results", "detail", "form", "fields", "loras", "datasets", "loss", "words"),
            *("json", "en", "zh"),
        )
    },
    "icon.svg": "image/svg+xml",
}
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        # Results are stored wherever ComfyUI put them.
        "img-src 'self' http: https:; media-src http: https:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class PageSettings(OwnModel):
    """The Temporal UI's address, if there is one, and the tasks' namespace in it."""

    temporal_ui_url: str | None = None
    namespace: str = "default"


def page_routes(settings: PageSettings) -> APIRouter:
    """The page's files are read here, once: they are small and do not change until the next start."""
    router = APIRouter(include_in_schema=False)

    @router.get("/page/settings.json")
    async def page_settings() -> PageSettings:
        return settings

    for name, media_type in FILES.items():
        route = _route_of((FOLDER / name).read_bytes(), media_type)
        router.add_api_route(f"/page/{name}", route)
        if name == "index.html":
            router.add_api_route("/", route)
    return router


def _route_of(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        return Response(content, headers={**HEADERS, "Content-Type": media_type})

    return file
