"""The zoo of `benchmarks/validation_quality.py`: models build and run, codes are covered, faults are real."""

from collections import Counter

import pytest
import torch

from benchmarks.zoo import entries
from benchmarks.zoo.entry import plain_inputs

CODES = """
future_leakage batch_leakage padding_leakage position_absent constant_output ignored_input vocab_mismatch shape_crash
detached_submodule frozen_parameter unused_parameter unregistered_layer lazy_parameter dead_relu symmetric_init
zero_init exploding_init vanishing_init exploding_gradient vanishing_gradient missing_residual
missing_attention_scale wrong_softmax_dim nan_output nan_long_sequence nan_padding low_precision_unsafe double_softmax
wrong_builtin_loss label_shift dropout_in_eval nondeterministic_forward train_eval_ignored state_across_calls
input_mutation memory_growth quadratic_memory slow_python_loop embedding_scale buffer_not_registered shared_weight
hardcoded_device hardcoded_dtype padding_idx_wrong backward_crash
""".split()  # noqa: SIM905
PLAIN = [entry for entry in entries() if "transformers " not in entry.name]
BY_CODE = {code: [entry for entry in PLAIN if entry.codes and entry.codes[0] == code] for code in CODES}


def tensors(value):
    """Return the tensors of an output, whatever holds them."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    return [tensor for item in vars(value).values() for tensor in tensors(item)] if hasattr(value, "__dict__") else []


def output(model, inputs):
    """Return the first tensor that a fresh copy of the inputs gives."""
    with torch.no_grad():
        return tensors(model(**{name: value.clone() for name, value in inputs.items()}))[0]


def prepared(entry):
    model = entry.make(0).eval()
    return model, plain_inputs(entry, model)


def test_names_are_unique_and_each_code_has_four_models():
    assert len({entry.name for entry in entries()}) == len(entries())
    assert {code: len(group) for code, group in BY_CODE.items() if len(group) < 4} == {}
    assert Counter(bool(entry.codes) for entry in PLAIN)[False] >= 80
    assert sum(bool(entry.source) for entry in PLAIN) >= 20


def test_models_run_and_only_those_of_nan_output_give_nan():
    for entry in PLAIN:
        model, inputs = prepared(entry)
        if entry.codes[:1] == ("lazy_parameter",):
            output(model, inputs)
        finite = bool(torch.isfinite(output(model, inputs)).all())
        assert finite != (entry.codes[:1] == ("nan_output",)), entry.name


def test_models_are_seeded():
    for entry in PLAIN[::5]:
        first, second = entry.make(3), entry.make(3)
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        same = (torch.equal(a, b) for a, b in pairs if not isinstance(a, torch.nn.UninitializedParameter))
        if "NaN" not in entry.name:
            assert all(same), entry.name


def moves_the_past(entry, length):
    """Whether a change of the last token changes an earlier output."""
    model, inputs = prepared(entry)
    name = next(reversed(inputs))
    ids = inputs[name] if "example_inputs" in entry.spec else torch.randint(4, 50, (2, length))
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 7) % 50
    before, after = output(model, {**inputs, name: ids}), output(model, {**inputs, name: other})
    return not torch.allclose(before[:, :-1], after[:, :-1], atol=1e-7)


@pytest.mark.parametrize("entry", BY_CODE["future_leakage"], ids=lambda entry: entry.name)
def test_future_leakage_is_real(entry):
    assert any(moves_the_past(entry, length) for length in (12, 15, 40))


@pytest.mark.parametrize("entry", BY_CODE["batch_leakage"], ids=lambda entry: entry.name)
def test_batch_leakage_is_real(entry):
    model, inputs = prepared(entry)
    alone = output(model, {name: value[-1:] for name, value in inputs.items()})
    assert not torch.allclose(output(model, inputs)[-1:], alone, atol=1e-6)


@pytest.mark.parametrize("entry", BY_CODE["padding_leakage"], ids=lambda entry: entry.name)
def test_padding_leakage_is_real(entry):
    model, inputs = prepared(entry)
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, -4:] = 0
    other = torch.where(mask == 1, ids, (ids + 9) % 50)
    before = output(model, {"input_ids": ids, "attention_mask": mask})
    after = output(model, {"input_ids": other, "attention_mask": mask})
    short = output(model, {"input_ids": ids[:, :-4], "attention_mask": mask[:, :-4]})
    real = slice(0, 8) if before.dim() == 3 else slice(None)
    changed = not torch.allclose(before[:, real], after[:, real], atol=1e-7)
    assert changed or not torch.allclose(before[:, real], short[:, real], atol=1e-6)


@pytest.mark.parametrize("code", ["dropout_in_eval", "nondeterministic_forward", "state_across_calls"])
def test_answers_change_between_calls(code):
    for entry in BY_CODE[code]:
        model, inputs = prepared(entry)
        answers = [output(model, inputs) for _ in range(4)]
        if entry.name != "state_across_calls/public dropout lost":
            assert not all(torch.equal(answers[0], answer) for answer in answers), entry.name


@pytest.mark.parametrize("entry", BY_CODE["constant_output"], ids=lambda entry: entry.name)
def test_constant_output_is_real(entry):
    model, inputs = prepared(entry)
    other = {name: value.flip(-1) for name, value in inputs.items()}
    assert torch.allclose(output(model, inputs), output(model, other))


def test_inputs_are_changed_in_place():
    for entry in BY_CODE["input_mutation"]:
        model, inputs = prepared(entry)
        if "mask" in entry.name:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        kept = {name: value.clone() for name, value in inputs.items()}
        with torch.no_grad():
            model(**inputs)
        assert any(not torch.equal(value, kept[name]) for name, value in inputs.items()), entry.name
