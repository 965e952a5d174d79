"""`/api/v1/uploads` (contract §6): a file at once, or in parts by tus 1.0 (https://tus.io/protocols/resumable-upload).

    POST /api/v1/uploads                   without `Tus-Resumable`: the body is the file
    POST /api/v1/uploads                   with it: begins an upload of `Upload-Length` bytes
    HEAD, PATCH, DELETE …/{upload_id}      tus: how far it is; more of it; delete it
    GET …/{upload_id}                      what it is, as JSON
    OPTIONS /api/v1/uploads                tus: what is offered

Extensions: creation, expiration, termination. Departures from tus:
1. `X-HTTP-Method-Override` is not read: clients that cannot send PATCH send the file at once.
2. HEAD joins the parts once everything has arrived, so it may take some seconds then.

Annotations are evaluated when this module runs: `upload_routes` makes the dependencies that they name.
"""

import base64
import binascii
from collections.abc import Callable, Coroutine
from email.utils import format_datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from comfyui_temporal.contracts.fields import CallerId
from comfyui_temporal.contracts.permissions import Operation
from comfyui_temporal.contracts.uploads import InputKind, UploadView
from gateway.access import Access
from gateway.problems import FieldProblem, Problem, ProblemCode, problems
from gateway.upload_body import SentBytes
from gateway.uploads import Uploads
from runtime.caller_tokens import Caller
from store import StoredUpload

UPLOADS: Final = "/api/v1/uploads"
TUS: Final = "1.0.0"
TUS_HEADER: Final = "Tus-Resumable"
PART_TYPE: Final = "application/offset+octet-stream"
MAX_METADATA: Final = 4_096
SENT_HEADERS: Final = ("Tus-Resumable", "Upload-Length", "Upload-Metadata", "Upload-Offset")
"""What tus clients in browsers send."""
ANSWERED_HEADERS: Final = (
    *("Tus-Resumable", "Tus-Version", "Tus-Extension", "Tus-Max-Size"),
    *("Upload-Offset", "Upload-Length", "Upload-Expires", "Upload-Metadata"),
)
"""What they read."""

_ANY: Final = (
    *(ProblemCode.UNAUTHENTICATED, ProblemCode.NOT_AUTHORIZED, ProblemCode.INPUT_INVALID),
    *(ProblemCode.STORE_UNAVAILABLE, ProblemCode.STORAGE_UNAVAILABLE, ProblemCode.TOKENS_UNVERIFIABLE),
    *(ProblemCode.UPLOADS_NOT_OFFERED, ProblemCode.RATE_LIMITED),
)
_OWN: Final = (*_ANY, ProblemCode.UPLOAD_UNKNOWN, ProblemCode.UPLOAD_EXPIRED)
_TAKEN: Final = (
    *(ProblemCode.TOO_LARGE, ProblemCode.TOO_SLOW, ProblemCode.FILE_UNSUPPORTED, ProblemCode.PROTOCOL_UNSUPPORTED),
)
_BEGUN: Final[dict[int | str, dict[str, Any]]] = {
    201: {
        "description": "The upload",
        "headers": {"Location": {"description": "The upload's address.", "schema": {"type": "string"}}},
    }
}
_FILE: Final[dict[str, Any]] = {
    "requestBody": {
        "description": "The file; empty where an upload in parts begins.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_PART: Final[dict[str, Any]] = {
    "requestBody": {"required": True, "content": {PART_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}
_OFFSET: Final[dict[int | str, dict[str, Any]]] = {
    status: {
        "description": what,
        "headers": {"Upload-Offset": {"description": "Bytes that have arrived.", "schema": {"type": "integer"}}},
    }
    for status, what in ((200, "How far it is"), (204, "Taken"))
}

_METHODS: Final = {False: "OPTIONS, POST", True: "DELETE, GET, HEAD, PATCH"}
"""Each method is a route of its own: the framework would name the first one's alone."""

Kind = Annotated[InputKind | None, Query(description="What the file is said to be: another one is refused.")]
Protocol = Annotated[str | None, Header(alias=TUS_HEADER, description="`1.0.0`: an upload in parts.")]


class _TusRoute(APIRoute):
    """Every answer says the protocol's version, refusals too, and a 405 every method of the path."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in (self.methods or ()):
            raise HTTPException(405, headers={"Allow": _METHODS[self.path.endswith("{upload_id}")]})
        await super().handle(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                response = await handle(request)
            except Problem as problem:
                problem.headers.setdefault(TUS_HEADER, TUS)
                raise
            response.headers[TUS_HEADER] = TUS
            return response

        return answer


def upload_routes(uploads: Uploads, access: Access) -> APIRouter:
    router = APIRouter(prefix=UPLOADS, tags=["uploads"], route_class=_TusRoute)
    Sender = Annotated[Caller, Depends(access.requires(Operation.CONTINUE_UPLOAD))]
    Owner = Annotated[Caller, Depends(access.requires(Operation.UPLOAD))]

    @router.post(
        "",
        status_code=201,
        responses=_BEGUN | problems(*_ANY, *_TAKEN),
        openapi_extra=_FILE,
    )
    async def upload(
        caller: Owner,
        request: Request,
        response: Response,
        kind: Kind = None,
        protocol: Protocol = None,
        length: Annotated[int | None, Header(alias="Upload-Length", ge=1, le=2**53)] = None,
        metadata: Annotated[str, Header(alias="Upload-Metadata", max_length=MAX_METADATA)] = "",
    ) -> UploadView:
        """Upload an image, mask, video or sound: 201. With `Tus-Resumable` begin an upload in parts."""
        body = SentBytes(request)
        if protocol is None:
            async with body.answered_at_its_end():
                taken = await uploads.take(caller, body, kind)
        else:
            _check_protocol(protocol)
            if length is None:
                raise _field("Upload-Length", "is needed: the length must be known when the upload begins")
            declared = kind or _kind_in(metadata)
            taken = await uploads.begin(caller, length, kind=declared, metadata=metadata)
        response.headers["Location"] = f"{UPLOADS}/{taken.upload_id}"
        response.headers.update(_progress(taken))
        return taken.view()

    @router.options("", status_code=204, response_class=Response)
    async def offered() -> Response:
        """What is offered of tus."""
        headers = {
            "Tus-Version": TUS,
            "Tus-Extension": "creation,expiration,termination",
            "Tus-Max-Size": str(uploads.settings.max_bytes),
        }
        return Response(status_code=204, headers=headers)

    @router.head("/{upload_id}", response_class=Response, responses=_of(200) | problems(*_OWN))
    async def look(caller: Sender, upload_id: CallerId) -> Response:
        """How far an upload is."""
        found = await uploads.own(caller, upload_id)
        headers = _progress(found) | ({"Upload-Metadata": found.metadata} if found.metadata else {})
        return Response(status_code=200, headers=headers | {"Upload-Length": str(found.size_bytes)})

    @router.get("/{upload_id}", responses=problems(*_OWN))
    async def read(caller: Sender, upload_id: CallerId) -> UploadView:
        """What an upload is."""
        return (await uploads.own(caller, upload_id)).view()

    @router.patch(
        "/{upload_id}",
        status_code=204,
        response_class=Response,
        responses=_of(204) | problems(*_OWN, *_TAKEN, ProblemCode.UPLOAD_OFFSET),
        openapi_extra=_PART,
    )
    async def append(
        caller: Sender,
        upload_id: CallerId,
        request: Request,
        offset: Annotated[int, Header(alias="Upload-Offset", ge=0, le=2**53)],
        protocol: Protocol = None,
    ) -> Response:
        """Send more of an upload, from the byte on that it has reached; 409 for any other."""
        _check_protocol(protocol)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != PART_TYPE:
            raise Problem(ProblemCode.FILE_UNSUPPORTED, f"A part's Content-Type must be {PART_TYPE}.")
        body = SentBytes(request)
        async with body.answered_at_its_end():
            upload = await uploads.append(caller, upload_id, offset, body)
        return Response(status_code=204, headers=_progress(upload))

    @router.delete("/{upload_id}", status_code=204, response_class=Response, responses=problems(*_OWN))
    async def delete(caller: Owner, upload_id: CallerId) -> Response:
        """Delete an upload. A task that names it and has not fetched it yet fails."""
        await uploads.delete(caller, upload_id)
        return Response(status_code=204)

    return router


def _of(status: int) -> dict[int | str, dict[str, Any]]:
    return {status: _OFFSET[status]}


def _progress(upload: StoredUpload) -> dict[str, str]:
    return {
        "Upload-Offset": str(upload.received_bytes),
        "Upload-Expires": format_datetime(upload.expires_at, usegmt=True),
    }


def _check_protocol(version: str | None) -> None:
    if version != TUS:
        raise Problem(
            ProblemCode.PROTOCOL_UNSUPPORTED,
            f"Uploads in parts speak tus {TUS}: send `{TUS_HEADER}: {TUS}`.",
            headers={"Tus-Version": TUS},
        )


def _kind_in(metadata: str) -> InputKind | None:
    """The `kind` among tus's metadata: names and base64 values, `kind bWFzaw==,filename …`. Raises Problem 422."""
    pairs = dict(pair.strip().partition(" ")[::2] for pair in metadata.split(","))
    if "kind" not in pairs:
        return None
    try:
        return InputKind(base64.b64decode(pairs["kind"], validate=True).decode())
    except (binascii.Error, ValueError):
        raise _field("Upload-Metadata", f"kind must be one of {', '.join(InputKind)}, in base64") from None


def _field(name: str, message: str) -> Problem:
    return Problem(
        ProblemCode.INPUT_INVALID,
        f"Nothing was begun: {name} {message}.",
        fields=[FieldProblem(field=name, message=message)],
    )
