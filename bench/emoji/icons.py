"""The artwork that flux-emoji is trained on: Microsoft's Fluent Emoji, from a package of SVG files, as pixels.

    python -m stepgraph.bench.emoji.icons --size 32 --out out/emoji/icons-32.npz

It needs the extra `emoji` and, the first time, npm and a network. The package is never shipped; its licence lies beside the
weights.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stepgraph.bench.emoji.captions import is_base
from stepgraph.errors import ArgumentError, FileFormatError
from stepgraph.files.whole_file import whole_file

PACKAGE, VERSION = "@iconify-json/fluent-emoji-flat", "1.2.6"
SHA256 = "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
TARBALL = f"iconify-json-fluent-emoji-flat-{VERSION}.tgz"
# Icons are rendered at this many times the size of the pictures, which are averages of as many pixels either way.
OVERSAMPLE = 2
NOTICE = f"""\
flux-emoji and its retrieval network were trained on pictures of Fluent Emoji (https://github.com/microsoft/fluentui-emoji),
as packaged in {PACKAGE} {VERSION}. That artwork is under this licence:

MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


@dataclass(frozen=True)
class Icons:
    """Rendered icons.

    Attributes:
        names: Of the icons.
        pixels: RGBA, not premultiplied, [N, 4, S, S] uint8, S being `OVERSAMPLE` times the pictures' size.
    """

    names: tuple[str, ...]
    pixels: torch.Tensor

    @property
    def size(self) -> int:
        """Pixels of a picture's side."""
        return self.pixels.shape[-1] // OVERSAMPLE

    def chosen(self, names: Sequence[str]) -> "Icons":
        """Those of these names, in their order.

        Raises:
            FileFormatError: One is not there.
        """
        places = {name: place for place, name in enumerate(self.names)}
        lacking = [name for name in names if name not in places]
        if lacking:
            raise FileFormatError(f"the rendered icons lack {', '.join(lacking[:5])}")
        return Icons(tuple(names), self.pixels[[places[name] for name in names]])

    def save(self, path: Path) -> None:
        """Write them as .npz."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, names=np.array(self.names), pixels=self.pixels.numpy())

    @classmethod
    def load(cls, path: Path) -> "Icons":
        """Read them."""
        with np.load(path) as arrays:
            return cls(tuple(map(str, arrays["names"])), torch.from_numpy(arrays["pixels"]))


def fetch(folder: Path) -> Path:
    """The package's archive in a folder; fetched by npm where it does not lie there yet.

    Raises:
        ArgumentError: npm is not there, or fails.
        FileFormatError: The archive is not the one that was pinned.
    """
    path = folder / TARBALL
    if not path.is_file():
        if shutil.which("npm") is None:
            raise ArgumentError(f"{path} is not there, and npm, which would fetch it, is not either; put the archive there")
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{PACKAGE}@{VERSION}"]
        packed = subprocess.run(command, capture_output=True, text=True, check=False)
        if packed.returncode != 0 or not path.is_file():
            raise ArgumentError(f"{' '.join(command)} failed: {(packed.stderr or packed.stdout).strip()[:500]}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise FileFormatError(f"{path} has the SHA-256 {digest}, expected {SHA256}; remove the file")
    return path


def read_collection(path: Path) -> dict[str, Any]:
    """The collection in a package's archive, in Iconify's JSON: `icons` by name, each with the `body` of an SVG."""
    with tarfile.open(path) as archive:
        member = archive.extractfile("package/icons.json")
        if member is None:
            raise FileFormatError(f"{path} has no package/icons.json")
        collection: dict[str, Any] = json.loads(member.read())
        return collection


def render_icons(collection: dict[str, Any], size: int) -> Icons:
    """All icons but those in other skin tones, for pictures of `size` pixels.

    Raises:
        ArgumentError: The extra `emoji` is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise ArgumentError("icons are rendered by resvg-py; pip install 'stepgraph[emoji]'") from error
    bodies = collection["icons"]
    names = tuple(name for name in bodies if is_base(name, bodies))
    side, box = OVERSAMPLE * size, f"0 0 {collection.get('width', 16)} {collection.get('height', 16)}"
    pixels = np.empty((len(names), side, side, 4), np.uint8)
    for picture, name in zip(pixels, names, strict=True):
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{bodies[name]["body"]}</svg>'
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))
        picture[:] = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    return Icons(names, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())


def rendered(path: Path, size: int) -> Icons:
    """The icons in a file; where there is none, they are fetched beside it, rendered and written.

    Raises:
        FileFormatError: They were rendered for pictures of another size.
    """
    if not path.is_file():
        render_icons(read_collection(fetch(path.parent)), size).save(path)
    icons = Icons.load(path)
    if icons.size != size:
        raise FileFormatError(f"{path} has icons for pictures of {icons.size} pixels, not {size}")
    return icons


def main() -> None:
    """Fetch, render and write the icons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="of the pictures, in pixels")
    parser.add_argument("--out", type=Path, default=None, help="by default out/emoji/icons-SIZE.npz")
    arguments = parser.parse_args()
    path = arguments.out or Path(f"out/emoji/icons-{arguments.size}.npz")
    icons = rendered(path, arguments.size)
    print(f"{len(icons.names)} icons for {icons.size} x {icons.size} pixels in {path}")


if __name__ == "__main__":
    main()
