"""Shapes that are refused: where the code goes wrong, and designs that may refuse them."""

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.detection import Detection
from utils.test_functions import check_shape_robustness
from utils.tier1_critical_validation import validate
from utils.validation.shape_origin import Sizes, shape_origin


def found(result):
    """Return (code, severity, where) of each finding."""
    return [(finding.code, finding.severity, finding.where) for finding in result.findings]


class Mix(nn.Module):
    """A causal average, in which a test breaks the shapes."""

    def __init__(self, breaks):
        super().__init__()
        self.breaks, self.proj = breaks, nn.Linear(16, 16)

    def forward(self, x):
        return self.proj(self.breaks(x).cumsum(1))


class LM(nn.Module):
    """Token ids in, logits out; `inner` breaks shapes in a block, `outer` in the model itself."""

    def __init__(self, inner=lambda x: x, outer=lambda x: x, final=lambda z: z, rows=64, declared=64):
        super().__init__()
        self.tok, self.pos = nn.Embedding(50, 16), nn.Embedding(rows, 16)
        self.blocks = nn.ModuleList([Mix(lambda x: x), Mix(inner)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 50)
        self.outer, self.final = outer, final
        self.config = {"vocab_size": 50, "max_position_embeddings": declared, "is_decoder": True}

    def forward(self, input_ids):
        x = self.tok(input_ids) + self.pos(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = x + block(x)
        return self.final(self.head(self.norm(self.outer(x))))


def pairs(x):
    """Add neighbours; an odd length has none for the last."""
    batch, length, width = x.shape
    return x.view(batch, length // 2, 2, width).cumsum(2).view(batch, length, width)


INNER = {
    "batch of two": lambda x: x.view(2, x.shape[1], 16),
    "odd length": pairs,
    "length one": lambda x: torch.stack([x[:, 0], *x[:, 1:].unbind(1)], 1) if x[:, 1].any() else x,
    "mask of 32": lambda x: x * torch.ones(32)[: x.shape[1], None],
}


@pytest.mark.parametrize("kind", INNER)
def test_the_block_with_the_fault_is_named(kind):
    """Its own code crashes, or hands on what another module then chokes on."""
    result = check_shape_robustness(LM(inner=INNER[kind]))
    assert found(result) == [("shape_crash", "fail", "blocks.1")], result.findings
    assert result.findings[0].reproduction.endswith("trial(**inputs)")


def test_the_model_itself_is_named():
    """The squeeze stands in forward(); the crash, if any, comes later."""
    assert found(check_shape_robustness(LM(outer=lambda x: x.squeeze(0)))) == [("shape_crash", "fail", "LM")]
    assert found(check_shape_robustness(LM(final=lambda z: z.squeeze()))) == [("shape_crash", "fail", "LM")]


def test_transposed_logits():
    """(seq, batch, vocab) is one finding with its own words."""
    result = check_shape_robustness(LM(final=lambda z: z.transpose(0, 1)))
    assert found(result) == [("shape_crash", "fail", "LM")]
    assert "batch and positions are transposed" in result.why and "transpose(0, 1)" in result.findings[0].hint


def test_batch_size_written_into_the_code():
    """No probe runs with two samples, so the one that runs is searched for."""
    result = check_shape_robustness(LM(inner=lambda x: x.view(4, 12, 16)))
    assert found(result) == [("shape_crash", "fail", "blocks.1")]
    assert "runs with batch size 4 and not with 2" in result.why


class Recurrent(nn.Module):
    """The first state is made for two samples."""

    def __init__(self, batch=2):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(50, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 50)
        self.batch = batch

    def forward(self, input_ids):
        start = torch.zeros(1, self.batch or len(input_ids), 16)
        return self.head(self.rnn(self.embed(input_ids), (start, start))[0])


def test_state_of_a_fixed_batch():
    """The recurrent layer is handed the wrong state; its caller is to blame."""
    assert found(check_shape_robustness(Recurrent())) == [("shape_crash", "fail", "Recurrent")]
    assert found(check_shape_robustness(Recurrent(0))) == []


def test_samples_written_into_a_flattening():
    """What follows gets as many rows as in development, with fewer features: not its fault."""

    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 64, 10)

        def forward(self, x):
            return self.fc(self.conv(x).view(4, -1))

    spec = ModelSpec(example_inputs={"x": torch.randn(4, 1, 8, 8)})
    assert found(check_shape_robustness(Flattened(), spec=spec)) == [("shape_crash", "fail", "Flattened")]


def test_hidden_states_returned_as_logits():
    """The head is there and forward() forgot it; the last norm is not to blame."""

    class Headless(LM):
        def forward(self, input_ids):
            return self.norm(self.tok(input_ids))

    result = check_shape_robustness(Headless(), spec=ModelSpec(task="causal_lm"))
    assert ("vocab_mismatch", "fail", "Headless") in found(result)


def test_no_promise_no_maximum():
    """A buffer of 64 rows that no setting mentions: 64 is the limit, found by trying, or unknown."""

    class Buffered(LM):
        def __init__(self):
            super().__init__()
            del self.pos
            self.register_buffer("table", torch.randn(64, 16))
            self.config = {"vocab_size": 50, "is_decoder": True}

        def forward(self, input_ids):
            return self.head(self.tok(input_ids).cumsum(1) + self.table[: input_ids.shape[1]])

    adapter = ModelAdapter(Buffered())
    adapter.__dict__["max_length"] = Detection(None, "the search was too slow")
    assert found(check_shape_robustness(adapter)) == []


def test_table_is_named_with_its_rows():
    """The hint says how many rows there are and how many are needed."""
    result = check_shape_robustness(LM(rows=63))
    assert found(result) == [("shape_crash", "fail", "pos")]
    assert "`pos` has 63 rows" in result.findings[0].hint and "(64)" in result.findings[0].hint


def test_one_flat_list_of_logits_is_a_shape_too():
    """Logits of all positions of all texts below each other."""
    assert found(check_shape_robustness(LM(final=lambda z: z.reshape(-1, 50)), spec=ModelSpec(task="causal_lm"))) == []


class Reader(nn.Module):
    """A text classifier with a convolution that a test sizes."""

    def __init__(self, kernel, pool=lambda x: x.amax(2)):
        super().__init__()
        self.embed, self.conv, self.head = nn.Embedding(50, 16), nn.Conv1d(16, 8, kernel), nn.Linear(8, 3)
        self.pool = pool

    def forward(self, input_ids):
        return self.head(self.pool(self.conv(self.embed(input_ids).transpose(1, 2)).relu()))


def test_shortest_text_of_a_convolution_is_a_limit():
    """Kernels of two and three: the design's own limit."""
    for kernel in (2, 3):
        assert found(check_shape_robustness(Reader(kernel))) == [("shape_limit", "warn", "Reader")]


def test_single_token_that_a_slip_forbids():
    """The second token is taken for granted."""
    result = check_shape_robustness(Reader(1, pool=lambda x: x.amax(2) + x[:, :, 1]))
    assert found(result) == [("shape_crash", "fail", "Reader")] and "length 1" in result.why


class Patches(nn.Module):
    """Bytes in patches of four, as in MegaByte: lengths are multiples of four by design."""

    def __init__(self):
        super().__init__()
        self.embed, self.join, self.head = nn.Embedding(50, 16), nn.Linear(64, 16), nn.Linear(16, 3)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.head(self.join(x.reshape(len(x), -1, 64)).mean(1))


def test_patches_are_a_limit():
    """Worth a warning, no fault."""
    assert found(check_shape_robustness(Patches())) == [("shape_limit", "warn", "Patches")]


class Images(nn.Module):
    """A convolution whose output a test turns into features."""

    def __init__(self, flatten, features=8):
        super().__init__()
        self.conv, self.flatten, self.head = nn.Conv2d(3, 8, 4, stride=4), flatten, nn.Linear(features, 5)

    def forward(self, pixel_values):
        return self.head(self.flatten(self.conv(pixel_values)))


def test_image_sizes():
    """Averages take all sizes; a side used for both is a fault; flattening takes one size by design."""
    assert found(check_shape_robustness(Images(lambda x: x.mean((2, 3))))) == []
    square = Images(lambda x: x.view(len(x), 8, x.shape[2] * x.shape[2]).mean(2))
    result = check_shape_robustness(square)
    assert found(result) == [("shape_crash", "fail", "Images")] and "64 x 96" in result.why
    even = Images(lambda x: (x[:, :, ::2] + x[:, :, 1::2]).mean((2, 3)))
    assert [entry[:2] for entry in found(check_shape_robustness(even))] in ([], [("shape_limit", "warn")])
    assert found(check_shape_robustness(Images(lambda x: x.flatten(1), 8 * 56 * 56))) == []
    assert found(check_shape_robustness(square, config={"image_size": 32})) == []


class Translator(nn.Module):
    """Reads 40 ids in its decoder and predicts as many as a test says."""

    def __init__(self, width):
        super().__init__()
        self.source, self.target, self.out = nn.Embedding(40, 16), nn.Embedding(40, 16), nn.Linear(16, width)

    def forward(self, input_ids, decoder_input_ids):
        return self.out(self.target(decoder_input_ids) + self.source(input_ids).mean(1, keepdim=True))


def test_prediction_that_the_decoder_cannot_read():
    """Scores wider than the decoder's table crash in the middle of generation."""
    assert found(check_shape_robustness(Translator(40))) == []
    codes = found(check_shape_robustness(Translator(44)))
    assert codes and {code for code, _, _ in codes} == {"vocab_mismatch"}
    assert ("vocab_mismatch", "fail", "target") in codes or ("vocab_mismatch", "fail", "out") in codes


def test_logits_cut_by_the_model_itself():
    """The head is as wide as it should be, and forward drops a column."""
    result = check_shape_robustness(LM(final=lambda z: z[..., :-1]))
    assert [(f.code, f.severity) for f in result.findings] == [("vocab_mismatch", "fail")]
    assert "logits are 49 wide, the vocabulary has 50" in result.why


def test_padding_to_a_multiple_of_64_goes_both_ways(tiny):
    """A wider table, or wider scores, as nanoGPT's 50304 for 50257."""
    assert found(check_shape_robustness(tiny.GPT(vocab=126, head_width=128))) == []
    model = tiny.GPT(vocab=128, head_width=126)
    assert found(check_shape_robustness(model)) == []


def test_one_crash_is_told_once():
    """Other checks point to the one that has reported it."""
    report = validate(LM(inner=lambda x: x.view(2, x.shape[1], 16)), progress=False)
    fails = [(f.code, f.where) for result in report.results for f in result.findings if f.severity == "fail"]
    assert fails == [("shape_crash", "blocks.1")]
    told = [result.why for result in report.results[1:] if "see shape_robustness" in result.why]
    assert all(why.startswith("could not run: ") for why in told)


def test_dimensions_that_may_follow():
    """Equal, scaled, a token more, or stuck at another run's batch."""
    sizes = Sizes(((2, 3), (17, 9)))
    assert sizes.follows([(2, 17, 16)], [(3, 9, 16)])
    assert sizes.follows([(34, 16)], [(51, 16)])
    assert sizes.follows([(2, 18)], [(3, 10)])
    assert not sizes.follows([(2, 17, 16)], [(9, 16)])
    assert not sizes.follows([(2, 17, 16)], [(3, 9, 17)])
    assert sizes.stale([(2, 17, 16), (1, 2, 16)], [(3, 17, 16), (1, 2, 16)])
    assert not sizes.stale([(2, 17, 16), (17, 17)], [(3, 17, 16), (17, 17)])


def test_state_of_two_layers_is_no_batch_of_two():
    """A recurrent state (layers, batch, width) beside a squeeze in forward() that takes a batch of one away."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn = nn.Embedding(50, 16), nn.LSTM(16, 16, 2, batch_first=True)
            self.gate, self.out = nn.Linear(16, 1), nn.Linear(16, 50)

        def forward(self, input_ids):
            x = self.rnn(self.embed(input_ids))[0]
            return self.out(torch.einsum("btd,bt->btd", x, self.gate(x).squeeze()))

    assert found(check_shape_robustness(Gated())) == [("shape_crash", "fail", "Gated")]


def test_origin_of_a_shape_that_runs_is_the_model():
    """Nothing departs, so there is nothing finer to name."""
    adapter = ModelAdapter(LM())
    assert shape_origin(adapter, adapter.example_inputs(2), adapter.example_inputs(3)) == "LM"


def crashes(model, spec):
    """Return what any check says of inputs that a model refuses, or could not do because of one."""
    results = validate(model, spec=spec, progress=False).results
    said = [f.message for result in results for f in result.findings if f.code in ("shape_crash", "vocab_mismatch")]
    return said + [result.why for result in results if result.could_not_run]


class Series(nn.Module):
    """Reads numbers of shape (batch, time, 6); `fold` works on the time axis in a block of its own."""

    def __init__(self, fold):
        super().__init__()
        self.inp, self.fold, self.head = nn.Linear(6, 16), fold, nn.Linear(16, 3)

    def forward(self, features, lengths=None, mask=None):
        x = self.fold(self.inp(features))
        if mask is not None:
            x = x * mask.any(1)[:, None, None]
        return self.head(x.mean(1))


class Fold(nn.Module):
    """Averages `size` neighbours."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x.view(x.shape[0], -1, self.size, x.shape[-1]).mean(2)


class UpDown(nn.Module):
    """Halves the time, doubles it and adds it to what it was: no odd lengths, by design."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv1d(16, 16, 2, 2), nn.ConvTranspose1d(16, 16, 2, 2)

    def forward(self, x):
        return x + self.up(self.down(x.mT)).mT


SERIES = {"features": torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("mask", [False, True])
def test_pairs_of_steps(mask):
    """Neighbours are averaged by a view, so a series of odd length crashes."""
    examples = SERIES | ({"mask": torch.ones(3, 10, dtype=torch.bool)} if mask else {})
    result = check_shape_robustness(Series(Fold(2)), spec=ModelSpec(example_inputs=examples))
    assert found(result) == [("shape_crash", "fail", "fold")]
    message = result.findings[0].message
    assert message.startswith("12 and 14 steps run, 11 do not: RuntimeError: shape '[1, -1, 2, 16]' is invalid")
    if not mask:
        with pytest.raises(RuntimeError, match="invalid for input"):
            exec(result.findings[0].reproduction, {"model": Series(Fold(2))})


def test_pairs_of_steps_with_channels_first():
    class First(Series):
        def forward(self, signal):
            return super().forward(signal.mT)

    examples = {"signal": SERIES["features"].mT.contiguous()}
    result = check_shape_robustness(First(Fold(2)), spec=ModelSpec(example_inputs=examples))
    assert found(result) == [("shape_crash", "fail", "fold")]


@pytest.mark.parametrize("sound", [nn.Identity(), Fold(5), UpDown(), nn.LayerNorm((10, 16))])
def test_series_of_lengths_that_a_design_has(sound):
    result = check_shape_robustness(Series(sound), spec=ModelSpec(example_inputs=SERIES))
    assert found(result) == []


class TwoVocabularies(nn.Module):
    """Sound: an encoder-decoder whose languages have tables of different sizes, and whose inputs have unusual names."""

    def __init__(self, source, target):
        super().__init__()
        self.source, self.target = nn.Embedding(source, 16), nn.Embedding(target, 16)
        self.out = nn.Linear(16, target)

    def forward(self, english, german):
        return self.out(self.target(german) + self.source(english).mean(1, keepdim=True))


@pytest.mark.parametrize("sizes", [(200, 30), (30, 200)])
@pytest.mark.parametrize("positions", [(11, 9), (9, 9)])
def test_each_language_keeps_to_its_own_table(sizes, positions):
    """No check hands one language the ids of the other."""
    examples = {"english": torch.ones(3, positions[0]).long(), "german": torch.ones(3, positions[1]).long()}
    spec = ModelSpec(task="seq2seq", example_inputs=examples)
    model = TwoVocabularies(*sizes)
    assert ModelAdapter(model, spec=spec).content_input == "german"
    assert found(check_shape_robustness(model, spec=spec)) == []
    assert crashes(model, spec) == []


def test_vocabulary_of_the_predictions_is_not_that_of_the_source():
    examples = {"english": torch.ones(3, 11).long(), "german": torch.ones(3, 9).long()}
    spec = ModelSpec(task="seq2seq", vocab_size=200, example_inputs=examples)
    assert found(check_shape_robustness(TwoVocabularies(30, 200), spec=spec)) == []


def test_one_number_per_token():
    """Sound: scores of shape (batch, seq), which follow the length."""

    class Scorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok, self.out = nn.Embedding(50, 16), nn.Linear(16, 1)

        def forward(self, input_ids):
            return self.out(self.tok(input_ids)).squeeze(-1)

    assert found(check_shape_robustness(Scorer())) == []


class Rows(nn.Module):
    """Sound: categories with tables of their own sizes beside numbers."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, 8) for size in (40, 3, 12))
        self.numbers, self.out = nn.Linear(5, 8), nn.Linear(32, 3)

    def forward(self, cat, num):
        read = [table(cat[:, column]) for column, table in enumerate(self.tables)]
        return self.out(torch.cat([*read, self.numbers(num)], 1))


class Fields(nn.Module):
    """Sound: one column per input."""

    def __init__(self):
        super().__init__()
        self.user, self.day, self.out = nn.Embedding(900, 8), nn.Embedding(7, 8), nn.Linear(16, 1)

    def forward(self, user, day):
        return self.out(torch.cat([self.user(user), self.day(day)], -1)).squeeze(-1)


def drawn(tops, *shape):
    """Return columns of ids below `tops`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(top, shape, generator=generator) for top in tops]


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_columns_as_inputs_of_their_own(shape):
    """A single id per sample is a column, whether or not it has an axis of its own."""
    spec = ModelSpec(example_inputs=dict(zip(("user", "day"), drawn((900, 7), *shape), strict=True)))
    assert ModelAdapter(Fields(), spec=spec).modality == "features"
    assert crashes(Fields(), spec) == []


@pytest.mark.parametrize("order", [("cat", "num"), ("num", "cat")])
def test_columns_of_their_own_ranges(order):
    examples = {"cat": torch.stack(drawn((40, 3, 12), 6), 1), "num": torch.randn(6, 5)}
    spec = ModelSpec(example_inputs={name: examples[name] for name in order})
    assert crashes(Rows(), spec) == []


class Unclear(nn.Module):
    """Takes an object with two tensors in it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, sample):
        return self.head(sample.left + sample.right)


class Clips(nn.Module):
    """Takes (batch, time, channels, height, width), and calls it images."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, images):
        batch, time, _, _, _ = images.shape
        return self.head(self.conv(images.flatten(0, 1)).mean((2, 3))).view(batch, time, 5).mean(1)


@pytest.mark.parametrize("kind", [Unclear, Clips])
def test_inputs_that_nobody_can_guess_are_no_crash(kind):
    """The verdict is open, and the report says which argument is unclear and what to pass."""
    report = validate(kind(), progress=False)
    assert report.verdict == "INCOMPLETE" and not report.findings
    name = "sample" if kind is Unclear else "images"
    why = report.results[0].why
    assert f"unclear what `{name}` holds" in why and f"ModelSpec(example_inputs={{'{name}': ...}})" in why


def test_a_crash_on_evident_inputs_is_the_models_own():
    """Ids by their name, or by the table that took them."""

    class Broken(Reader):
        def forward(self, input_ids):
            return nn.functional.linear(self.embed(input_ids).mean(1), torch.zeros(3, 17))

    class Unnamed(Broken):
        def forward(self, x):
            return super().forward(x)

    for kind in (Broken, Unnamed):
        assert [entry[:2] for entry in found(check_shape_robustness(kind(1)))] == [("shape_crash", "fail")]


class Graph(nn.Module):
    """Node features (nodes, 8) and edges (2, many); `per` says what there is one row of in the answer."""

    def __init__(self, per="node"):
        super().__init__()
        self.enter, self.leave, self.per = nn.Linear(8, 16), nn.Linear(16, 3), per

    def forward(self, x, edge_index):
        nodes = self.enter(x)
        heard = torch.zeros_like(nodes).index_add(0, edge_index[1], nodes[edge_index[0]])
        scores = self.leave((nodes + heard).relu())
        return scores if self.per == "node" else scores.mean(0, keepdim=True)


class Dense(nn.Module):
    """The same with a matrix of edges."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x, adjacency):
        return self.leave((adjacency @ self.enter(x)).relu())


@pytest.mark.parametrize("kind", ["node", "graph", "dense"])
def test_a_graph_has_no_axis_of_samples(kind):
    """Its rows hear of each other, and cannot be cut to two: neither is a fault."""
    draw = torch.Generator().manual_seed(0)
    nodes = torch.randn(10, 8, generator=draw)
    if kind == "dense":
        model, examples = Dense(), {"x": nodes, "adjacency": torch.rand(10, 10, generator=draw)}
    else:
        model, examples = Graph(kind), {"x": nodes, "edge_index": torch.randint(10, (2, 30), generator=draw)}
    report = validate(model, spec=ModelSpec(example_inputs=examples), progress=False)
    assert report.verdict == "READY" and not report.findings
    skipped = {result.check: result.why for result in report.results if result.status == "skip"}
    for check in ("shape_robustness", "batch_independence"):
        assert "no axis of samples" in skipped[check]


def test_a_graph_of_ten_nodes_still_has_faults():
    """Edges that are never read."""

    class Deaf(Graph):
        def forward(self, x, edge_index):
            return self.leave(self.enter(x).relu())

    examples = {"x": torch.randn(10, 8), "edge_index": torch.randint(10, (2, 30))}
    report = validate(Deaf(), spec=ModelSpec(example_inputs=examples), progress=False)
    assert [(f.code, f.severity) for f in report.findings] == [("ignored_input", "fail")]


def test_no_parameters_are_said():
    """Nothing is wrong with such a module, and the report says that nothing can be trained."""
    report = validate(nn.Softplus(), progress=False)
    assert report.findings == ()
    assert "no parameters: nothing to train" in next(r.why for r in report.results if r.check == "gradient_flow")


class CountsFromOne(nn.Module):
    """Has no row for the id 0; `shift` as in code that moves ids by one."""

    def __init__(self, shift):
        super().__init__()
        self.words, self.head, self.shift = nn.Embedding(60, 8), nn.Linear(8, 60), shift

    def forward(self, input_ids):
        return self.head(self.words(self.shift(input_ids)))


def test_an_id_zero_that_crashes():
    """Shifted down by one there is no row; clamped, or shifted round, there is."""
    from tests.validation.faulty_modes import found

    assert found(check_shape_robustness, CountsFromOne(lambda i: i - 1)) == [("vocab_mismatch", "fail", "words")]
    assert found(check_shape_robustness, CountsFromOne(lambda i: (i - 1).clamp(min=0))) == []
    assert found(check_shape_robustness, CountsFromOne(lambda i: (i - 1) % 60)) == []


HUGE = 10**12
"""Numbers that no machine of ours has room for."""


class Hungry(nn.Module):
    """Asks for more memory than there is; `when` tells for which input."""

    def __init__(self, layer=None, when=lambda x: True):
        super().__init__()
        self.layer, self.when = layer or nn.Linear(4, 4), when

    def forward(self, x):
        y = self.layer(x)
        return y + torch.zeros(HUGE).sum() if self.when(x) else y


@pytest.mark.parametrize("example", [None, {"x": torch.randn(2, 4)}])
def test_a_pass_that_asks_for_too_much_memory(example):
    """Whether the input was made up or given: what was asked for, and the line that did."""
    report = validate(Hungry(), spec=ModelSpec(example_inputs=example), progress=False)
    (finding,) = report.findings
    assert (finding.code, finding.severity, finding.where) == ("out_of_memory", "fail", "Hungry")
    assert "because memory ran out on " in finding.message and "it asked for 4.0 TB at once" in finding.message
    line = Hungry.forward.__code__.co_firstlineno + 2
    assert finding.location == f"test_shape_robustness.py:{line} (class Hungry)"


def test_a_trial_that_asks_for_too_much_memory_is_no_fault():
    """One of the inputs that were tried in vain did; another one runs."""
    model = Hungry(nn.Conv2d(3, 4, 3), when=lambda x: x.shape[-1] > 100)
    adapter = ModelAdapter(model, spec=ModelSpec(example_inputs={"x": torch.randn(2, 3, 16, 16)}))
    assert adapter.failure is None and not check_shape_robustness(adapter).findings

    class Picky(Hungry):
        def forward(self, x):
            if x.is_floating_point():
                return super().forward(x)
            return x.float().mean(1, keepdim=True).repeat(1, 3)

    assert ModelAdapter(Picky(nn.Linear(4, 3))).failure is None


def test_inputs_that_nobody_can_guess_and_that_take_all_memory():
    """Nothing was computed from them, so they may be wrong."""

    class Unsure(Hungry):
        def forward(self, x):
            torch.zeros(HUGE)
            return self.layer(x)

    report = validate(Unsure(), progress=False)
    assert report.verdict == "INCOMPLETE" and not report.findings
    assert "memory ran out, and it is unclear what `x` holds" in report.results[0].why
