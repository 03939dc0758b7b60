import json
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.concepts.transfer_toys import Teacher, samples, student, teacher
from utils.concepts.content import Content
from utils.concepts.extraction import extract_concept
from utils.concepts.package import PackageError
from utils.concepts.package_files import MANIFEST, load_package, package_sha256, save_package
from utils.runtime.files import own_hash


@pytest.fixture(scope="module")
def package():
    given = samples(160)
    groups = [[f"group {number % 20}" for number in range(len(side))] for side in given]
    return extract_concept(teacher(), "one sign", *given, licence="CC0", date="2026-11-22", groups=groups)


@pytest.fixture
def folder(package, tmp_path):
    return save_package(package, tmp_path / "package")


def rewritten(folder, **changes):
    """Change a manifest as someone would who knows how it is hashed."""
    body = json.loads((folder / MANIFEST).read_text()) | changes
    body.pop("sha256")
    (folder / MANIFEST).write_text(json.dumps(body | {"sha256": own_hash(body)}))


def test_a_saved_package_comes_back_whole(package, folder):
    found = load_package(folder, package_sha256(folder))
    assert found.to_dict() == package.to_dict()
    assert found.provenance == package.provenance
    assert found.groups == package.groups
    assert found.content.hashes() == package.content.hashes()
    for name in ("labels", "soft_targets", "prototypes", "anchors"):
        assert torch.equal(getattr(found, name), getattr(package, name))
    assert all(torch.equal(found.traces[name], table) for name, table in package.traces.items())
    assert torch.equal(found.readout(teacher()).vector, package.readout(teacher()).vector)


def test_texts_are_kept_as_texts(package, tmp_path):
    made = replace(package, content=Content(texts=tuple(f"text {n}" for n in range(len(package)))))
    assert load_package(save_package(made, tmp_path)).content.texts == made.content.texts


def test_saving_again_replaces_the_package_and_leaves_nothing_behind(package, folder):
    before = package_sha256(folder)
    save_package(package, folder)
    assert package_sha256(folder) == before
    save_package(package.shuffled(0), folder)
    assert package_sha256(folder) != before
    assert len(list(folder.iterdir())) == 2
    load_package(folder)


def test_a_change_is_noticed(package, folder):
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(PackageError, match="damaged or was changed .*safetensors has the SHA-256"):
        load_package(folder)
    save_package(package, folder)
    manifest = folder / MANIFEST
    whole = manifest.read_text()
    manifest.write_text(whole.replace("CC0", "GPL"))
    with pytest.raises(PackageError, match="damaged or was changed .*and says"):
        load_package(folder)
    manifest.write_text(whole[: len(whole) // 2])
    with pytest.raises(PackageError, match="damaged or was changed"):
        load_package(folder)
    manifest.write_text("[]")
    with pytest.raises(PackageError, match="does not say its format"):
        load_package(folder)
    limit = sys.getrecursionlimit()
    for depth in (*range(limit - 200, limit + 10), 100_000):  # what is read may be too deep to be hashed
        manifest.write_text('{"format": 2, "name": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(PackageError, match="damaged or was changed"):
            load_package(folder)


def test_json_of_something_else_is_never_replaced(package, tmp_path):
    manifest = tmp_path / MANIFEST
    for content in ('{"name": "my web app"}', "[]", '{"format": 2}', '{"format": 2, "tensors": ["file", "sha256"]}'):
        manifest.write_text(content)
        for replaced in (False, True):
            with pytest.raises(
                PackageError, match=r"concept.json in .* is of no concept package. .*save_package wrote"
            ):
                save_package(package, tmp_path, replaced)
        assert [path.name for path in tmp_path.iterdir()] == [MANIFEST] and manifest.read_text() == content


def test_damaged_packages_are_replaced_when_asked_and_no_other_file_is_deleted(package, folder):
    manifest = folder / MANIFEST
    own = folder / "concept-0123456789abcdef.safetensors"
    own.write_text("mine")
    for content in ("", manifest.read_text()[:90], manifest.read_text().replace("CC0", "GPL")):
        manifest.write_text(content)
        with pytest.raises(PackageError, match="replace=True"):
            save_package(package, folder)
        save_package(package, folder, replace=True)
        assert own.read_text() == "mine" and load_package(folder).name == package.name


def test_a_name_with_half_a_surrogate_pair(package, tmp_path):
    made = replace(package, name="one \ud800 sign")
    assert load_package(save_package(made, tmp_path)).name == made.name


def test_another_package_version_or_folder_is_refused(folder, tmp_path):
    with pytest.raises(PackageError, match=r"There is no concept package"):
        load_package(tmp_path / "nothing")
    with pytest.raises(PackageError, match=r"has the SHA-256 .* Expected 123"):
        load_package(folder, "123")
    rewritten(folder, format=99)
    with pytest.raises(PackageError, match="has the format 99"):
        load_package(folder)


def test_a_package_hashed_anew_must_still_fit_together(package, folder):
    tensors = json.loads((folder / MANIFEST).read_text())["tensors"]
    rewritten(folder, tensors=tensors | {"file": "../elsewhere.safetensors"})
    with pytest.raises(PackageError, match=r"names the file '\.\./elsewhere"):
        load_package(folder)
    rewritten(folder, tensors=tensors, groups=["one"])
    with pytest.raises(PackageError, match="not whole: 1 groups for 160"):
        load_package(folder)
    rewritten(folder, groups=[], provenance={"model": "x"})
    with pytest.raises(PackageError, match="damaged or was changed .TypeError"):
        load_package(folder)
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(PackageError, match="damaged or was changed .FileNotFoundError"):
        load_package(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": " "}, "needs a name"),
        ({"soft_targets": torch.zeros(3)}, "soft_targets of shape"),
        ({"soft_targets": torch.full((160,), 2.0)}, "outside 0 to 1"),
        ({"soft_targets": torch.full((160,), torch.nan)}, "not finite"),
        ({"labels": torch.zeros(160, dtype=torch.bool)}, "other numbers of exemplars"),
        ({"anchors": torch.full((64,), 500)}, "not among 160"),
        ({"anchors": torch.zeros(0, dtype=torch.int64), "traces": {}}, "0 anchors and 0 traces"),
        ({"traces": {"x": torch.zeros(160, 2)}}, "trace of x of shape"),
        ({"prototypes": torch.zeros(2, 3)}, "prototypes of shape"),
        ({"labels": torch.arange(160) >= 0}, "other numbers of exemplars"),
        ({"content": Content({"": torch.full((160, 8), torch.nan)})}, "values that are not finite"),
        ({"content": Content({"a": torch.zeros(160, 8), "b": torch.zeros(3)})}, r"have the shapes .160, 8., .3,."),
        ({"content": Content({"": torch.tensor(1.0)})}, r"have the shapes \(\)"),
        ({"content": Content(texts=("",) * 160)}, "160 of the exemplars are empty"),
        ({"content": Content({"": torch.zeros(160, 8)}, ("x",) * 160)}, "texts and tensors at once"),
        ({"calibration": (float("nan"), 0.0)}, "a calibration of"),
    ],
)
def test_parts_that_do_not_fit_are_refused(package, changes, said):
    with pytest.raises(PackageError, match=said):
        replace(package, **changes)


def test_a_direction_of_no_numbers_and_mixed_labels_are_refused(package):
    broken = package.direction.vector.clone()
    broken[0] = torch.inf
    with pytest.raises(PackageError, match="numbers not finite"):
        replace(package, direction=replace(package.direction, vector=broken))
    with pytest.raises(PackageError, match="a bias of nan"):
        replace(package, direction=replace(package.direction, bias=float("nan")))
    with pytest.raises(PackageError, match="do not put the positive exemplars first"):
        replace(package, labels=package.labels.roll(1))


def test_a_foreign_manifest_deletes_no_file(package, folder, tmp_path):
    """Whoever wrote the old manifest may name any file, or form the name from something that is no hash."""
    tensors = json.loads((folder / MANIFEST).read_text())["tensors"]
    other, beside = tmp_path / "precious.txt", tmp_path / "x.safetensors"
    (folder / "concept-").mkdir()
    for path in (other, beside, folder / "notes.txt"):
        path.write_text("mine")
    for entry in (
        {"file": str(other)},
        {"file": "../precious.txt"},
        {"file": "notes.txt"},
        {"file": "concept-/../../x.safetensors", "sha256": "/../../x"},
        {"file": 3, "sha256": None},
    ):
        rewritten(folder, tensors=tensors | entry)
        with pytest.raises(PackageError):
            load_package(folder)
        save_package(package, folder)
        assert other.exists() and beside.exists() and (folder / "notes.txt").exists()
    load_package(folder)


def test_too_large_a_package_is_refused(package, monkeypatch):
    monkeypatch.setattr("utils.concepts.package.MOST_EXAMPLES", 100)
    with pytest.raises(PackageError, match="160 exemplars of .* above 100"):
        replace(package)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**9))
def test_a_shuffled_package_has_the_same_targets_and_says_nothing(package, seed):
    made = package.shuffled(seed)
    assert torch.equal(made.soft_targets.sort().values, package.soft_targets.sort().values)
    assert torch.equal(made.labels, package.labels)
    # Each side gets targets of both sides in proportion, up to one of them.
    positives = int(package.labels.sum())
    own = torch.isin(made.soft_targets[package.labels], package.soft_targets[package.labels]).sum()
    assert abs(float(own) - positives**2 / len(package)) <= 1
    number = next(n for n in range(len(package)) if bool((package.soft_targets == made.soft_targets[n]).sum() == 1))
    source = int((package.soft_targets == made.soft_targets[number]).nonzero()[0])
    for name, table in made.traces.items():
        assert torch.equal(table[number], package.traces[name][source])


def test_only_the_teacher_as_it_was_is_read(package):
    with pytest.raises(PackageError, match="of a Teacher whose weights have"):
        package.readout(student())
    changed = Teacher()
    with torch.no_grad():
        changed.first.bias += 1
    with pytest.raises(PackageError, match="Give the teacher as it was"):
        package.readout(changed)


def test_it_tells_what_it_is(package):
    assert "Concept 'one sign' of Teacher" in str(package)
    assert "licence CC0" in str(package)
    told = package.to_dict()
    assert told["provenance"]["date"] == "2026-11-22"
    assert told["found"] is package.found is True
    assert told["direction"]["accepted"] is False
    json.dumps(told)
    assert package.place == ("head", "input")
