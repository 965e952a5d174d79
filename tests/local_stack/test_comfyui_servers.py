"""A ComfyUI address that does not answer is reported."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from local_stack.__main__ import _parser
from local_stack.comfyui_servers import silent_servers
from local_stack.ports import any_free_port


class Answers(BaseHTTPRequestHandler):
    """A server that knows `/system_stats` alone, and below `/gpus` one behind a proxy that demands a token."""

    def do_GET(self) -> None:
        self.send_response({"/system_stats": 200, "/gpus/system_stats": 401}.get(self.path, 404))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return None


def test_only_a_silent_server_is_named_with_what_to_do() -> None:
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        there, gone = f"http://127.0.0.1:{server.server_port}/", f"http://127.0.0.1:{any_free_port()}"
        said = list(silent_servers([there, gone, f"{there}elsewhere", f"{there}gpus"]))
        server.shutdown()
    assert [sentence.split()[2] for sentence in said] == [gone, f"{there}elsewhere"]
    assert all("Jobs wait until it does" in sentence and "COMFYUI=http://host:port" in sentence for sentence in said)


def test_an_invalid_address_is_named_too() -> None:
    [sentence] = silent_servers(["http://a b:8188"])
    assert sentence.startswith("ComfyUI at http://a b:8188 does not answer")


def test_an_address_may_have_a_path_as_behind_a_proxy() -> None:
    given = _parser().parse_args(["up", "--comfyui", "https://gpus.example/one/", "--comfyui", "http://127.0.0.1:8188"])
    assert given.comfyui == ["https://gpus.example/one", "http://127.0.0.1:8188"]
    for wrong in ("gpus.example:8188", "http://gpus.example/one?x=1", "http:///one"):
        with pytest.raises(SystemExit):
            _parser().parse_args(["up", "--comfyui", wrong])
