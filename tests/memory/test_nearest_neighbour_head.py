"""A nearest-neighbour head against the paper's equations, scikit-learn and a memory that cannot help."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.objectives import IGNORED
from utils.memory.datastore import Scaling, _Reservoir, build_datastore
from utils.memory.key_reader import KeyReader
from utils.memory.memory_evaluation import choose_memory, choose_settings, evaluate_memory
from utils.memory.memory_generation import generate_with_memory
from utils.memory.nearest_neighbour_head import NearestNeighbourHead
from utils.memory.neighbour_mixture import Gate, Lookup, NeighbourConfig, fit_gate, window_hashes
from utils.memory.vector_index import IndexConfig
from utils.runtime.errors import AdapterError, ConfigError, DataError
from utils.training.weights import weights_sha256

VOCABULARY, LENGTH = 48, 24
TORCH = IndexConfig(backend="torch")


def make_gpt(seed=0):
    torch.manual_seed(seed)
    like = utils.load_model(
        "example:gpt", config={"vocab_size": VOCABULARY, "d_model": 32, "nhead": 2, "num_layers": 2, "dropout": 0.0}
    )
    for parameter in like.module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return ModelAdapter(like.module)


@pytest.fixture(scope="module")
def adapter():
    return make_gpt()


def make_text(count, seed):
    """Windows made of a few phrases in random order: what follows inside a phrase can be remembered."""
    phrases = torch.randint(0, VOCABULARY, (12, 8), generator=torch.Generator().manual_seed(7))
    chosen = torch.randint(0, 12, (count, LENGTH // 8), generator=torch.Generator().manual_seed(seed))
    return phrases[chosen].flatten(1)


def apart(count, seed, *others):
    """Windows of `make_text` that are in none of the others, and each once."""
    known = {tuple(row) for other in others for row in other.tolist()}
    rows = dict.fromkeys(tuple(row) for row in make_text(2 * count, seed).tolist())
    return torch.tensor([row for row in rows if row not in known][:count])


@pytest.fixture(scope="module")
def store(adapter):
    return build_datastore(adapter, make_text(40, 1))


@pytest.fixture(scope="module")
def head(adapter, store):
    return NearestNeighbourHead(adapter, store, NeighbourConfig(16, 0.5, 0.3), index=TORCH)


def all_vectors(adapter, ids):
    with KeyReader(adapter).reading() as read:
        return read(ids)


def test_every_position_is_a_key_with_the_token_after_it(adapter, store):
    ids = make_text(40, 1)
    vectors, _ = all_vectors(adapter, ids)
    assert len(store) == store.seen == 40 * (LENGTH - 1)
    torch.testing.assert_close(store.keys, vectors[:, :-1].flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(store.values.long(), ids[:, 1:].flatten())
    assert torch.equal(ids[store.windows.long(), store.positions.long() + 1], store.values.long())
    assert store.layer == "head" and store.side == "input"
    assert (
        store.nbytes == sum(t.nbytes for t in (store.keys, store.values, store.windows, store.positions)) + 40 * 24 * 4
    )
    assert "920 keys" in repr(store)


def test_labels_say_what_follows_and_what_counts(adapter):
    ids = make_text(2, 3)
    labels = torch.full_like(ids, IGNORED)
    labels[0, -1], labels[1, 4] = 5, 6
    store = build_datastore(adapter, ids, labels)
    assert store.values.tolist() == [5, 6]
    assert (store.windows.tolist(), store.positions.tolist()) == ([0, 1], [LENGTH - 1, 4])


def test_distances_and_answers_are_those_of_the_equations(adapter, store, head):
    ids = make_text(3, 2)
    found = head.lookup(ids)
    vectors, logits = all_vectors(adapter, ids)
    queries = vectors[:, :-1].flatten(0, 1).numpy()
    reference = NearestNeighbors(n_neighbors=16, algorithm="brute").fit(store.keys.numpy())
    distances, _ = reference.kneighbors(queries)
    np.testing.assert_allclose(found.distances.numpy(), distances**2, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        ((queries[:, None] - store.keys.numpy()[found.rows.numpy()]) ** 2).sum(-1),
        found.distances,
        rtol=1e-3,
        atol=1e-3,
    )
    whole = head.log_probabilities(ids)
    model = logits[:, :-1].flatten(0, 1).double().softmax(-1).numpy()
    # Equations 2 and 3, term by term.
    for place in range(0, len(queries), 7):
        memory = np.zeros(VOCABULARY)
        for distance, row in zip(found.distances[place], found.rows[place], strict=True):
            memory[int(store.values[row])] += math.exp(-float(distance) / 0.5)
        expected = 0.3 * memory / memory.sum() + 0.7 * model[place]
        np.testing.assert_allclose(whole[:, :-1].flatten(0, 1)[place].exp(), expected, rtol=2e-3, atol=1e-6)
    targets = ids[:, 1:].flatten()
    picked = whole[:, :-1].flatten(0, 1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.log_probability(head.config), picked, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(3, LENGTH), rtol=1e-4, atol=1e-4)


def test_faiss_and_torch_answer_alike(adapter, store, head):
    pytest.importorskip("faiss")
    ids = make_text(3, 2)
    by_faiss = NearestNeighbourHead(adapter, store, head.config, index=IndexConfig(backend="faiss"))
    torch.testing.assert_close(by_faiss.log_probabilities(ids), head.log_probabilities(ids), rtol=1e-3, atol=1e-3)
    assert "FAISS" in by_faiss.method and "torch" in head.method
    assert by_faiss.nbytes > head.nbytes == store.nbytes


def test_a_weight_of_zero_is_the_model_alone(adapter, store):
    ids = make_text(2, 4)
    alone = NearestNeighbourHead(adapter, store, NeighbourConfig(8, 1.0, 0.0), index=TORCH)
    torch.testing.assert_close(alone.log_probabilities(ids), all_vectors(adapter, ids)[1].log_softmax(-1))


def test_more_neighbours_than_keys_are_all_keys(adapter):
    small = build_datastore(adapter, make_text(1, 1)[:, :4])
    found = NearestNeighbourHead(adapter, small, NeighbourConfig(50), index=TORCH).lookup(make_text(1, 2))
    assert found.distances.shape[1] == 3


def test_the_model_is_left_as_it_was(adapter, store, head):
    adapter.module.train()
    before, state = weights_sha256(adapter.module), torch.random.get_rng_state()
    head.lookup(make_text(2, 5))
    generate_with_memory(adapter, head, [1, 2], 3)
    assert weights_sha256(adapter.module) == before and adapter.module.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in adapter.module.modules())
    adapter.module.eval()


def test_memory_helps_and_a_shuffled_one_does_not(head):
    groups = torch.arange(30) // 2
    first = apart(20, 11, make_text(40, 1))
    development = head.lookup(first, neighbours=64)
    test = head.lookup(apart(30, 12, make_text(40, 1), first), neighbours=64)
    found = evaluate_memory(head, development, test, groups, resamples=500)
    assert found.helps and found.gain.high < 0.5 and found.groups == 15
    assert found.gain.low < found.gain.ratio < found.gain.high
    assert found.control.low > 1, "with the same settings a shuffled memory does harm"
    # An untrained model learns from it how often each token occurs, and no more.
    assert found.gain.high < found.control_tuned.low and found.beyond_control.high < 1
    assert found.gain.ratio == pytest.approx(found.memory / found.base)
    assert found.median < 0.5 and found.improved == 1
    assert found.shuffled / found.base == pytest.approx(found.control.ratio)
    assert "rough" in found.notes[0]
    assert json.loads(json.dumps(found.to_dict()))["helps"] is True
    assert "model and memory" in str(found) and "<table>" in found._repr_html_()
    again = evaluate_memory(head, development, test, groups, resamples=500)
    assert again == found


def test_a_useless_memory_is_given_no_say(adapter, head):
    # Queries from text whose next tokens are random: nothing can be looked up.
    noise = torch.randint(0, VOCABULARY, (40, LENGTH), generator=torch.Generator().manual_seed(3))
    lookups = [head.lookup(part, neighbours=64) for part in noise.split(20)]
    sure, test = (Lookup(**{**vars(one), "model": torch.full_like(one.model, -0.01)}) for one in lookups)
    choice = choose_settings(sure)
    assert choice.config.weight == 0 and choice.ratio == 1.0 and choice.config.gate is None
    found = evaluate_memory(head, sure, test, resamples=200)
    assert not found.helps and "does not help" in str(found)


def synthetic(n=600, k=8, seed=0):
    """The memory is right exactly where the nearest is near."""
    generator = torch.Generator().manual_seed(seed)
    near = torch.rand(n, generator=generator) < 0.5
    distances = torch.where(near, 0.1, 9.0)[:, None] + torch.rand(n, k, generator=generator).sort(1).values
    targets = torch.zeros(n, dtype=torch.int64)
    values = torch.where(near, 0, 1)[:, None].expand(n, k).clone()
    flat = torch.full((n,), 1.0) + 0.01 * torch.rand(n, generator=generator)
    return Lookup(
        distances, torch.zeros(n, k, dtype=torch.int64), values, flat, -flat, targets,
        torch.full((n,), -1.0), torch.arange(n), torch.arange(n),
    )  # fmt: skip


def test_a_gate_listens_where_the_memory_is_near():
    lookup = synthetic()
    choice = choose_settings(lookup)
    gate = choice.config.gate
    assert gate is not None and choice.gate_ratio is not None
    plain = choose_settings(lookup, gate=False)
    assert plain.config.gate is None and choice.ratio < plain.ratio
    other = synthetic(seed=1)
    assert other.log_probability(choice.config).mean() > other.log_probability(plain.config).mean() + 0.1
    shares = other.weight_logits(choice.config).sigmoid()
    assert shares[other.values[:, 0] == 0].min() > 0.9 and shares[other.values[:, 0] == 1].max() < 0.1
    assert NeighbourConfig.from_dict(json.loads(json.dumps(choice.config.to_dict()))) == choice.config


def test_mass_of_the_likeliest_token():
    lookup = synthetic(4, 5)
    values = torch.tensor([[3, 3, 1, 2, 3], [0, 1, 2, 3, 4], [7, 7, 7, 7, 7], [2, 1, 1, 2, 2]])
    lookup = Lookup(**{**vars(lookup), "values": values})
    config = NeighbourConfig(5, 0.7)
    shares = lookup.shares(config)
    expected = [max(float(s[v == token].sum()) for token in v.unique()) for v, s in zip(values, shares, strict=True)]
    torch.testing.assert_close(lookup.features(config)[:, 3], torch.tensor(expected))
    assert torch.isfinite(lookup.features(config)).all()


def test_choosing_among_memories(adapter, store):
    shuffled = NearestNeighbourHead(adapter, store.shuffled(), index=TORCH)
    heads = {"shuffled": shuffled, "right": NearestNeighbourHead(adapter, store, index=TORCH)}
    best, choices = choose_memory(heads, apart(6, 9, make_text(40, 1)))
    assert best == "right" and choices["right"].ratio < choices["shuffled"].ratio
    with pytest.raises(ConfigError, match="no memory to choose from"):
        choose_memory({}, make_text(1, 1))


def test_splits_that_share_windows_are_refused(adapter, store, head):
    memory = make_text(40, 1)
    first = apart(4, 11, memory)
    second = apart(4, 12, memory, first)
    looked = {name: head.lookup(ids) for name, ids in (("first", first), ("second", second), ("memory", memory[:4]))}
    assert window_hashes(memory.int()).tolist() == window_hashes(memory).tolist()
    assert len(window_hashes(torch.cat((first, second))).unique()) == 8
    mixed_up = head.lookup(torch.cat((second, first[2:3], first[:1])))
    for one, other, message in (
        ("memory", "second", "4 of 4 windows of the development split are in the memory too: number 0, 1, 2, 3"),
        ("first", "memory", "4 of 4 windows of the test split are in the memory too"),
        ("first", "first", "4 of 4 windows of the test split are in the development split too"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate_memory(head, looked[one], looked[other])
    with pytest.raises(DataError, match="2 of 6 windows of the test split are in the development split too: number 4"):
        evaluate_memory(head, looked["first"], mixed_up)
    labels = torch.full_like(first, IGNORED)
    labels[:3, :5], labels[3] = 1, 2
    tails = head.lookup(torch.cat((first[:3], second[:1])), labels)
    evaluate_memory(head, looked["first"], tails, gate=False, resamples=100)  # mostly filling: equal by chance
    with pytest.raises(DataError, match="windows of the development split are in the memory too"):
        choose_memory({"one": head}, memory[:2])
    bare = replace(store, source=store.source[:0])
    unread = NearestNeighbourHead(adapter, bare, head.config, index=TORCH)
    found = evaluate_memory(unread, unread.lookup(first), unread.lookup(second), gate=False, resamples=100)
    assert any("kept no text" in note for note in found.notes)


@pytest.mark.parametrize("kind", ["standardise", "whiten"])
def test_scaling(adapter, kind):
    ids = make_text(30, 1)
    scaled, plain = build_datastore(adapter, ids, scaling=kind), build_datastore(adapter, ids)
    torch.testing.assert_close(scaled.keys, scaled.scaling(plain.keys))
    kept = scaled.keys.std(0) > 0.5
    torch.testing.assert_close(scaled.keys.std(0)[kept], torch.ones(int(kept.sum())), rtol=1e-2, atol=1e-2)
    head = NearestNeighbourHead(adapter, scaled, index=TORCH)
    assert float(head.lookup(ids).distances[:, 0].max()) < 0.05, "each remembered place finds itself"


def test_whitened_distance_is_that_of_mahalanobis():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(400, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    scaling = Scaling.fit("whiten", keys)
    inverse = np.linalg.inv(np.cov(keys.numpy().T, bias=True))
    gap = (keys[0] - keys[1]).numpy()
    ours = (scaling(keys[:1]) - scaling(keys[1:2])).square().sum()
    assert float(ours) == pytest.approx(float(gap @ inverse @ gap), rel=1e-3)
    assert torch.equal(Scaling.fit("whiten", torch.ones(4, 3)).matrix.abs().sum(0), torch.ones(3))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.lists(st.integers(1, 17), min_size=1, max_size=6), st.integers(0, 5))
def test_a_reservoir_is_bounded_and_does_not_depend_on_batches(most, sizes, seed):
    total = sum(sizes)
    rows = torch.arange(total, dtype=torch.float32)[:, None]
    about = torch.arange(total).int()[:, None].expand(total, 3)

    def kept(cuts):
        reservoir = _Reservoir(most, None, seed)
        start = 0
        for size in cuts:
            reservoir.offer(rows[start : start + size], about[start : start + size])
            start += size
        keys, places = reservoir.content()
        assert torch.equal(keys[:, 0].int(), places[:, 0])
        return keys[:, 0].tolist()

    whole = kept([total])
    assert len(whole) == len(set(whole)) == min(most, total)
    assert kept(sizes) == whole == kept([1] * total)


def test_a_reservoir_keeps_each_with_the_same_chance():
    counts = torch.zeros(20)
    for seed in range(1000):
        reservoir = _Reservoir(5, None, seed)
        for start in (0, 7, 14):
            part = torch.arange(start, min(start + 7, 20))
            reservoir.offer(part[:, None].float(), part[:, None].expand(-1, 3).int())
        counts[reservoir.content()[0][:, 0].long()] += 1
    # 250 expected, deviation 14.
    assert (counts - 250).abs().max() < 65


def test_bounds_in_keys_and_bytes(adapter):
    batches = [make_text(4, seed) for seed in range(3)]
    bounded = build_datastore(adapter, batches, max_keys=50)
    assert len(bounded) == 50 and bounded.seen == 12 * (LENGTH - 1) and "of 276 positions" in repr(bounded)
    text = torch.cat(batches)
    assert torch.equal(text[bounded.windows.long(), bounded.positions.long() + 1], bounded.values.long())
    assert len(build_datastore(adapter, batches, max_bytes=10 * 4 * 35)) == 10
    without = build_datastore(adapter, ((part, part) for part in batches), keep_source=False)
    assert len(without.source) == 0 and len(without) == 12 * LENGTH and without.text(0, None)[0] == ""


def test_a_layer_by_name(adapter):
    block = build_datastore(adapter, make_text(3, 1), layer="blocks.0")
    assert (block.layer, block.side) == ("blocks.0", "output")
    inner = build_datastore(adapter, make_text(3, 1), layer="blocks.1.mlp", side="input")
    assert not torch.equal(block.keys, inner.keys)


class Recurrent(nn.Module):
    """An RNN whose layers put positions first."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(20, 8), nn.GRU(8, 8), nn.Linear(8, 20)

    def forward(self, input_ids):
        return self.head(self.rnn(self.embed(input_ids).transpose(0, 1))[0]).transpose(0, 1)


def test_a_recurrent_model_that_puts_positions_first():
    torch.manual_seed(0)
    adapter = ModelAdapter(Recurrent(), spec=ModelSpec(task="causal_lm"))
    ids = torch.randint(0, 20, (6, 5))
    store = build_datastore(adapter, ids)
    assert len(store) == 24
    head = NearestNeighbourHead(adapter, store, NeighbourConfig(1, 0.01, 0.9), index=TORCH)
    assert (head.lookup(ids).distances[:, 0] < 1e-4).all()
    assert head.lookup(ids).log_probability(head.config).mean() > math.log(0.5)


def test_generation_names_its_memories(adapter, store):
    sure = NearestNeighbourHead(adapter, store, NeighbourConfig(8, 0.01, 0.95), index=TORCH)
    text = make_text(40, 1)
    made = generate_with_memory(adapter, sure, text[0, :3].tolist(), 5, temperature=0, memories=2)
    # A phrase that began is gone on with as remembered.
    assert list(made.ids) == text[0, 3:8].tolist()
    for token in made.tokens:
        first = token.memories[0]
        assert first.supports and first.token == str(token.id) and len(token.memories) == 2
        assert text[first.window, first.position + 1] == token.id
        assert 0.9 < token.memory_share <= 1 and token.weight == pytest.approx(0.95)
        assert token.log_probability > token.model_log_probability and token.entropy >= 0
        assert first.text.split()[-1] == str(int(text[first.window, first.position]))
    assert json.loads(json.dumps(made.to_dict()))["ids"] == list(made.ids)
    assert "memor" in made._repr_html_() and str(made) == ""
    again = generate_with_memory(adapter, sure, text[0, :3].tolist(), 5, seed=3)
    assert again.ids == generate_with_memory(adapter, sure, text[0, :3].tolist(), 5, seed=3).ids


def test_generation_without_weight_is_plain_generation(adapter, store):
    from utils.training.generation import generate

    silent = NearestNeighbourHead(adapter, store, NeighbourConfig(8, 1.0, 0.0), index=TORCH)
    plain = generate(adapter, [3, 4], 8, seed=2)
    assert generate_with_memory(adapter, silent, [3, 4], 8, seed=2).ids == plain.ids


class FakeTokenizer:
    """Only what a fingerprint needs."""

    eos_id, vocab_size = 0, VOCABULARY

    def __init__(self, name):
        self.name = name

    def to_json(self):
        return self.name


def test_a_datastore_of_another_model_or_tokenizer_is_refused(adapter, store):
    with pytest.raises(ConfigError, match="with the same weights"):
        NearestNeighbourHead(make_gpt(1), store)
    named = build_datastore(adapter, make_text(1, 1), tokenizer=FakeTokenizer("a"))
    NearestNeighbourHead(adapter, named, tokenizer=FakeTokenizer("a"))
    with pytest.raises(ConfigError, match="the tokenizer that made its ids"):
        NearestNeighbourHead(adapter, named, tokenizer=FakeTokenizer("b"))


class Short(nn.Module):
    """Reads sixteen tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.places, self.head = nn.Embedding(20, 8), nn.Embedding(16, 8), nn.Linear(8, 20)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1])))


def test_bad_input(adapter, store, head):
    ids = make_text(2, 1)
    short = ModelAdapter(Short(), spec=ModelSpec(task="causal_lm"))
    for call, message in (
        (lambda: build_datastore(adapter, ids, scaling="big"), "The scaling is 'big'"),
        (lambda: build_datastore(adapter, ids, max_keys=0), "max_keys is 0"),
        (lambda: build_datastore(adapter, ids, max_bytes=5), "Expected room for one key"),
        (lambda: build_datastore(adapter, ids, layer="blocks.9"), "no layer 'blocks.9'"),
        (lambda: build_datastore(adapter, ids, layer="head", side="top"), "The side is 'top'"),
        (lambda: build_datastore(adapter, [ids], ids), "labels beside an iterable"),
        (lambda: NearestNeighbourHead(adapter, "a path"), "The datastore is 'a path'"),
        (lambda: NeighbourConfig(neighbours=0), "neighbours is 0"),
        (lambda: NeighbourConfig(temperature=0.0), "temperature is 0.0"),
        (lambda: NeighbourConfig(weight=1), "weight is 1"),
        (lambda: NeighbourConfig(weight=math.nan), "weight is nan"),
        (lambda: NeighbourConfig(gate="yes"), "gate is 'yes'"),
        (lambda: NeighbourConfig.from_dict({"k": 3}), "k"),
        (lambda: Gate((0,) * 5, (1,) * 6, (0,) * 6, 0.0), "means of the gate"),
        (lambda: Gate((0,) * 6, (0,) * 6, (0,) * 6, 0.0), "deviations of the gate"),
        (lambda: choose_settings(head.lookup(ids), gate="maybe"), "gate is 'maybe'"),
        (lambda: evaluate_memory(head, head.lookup(ids), head.lookup(ids), resamples=3), "resamples is 3"),
        (lambda: generate_with_memory(adapter, head, [1], 3, memories=-1), "memories is -1"),
        (lambda: generate_with_memory(adapter, head, [1], 0), "tokens is 0"),
        (lambda: generate_with_memory(make_gpt(1), head, [1], 3), "made with another model"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    for call, message in (
        (lambda: build_datastore(adapter, ids.float()), "of the type float32 and the shape"),
        (lambda: build_datastore(adapter, ids[0]), "Expected whole numbers of shape"),
        (lambda: build_datastore(adapter, ids[:, :1]), "No token has one after it"),
        (lambda: build_datastore(adapter, ids + VOCABULARY), f"ids from 0 to {VOCABULARY - 1}"),
        (lambda: build_datastore(adapter, ids, ids[:, 1:]), "one label for each id"),
        (lambda: build_datastore(adapter, []), "no text to remember"),
        (lambda: build_datastore(adapter, [ids, ids[:, 1:]]), "windows of one length"),
        (lambda: NearestNeighbourHead(adapter, replace(store, values=store.values + 40)), "holds the token"),
        (lambda: build_datastore(short, torch.zeros(1, 17, dtype=torch.int64)), "which Short reads at once"),
        (lambda: head.neighbours(torch.full((1, 32), math.nan), 2), "not finite"),
        (lambda: evaluate_memory(head, head.lookup(ids), head.lookup(ids[:1])), "has 1 document"),
        (lambda: evaluate_memory(head, head.lookup(ids), head.lookup(ids), [0.5, 0.5]), "a whole number for each"),
        (lambda: generate_with_memory(adapter, head, "text", 3), "there is no tokenizer"),
    ):
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(AdapterError, match="a vector for every token"):
        build_datastore(adapter, ids, layer="embed", side="input")
    broken = make_gpt(2)
    with torch.no_grad():
        broken.module.norm.weight.fill_(math.nan)
    with pytest.raises(AdapterError, match="not finite"):
        build_datastore(broken, ids)


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="is no causal language model"):
        KeyReader(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))


def test_gates_start_where_the_weight_is():
    lookup = synthetic(50)
    config = NeighbourConfig(8, 1.0, 0.5)
    fitted = fit_gate(lookup, config)
    assert lookup.log_probability(NeighbourConfig(8, 1.0, 0.5, fitted)).mean() > lookup.log_probability(config).mean()


def test_a_model_that_learned_since_is_not_answered_for(store):
    model = make_gpt()
    own = NearestNeighbourHead(model, store, index=TORCH)
    text = apart(2, 9)
    before = own.lookup(text)
    first = next(model.module.parameters())
    kept = first.detach().clone()
    with torch.no_grad():
        first.add_(1)
    with pytest.raises(DataError, match="have changed since its memory was joined to it"):
        own.lookup(text)
    with torch.no_grad():
        first.copy_(kept)
    assert torch.equal(own.lookup(text).rows, before.rows)
