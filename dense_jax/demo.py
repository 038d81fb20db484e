"""Serves a web page that segments images: python -m dense_jax.demo --workdir=DIR [--port=7860].

The page shows one image at a time, beside itself with the class colors at any opacity. It lists the
area and the number of objects of each class, and offers the class map for download. Some images of
the run's evaluation split are examples, if the data is still there. Images are read as in
evaluation. By default, only this machine can open the page. The page loads nothing from other
machines. Requires Gradio, which the extra `demo` installs.
"""

from absl import flags

from dense_jax import command

if __name__ == "__main__":  # above the slow imports, so that --help answers at once
    command.define_path(
        "workdir",
        "Workdir of a run of dense_jax.main, file written by dense_jax.export, or hf://OWNER/NAME.",
        required=True,
    )
    flags.DEFINE_string(
        "host", "127.0.0.1", "Address to listen on; 0.0.0.0 also serves other machines."
    )
    flags.DEFINE_integer("port", 7860, "Port to listen on.", lower_bound=0, upper_bound=65535)
    flags.DEFINE_float("max_megapixels", 25, "Larger images are refused.", lower_bound=0)
    command.help_if_asked()

import html
import ipaddress
import os
import socket
import sys
import tempfile
import urllib.parse
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from dense_jax import class_colors, drawing, regions
from dense_jax.data import decode, folds, levels
from dense_jax.devices import runtime
from dense_jax.inference import results
from dense_jax.inference.predictor import Predictor, load
from dense_jax.labels import components
from dense_jax.workdir import files

if TYPE_CHECKING:
    import gradio

SHOWN = 1600  # the longer side of the pictures, in pixels
NUM_EXAMPLES = 4
THUMBNAIL = 160  # the longer side of the picture of an example, in pixels
BYTES_PER_PIXEL = 8  # the limit for uploads: four channels of 16 bits

CSS = """
#title h1 { font-size: 1.15rem; margin: 0; overflow-wrap: anywhere }
#examples .grid-wrap { min-height: 0; padding-top: 1.8rem }
#examples .grid-container { grid-template-columns: repeat(4, minmax(0, 6rem)) }
#areas { max-height: 32rem; overflow: auto; padding: 0 }
#areas table { width: 100%; border: 0; margin: 0; font-variant-numeric: tabular-nums }
#areas tr { border: 0; border-bottom: 1px solid var(--border-color-primary) }
#areas :is(td, th) { padding: .2rem .25rem; text-align: right; border: 0 }
#areas :is(td, th):nth-child(2) { text-align: left; width: 99%; min-width: 5.8rem; overflow-wrap: anywhere }
#areas i { display: block; width: 1.1rem; height: 1.1rem; outline: 1px solid #8888 }
#areas .none td { color: var(--body-text-color-subdued) }
"""


def read(
    path: str, num_channels: int, value_range: Any, max_megapixels: float, dtype: str = "uint8"
) -> Shaped[np.ndarray, "h w c"]:
    """Reads an uploaded image. Raises ValueError if it has more than `max_megapixels`."""
    name = Path(path).name
    with Path(path).open("rb") as file:
        decode.image_header(file, name, max_pixels=1e6 * max_megapixels)
        file.seek(0)
        image = decode.read_image(file, name, num_channels, dtype=dtype, value_range=value_range)
        return np.ma.getdata(image)


def write_examples(workdir: str, folder: str) -> list[str]:
    """Writes some images of a run's evaluation split into `folder`, and returns their paths.

    Returns [] for an exported file, and if the data is not there.
    """
    if not os.path.isdir(workdir):
        return []
    config = files.read(workdir, "config.json")["data"]
    try:
        source = folds.open_split(config, folds.eval_split(config), config["root"])
        numbers = np.linspace(0, len(source) - 1, NUM_EXAMPLES).round().astype(int)
        examples = [source[i] for i in np.unique(numbers).tolist()]
    except (ValueError, OSError):
        return []
    paths = []
    for example in examples:
        image, path = example["image"], os.path.join(folder, os.path.basename(example["name"]))
        if image.dtype == np.uint8 and image.shape[2] in (1, 3):
            paths.append(f"{path}.png")
            Image.fromarray(image.squeeze()).save(paths[-1])
        else:
            paths.append(f"{path}.npy")
            np.save(paths[-1], image)
    return paths


def table(labels: UInt8[np.ndarray, "h w *r"], colors: dict[str, Any]) -> str:
    """Returns an HTML table of the classes by decreasing area, with their color, name and area.

    It also has the number of objects of each class but class 0, which are connected components.

    labels: Class ids, or the masks of r regions, which take the place of classes 1 to r.
    colors: The RGB color of each class name, in the order of the classes.
    """
    if labels.ndim == 3:
        masks = np.concatenate([~labels.any(axis=-1, keepdims=True), labels], axis=-1)
        pixels = np.count_nonzero(masks, axis=(0, 1))
    else:
        masks = None
        pixels = np.bincount(labels.ravel(), minlength=len(colors))
    area = labels.shape[0] * labels.shape[1]
    rows = ["<tr><th></th><th>class</th><th>objects</th><th>pixels</th><th>area</th></tr>"]
    for c in np.argsort(-pixels, kind="stable").tolist():
        name, (red, green, blue) = list(colors.items())[c]
        found = components(labels, [c]) if masks is None else components(masks[..., c], [1])
        objects = f"{found.max():,}" if c else ""
        rows.append(
            f"<tr{'' if pixels[c] else ' class=none'}>"
            f'<td><i style="background: rgb({red} {green} {blue})"></i></td>'
            f"<td>{html.escape(name)}</td><td>{objects}</td><td>{pixels[c]:,}</td>"
            f"<td>{100 * pixels[c] / area:.2f}&nbsp;%</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def save(labels: UInt8[np.ndarray, "h w *r"], predictor: Predictor, path: Path) -> Path:
    """Writes PATH_classes.png, or with regions PATH_masks.zip. Returns the path of the file."""
    if predictor.regions is None:
        path = path.with_name(f"{path.stem}_classes.png")
        class_colors.indexed(labels, predictor.palette).save(path)
        return path
    path = path.with_name(f"{path.stem}_masks.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for k, ending in enumerate(results.endings(["classes"], predictor.regions).values()):
            with archive.open(ending.removeprefix("_"), "w") as file:
                Image.fromarray(255 * labels[..., k]).save(file, "PNG")
    return path


def thumbnail(path: str, predictor: Predictor) -> class_colors.Picture:
    """Returns a small picture of an example."""
    image = read(path, predictor.num_channels, predictor.value_range, np.inf, predictor.dtype)
    image = levels.picture(image, value_range=predictor.value_range)
    return drawing.shrink(drawing.to_rgb(image), THUMBNAIL)


def make_page(
    predictor: Predictor, max_megapixels: float, examples: Sequence[str]
) -> "gradio.Blocks":
    """Returns the web page for a predictor. examples: The paths of images to choose from."""
    import gradio as gr

    colors = class_colors.prediction_colors(predictor)
    has_regions = predictor.regions is not None

    def segment(path: str | None, opacity: float) -> tuple[Any, ...]:
        if path is None:  # the user removed the image
            return None, None, "", gr.DownloadButton(interactive=False)
        try:
            values = predictor.num_channels, predictor.value_range
            image = read(path, *values, max_megapixels, predictor.dtype)
        except ValueError as error:
            message = html.escape(str(error))  # Gradio renders the message as HTML
            raise gr.Error(message, duration=None, print_exception=False) from error
        labels = predictor(image)
        result = save(labels, predictor, Path(path))
        flat = regions.flat(labels, predictor.regions)
        image = levels.picture(image, value_range=predictor.value_range)
        shown = drawing.shrink(drawing.to_rgb(image), SHOWN), drawing.shrink(flat, SHOWN)
        download = gr.DownloadButton(value=result, interactive=True)
        return shown, draw(shown, opacity), table(labels, colors), download

    def draw(
        shown: tuple[np.ndarray, np.ndarray] | None, opacity: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        return shown and (
            shown[0],
            drawing.overlay(*shown, class_colors.to_palette(colors), opacity),
        )

    def choose(event: gr.SelectData) -> str:
        return examples[event.index]

    title = f"dense_jax: {predictor.about}"
    with gr.Blocks(analytics_enabled=False, title=title, delete_cache=(600, 3600)) as page:
        shown = gr.State()
        gr.HTML(f"<h1>{html.escape(predictor.about)}</h1>", elem_id="title")
        with gr.Row():
            file = gr.File(label="Image", height=140, min_width=280)
            if examples:
                gallery = gr.Gallery(
                    [thumbnail(path, predictor) for path in examples],
                    label="Examples",
                    columns=NUM_EXAMPLES,
                    height=140,
                    min_width=280,
                    object_fit="cover",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="examples",
                )
                gallery.select(choose, None, file, show_progress="hidden")
            opacity = gr.Slider(
                0, 1, drawing.OPACITY, step=0.05, label="Opacity of the classes", min_width=280
            )
        with gr.Row():
            with gr.Column(scale=5, min_width=280):
                picture = gr.ImageSlider(
                    label="Image | classes",
                    format="jpeg",
                    buttons=["fullscreen"],
                    interactive=False,
                    max_height=640,
                    elem_id="picture",
                )
            with gr.Column(scale=2, min_width=320):
                areas = gr.HTML(elem_id="areas")
                content = "Masks as PNG" if has_regions else "Class ids as PNG"
                download = gr.DownloadButton(content, interactive=False)
        file.change(segment, [file, opacity], [shown, picture, areas, download])
        opacity.input(
            draw, [shown, opacity], picture, show_progress="hidden", trigger_mode="always_last"
        )
    return page


class OwnHosts:
    """ASGI middleware that accepts only requests to IP addresses and to the host names in `names`.

    This prevents DNS rebinding: a malicious website makes its own host name resolve to this machine
    so that its pages can read from this server.
    """

    def __init__(self, app: Any, names: Collection[str]):
        self._app, self._names = app, names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        answer = self._app
        if scope["type"] in ("http", "websocket"):
            from starlette.responses import PlainTextResponse  # a dependency of Gradio

            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            try:
                name = urllib.parse.urlsplit(f"//{host}").hostname or ""
                if name not in self._names:
                    ipaddress.ip_address(name)
            except ValueError:  # neither one of our names nor an IP address
                message = f"not served as {host!r}, but as {', '.join(sorted(self._names))}\n"
                answer = PlainTextResponse(message, 421)
        await answer(scope, receive, send)


def serve(
    predictor: Predictor,
    host: str,
    port: int,
    max_megapixels: float,
    examples: Sequence[str] = (),
) -> "gradio.Blocks":
    """Starts a server and returns the page.

    Raises OSError if the port is taken, or ValueError if `host` is an IPv6 address.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    if ":" in host:
        raise ValueError(f"--host={host}: Gradio does not serve at IPv6 addresses")
    names = {"localhost", host.lower()}
    if host not in ("localhost", "127.0.0.1"):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    page = make_page(predictor, max_megapixels, examples)
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
        # System fonts, because other fonts would be loaded from the web.
        theme=gr.themes.Default(primary_hue="blue", font="system-ui", font_mono="monospace"),
        css=CSS,
    )
    return page


def main(argv: list[str]) -> None:
    """Serves the page until the process is stopped."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        sys.exit("the demo needs Gradio: pip install 'gradio>=6.31'")
    runtime.prepare()
    args = flags.FLAGS
    predictor = load(args.workdir)
    with tempfile.TemporaryDirectory() as folder:
        examples = write_examples(args.workdir, folder)
        try:
            page = serve(predictor, args.host, args.port, args.max_megapixels, examples)
        except OSError as error:
            sys.exit(f"{args.host}:{args.port} cannot be used, pass another --port ({error})")
        print(f"open {page.local_url}")
        page.block_thread()


if __name__ == "__main__":
    command.run(main)
