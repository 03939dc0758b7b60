"""More tokens and classes: old logits stay, the loss rises by no more than said, and losses know of new labels."""

import math

import pytest
import torch
from torch import nn

from tests.growth.toys import VOCABULARY, Toy, adapted, answer, assert_undone, grown, planned, shapes, tensors
from utils.growth.edits import GrowthRefusedError, Plan, Widen
from utils.growth.operators.vocabulary import SHIFT
from utils.growth.surgery import Surgery


def rise(old, new):
    """Return by how much the logarithm of the softmax's sum rose, at most."""
    return float((new.logsumexp(-1) - old.logsumexp(-1)).max())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_old_logits_stay_and_the_loss_rises_within_jensens_bound(tied):
    model = Toy(tied=tied, bias=False)
    plan, _, old, new = grown(model, "vocabulary", amount=5)
    assert new.shape[-1] == VOCABULARY + 5
    assert plan.outputs == VOCABULARY
    assert torch.allclose(new[..., :VOCABULARY], old, atol=1e-12)
    assert torch.allclose(new[..., VOCABULARY:], old.mean(-1, keepdim=True).expand(*old.shape[:-1], 5), atol=1e-10)
    assert 0 < rise(old, new) <= math.log(1 + 5 / VOCABULARY)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_with_a_bias_the_loss_rises_by_no_more_than_a_fixed_amount(tied):
    model = Toy(tied=tied)
    _, _, old, new = grown(model, "vocabulary", amount=3)
    margin = math.log(3 / (VOCABULARY * SHIFT))
    assert torch.allclose(new[..., VOCABULARY:].mean(-1), old.mean(-1) - margin, atol=1e-10)
    assert 0 < rise(old, new) <= SHIFT


def test_tied_weights_grow_once_and_stay_tied():
    model = Toy(tied=True)
    plan = planned(model, "vocabulary", amount=2)
    assert sum(isinstance(edit, Widen) and edit.axis == 0 and edit.fill == "mean" for edit in plan.edits) == 1
    known = tensors(model)
    surgery = Surgery(model, plan)
    assert model.head.weight is model.tokens.weight
    assert model.head.weight.shape == (VOCABULARY + 2, 16)
    assert (model.tokens.num_embeddings, model.head.out_features) == (VOCABULARY + 2, VOCABULARY + 2)
    surgery.undo()
    assert_undone(model, known)
    assert model.head.weight is model.tokens.weight
    assert (model.config.vocab_size, model.vocab_size) == (VOCABULARY, VOCABULARY)


def test_new_rows_are_the_mean_and_the_padding_row_stays():
    model = Toy(padding=0)
    assert model.tokens.weight[0].abs().sum() == 0
    old = model.tokens.weight.detach().clone()
    Surgery(model, planned(model, "vocabulary", amount=2))
    assert torch.equal(model.tokens.weight[:VOCABULARY], old)
    assert torch.allclose(model.tokens.weight[VOCABULARY:], old.mean(0).expand(2, 16))
    assert model.tokens.padding_idx == 0
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert not model.tokens.weight.grad.any()


def test_a_loss_inside_forward_takes_new_labels():
    model = Toy()
    plan = planned(model, "vocabulary", amount=4)
    Surgery(model, plan)
    assert (model.config.vocab_size, model.vocab_size) == (VOCABULARY + 4, VOCABULARY + 4)
    ids = torch.full((2, 6), VOCABULARY + 3)
    loss, _ = model(ids, ids)
    loss.backward()
    assert model.head.weight.grad[VOCABULARY + 3].abs().sum() > 0
    assert model.tokens.weight.grad[VOCABULARY + 3].abs().sum() > 0


def test_a_size_that_only_the_loss_reads_is_found_under_any_name():
    class Named(Toy):
        def __init__(self):
            super().__init__()
            self.how_many = VOCABULARY
            del self.vocab_size

        def forward(self, input_ids, labels=None):
            logits = super().forward(input_ids)
            if labels is None:
                return logits
            return nn.functional.cross_entropy(logits.view(-1, self.how_many), labels.view(-1)), logits

    model = Named()
    Surgery(model, planned(model, "vocabulary", amount=4))
    assert model.how_many == VOCABULARY + 4


def test_a_table_without_a_head_grows_alone():
    model = Toy(classes=3)
    plan, _, old, new = grown(model, "vocabulary", amount=4)
    assert plan.outputs is None
    assert torch.equal(old, new)
    assert model.tokens.weight.shape[0] == VOCABULARY + 4
    assert model.head.weight.shape[0] == 3
    assert answer(model, torch.full((1, 4), VOCABULARY + 3)).isfinite().all()


def test_a_replay_gives_the_same_names_and_shapes():
    first, second = Toy(tied=True), Toy(tied=True)
    plan = planned(first, "vocabulary", to=50)
    Surgery(first, plan)
    Surgery(second, Plan.from_dict(plan.to_dict()))
    assert shapes(first) == shapes(second)
    assert second.head.weight is second.tokens.weight


def test_a_frozen_table_stays_frozen():
    model = Toy()
    model.tokens.weight.requires_grad_(False)
    Surgery(model, planned(model, "vocabulary", amount=1))
    assert not model.tokens.weight.requires_grad
    assert model.head.weight.requires_grad


def test_a_head_without_a_module_of_its_own_grows_and_places_do_not():
    class Bare(Toy):
        def __init__(self):
            super().__init__()
            del self.head
            self.places = nn.Parameter(torch.randn(VOCABULARY, 16) * 0.1)
            self.register_parameter("bias", nn.Parameter(torch.randn(VOCABULARY)))

        def forward(self, input_ids, labels=None):
            x = self.tokens(input_ids) + self.places[: input_ids.shape[1]]
            for block in self.blocks:
                x = block(x)
            return nn.functional.linear(self.norm(x), self.tokens.weight, self.bias)

    model = Bare()
    _, _, old, new = grown(model, "vocabulary", amount=2)
    assert torch.allclose(new[..., :VOCABULARY], old, atol=1e-12)
    assert 0 < rise(old, new) <= SHIFT
    assert model.tokens.weight.shape[0] == model.bias.shape[0] == VOCABULARY + 2
    assert model.places.shape[0] == VOCABULARY


def test_what_has_no_vocabulary_is_refused():
    with pytest.raises(GrowthRefusedError, match="There is no token table 'head'"):
        planned(Toy(), "vocabulary", amount=1, where="head")
    with pytest.raises(GrowthRefusedError, match="amount is '0'"):
        planned(Toy(), "vocabulary", amount=0)

    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3 * 64, 5)

        def forward(self, pixel_values):
            return self.head(pixel_values.reshape(-1, 3 * 64))

    from utils.adapters import ModelAdapter, ModelSpec

    adapter = ModelAdapter(Images(), spec=ModelSpec(example_inputs={"pixel_values": torch.randn(2, 3, 8, 8)}))
    with pytest.raises(GrowthRefusedError, match="No table reads tokens"):
        planned(adapter, "vocabulary", amount=1)


def test_a_table_larger_than_the_head_is_refused_unless_named():
    model = Toy()
    model.tokens = nn.Embedding(VOCABULARY + 3, 16)
    with pytest.raises(GrowthRefusedError, match="tokens has 40 rows, and the model has 37 outputs"):
        planned(model, "vocabulary", amount=1)
    assert planned(model, "vocabulary", amount=1, where="tokens").outputs is None


def test_a_model_that_clips_its_ids_is_refused():
    class Clipped(Toy):
        def forward(self, input_ids, labels=None):
            return super().forward(input_ids.clamp(max=36))

    model = Clipped()
    with pytest.raises(GrowthRefusedError, match="no new token can be read"):
        planned(model, "vocabulary", amount=1)


def test_new_outputs_that_may_win_are_refused():
    class Boosted(Toy):
        def forward(self, input_ids, labels=None):
            logits = super().forward(input_ids)
            return torch.cat([logits[..., :37], logits[..., 37:] + 20], -1)

    with pytest.raises(GrowthRefusedError, match="the new outputs raise the loss by"):
        planned(Boosted(), "vocabulary", amount=1)


def test_classes_grow_and_old_logits_stay():
    model = Toy(classes=5)
    known = tensors(model)
    plan, surgery, old, new = grown(model, "classes", amount=2)
    assert (plan.before, plan.after, plan.outputs) == (5, 7, 5)
    assert new.shape[-1] == 7
    assert torch.allclose(new[..., :5], old, atol=1e-12)
    assert 0 < rise(old, new) <= SHIFT
    assert (model.num_classes, model.config.num_labels, model.head.out_features) == (7, 7, 7)
    loss, _ = model(torch.arange(12).reshape(2, 6), torch.tensor([6, 5]))
    loss.backward()
    assert (model.head.weight.grad[5:].abs().sum(1) > 0).all()
    surgery.undo()
    assert (model.num_classes, model.config.num_labels, model.head.out_features) == (5, 5, 5)
    assert set(known) == set(dict(model.named_parameters()))


def test_a_head_without_bias_rises_within_jensens_bound():
    _, _, old, new = grown(Toy(classes=5, bias=False), "classes", amount=1)
    assert 0 < rise(old, new) <= math.log(1 + 1 / 5)


def test_a_label_for_a_new_class_learns_at_full_strength():
    model = Toy(classes=5)
    Surgery(model, planned(model, "classes", amount=1))
    loss, logits = model(torch.arange(6)[None], torch.tensor([5]))
    gradient = torch.autograd.grad(loss, logits)[0][0, 5]
    assert -1 <= gradient < -0.99


def test_what_are_no_classes_is_refused():
    with pytest.raises(GrowthRefusedError, match="The 37 outputs are tokens"):
        planned(Toy(), "classes", amount=1)
    with pytest.raises(GrowthRefusedError, match="The model has 1 output and its task is regression"):
        planned(adapted(Toy(classes=1), "regression"), "classes", amount=1)
    with pytest.raises(GrowthRefusedError, match="There is no module 'nowhere'"):
        planned(Toy(classes=5), "classes", amount=1, where="nowhere")
    with pytest.raises(GrowthRefusedError, match="No parameter of norm has 5 rows"):
        planned(Toy(classes=5), "classes", amount=1, where="norm")
    with pytest.raises(GrowthRefusedError, match="classes was to grow to 5, and the model has 5 classes"):
        planned(Toy(classes=5), "classes", to=5)


def test_two_heads_whose_answers_are_averaged_are_refused():
    class Two(Toy):
        def __init__(self):
            super().__init__(classes=5)
            self.other = nn.Linear(16, 5)

        def forward(self, input_ids, labels=None):
            x = self.tokens(input_ids).mean(1)
            return self.head(x) + self.other(x)

    with pytest.raises(GrowthRefusedError, match="classes from 5 to 6 in .* does not keep the function"):
        planned(Two(), "classes", amount=1)


def labelled(kind, task, **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **options)
    torch.manual_seed(0)
    return getattr(transformers, f"AutoModelFor{task}").from_config(config)


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "task", "options"),
    [
        ("bert", "MaskedLM", {"vocab_size": 37, **SIZES}),
        ("llama", "CausalLM", {"vocab_size": 37, **SIZES}),
        ("gpt2", "CausalLM", {"vocab_size": 37, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}),
        (
            "bart",
            "Seq2SeqLM",
            {"vocab_size": 37, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
            | {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
        ),
    ],
)
def test_models_of_others_compute_their_loss_with_new_tokens(kind, task, options):
    model = labelled(kind, task, **options)
    name = {"MaskedLM": "masked_lm", "CausalLM": "causal_lm", "Seq2SeqLM": "seq2seq"}[task]
    plan = planned(model, "vocabulary", name, amount=3)
    ids = torch.arange(12).reshape(2, 6) + 3
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        Surgery(model, plan)
        after = model(input_ids=ids).logits
    assert torch.allclose(after[..., :37], before, atol=1e-5)
    assert model.config.vocab_size == 40
    new = torch.full((2, 6), 39)
    assert model(input_ids=new, labels=new).loss.isfinite()


def test_the_names_of_a_configs_labels_follow_and_come_back():
    model = labelled("bert", "SequenceClassification", vocab_size=37, id2label={0: "cat", 1: "dog"}, **SIZES)
    names, numbers = model.config.id2label, model.config.label2id
    surgery = Surgery(model, planned(model, "classes", "text_classification", amount=1))
    assert model.config.num_labels == model.num_labels == 3
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "LABEL_2"}
    ids = torch.arange(12).reshape(2, 6)
    assert model(input_ids=ids, labels=torch.tensor([2, 0])).loss.isfinite()
    surgery.undo()
    assert model.config.id2label is names
    assert model.config.label2id is numbers
    assert model.config.num_labels == 2
