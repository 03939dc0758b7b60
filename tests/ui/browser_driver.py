"""Drives a real browser; runs in the environment of lab.txt: python browser_driver.py wizard|report ...

``wizard FOLDER PYTHON CHROMIUM``: opens FOLDER/wizard.ipynb in JupyterLab, whose kernel PYTHON runs, and uses the form.
``report FILE FOLDER CHROMIUM``: opens a report, and keeps a picture of it in FOLDER, light, dark and narrow.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

TOKEN = "seedbed"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(address, body=None):
    data = json.dumps(body).encode() if body is not None else None
    headers = {"Authorization": f"token {TOKEN}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=30) as answer:
        return json.loads(answer.read())


def wizard(folder, python, chromium):
    """Fill the form in and ask for the estimate."""
    home = folder / "home"
    kernel = home / "data" / "kernels" / "seedbed"
    kernel.mkdir(parents=True)
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "seedbed", "language": "python"}))
    names = {"HOME": "", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    environment = {**os.environ, **{name: str(home / value) for name, value in names.items()}}
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
        try:
            wait_for(f"{address}/api", server)
            body = {"path": "wizard.ipynb", "name": "wizard", "type": "notebook", "kernel": {"name": "seedbed"}}
            ask(f"{address}/api/sessions", body)
            with sync_playwright() as driver:
                browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
                page = browser.new_page(viewport={"width": 1280, "height": 1500})
                try:
                    use(page, address, folder)
                except BaseException:
                    page.screenshot(path=folder / "failure.png")
                    raise
                finally:
                    browser.close()
        finally:
            server.terminate()
            server.wait(30)


def wait_for(address, server):
    until = time.monotonic() + 90
    while True:
        try:
            return ask(address)
        except OSError:
            if time.monotonic() > until or server.poll() is not None:
                raise
            time.sleep(0.3)


def use(page, address, folder):
    """What a person would do."""
    page.goto(f"{address}/lab/tree/wizard.ipynb?token={TOKEN}")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
    page.evaluate(
        "void jupyterapp.restored.then(() => jupyterapp.shell.currentWidget.sessionContext.ready)"
        ".then(() => jupyterapp.commands.execute('notebook:run-all-cells'))"
    )
    page.wait_for_selector("text=The cells below train what stands here", timeout=180_000)
    page.evaluate("void jupyterapp.commands.execute('application:toggle-left-area')")
    page.wait_for_timeout(1500)
    page.screenshot(path=folder / "wizard.png")

    page.locator(".widget-dropdown select").first.select_option("balanced")
    page.wait_for_selector("text=Most of what the model can do")
    page.locator("text=How long").first.click()
    field = page.locator(".widget-hbox", has_text="max steps").last.locator("input")
    field.fill("many")
    field.press("Tab")
    page.wait_for_selector("text=Expected a number, or nothing for none")
    page.screenshot(path=folder / "wizard-error.png")
    field.fill("4")
    field.press("Tab")
    page.wait_for_selector("text=Expected a number, or nothing for none", state="detached")
    page.locator(".widget-button", has_text="Estimate").click()
    page.wait_for_selector("text=This run fits.", timeout=180_000)
    page.locator("text=How long").first.click()
    page.wait_for_timeout(800)
    page.screenshot(path=folder / "wizard-estimate.png")


def report(file, folder, chromium):
    """Look at a report; print what it asked for and how wide it is."""
    asked = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        for name, scheme, width in (("light", "light", 1200), ("dark", "dark", 1200), ("narrow", "light", 420)):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.on("request", lambda request: asked.append(request.url))
            page.goto(file.absolute().as_uri())
            page.screenshot(path=folder / f"report-{name}.png", full_page=True)
            overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            assert overflow <= 0, f"{name}: {overflow} pixels too wide"
        browser.close()
    outside = [address for address in asked if not address.startswith("file:")]
    assert not outside, outside


if __name__ == "__main__":
    verb, first, second, third = sys.argv[1:]
    if verb == "wizard":
        wizard(Path(first), second, third)
    else:
        report(Path(first), Path(second), third)
