"""Sparse autoencoders: what was planted is found again, and files are checked."""

import json

import pytest
import torch

from utils.concepts import autoencoder_files
from utils.concepts.autoencoder import AutoencoderConfig, SparseAutoencoder, fit_autoencoder, sparse
from utils.concepts.autoencoder_files import NAMES, RECORD, load_autoencoder, save_autoencoder
from utils.runtime.errors import CheckpointError, ConfigError, DataError
from utils.runtime.files import own_hash


def planted(n=4000, width=16, atoms=24, active=2, seed=0):
    """Sums of a few of many directions, with a little noise."""
    g = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, width, generator=g), dim=1)
    chosen = torch.rand(n, atoms, generator=g).topk(active, 1).indices
    codes = torch.zeros(n, atoms).scatter(1, chosen, torch.rand(n, active, generator=g) + 0.5)
    return codes @ dictionary + 0.01 * torch.randn(n, width, generator=g), dictionary


@pytest.fixture(scope="module")
def fitted():
    values, dictionary = planted()
    config = AutoencoderConfig(features=36, active=2, steps=700, learning_rate=0.01)
    return fit_autoencoder(5 * values + 30, config), 5 * values + 30, dictionary


def test_a_planted_dictionary_is_found(fitted):
    fit, _, dictionary = fitted
    cosines = (dictionary @ fit.autoencoder.decoder.T).max(1).values
    assert float(cosines.mean()) > 0.95
    assert fit.explained_variance > 0.85 > 0.4 > fit.principal
    assert fit.l0 == pytest.approx(2, abs=0.05)
    assert fit.vectors == (3600, 400)
    assert fit.losses[0][1] > 5 * fit.losses[-1][1]
    assert torch.allclose(fit.autoencoder.decoder.norm(dim=1), torch.ones(36), atol=1e-5)


def test_what_it_says_of_itself_is_so(fitted):
    fit, values, _ = fitted
    made = fit.autoencoder
    codes = made.encode(values)
    assert int((codes > 0).sum(1).max()) <= 2 and float(codes.min()) >= 0
    assert torch.allclose(made.decode(codes), made(values))
    left = (values - made(values)).square().sum() / (values - values.mean(0)).square().sum()
    assert float(left) == pytest.approx(fit.error, abs=0.05)
    assert int((codes > 0).any(0).logical_not().sum()) == fit.dead
    assert made(values.double()).dtype == torch.float64
    assert "principal components" in str(fit)
    assert json.loads(json.dumps(fit.to_dict(), allow_nan=False))["features"] == 36


def test_it_is_the_topk_of_the_paper():
    scores = torch.tensor([[3.0, -1.0, 2.0, 5.0], [-4.0, -1.0, -2.0, 0.5]])
    assert sparse(scores, 2).tolist() == [[3, 0, 0, 5], [0, 0, 0, 0.5]]


def test_features_that_no_longer_fire_are_won_back():
    """At a learning rate that kills features, more of the dictionary is found when they are trained too."""
    values, dictionary = planted(6000, 32, 128, 4)
    found = {}
    for after in (20, 10**6):
        config = AutoencoderConfig(features=256, active=4, steps=400, dead_after=after, learning_rate=0.03)
        fit = fit_autoencoder(values, config)
        cosines = (dictionary @ fit.autoencoder.decoder.T).max(1).values
        found[after] = fit.explained_variance, float((cosines > 0.9).float().mean())
    assert found[20][0] > found[10**6][0] + 0.005
    assert found[20][1] > found[10**6][1] + 0.05


def test_the_same_for_the_same_seed_whatever_the_streams_are():
    values, _ = planted(300)
    settings = {"features": 20, "active": 2, "steps": 30}
    fits = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        stream = torch.get_rng_state()
        fits.append(fit_autoencoder(values, AutoencoderConfig(**settings, seed=seed)))
        assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(fits[0].autoencoder.encoder, fits[1].autoencoder.encoder)
    assert fits[0].to_dict() == fits[1].to_dict()
    assert not torch.equal(fits[0].autoencoder.encoder, fits[2].autoencoder.encoder)
    with torch.no_grad():
        assert fit_autoencoder(values, AutoencoderConfig(**settings, seed=3)).to_dict() == fits[0].to_dict()


def test_samples_are_held_out_as_a_whole():
    values, _ = planted(300)
    groups = torch.arange(300) // 30
    fit = fit_autoencoder(values, AutoencoderConfig(features=20, active=2, steps=2, held_out=0.2), groups)
    assert fit.vectors == (240, 60)
    with pytest.raises(DataError, match="groups are of the shape \\(299,\\)"):
        fit_autoencoder(values, groups=groups[1:])
    with pytest.raises(DataError, match="All vectors are of one sample"):
        fit_autoencoder(values, groups=0 * groups)


def test_principal_components_of_few_wide_vectors():
    values = torch.randn(100, 3) @ torch.randn(3, 200) + 0.1 * torch.randn(100, 200)
    fit = fit_autoencoder(values, AutoencoderConfig(features=8, active=3, steps=1))
    assert fit.principal > 0.9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.randn(1, 4), "There is 1 vector."),
        (torch.randn(49, 4), "There are 49 vectors."),
        (torch.ones(60, 4), "All vectors are equal."),
        (torch.full((60, 4), torch.nan), "60 of 60 vectors hold values that are not finite."),
        (torch.randn(60), "The vectors have the shape (60,)."),
        ("a", "The vectors are 'a'."),
        (torch.randn(60, 4)[:3].repeat(20, 1), "There are 3 vectors different among 60."),
        (torch.randn(60, 4).to_sparse(), "sparse_coo"),
        (torch.randn(60, 4) * 1j, "complex64"),
    ],
)
def test_bad_vectors_are_named(values, message):
    with pytest.raises(DataError) as caught:
        fit_autoencoder(values, AutoencoderConfig(features=8, active=2, steps=1))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"active": 0}, "active is 0"),
        ({"features": 4, "active": 5}, "no more active features"),
        ({"steps": True}, "steps is True"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError) as caught:
        AutoencoderConfig(**settings)
    assert message in str(caught.value)


def test_more_bad_settings():
    with pytest.raises(ConfigError, match="Did you mean 'active'"):
        AutoencoderConfig.from_dict({"activ": 3})
    with pytest.raises(ConfigError, match="9 of 8 features are to be active"):
        fit_autoencoder(torch.randn(60, 2), AutoencoderConfig(active=9))
    with pytest.raises(ConfigError, match="the autoencoder is for the width 4"):
        SparseAutoencoder(4, 8, 2).encode(torch.randn(3, 5))


def test_saved_and_loaded(fitted, tmp_path):
    fit, values, _ = fitted
    assert save_autoencoder(fit, tmp_path / "one") == tmp_path / "one"
    loaded = load_autoencoder(tmp_path / "one")
    assert loaded.to_dict() == fit.to_dict() and loaded.config == fit.config
    assert torch.equal(loaded.autoencoder(values), fit.autoencoder(values))
    assert not loaded.autoencoder.training


def test_a_save_that_fails_leaves_the_one_before(fitted, tmp_path, monkeypatch):
    fit, values, _ = fitted
    save_autoencoder(fit, tmp_path)
    own = {"autoencoder-notes.safetensors", "autoencoder-0123456789abcdef.safetensors"}
    for name in own:
        (tmp_path / name).write_text("mine")
    other = fit_autoencoder(values[:300], AutoencoderConfig(features=8, active=2, steps=1))
    with monkeypatch.context() as patch:
        patch.setattr(autoencoder_files, "write_json", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(CheckpointError, match=r"The autoencoder cannot be saved as .*killed.* Choose another path"):
            save_autoencoder(other, tmp_path)
    assert load_autoencoder(tmp_path).to_dict() == fit.to_dict()
    save_autoencoder(other, tmp_path)
    assert load_autoencoder(tmp_path).to_dict() == other.to_dict()
    held = {path.name for path in tmp_path.iterdir()}
    assert len(held) == 4 and held > {RECORD} | own and len(set(filter(NAMES.fullmatch, held))) == 2


def test_json_of_something_else_is_never_replaced(fitted, tmp_path):
    for content in (
        '{"name": "my web app"}',
        "[]",
        '{"format": 2}',
        '{"format": "2", "tensors": {"file": 1, "sha256": 2}}',
    ):
        (tmp_path / RECORD).write_text(content)
        with pytest.raises(
            CheckpointError, match="autoencoder.json in .* is of no autoencoder. .*save_autoencoder wrote"
        ):
            save_autoencoder(fitted[0], tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [RECORD] and (tmp_path / RECORD).read_text() == content


def test_files_that_cannot_be_trusted(fitted, tmp_path):
    fit = fitted[0]

    def refused(change, message):
        save_autoencoder(fit, tmp_path)
        change()
        with pytest.raises(CheckpointError) as caught:
            load_autoencoder(tmp_path)
        assert message in str(caught.value)
        assert "fit it again" in str(caught.value)

    def rewrite(**values):
        record = json.loads((tmp_path / RECORD).read_text()) | values
        (tmp_path / RECORD).write_text(json.dumps(record | {"sha256": own_hash(record)}))

    def edit(was, now):
        record = (tmp_path / RECORD).read_text()
        assert record.count(was) == 1
        (tmp_path / RECORD).write_text(record.replace(was, now))

    def tensors():
        return tmp_path / json.loads((tmp_path / RECORD).read_text())["tensors"]["file"]

    def flip():
        content = bytearray(tensors().read_bytes())
        content[-1] ^= 1
        tensors().write_bytes(bytes(content))

    refused(lambda: edit('"explained_variance": 0.', '"explained_variance": 0.9'), "was changed after it was written")
    refused(lambda: edit('"active": 2', '"active": 3'), "was changed after it was written")
    refused(lambda: rewrite(tensors={"file": "../x", "sha256": "0" * 64}), "it names the file '../x'")
    refused(lambda: rewrite(tensors={"file": "autoencoder-../x.safetensors", "sha256": "../x"}), "it names the file")
    refused(flip, "has the SHA-256")
    refused(lambda: tensors().unlink(), "FileNotFoundError")
    refused(lambda: (tmp_path / RECORD).unlink(), "FileNotFoundError")
    refused(lambda: (tmp_path / RECORD).write_text("{"), "JSONDecodeError")
    refused(lambda: rewrite(format=7), "it has the format 7")
    refused(lambda: rewrite(width=17), "the shapes of 36 features of width 17")
    refused(lambda: rewrite(config={"activ": 2}), "has no setting 'activ'")
    refused(lambda: rewrite(config={"active": 50}), "more features are active than there are")
    refused(lambda: rewrite(losses=3), "TypeError")
    refused(lambda: (tmp_path / RECORD).write_text("[]"), "TypeError")
