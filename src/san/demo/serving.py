"""Serving the page to this machine alone: on the loopback address, and without asking another host for anything."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import Any

# Before gradio is imported, which would otherwise tell its makers that a page was started.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from san.demo.networks import Network
from san.demo.page import STYLE, build_page
from san.demo.uploads import MOST_MEGABYTES
from san.errors import UserError

__all__ = ["HOST", "serve", "served"]

HOST = "127.0.0.1"
"""Where the page is served: the loopback address, which other machines cannot reach."""
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "Consolas", "monospace")
# A browser refuses whatever is not from the page's own address, so nothing that gradio names elsewhere is asked for.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; font-src 'self' data:; worker-src 'self' blob:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)


class _OwnPageOnly:
    """Refuses what other sites' pages send, files above all, which a browser carries here for them.

    Browsers say where a request comes from, in one header or the other; what says nothing is nobody's page.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and _is_foreign(Headers(scope=scope)):
            await PlainTextResponse("only the page itself may send anything here", 403)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _is_foreign(headers: Headers) -> bool:
    """Whether a request comes from another page than our own."""
    origin = headers.get("origin")
    is_elsewhere = origin is not None and origin.partition("://")[2] != headers.get("host")
    return is_elsewhere or headers.get("sec-fetch-site", "none") not in ("same-origin", "none")


class _ContentPolicy:
    """Adds the policy to every answer."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), policy]}
            await send(message)

        await self._app(scope, receive, send_with_policy)


_GUARDS = [
    Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
    Middleware(_ContentPolicy),
    Middleware(_OwnPageOnly),
]


def serve(networks: Sequence[Network], *, port: int | None = None, open_browser: bool = True) -> None:
    """Serve the page until Ctrl-C or SIGTERM, and print its address; in the main thread, which alone hears them.

    Args:
        networks: As `load_networks` gives them; the first two stand side by side.
        port: Where on `HOST`; default the first free one from 7860 on.
        open_browser: Show the page in a browser.

    Raises:
        UserError: The port is taken or does not exist.
        SystemExit: SIGTERM came; its code is 143.
    """
    with _ended_by_sigterm(), served(networks, port=port, open_browser=open_browser) as (_, address):
        print(f"{address} (this machine only; Ctrl-C ends it)", flush=True)
        Event().wait()


@contextmanager
def _ended_by_sigterm() -> Generator[None]:
    """SIGTERM, which would end the process at once, raises `SystemExit` inside, so that no file remains."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def served(
    networks: Sequence[Network], *, port: int | None = None, open_browser: bool = False
) -> Generator[tuple[gr.Blocks, str]]:
    """The page and its address, served by other threads as long as the block runs; arguments as of `serve`.

    Uploads and pictures lie in a folder of their own meanwhile, which is removed at the end.
    """
    with (
        tempfile.TemporaryDirectory(prefix="san-demo-", ignore_cleanup_errors=True) as folder,
        _environment(GRADIO_TEMP_DIR=folder, **_without_proxy()),
    ):
        page = build_page(networks)
        try:
            yield page, _launch(page, port, open_browser)
        finally:
            page.close(verbose=False)


def _without_proxy() -> dict[str, str]:
    """Variables by which gradio, which asks its own page whether it is there, does not ask a proxy of the user's."""
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    return dict.fromkeys(("no_proxy", "NO_PROXY"), f"{others},{HOST}" if others else HOST)


@contextmanager
def _environment(**values: str) -> Generator[None]:
    """Environment variables inside, and what they were afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _launch(page: gr.Blocks, port: int | None, open_browser: bool) -> str:
    if port is not None and not 0 < port < 1 << 16:
        raise UserError(f"port {port} does not exist; --port takes 1 to 65535")
    page.queue(max_size=64, api_open=False)
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            inbrowser=open_browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            footer_links=[],
            max_file_size=f"{MOST_MEGABYTES}mb",
            state_session_capacity=64,
            theme=gr.themes.Default(font=_FONTS, font_mono=_MONO),
            # Not as `css`, whose rules gradio takes apart and leaves some out.
            head=f"<style>{STYLE}</style>",
            app_kwargs={"middleware": _GUARDS},
        )
    except OSError as problem:
        where = f"port {port} is" if port else "the ports from 7860 on are"
        raise UserError(f"{where} not free; name another with --port") from problem
    return address
