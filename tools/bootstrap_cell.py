# @title Find Seedbed's code { display-mode: "form" }
import io, os, pathlib, shutil, subprocess, sys, tempfile, urllib.request, zipfile

REPOSITORY = ""  # stamped by make colab-links
TAG, MARK, HERE = "v0.1.0", "utils/runtime/project.py", pathlib.Path.cwd().resolve()
KEPT = HERE / f"seedbed-{TAG}"


def keep(fill, *source):
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".seedbed-") as folder:
        fill(f"{folder}/new", *source)
        found = min(pathlib.Path(folder).glob(f"**/{MARK}")).parents[2]
        shutil.rmtree(KEPT, ignore_errors=True)
        return found.replace(KEPT)


def clone(folder, address):
    command = ["git", "clone", "--quiet", "--depth", "1", "--branch", TAG, address, folder]
    subprocess.run(command, check=True, timeout=120, stdin=subprocess.DEVNULL, capture_output=True)


def unpack(folder, address):
    with urllib.request.urlopen(f"{address}/archive/refs/tags/{TAG}.zip", timeout=60) as answer:
        zipfile.ZipFile(io.BytesIO(answer.read())).extractall(folder)


def find(chosen):
    places = [pathlib.Path(chosen).resolve()] if chosen else [HERE, *HERE.glob("seedbed*.zip"), KEPT]
    for place in places:
        if (place / MARK).is_file():
            return place
        if zipfile.is_zipfile(place) and MARK in " ".join(zipfile.ZipFile(place).namelist()):
            return keep(zipfile.ZipFile(place).extractall)
    problems = [f"no {MARK} in {', '.join(map(str, places))}"]
    if not REPOSITORY:
        problems.append("no repository address is stamped into this notebook (make colab-links REPO=owner/name)")
    for way in (clone, unpack) if REPOSITORY and not chosen else ():
        try:
            return keep(way, f"https://github.com/{REPOSITORY}")
        except Exception as error:
            problems.append(f"{way.__name__} of {REPOSITORY} {TAG}: {error}")
    message = f"Seedbed's code was not found: {'; '.join(problems)}. Upload it as seedbed.zip beside this notebook"
    raise RuntimeError(message + ", or set SEEDBED_SOURCE to a folder or zip that holds it, and run this cell again.")


root = find(os.environ.get("SEEDBED_SOURCE"))
sys.path[:] = [str(root), *(path for path in sys.path if path != str(root))]
if getattr(sys.modules.get("utils"), "__file__", None) != str(root / "utils" / "__init__.py"):
    for name in [name for name in sys.modules if name.partition(".")[0] == "utils"]:
        del sys.modules[name]  # another package of this name, or an older Seedbed
import utils

if pathlib.Path(utils.__file__).resolve().parent != root / "utils":
    raise RuntimeError(f"import utils gives {utils.__file__}, not {root}: restart the runtime and run this cell first.")
print(f"Seedbed {TAG} from {root}")
