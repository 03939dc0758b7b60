"""Installing requirements-training.txt or requirements-memory.txt on Colab changes no package that is there."""

import re
from pathlib import Path

import pytest
from stubs import canonical, frozen_versions, would_install, write_stubs

HERE = Path(__file__).parent
LISTS = ("pip-freeze.txt", "pip-freeze.gpu.txt")


def test_versions_are_read_from_every_kind_of_line():
    text = "# comment\nNum_Py==2.1.3\n-e .\nx @ file:///y\n"
    text += "torch @ https://x.example/a/torch-2.11.0%2Bcu128-cp313-linux.whl#sha256=1\n"
    assert frozen_versions(text) == {"num-py": "2.1.3", "torch": "2.11.0+cu128"}


def test_stubs_are_seen_as_installed_packages(tmp_path):
    from importlib import metadata

    write_stubs({"num-py": "2.1.3", "torch": "2.11.0+cu128"}, tmp_path / "stubs")
    found = {item.metadata["Name"]: item.version for item in metadata.distributions(path=[str(tmp_path / "stubs")])}
    assert found == {"num-py": "2.1.3", "torch": "2.11.0+cu128"}


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_complete(name):
    versions = frozen_versions((HERE / name).read_text(encoding="utf-8"))
    assert len(versions) > 500
    assert {"torch", "numpy", "pandas", "protobuf", "ipywidgets", "transformers", "tokenizers"} <= versions.keys()


def test_replica_is_part_of_the_gpu_list():
    frozen = frozen_versions((HERE / "pip-freeze.gpu.txt").read_text(encoding="utf-8"))
    replica = frozen_versions((HERE / "replica.txt").read_text(encoding="utf-8"))
    assert len(replica) > 30
    differing = {name: version for name, version in replica.items() if frozen[name].split("+")[0] != version}
    assert differing == {}


@pytest.mark.parametrize(
    ("file", "needed"), [("requirements-training.txt", "pytorch-lightning"), ("requirements-memory.txt", "faiss-cpu")]
)
def test_requirements_name_only_what_colab_lacks_and_bound_it_on_both_sides(root, file, needed):
    lines = (root / file).read_text(encoding="utf-8").splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    names = {canonical(re.match(r"[\w.-]+", line)[0]) for line in requirements}
    assert needed in names
    for line in requirements:
        assert ">=" in line, line
        assert "<" in line, line
    for name in LISTS:
        assert names & frozen_versions((HERE / name).read_text(encoding="utf-8")).keys() == set()


@pytest.fixture(scope="module", params=LISTS)
def colab(request, tmp_path_factory):
    """The frozen versions of one runtime and their stubs, where the package index answers."""
    versions = frozen_versions((HERE / request.param).read_text(encoding="utf-8"))
    stubs = tmp_path_factory.mktemp("colab") / "stubs"
    write_stubs(versions, stubs)
    try:
        assert would_install(["six==1.16.0"], stubs) == {"six": "1.16.0"}
    except RuntimeError as error:
        pytest.skip(f"the package index cannot be asked: {error}")
    return versions, stubs


@pytest.mark.network
@pytest.mark.slow
class TestResolver:
    def test_requirements_change_nothing(self, colab, root):
        versions, stubs = colab
        added = would_install(["-r", str(root / "requirements-training.txt")], stubs)
        assert {"pytorch-lightning", "torchmetrics", "optuna", "onnx", "onnxruntime", "onnxscript"} <= added.keys()
        assert added.keys() & versions.keys() == set()

    def test_the_fast_search_is_all_that_comes_with_memories(self, colab, root):
        _, stubs = colab
        assert would_install(["-r", str(root / "requirements-memory.txt")], stubs).keys() == {"faiss-cpu"}

    @pytest.mark.parametrize(
        ("requirements", "replaced"),
        [(["onnx>=1.23", "onnxruntime"], "protobuf"), (["numpy>=2.3"], "numpy"), (["ipywidgets>=8"], "ipywidgets")],
    )
    def test_what_would_change_something_is_noticed(self, colab, requirements, replaced):
        versions, stubs = colab
        assert replaced in would_install(requirements, stubs).keys() & versions.keys()
