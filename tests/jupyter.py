"""JupyterLab in a process of its own, over one notebook, for tests that click in a browser."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import fvlens


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def answers(port):
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def environment(folder):
    """That of a user without settings, whose kernels import this fvlens."""
    root = str(Path(fvlens.__file__).parents[1])
    own = {f"JUPYTER_{name.upper()}_DIR": folder / name for name in ("config", "data", "runtime")}
    return {**os.environ, **{name: str(path) for name, path in own.items()}, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}


def write_notebook(path, source):
    cell = {"cell_type": "code", "id": "a", "execution_count": None, "metadata": {}, "outputs": [], "source": source}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = {"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(book))


@contextlib.contextmanager
def lab(folder, source):
    """The address of a notebook with one cell, open in JupyterLab."""
    write_notebook(folder / "book.ipynb", source)
    port, token = free_port(), secrets.token_hex(16)
    line = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    line += [
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.expose_app_in_browser=True",
    ]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(line, env=environment(folder), stdout=log, stderr=log, cwd=folder)
    try:
        end = time.monotonic() + 180
        while not answers(port):
            assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < end, (folder / "server.log").read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/book.ipynb?token={token}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def run_cell(page, address):
    """Open the notebook and run its cell."""
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell .cm-content", timeout=180_000)
    context = "window.jupyterapp?.shell?.currentWidget?.sessionContext"
    kernel = f"{context}?.session?.kernel"
    ready = f"{context}?.isReady && {kernel}?.connectionStatus == 'connected' && {kernel}?.status == 'idle'"
    page.wait_for_function(ready, timeout=180_000)  # before that it would ask for a kernel
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
