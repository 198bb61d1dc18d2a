"""`san demo`: a page in the browser on which a network can be looked at while it looks at a picture.

Served to this machine alone by gradio. `networks` holds what is shown and `answers` what is computed; `pictures`,
`charts` and `panel` draw it; `showing` is the page without gradio, `page` the components and events, and `serving` puts
it on the loopback address. `uploads` and `samples` are where pictures come from.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from san.demo.networks import Network, load_networks
    from san.demo.serving import serve

__all__ = ["Network", "load_networks", "serve"]

_HOMES = {"Network": "san.demo.networks", "load_networks": "san.demo.networks", "serve": "san.demo.serving"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'san.demo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
