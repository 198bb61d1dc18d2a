"""`san demo`: networks in the browser."""

from __future__ import annotations

from san.cli.arguments import chosen_device

__all__ = ["demo"]


def demo(
    *,
    checkpoint: list[str] | None = None,
    port: int | None = None,
    open_browser: bool = True,
    device: str | None = None,
) -> None:
    """Show what a network sees, in the browser.

    Choose a sample or upload a picture; see the likeliest classes and what a pixel that is clicked attends to, in any
    layer and weight group; turn the picture, attack it (PGD), and see whether the answer holds; set two networks side
    by side. The page is served to this machine alone, at 127.0.0.1, and asks no other host for anything. Without
    --checkpoint it shows a small network that comes with the package. Ctrl-C ends it.

    Args:
        checkpoint: A run folder, a .safetensors file or a published .pth; several if given several times, of which the
            first two stand side by side.
        port: Where to serve; default the first free one from 7860 on.
        open_browser: Show the page in a browser at once.
        device: Such as cpu or cuda:0; default the GPU if there is one.
    """
    # First of all: a missing package should not cost what is loaded before it is noticed.
    from san.demo.networks import load_networks
    from san.demo.serving import serve

    serve(load_networks(checkpoint or [], chosen_device(device)), port=port, open_browser=open_browser)
