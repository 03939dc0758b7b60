"""What a trace says of a model against the model itself, by hand; what is missing is said."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.concepts.attention_flow import attention_flow
from utils.concepts.logit_lens import logit_lens
from utils.concepts.reasoning_steps import split_steps
from utils.concepts.reasoning_trace import record_trace
from utils.concepts.trace_parts import ReasoningTrace
from utils.concepts.trace_view import step_rows
from utils.memory.datastore import build_datastore
from utils.memory.nearest_neighbour_head import NearestNeighbourHead
from utils.memory.neighbour_mixture import NeighbourConfig
from utils.memory.vector_index import IndexConfig
from utils.runtime.errors import AdapterError, CheckpointError, ConfigError, DataError
from utils.runtime.files import own_hash
from utils.tokenization.adaptive_tokenizer import choose_tokenizer
from utils.training.weights import weights_sha256

CAUSAL = ModelSpec(task="causal_lm")
TEXT = "To add two numbers, count on. First take three. Then count two more.\nThe answer is five. " * 12


@pytest.fixture(scope="module")
def tokenizer():
    return choose_tokenizer([TEXT, "abcdefghijklmnopqrstuvwxyz"], 300)


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    config = {"vocab_size": 300, "d_model": 32, "nhead": 2, "num_layers": 3, "dropout": 0.0}
    loaded = utils.load_model("example:gpt", config=config)
    for parameter in loaded.module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return ModelAdapter(loaded.module)


@pytest.fixture(scope="module")
def head(gpt, tokenizer):
    ids = torch.from_numpy(tokenizer.encode([TEXT])[0]).long()
    windows = ids[: len(ids) // 16 * 16].view(-1, 16)
    store = build_datastore(gpt, windows, tokenizer=tokenizer)
    config = NeighbourConfig(8, 0.05, 0.9)
    return NearestNeighbourHead(gpt, store, config, index=IndexConfig(backend="torch"), tokenizer=tokenizer)


def test_the_lens_is_norm_and_head_on_each_block(gpt):
    inputs = gpt.example_inputs(1, 9)
    read = logit_lens(gpt, inputs)
    assert read.layers == ("before the blocks", "blocks.0", "blocks.1", "blocks.2")
    assert read.faithful and read.difference < 1e-5 and read.skipped == ()
    with torch.no_grad():
        state = gpt.module.embed(inputs["input_ids"])
        expected = [gpt.module.head(gpt.module.norm(state))]
        for block in gpt.module.blocks:
            state = block(state)
            expected.append(gpt.module.head(gpt.module.norm(state)))
    torch.testing.assert_close(read.logits, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_rollout_of_a_causal_model(gpt):
    inputs = gpt.example_inputs(1, 7)
    read = attention_flow(gpt, lambda: gpt.logits(inputs))
    assert read.modules == tuple(f"blocks.{number}.attn" for number in range(3)) and read.unseen == ()
    assert read.rollout is not None
    torch.testing.assert_close(read.rollout.sum(-1), torch.ones(7))
    assert not read.rollout.triu(1).any(), "nothing comes from later places"
    # The first place sees only itself, in every layer.
    assert float(read.rollout[0, 0]) == pytest.approx(1)


class OneHead(nn.Module):
    """Attention with weights known in closed form: every query weighs all keys alike."""

    def __init__(self, layers=2):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Averaging() for _ in range(layers))
        self.head = nn.Linear(8, 11)

    def forward(self, input_ids):
        state = self.embed(input_ids)
        for block in self.blocks:
            state = block(state)
        return self.head(state)


class Averaging(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        nn.init.zeros_(self.q.weight)
        nn.init.zeros_(self.q.bias)

    def forward(self, x):
        size = x.shape[1]
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        mask = torch.ones(size, size, device=x.device).triu(1).bool()
        return x + scores.masked_fill(mask, float("-inf")).softmax(-1) @ self.v(x)


def test_rollout_of_uniform_attention_in_closed_form():
    adapter = ModelAdapter(OneHead(), spec=CAUSAL)
    inputs = adapter.example_inputs(1, 5)
    read = attention_flow(adapter, lambda: adapter.logits(inputs))
    even = torch.tril(torch.ones(5, 5)) / torch.arange(1, 6)[:, None]
    step = 0.5 * even + 0.5 * torch.eye(5)
    torch.testing.assert_close(read.rollout, step @ step)


def test_a_text_with_memory(gpt, head, tokenizer, tmp_path):
    before = weights_sha256(gpt.module)
    trace = record_trace(gpt, "First take", 14, memory=head, tokenizer=tokenizer)
    assert trace.prompt == "First take" and trace.text and trace.notes == ()
    prompt = [token for token in trace.tokens if not token.written]
    written = [token for token in trace.tokens if token.written]
    assert len(written) == 14 and prompt[0].log_probability is None
    # The last layer of the lens is the model.
    ids = torch.tensor([[token.id for token in trace.tokens]])
    with torch.no_grad():
        own = gpt.logits({"input_ids": ids})[0].softmax(-1)
    assert trace.lens is not None and trace.lens.faithful
    for place in range(len(trace.tokens) - 1):
        assert trace.lens.guesses[-1][place][0].id == int(own[place].argmax())
        follows = trace.tokens[place + 1].id
        assert trace.lens.final[-1][place] == pytest.approx(float(own[place, follows]), abs=1e-5)
    # The mixture is what the tokens were drawn from, and its share is in it.
    for place, token in enumerate(trace.tokens):
        if token.written:
            model = math.log(float(own[place - 1, token.id]))
            part = math.exp(token.log_probability) * (1 - token.memory_share)
            assert part == pytest.approx(0.1 * math.exp(model), rel=1e-2, abs=1e-5)
            assert len(token.memories) == 3
    assert trace.steps[0].begin == 0 and trace.steps[-1].end == 14
    assert "".join(step.text for step in trace.steps) == trace.text
    first = trace.steps[0]
    part = written[first.begin : first.end]
    assert first.mean_log_probability == pytest.approx(sum(t.log_probability for t in part) / len(part))
    assert 0 < first.memory_share <= 1 and first.memories
    assert weights_sha256(gpt.module) == before
    path = trace.save(tmp_path / "trace.json")
    assert ReasoningTrace.load(path) == trace
    assert trace.save_figure(tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    html = trace._repr_html_()
    assert "overflow-x:auto" in html and '<td style="white-space:normal' in html, "steps wrap, numbers are scrolled to"
    assert "data:image/png" in html and "from memory" in html
    assert "memories" in step_rows(trace)[0] and "lens over 4 layers" in str(trace)


def test_titles_of_the_picture_are_whole(gpt, head, tokenizer):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = record_trace(gpt, "First", 2, memory=head, tokenizer=tokenizer).figure()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    titles = [axis._left_title for panel in figure.subfigs for axis in panel.axes]
    assert "which memories had a part in" in titles[0].get_text().replace("\n", " ")
    assert all(title.get_window_extent(canvas.get_renderer()).x1 < figure.bbox.x1 for title in titles)


def test_a_text_without_memory_or_tokenizer(gpt):
    trace = record_trace(gpt, [5, 6, 7], 4)
    assert [token.id for token in trace.tokens[:3]] == [5, 6, 7] and trace.text == ""
    assert any("no memory" in note for note in trace.notes) and any("no tokenizer" in note for note in trace.notes)
    assert len(trace.steps) == 1 and (trace.steps[0].begin, trace.steps[0].end) == (0, 4)
    from utils.training.generation import generate

    assert [t.id for t in trace.tokens[3:]] == list(generate(gpt, [5, 6, 7], 4, temperature=0, top_k=None).ids)
    again = record_trace(gpt, torch.tensor([5, 6, 7]), 4, temperature=1.0, seed=3)
    assert again == record_trace(gpt, [5, 6, 7], 4, temperature=1.0, seed=3)


def test_the_prompt_alone(gpt, tmp_path):
    trace = record_trace(gpt, [5, 6, 7], 0)
    assert len(trace.tokens) == 3 and trace.steps == () and trace.lens is not None
    assert trace.tokens[1].log_probability is not None
    assert trace.save_figure(tmp_path / "prompt.png").is_file()
    one = record_trace(gpt, [5], 0)
    assert len(one.lens.final[0]) == 1 and one.save_figure(tmp_path / "one.png").is_file()


class Skipping(OneHead):
    """The head also reads the embedding: no block's output alone makes the answer."""

    def forward(self, input_ids):
        state = start = self.embed(input_ids)
        for block in self.blocks:
            state = block(state)
        return self.head(state + start)


def test_a_way_past_the_blocks_is_noticed():
    torch.manual_seed(0)
    adapter = ModelAdapter(Skipping(), spec=CAUSAL)
    read = logit_lens(adapter, adapter.example_inputs(1, 5))
    assert not read.faithful and read.difference > 0.01 and "past the last block" in read.reason
    trace = record_trace(adapter, [1, 2, 3], 2)
    assert trace.lens is not None and not trace.lens.faithful
    assert any("not faithful" in note for note in trace.notes)


class RecurrentBlock(nn.Module):
    """Returns a tuple, as many layers do."""

    def __init__(self):
        super().__init__()
        self.rnn, self.norm = nn.GRU(8, 8, batch_first=True), nn.LayerNorm(8)

    def forward(self, x):
        output, state = self.rnn(x)
        return x + self.norm(output), state


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.blocks = nn.ModuleList(RecurrentBlock() for _ in range(2))

    def forward(self, input_ids):
        state = self.embed(input_ids)
        for block in self.blocks:
            state, _ = block(state)
        return self.head(state)


def test_a_recurrent_model_has_a_lens_and_no_attention(tmp_path):
    adapter = ModelAdapter(Recurrent(), spec=CAUSAL)
    trace = record_trace(adapter, [1, 2, 3], 3)
    assert trace.lens is not None and trace.lens.faithful and len(trace.lens.layers) == 3
    assert trace.attention is None and any("no attention flow" in note for note in trace.notes)
    assert trace.save_figure(tmp_path / "rnn.png").is_file()


class PlainRecurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(11, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 11)

    def forward(self, input_ids):
        return self.head(self.rnn(self.embed(input_ids))[0])


def test_a_model_without_blocks_says_so(tmp_path):
    adapter = ModelAdapter(PlainRecurrent(), spec=CAUSAL)
    trace = record_trace(adapter, [1, 2, 3], 3)
    assert trace.lens is None and trace.attention is None
    assert any("no repeated blocks" in note for note in trace.notes)
    assert all(token.log_probability is not None for token in trace.tokens[1:])
    assert trace.save_figure(tmp_path / "plain.png").is_file()
    assert ReasoningTrace.from_dict(json.loads(json.dumps(trace.to_dict()))) == trace
    with pytest.raises(AdapterError, match="Nothing of what PlainRecurrent computes"):
        record_trace(adapter, torch.tensor([[1, 2, 3]]))


class Shared(OneHead):
    """One block, run three times."""

    def __init__(self):
        super().__init__(layers=1)

    def forward(self, input_ids):
        state = self.embed(input_ids)
        for _ in range(3):
            state = self.blocks[0](state)
        return self.head(state)


def test_a_block_that_runs_several_times():
    torch.manual_seed(0)
    adapter = ModelAdapter(Shared(), spec=CAUSAL)
    inputs = adapter.example_inputs(1, 5)
    read = logit_lens(adapter, inputs)
    assert read.layers == ("before the blocks", "blocks.0 #1", "blocks.0 #2", "blocks.0 #3") and read.faithful
    with torch.no_grad():
        once = adapter.module.head(adapter.module.blocks[0](adapter.module.embed(inputs["input_ids"])))
    torch.testing.assert_close(read.logits[1], once)


def test_an_image_classifier(tmp_path):
    adapter = ModelAdapter(utils.load_model("example:vit"))
    inputs = adapter.example_inputs(1)
    trace = record_trace(adapter, inputs)
    assert trace.task == "image_classification" and len(trace.tokens) == 1 and trace.steps == ()
    assert trace.lens is not None and trace.lens.faithful and len(trace.lens.final[0]) == 1
    with torch.no_grad():
        adapter.module.eval()
        own = adapter.logits(inputs)[0].softmax(-1)
    assert trace.lens.guesses[-1][0][0].id == int(own.argmax()) == trace.tokens[0].id
    assert trace.attention is not None
    assert trace.save_figure(tmp_path / "vit.png").is_file()
    assert ReasoningTrace.load(trace.save(tmp_path / "vit.json")) == trace


class Convolutions(nn.Module):
    """Blocks of which the first narrows what it hands on."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, 3, stride, 1), nn.ReLU()) for stride in (1, 2, 1))
        self.head = nn.Linear(6, 4)

    def forward(self, pixel_values):
        x = self.stem(pixel_values)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_blocks_of_another_shape_are_left_out():
    inputs = {"pixel_values": torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    adapter = ModelAdapter(Convolutions(), spec=ModelSpec(example_inputs=inputs))
    trace = record_trace(adapter, inputs["pixel_values"])
    assert trace.lens is not None and trace.lens.layers == ("blocks.1", "blocks.2")
    assert any("leaves out blocks.0" in note for note in trace.notes)


def test_a_masked_language_model(tmp_path):
    adapter = ModelAdapter(utils.load_model("example:bert"))
    ids = adapter.example_inputs(1, 6)
    trace = record_trace(adapter, ids)
    assert len(trace.tokens) == 6 and trace.lens is not None and len(trace.lens.final[0]) == 6
    assert trace.save_figure(tmp_path / "bert.png").is_file()


class Broken(OneHead):
    def forward(self, input_ids):
        raise ValueError("never runs")


def test_bad_input(gpt, head):
    vit = ModelAdapter(utils.load_model("example:vit"))
    image = vit.example_inputs(2)
    linear = ModelAdapter(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), spec=ModelSpec(task="regression"))
    broken = ModelAdapter(Broken(), spec=CAUSAL)
    for error, call, message in (
        (ConfigError, lambda: record_trace(gpt, [1], -1), "tokens is -1. Expected .* Write for example tokens=1"),
        (ConfigError, lambda: record_trace(gpt, [1], "a"), "tokens is 'a'"),
        (ConfigError, lambda: record_trace(gpt, [1], temperature=-1), "temperature is -1.* 0 takes the likeliest"),
        (ConfigError, lambda: record_trace(gpt, [1], temperature=math.nan), "temperature is nan"),
        (ConfigError, lambda: record_trace(gpt, [1], top_k=0), "top_k is 0.* or leave it out"),
        (ConfigError, lambda: record_trace(gpt, [1], seed=2**70), "seed is "),
        (ConfigError, lambda: record_trace(gpt, torch.tensor([[1, 2]]), memory=head), "A memory was given"),
        (ConfigError, lambda: record_trace(vit, "a picture"), "only a causal language model goes on"),
        (DataError, lambda: record_trace(vit, image), "There are 2 samples"),
        (DataError, lambda: record_trace(vit, {"other": 1}), "Expected a tensor under"),
        (DataError, lambda: record_trace(gpt, "text"), "there is no tokenizer"),
        (DataError, lambda: record_trace(gpt, []), "The prompt is empty"),
        (DataError, lambda: record_trace(gpt, [999]), "holds the id 999"),
        (AdapterError, lambda: record_trace(broken, [1]), "No forward pass of Broken"),
        (AdapterError, lambda: record_trace(linear, torch.zeros(1, 4)), "is for regression"),
    ):
        with pytest.raises(error, match=message):
            call()


class Short(OneHead):
    """Reads sixteen tokens."""

    def __init__(self):
        super().__init__()
        self.places = nn.Embedding(16, 8)

    def forward(self, input_ids):
        state = self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            state = block(state)
        return self.head(state)


def test_more_than_a_model_reads_at_once_is_refused():
    adapter = ModelAdapter(Short(), spec=CAUSAL)
    assert len(record_trace(adapter, [1, 2, 3], 13).tokens) == 16
    with pytest.raises(ConfigError, match="Expected at most 16"):
        record_trace(adapter, [1, 2, 3], 14)


def test_what_a_model_cannot_read_is_refused(gpt, head):
    with pytest.raises(ConfigError, match="The memory is a dict. Expected a NearestNeighbourHead"):
        record_trace(gpt, [5, 6], 2, memory={})
    for prompt in (None, [1.5], ["a"]):
        with pytest.raises(DataError, match="does not hold ids alone"):
            record_trace(gpt, prompt, 2)
    with pytest.raises(AdapterError, match="does not run on a batch of"):
        record_trace(ModelAdapter(Short(), spec=CAUSAL), torch.ones(1, 40, dtype=torch.long))


def test_files_that_cannot_be_trusted(gpt, tmp_path):
    path = record_trace(gpt, [5, 6], 2).save(tmp_path / "trace.json")
    values = json.loads(path.read_text())

    def changed(change):
        other = json.loads(json.dumps(values))
        change(other)
        path.write_text(json.dumps(other | {"sha256": own_hash(other)}))
        return ReasoningTrace.load(path)

    assert changed(lambda v: None).tokens
    for change, message in (
        (lambda v: v.update(format="x"), "no reasoning trace"),
        (lambda v: v.update(version=7), "version 7"),
        (lambda v: v.pop("lens"), "does not hold together"),
        (lambda v: v["lens"]["layers"].pop(), "other layers or places"),
        (lambda v: v["lens"]["final"][0].__setitem__(0, 3.0), "no number from 0"),
        (lambda v: v["lens"]["final"][0].__setitem__(0, "3"), "no number from 0"),
        (lambda v: v["attention"]["rollout"].pop(), "not square"),
        (lambda v: v["attention"]["rollout"][0].__setitem__(0, None), "no number"),
        (lambda v: v["steps"][0].update(end=9), "do not cover"),
        (lambda v: v["tokens"][0].update(other=1), "does not hold together"),
    ):
        with pytest.raises(CheckpointError, match=message):
            changed(change)
    # Whoever does not hash it anew is noticed, and a file without a hash too.
    path.write_text(json.dumps(values).replace(values["tokens"][0]["text"], "x" + values["tokens"][0]["text"], 1))
    with pytest.raises(CheckpointError, match="was changed after it was written: its hash is another.*another copy"):
        ReasoningTrace.load(path)
    values.pop("sha256")
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="carries no hash"):
        ReasoningTrace.load(path)
    path.write_text(json.dumps(values | {"version": 1}))
    with pytest.raises(CheckpointError, match="version 1. Expected version 2; files of version 1 carry no hash"):
        ReasoningTrace.load(path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as a trace"):
        ReasoningTrace.load(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        ReasoningTrace.load(tmp_path / "none.json")
    with pytest.raises(CheckpointError, match="The path of the trace is None"):
        ReasoningTrace.load(None)


def test_where_nothing_can_be_written(gpt, tmp_path):
    trace = record_trace(gpt, [5, 6], 1)
    (tmp_path / "file").write_text("mine")
    for save in (trace.save, trace.save_figure):
        for path, message in (
            (tmp_path / "file" / "trace", "cannot be saved as .*not below a file.*Choose another path"),
            (tmp_path, "cannot be saved as .*is a folder"),
            ("", "The path of the .* is ''. Expected a path"),
            (None, "is None"),
            ("a\0b", "Expected a path"),
        ):
            with pytest.raises(CheckpointError, match=message):
                save(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_steps_by_hand():
    assert split_steps(["One", ". ", "Two 3", ".5", ".\n", "\n", "Three"]) == [(0, 2), (2, 6), (6, 7)]
    assert split_steps(["a\n", "\n"]) == [(0, 2)] and split_steps([]) == []
    assert split_steps(["\n", "a"]) == [(0, 2)]
    assert split_steps(["7", "8"]) == [(0, 2)]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text("ab. \n!", max_size=4), max_size=12))
def test_steps_cover_everything_in_order(pieces):
    steps = split_steps(pieces)
    assert [place for begin, end in steps for place in range(begin, end)] == list(range(len(pieces)))
    if "".join(pieces).strip():
        assert all("".join(pieces[begin:end]).strip() for begin, end in steps)
