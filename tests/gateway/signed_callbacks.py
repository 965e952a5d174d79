"""Hooks of schemathesis: it signs callbacks as ComfyUI does, so that more than their refusal is tested, and can send a
part of an upload."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from urllib.parse import unquote, urlsplit

import schemathesis
from requests import PreparedRequest
from requests.auth import AuthBase
from schemathesis.auths import GLOBAL_AUTH_STORAGE as AUTH_STORAGE

from proof.site.callbacks import signed_headers

HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")


class Signed(AuthBase):
    """Signs what goes over the wire; a request that lacks one of the headers is unchanged."""

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        if not all(name in request.headers for name in HEADERS):
            return request
        body = _of_the_task_in_the_path(request.body or b"", str(request.url))
        request.body, request.headers["content-length"] = body, str(len(body))
        signed = signed_headers(body, os.environ["GATEWAY_CALLBACK_SECRET"])
        request.headers.update({name: signed[name] for name in HEADERS})
        return request


def _of_the_task_in_the_path(body: object, url: str) -> bytes:
    raw = body if isinstance(body, bytes) else str(body).encode()
    with suppress(ValueError, RecursionError):
        callback = json.loads(raw)
        if isinstance(callback, dict) and isinstance(callback.get("task_id"), str):
            callback["task_id"] = unquote(urlsplit(url).path.rpartition("/")[2])
            return json.dumps(callback).encode()
    return raw


AUTH_STORAGE.set_from_requests(Signed()).apply_to(path="/callbacks/comfyui/{task_id}")
schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")
