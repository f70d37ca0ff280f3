"""circuit-tracer's own frontend on this machine: its files from PyPI, the libraries that it loads from npm.

`frontend(folder)` downloads them with pip and npm (3 MB, nothing is installed or run) and gives None where a registry
cannot be reached. `served` serves the frontend and a directory of graphs to this machine alone; where the page asks
other machines for libraries it gets them from here.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WHEEL = "circuit-tracer==0.5.0"
LIBRARIES = {"d3@7.9.0": "dist/d3.min.js", "d3-collection@1.0.7": "dist/d3-collection.min.js",
             "d3-jetpack@2.3.0": "build/d3-jetpack.cjs", "dagre@0.8.5": "dist/dagre.min.js",
             "pako@2.1.0": "dist/pako.min.js"}  # fmt: skip
# d3-jetpack is published as a module alone; this makes it what the page expects, an addition to the global d3, and
# gives charts the method `drawAxis` that the page's own copy of it has.
_AS_SCRIPT = """(function(d3){const exports={},module={},require=()=>d3;%s
Object.assign(d3,exports);
d3.conventions=options=>{const c=exports.conventions(options);
c.drawAxis=svg=>exports.drawAxis({...c,svg:svg||c.svg});return c}
})(window.d3);"""
# What the page asks for, and what it gets; None: not needed for graphs.
_ASKED = {
    "https://transformer-circuits.pub/2025/attribution-graphs/static_js/lib/hotserver-client-ws.js": None,
    "https://transformer-circuits.pub/2025/attribution-graphs/static_js/lib/npy_v0.js": None,
    "https://transformer-circuits.pub/2025/attribution-graphs/static_js/lib/d3.js": "d3.js",
    "https://transformer-circuits.pub/2025/attribution-graphs/static_js/lib/jetpack_2024-07-20.js": "d3-jetpack.js",
    "https://unpkg.com/dagre@0.8.5/dist/dagre.min.js": "dagre.js",
    "https://unpkg.com/pako@2.1.0/dist/pako.min.js": "pako.js",
}


def frontend(folder: Path) -> Path | None:
    """The package's directory `circuit_tracer/frontend`, with `assets/lib`; None without the registries."""
    if shutil.which("npm") is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    commands = [(pip, None), (["npm", "pack", "--silent", *LIBRARIES], folder)]
    for command, where in commands:
        try:
            done = subprocess.run(command, cwd=where, capture_output=True, timeout=120)
        except subprocess.TimeoutExpired:
            return None
        if done.returncode:
            return None
    with zipfile.ZipFile(next(folder.glob("circuit_tracer-*.whl"))) as wheel:
        wheel.extractall(folder / "wheel")
    found = folder / "wheel" / "circuit_tracer" / "frontend"
    (found / "assets" / "lib").mkdir()
    for library, inside in LIBRARIES.items():
        name, _, version = library.rpartition("@")
        with tarfile.open(folder / f"{name}-{version}.tgz") as archive:
            member = archive.extractfile(f"package/{inside}")
            assert member is not None
            script = member.read().decode()
        script = _AS_SCRIPT % script if name == "d3-jetpack" else script
        (found / "assets" / "lib" / f"{name}.js").write_text(script, encoding="utf-8")
    index = found / "assets" / "index.html"
    text = index.read_text(encoding="utf-8")
    for address, name in _ASKED.items():
        assert f"<script src='{address}'></script>" in text, address
        scripts = [] if name is None else ["d3.js", "d3-collection.js"] if name == "d3.js" else [name]
        here = "".join(f"<script src='./lib/{script}'></script>" for script in scripts)
        text = text.replace(f"<script src='{address}'></script>", here)
    index.write_text(text, encoding="utf-8")
    return found


class _Handler(http.server.SimpleHTTPRequestHandler):
    """As the package's own server: `/data/` and `/graph_data/` are the directory of graphs, the rest its assets."""

    def __init__(self, *args: object, data: Path, **kwargs: object) -> None:
        self.data = data
        super().__init__(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    def translate_path(self, path: str) -> str:
        for prefix in ("/data/", "/graph_data/"):
            if path.startswith(prefix):
                return str(self.data / path[len(prefix) :].split("?")[0])
        return super().translate_path(path)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(assets: Path, data: Path) -> Iterator[str]:
    """The address of the frontend, on 127.0.0.1 alone."""
    handler = functools.partial(_Handler, data=data, directory=str(assets))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(timeout=10)
