"""Arguments of every wrong kind: each is answered by an error of ours with three sentences, never by a traceback."""

import ast
import traceback

import numpy as np
import pytest
import torch

from tests.memory.buffers import add, batch_of
from tests.memory.references import points
from tests.memory.test_nearest_neighbour_head import TORCH, apart, make_gpt, make_text
from utils.memory import datastore_files, embedding, neighbour_mixture, repeated_lines
from utils.memory.datastore import build_datastore
from utils.memory.episodic_buffer import EpisodicBuffer
from utils.memory.long_term_memory import LongTermMemory
from utils.memory.memory_consolidation import consolidate, recalled
from utils.memory.memory_evaluation import choose_memory, choose_settings, evaluate_memory
from utils.memory.memory_generation import generate_with_memory
from utils.memory.nearest_neighbour_head import NearestNeighbourHead
from utils.memory.neighbour_mixture import Gate, NeighbourConfig
from utils.memory.vector_index import IndexConfig
from utils.runtime.errors import CheckpointError, ConfigError, DataError, SeedbedError

ODD = (
    None, 0, -5, 1.5, True, 2**80, float("nan"), "a", "", b"b", [], [1.5], ["a"], {}, {"a": 1}, {1: 2}, object(), len,
    torch.ones(2), torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.int64), torch.tensor(5),
    torch.ones(2, dtype=torch.complex64), np.array(["a"]), np.array([None]), np.float32(1), ("a", 1),
)  # fmt: skip
"""Of everything that somebody may give by mistake."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Whatever the calls below are made with, right."""
    adapter, text = make_gpt(), make_text(40, 1)
    store = build_datastore(adapter, text)
    head = NearestNeighbourHead(adapter, store, index=TORCH)
    first = apart(3, 11, text)
    second = apart(3, 12, text, first)
    place = tmp_path_factory.mktemp("odd")
    datastore_files.save_datastore(store, place / "store")
    memory = LongTermMemory(8, config=TORCH)
    memory.add(points(9), [{"row": row} for row in range(9)])
    memory.save(place / "memory")
    return {
        "adapter": adapter, "text": text[:2], "store": store, "head": head, "place": place, "memory": memory,
        "lookups": (head.lookup(first), head.lookup(second)),
    }  # fmt: skip


def filled_buffer(policy="reservoir"):
    buffer = EpisodicBuffer(6, policy=policy)
    add(buffer, 6)
    return buffer


def embedder():
    return embedding.function_embedder(lambda samples: samples["logits"], "logits")


def calls(world):
    """Yield (name, function, right arguments) for everything that is public."""
    adapter, head, memory, text = world["adapter"], world["head"], world["memory"], world["text"]
    one, other = world["lookups"]
    buffer = filled_buffer()
    samples = batch_of(2)
    slots = buffer.slots[:2]
    yield "EpisodicBuffer", EpisodicBuffer, {
        "capacity": 5, "max_bytes": None, "policy": "reservoir", "seed": 0, "directory": None, "source": "",
    }  # fmt: skip
    yield "buffer.about", buffer.about, {"slots": slots}
    yield "buffer.read", buffer.read, {"slots": slots}
    numbers = torch.arange(2)
    for policy in ("reservoir", "balanced", "priority"):
        given = {"samples": samples, "groups": numbers, "priorities": numbers.float(), "time": 0}
        yield f"buffer.add, {policy}", filled_buffer(policy).add, given
    yield "buffer.sample", buffer.sample, {"count": 1, "draw": 0, "groups": None, "without": None}
    yield "buffer.update", buffer.update, {"slots": slots, "values": {"labels": numbers}}
    yield "buffer.prioritise", buffer.prioritise, {"slots": slots, "priorities": numbers.float()}
    yield "buffer.widen", buffer.widen, {"name": "logits", "size": 3, "fill": 0.0}
    yield "buffer.load_state_dict", filled_buffer().load_state_dict, {"state": buffer.state_dict()}
    for name, value in buffer.state_dict().items():
        whole = buffer.state_dict()
        yield (
            f"buffer.load_state_dict of {name}",
            lambda value, name=name, whole=whole: filled_buffer().load_state_dict({**whole, name: value}),
            {"value": value},
        )
    yield "buffer.remove", filled_buffer().remove, {"slots": slots}
    yield "LongTermMemory", LongTermMemory, {"dimension": 8, "metric": "l2", "embedder": None, "config": TORCH}
    yield "memory.ids", memory.ids, {"domain": None, "where": None}
    vectors = points(2)
    added = LongTermMemory(8, config=TORCH)
    yield "memory.add", added.add, {"items": vectors, "metadata": None, "ids": None, "domain": "a", "vectors": None}
    yield "memory.search", memory.search, {
        "queries": vectors, "k": 1, "domain": None, "where": None, "vectors": None, "with_metadata": True,
    }  # fmt: skip
    for name in ("get", "metadata"):
        yield f"memory.{name}", getattr(memory, name), {"ids": [1, 2]}
    changed = LongTermMemory(8, config=TORCH)
    changed.add(points(9))
    given = {"ids": [1, 2], "items": vectors, "metadata": None, "domain": "a", "vectors": None}
    yield "memory.update", changed.update, given
    yield "memory.delete", LongTermMemory.load(world["place"] / "memory").delete, {"ids": [1]}
    yield "memory.contains", lambda key: key in memory, {"key": 1}
    yield "memory.measured_recall", memory.measured_recall, {"queries": vectors, "k": 1, "vectors": None}
    yield "memory.save", memory.save, {"directory": world["place"] / "memory", "overwrite": False}
    yield "memory.load", LongTermMemory.load, {
        "directory": world["place"] / "memory", "embedder": None, "config": TORCH,
    }  # fmt: skip
    yield "IndexConfig", IndexConfig, {"backend": "torch", "exact_up_to": 5, "target_recall": 0.5, "seed": 0}
    model = embedding.model_embedder(adapter)
    yield "model_embedder", embedding.model_embedder, {
        "model": adapter, "tokenizer": None, "layer": "head", "pool": "auto", "side": "output", "channels": None,
        "batch_size": 2,
    }  # fmt: skip
    yield "a model's embedder", model, {"items": text}
    for name in ("input_ids", "other"):
        yield f"a model's embedder, {name}", lambda value, name=name: model({name: value}), {"value": text}
    yield "function_embedder", embedding.function_embedder, {"function": len, "fingerprint": "a"}
    yield "as_embedder", embedding.as_embedder, {"model": embedder()}
    yield "Embedder", embedding.Embedder, {"encode": len, "fingerprint": "a", "description": "b"}
    full, mind = filled_buffer(), LongTermMemory(embedder=embedder(), config=TORCH)
    yield "consolidate", consolidate, {
        "buffer": full, "memory": mind, "min_rehearsals": 1, "inputs": None, "keep": None, "domain": "a",
        "directory": None,
    }  # fmt: skip
    kept = filled_buffer()
    kept.sample(2, 0)
    ids = consolidate(kept, mind, 1).ids
    yield "recalled", recalled, {"memory": mind, "ids": list(ids)}
    yield "build_datastore", build_datastore, {
        "model": adapter, "batches": text, "labels": text, "layer": None, "side": None, "scaling": "none",
        "max_keys": 5, "max_bytes": None, "keep_source": True, "seed": 0, "tokenizer": None,
    }  # fmt: skip
    yield "a batch of build_datastore", lambda batch: build_datastore(adapter, [batch]), {"batch": (text, text)}
    yield "datastore.shuffled", world["store"].shuffled, {"seed": 0}
    yield "datastore.text", world["store"].text, {"row": 1, "tokenizer": None, "before": 2}
    yield "save_datastore", datastore_files.save_datastore, {
        "datastore": world["store"], "directory": world["place"] / "store",
    }  # fmt: skip
    yield "load_datastore", datastore_files.load_datastore, {"directory": world["place"] / "store"}
    yield "NearestNeighbourHead", NearestNeighbourHead, {
        "model": adapter, "datastore": world["store"], "config": NeighbourConfig(), "index": TORCH, "tokenizer": None,
    }  # fmt: skip
    yield "head.with_config", head.with_config, {"config": NeighbourConfig()}
    yield "head.neighbours", head.neighbours, {"vectors": world["store"].keys[:2], "count": 2}
    yield "head.lookup", head.lookup, {"ids": text, "labels": None, "neighbours": 2}
    yield "head.mixture", head.mixture, {"vectors": world["store"].keys[:2], "logits": torch.zeros(2, 48)}
    yield "head.log_probabilities", head.log_probabilities, {"ids": text}
    yield "generate_with_memory", generate_with_memory, {
        "model": adapter, "head": head, "prompt": [1], "tokens": 2, "temperature": 0.5, "top_k": 5, "seed": 0,
        "tokenizer": None, "stop_at_end": True, "memories": 1, "use_cache": True,
    }  # fmt: skip
    yield "choose_settings", choose_settings, {
        "lookup": one, "groups": None, "gate": False, "seed": 0,
    }  # fmt: skip
    yield "evaluate_memory", evaluate_memory, {
        "head": head, "development": one, "test": other, "groups": None, "development_groups": None, "gate": False,
        "resamples": 100, "seed": 0, "notes": (),
    }  # fmt: skip
    yield "choose_memory", choose_memory, {
        "heads": {"a": head}, "ids": text + 1, "labels": None, "groups": None, "gate": False, "seed": 0,
    }  # fmt: skip
    six = (1.0,) * 6
    yield "Gate", Gate, {"means": six, "deviations": six, "coefficients": six, "bias": 0.0}
    yield "NeighbourConfig", NeighbourConfig, {"neighbours": 3, "temperature": 1.0, "weight": 0.5, "gate": None}
    yield "NeighbourConfig.from_dict", NeighbourConfig.from_dict, {"settings": {}}
    yield "fit_gate", neighbour_mixture.fit_gate, {"lookup": one, "config": NeighbourConfig(8)}
    yield "without_repeated_lines", repeated_lines.without_repeated_lines, {
        "splits": {"a": ["b"]}, "shortest": 3, "within": True,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_no_argument_of_a_wrong_kind_ends_in_a_traceback(world, tmp_path, monkeypatch, root):
    own = str(root / "utils" / "memory")
    monkeypatch.chdir(tmp_path)  # some of the texts are names of folders
    raw, short = [], []
    for name, function, right in calls(world):
        for argument in right:
            for odd in ODD:
                if argument == "tokens" and odd is ODD[5]:
                    continue  # as many as the user can wait for
                try:
                    function(**{**right, argument: odd})
                except SeedbedError as error:
                    ours = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(own)
                    if ours and not (error.found and error.expected and error.action):
                        short.append(f"{name}({argument}={odd!r}): {error}")
                except Exception as error:
                    raw.append(f"{name}({argument}={odd!r}): {type(error).__name__}: {error}"[:200])
    assert not raw, "\n".join([str(len(raw)), *raw])
    assert not short, "\n".join(short)


def test_each_message_says_what_to_do(world):
    head, store, adapter, text = world["head"], world["store"], world["adapter"], world["text"]
    one, other = world["lookups"]
    buffer, memory = filled_buffer(), world["memory"]
    for call, message in (
        (lambda: consolidate(None, memory), "The buffer is None. Expected an EpisodicBuffer. Give the one"),
        (
            lambda: consolidate(buffer, None),
            "The memory is None. Expected a LongTermMemory. Make one with the embedder",
        ),
        (lambda: consolidate(buffer, memory, inputs="x"), "inputs is 'x'. Expected a function from the fields"),
        (lambda: consolidate(buffer, memory, keep="labels"), "keep is 'labels'. Expected several names"),
        (lambda: consolidate(buffer, memory, keep=torch.tensor(5)), "keep is a tensor"),
        (lambda: recalled(None, [1]), "The memory is None. Expected a LongTermMemory"),
        (
            lambda: head.lookup(text, neighbours=-5),
            "The number of neighbours is -5. Expected a whole number, at least 1",
        ),
        (
            lambda: head.lookup(text, neighbours=0),
            "The number of neighbours is 0. .* Leave it out to take the head's own",
        ),
        (lambda: head.lookup(text, neighbours=1.5), "The number of neighbours is 1.5"),
        (lambda: head.lookup(text, neighbours="a"), "The number of neighbours is 'a'"),
        (
            lambda: evaluate_memory(head, text, text),
            "The development split is a tensor .* what a head finds .*head.lookup",
        ),
        (lambda: evaluate_memory(head, one, [[1, 2]]), "The test split is of the type list"),
        (lambda: evaluate_memory(None, one, other), "The head is None. Expected a NearestNeighbourHead.*Make one"),
        (lambda: evaluate_memory(head, one, other, notes="a note"), "The notes are 'a note'. Expected a list of texts"),
        (lambda: evaluate_memory(head, one, other, gate=2), "gate is 2. Expected auto, True or False"),
        (
            lambda: choose_memory([head], text),
            "The heads are of the type list. Expected one head at least, under its name",
        ),
        (lambda: choose_memory({"a": 1}, text), "The head is 1. Expected a NearestNeighbourHead"),
        (lambda: choose_settings(text), "The lookup is a tensor"),
        (lambda: head.with_config("x"), "The settings are of the type str. Expected a NeighbourConfig, a mapping"),
        (
            lambda: NearestNeighbourHead(adapter, store, index=5),
            "The settings are of the type int. Expected a.* IndexC",
        ),
        (
            lambda: NearestNeighbourHead(adapter, store, tokenizer=5),
            "The tokenizer is 5, without `to_json`. Expected a T",
        ),
        (
            lambda: NeighbourConfig(gate={"bias": 0.0}),
            "The gate of the NeighbourConfig has no means, deviations, coeff",
        ),
        (lambda: build_datastore(adapter, text, keep_source="no"), "keep_source is 'no'. Expected True or False"),
        (lambda: build_datastore(adapter, text, scaling=None), 'The scaling is None. .* "whiten" is usual'),
        (lambda: build_datastore(adapter, text, seed="a"), "The seed of the sample is 'a'"),
        (
            lambda: store.text(len(store), None),
            "The number of the memory is 920. Expected a whole number, from 0 to 919",
        ),
        (lambda: store.text(0, 5), "The tokenizer is 5, without `encode`, `decode`"),
        (lambda: generate_with_memory(adapter, None, [1], 3), "The head is None"),
        (lambda: generate_with_memory(adapter, head, [1], 3, seed="a"), "The seed is 'a'. Expected a whole number"),
        (lambda: generate_with_memory(adapter, head, [1], 3, use_cache=1), "use_cache is 1. Expected True or False"),
        (lambda: memory.search(points(1), with_metadata=None), "with_metadata is None. Expected True or False"),
        (
            lambda: LongTermMemory(2**40),
            "The dimension of the memory is 1099511627776. Expected a whole number, from 1",
        ),
        (lambda: EpisodicBuffer(5, seed=None), "The seed of the buffer is None"),
        (lambda: EpisodicBuffer(5, source=3), "The source of the buffer's samples is 3. Expected a text"),
        (lambda: EpisodicBuffer(5, directory=3), "The path of the buffer's samples is 3. Expected a path"),
        (
            lambda: EpisodicBuffer(5, policy=[]),
            "The policy of the buffer is of the type list. Expected one of reservoir",
        ),
        (lambda: repeated_lines.without_repeated_lines({}, within=0), "within is 0. Expected True or False"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    for call, message in (
        (lambda: EpisodicBuffer(2**62).add(batch_of(2)), "There is no memory for 4,611,686,018,427,387,904 samples of"),
        (lambda: buffer.sample("a", 0), "The number of samples to draw is 'a'. Expected a whole number, at least 1"),
        (
            lambda: buffer.sample(1, "a"),
            "The number of the draw is 'a'. Expected a whole number.* Give that of the step",
        ),
        (lambda: buffer.sample(1, 0, groups=5), "groups is 5. Expected several whole numbers.*EpisodicBuffer.counts"),
        (lambda: buffer.sample(1, 0, without=[1.5]), "without is of the type list. Expected several whole numbers"),
        (lambda: add(buffer, 2, time="now"), "The time-stamp is 'now'. Expected a whole number"),
        (lambda: add(buffer, 2, time=2**70), "The time-stamp is .*Expected a whole number"),
        (lambda: buffer.update(buffer.slots, 5), "The values are 5. Expected a dict of tensors by name"),
        (lambda: buffer.widen("logits", "a"), "The new size of the field 'logits', which is 3 wide, is 'a'"),
        (lambda: buffer.widen("logits", 4, "a"), "is to be filled with 'a'. Expected a finite value"),
        (lambda: buffer.widen([], 4), "The buffer has no field .. with a dimension to widen"),
        (lambda: evaluate_memory(head, one, one), "windows of the test split are in the development split too"),
        (
            lambda: evaluate_memory(head, one, other, ["a", "b"]),
            "The groups are of the type list.*a whole number for each",
        ),
        (lambda: choose_settings(one, 5, gate=False), "The groups are 5"),
        (lambda: head.lookup(text.tolist()), "The ids are of the type list. Expected whole numbers of shape"),
        (lambda: head.lookup(None), "The ids are None. Expected whole numbers of shape"),
        (lambda: head.neighbours([1.0], 1), "The vectors are of the type list. .*of the shape .places, 32.. Give what"),
        (lambda: head.mixture(store.keys[:2], torch.zeros(3, 48)), r"There are logits \[3, 48\] for 2 vectors"),
        (lambda: build_datastore(adapter, None), "The text to remember is None. Expected token ids"),
        (lambda: build_datastore(adapter, [(text, text, text)]), "A batch is a tuple of 3. .* Give pairs"),
        (
            lambda: memory.add(points(2), ids=torch.ones(2, dtype=torch.bfloat16)),
            "The ids are .*Keep names of your own",
        ),
        (lambda: memory.get("12"), "The ids are '12' of the type str"),
        (lambda: memory.search(points(1), where="year"), "The condition is 'year'. Expected a mapping from keys"),
    ):
        with pytest.raises(DataError, match=message):
            call()
    longer = build_datastore(adapter, torch.cat((make_text(40, 1), make_text(9, 5))))
    with pytest.raises(
        ConfigError, match="found for the test split is of another memory than the head's.*Look the text"
    ):
        evaluate_memory(
            head, one, NearestNeighbourHead(adapter, longer.shuffled(), index=TORCH).lookup(make_text(3, 8))
        )
    with pytest.raises(CheckpointError, match="does not hold together: TypeError: the fields are no dict"):
        buffer.load_state_dict({**buffer.state_dict(), "fields": None})
    with pytest.raises(CheckpointError, match="there is more in it than there may be"):
        buffer.load_state_dict({**buffer.state_dict(), "seen": 2**80})
    assert len(buffer) == 6 and len(memory) == 9 and 2**80 not in memory and "a" not in memory


def test_every_error_says_what_was_found_what_was_expected_and_what_to_do(root):
    bare = []
    for path in sorted((root / "utils" / "memory").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
                ours = node.func.id in {kind.__name__ for kind in SeedbedError.__subclasses__()}
                passed_on = "adapter.failure" in ast.unparse(node)
                if ours and len(node.args) != 3 and not passed_on:
                    bare.append(f"{path.name}:{node.lineno}")
    assert not bare, bare
