"""Segments images in a browser: python -m dense_jax.demo --workdir=DIR [--port=7860].

Serves a page on which an image is dropped and its classes are seen: laid over it at any opacity, with
the area of each, and as a file to download. An image is read as evaluation reads it. By default only
this machine can open the page, which asks no other one for anything. Requests to other names than
this machine's are refused. It is made with Gradio, the package's extra `demo`.
"""

import html
import ipaddress
import socket
import sys
import urllib.parse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from jaxtyping import UInt8

from dense_jax import command, plots
from dense_jax.data import decode
from dense_jax.devices import runtime as startup
from dense_jax.inference.predictor import load

if TYPE_CHECKING:
    import gradio

SHOWN = 1600  # pixels, of the overlay's longer side
BYTES_PER_PIXEL = 8  # of an upload: four channels of 16 bits

CSS = """
#picture .image-frame, #picture img { width: 100%; max-height: 80vh; object-fit: contain }
#areas { max-height: 32rem; overflow: auto }
#areas table { width: 100%; border: 0; margin: 0; font-variant-numeric: tabular-nums }
#areas tr { border: 0; border-bottom: 1px solid var(--border-color-primary) }
#areas :is(td, th) { padding: .2rem .4rem; text-align: right; border: 0 }
#areas :is(td, th):nth-child(2) { text-align: left; width: 99%; overflow-wrap: anywhere }
#areas i { display: block; width: 1.1rem; height: 1.1rem; outline: 1px solid #8888 }
#areas .none td { color: var(--body-text-color-subdued) }
"""


def read(
    path: str, num_channels: int, value_range: Any, max_megapixels: float
) -> UInt8[np.ndarray, "h w c"]:
    """The image of a file, by the file's header known to be small enough. ValueError if it is not."""
    name = Path(path).name
    with Path(path).open("rb") as file:
        decode.image_header(file, name, max_pixels=1e6 * max_megapixels)
        file.seek(0)
        return decode.read_image(file, name, num_channels, value_range=value_range)


def areas(labels: UInt8[np.ndarray, "h w"], num_classes: int) -> list[tuple[int, int]]:
    """(class, pixels) of every class, the largest first."""
    pixels = np.bincount(labels.ravel(), minlength=num_classes)
    return [(c, int(pixels[c])) for c in np.argsort(-pixels, kind="stable").tolist()]


def table(labels: UInt8[np.ndarray, "h w"], colors: dict[str, Any]) -> str:
    """HTML: the color, name and area of every class. colors: {class: RGB}."""
    named = list(colors.items())
    rows = ["<tr><th></th><th>class</th><th>pixels</th><th>area</th></tr>"]
    for c, pixels in areas(labels, len(named)):
        name, (red, green, blue) = named[c]
        rows.append(
            f"<tr{'' if pixels else ' class=none'}>"
            f'<td><i style="background: rgb({red} {green} {blue})"></i></td>'
            f"<td>{html.escape(name)}</td><td>{pixels:,}</td>"
            f"<td>{100 * pixels / labels.size:.2f}&nbsp;%</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def make_page(predictor: Any, max_megapixels: float) -> "gradio.Blocks":
    """The page for `predictor(image) -> labels`, as `load` returns it."""
    import gradio as gr

    colors = plots.colors_of(predictor.class_names, predictor.palette)

    def segment(path: str | None, opacity: float) -> tuple[Any, ...]:
        if path is None:  # the image was taken away
            return None, None, "", gr.DownloadButton(interactive=False)
        try:
            image = read(path, predictor.num_channels, predictor.value_range, max_megapixels)
        except ValueError as error:
            message = html.escape(str(error))  # which Gradio would take for markup
            raise gr.Error(message, duration=None, print_exception=False) from error
        labels = predictor(image)
        result = Path(path).with_name(f"{Path(path).stem}_classes.png")
        plots.indexed(labels, predictor.palette).save(result)
        shown = plots.shrink(plots.to_rgb(image), SHOWN), plots.shrink(labels, SHOWN)
        download = gr.DownloadButton(value=result, interactive=True)
        return shown, draw(shown, opacity), table(labels, colors), download

    def draw(shown: tuple[np.ndarray, np.ndarray] | None, opacity: float) -> np.ndarray | None:
        return shown and plots.overlay(*shown, predictor.palette, opacity)

    with gr.Blocks(analytics_enabled=False, title="dense_jax", delete_cache=(600, 3600)) as page:
        shown = gr.State()
        with gr.Row():
            file = gr.File(label="Image", height=140, min_width=280)
            opacity = gr.Slider(
                0, 1, plots.OPACITY, step=0.05, label="Opacity of the classes", min_width=280
            )
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                picture = gr.Image(
                    label="Classes", format="jpeg", buttons=["fullscreen"], elem_id="picture"
                )
            with gr.Column(scale=1, min_width=280):
                of_classes = gr.HTML(elem_id="areas")
                download = gr.DownloadButton("Class ids as PNG", interactive=False)
        file.change(segment, [file, opacity], [shown, picture, of_classes, download])
        opacity.input(
            draw, [shown, opacity], picture, show_progress="hidden", trigger_mode="always_last"
        )
    return page


class OwnHosts:
    """ASGI middleware that answers requests to addresses and to `names`, and refuses all others.

    The owner of a page elsewhere can point its name to this machine. A browser then lets that page
    read what is served here (DNS rebinding), but its requests still carry that name.
    """

    def __init__(self, app: Any, names: Collection[str]):
        self._app, self._names = app, names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            from starlette.responses import PlainTextResponse  # of Gradio

            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if not is_own(host, self._names):
                said = f"not served as {host!r}, but as {', '.join(sorted(self._names))}\n"
                await PlainTextResponse(said, 421)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_own(host: str, names: Collection[str]) -> bool:
    """Whether a Host header has an address or one of the names, with any port."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        if name not in names:
            ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def serve(predictor: Any, host: str, port: int, max_megapixels: float) -> "gradio.Blocks":
    """Opens the page, and returns. Raises OSError if the port is taken, ValueError for IPv6."""
    import gradio as gr
    from starlette.middleware import Middleware

    if ":" in host:
        raise ValueError(f"--host={host}: Gradio does not serve at IPv6 addresses")
    names = {"localhost", host.lower()}
    if host not in ("localhost", "127.0.0.1"):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    page = make_page(predictor, max_megapixels)
    page.launch(
        server_name=host,
        server_port=port,
        max_file_size=round(BYTES_PER_PIXEL * 1e6 * max_megapixels),
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        app_kwargs={"middleware": [Middleware(OwnHosts, names)]},
        # Fonts of the reader's machine, for others would be fetched.
        theme=gr.themes.Default(primary_hue="blue", font="system-ui", font_mono="monospace"),
        css=CSS,
    )
    return page


def main(argv: list[str]) -> None:
    try:
        import gradio  # noqa: F401
    except ImportError:
        sys.exit("the demo needs Gradio: pip install 'gradio>=6.31'")
    startup.prepare()
    args = flags.FLAGS
    predictor = load(args.workdir)
    try:
        page = serve(predictor, args.host, args.port, args.max_megapixels)
    except OSError as error:
        sys.exit(f"{args.host}:{args.port} cannot be used, pass another --port ({error})")
    print(f"open {page.local_url}")
    page.block_thread()


if __name__ == "__main__":
    command.define_path("workdir", "Of a run of dense_jax.main.", required=True)
    flags.DEFINE_string(
        "host", "127.0.0.1", "Address to serve at; 0.0.0.0: to other machines, too."
    )
    flags.DEFINE_integer("port", 7860, "Port to serve at.", lower_bound=0, upper_bound=65535)
    flags.DEFINE_float("max_megapixels", 25, "Of an image; larger ones are refused.", lower_bound=0)
    command.run(main)
