"""One architecture, one operator: grown once, and looked at by means that are not growth's own.

Nothing here asks the certificate. The model before and the model after answer the same questions, of shapes that
growth did not see, in float64 where both compute in it; the new parameters must move in training, the cache of a
language model must agree with itself, and the plan, written as JSON and read again, must turn a fresh model into one
that takes the grown weights.
"""

import copy
import json
import re
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.growth_models import Architecture, answer, checks, ties, training_batch, vocabulary

BOUND = 1e-5
"""Largest change of an answer, as a share of the answers' size."""
CACHE_BOUND = 1e-6
"""Largest difference between cached and uncached logits in float64, as a share of their size."""
OPERATIONS: dict[str, dict[str, Any]] = {
    "depth": {"amount": 2},
    "depth@0": {"amount": 1, "where": 0},
    "feed_forward": {"amount": 24},
    "heads": {"amount": 1},
    "residual": {"amount": 8},
    "channels": {"amount": 8},
    "vocabulary": {"amount": 5},
    "classes": {"amount": 3},
    "expert": {"amount": 1},
}
"""What is asked for; ``@0`` is the same operator at the first block."""
RATE, WARM, STEPS = 1e-3, 2, 5


def perturb(model: nn.Module, seed: int = 11) -> None:
    """Move every weight and running statistic, so that no zero and no identity of the initialization hides anything."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                size = 0.1 if parameter.dim() < 2 else max(0.2 * float(parameter.std()), 0.02)
                parameter += size * torch.randn(parameter.shape, generator=draw)
        known = set(model.state_dict())
        for name, buffer in model.named_buffers():
            if name in known and buffer.is_floating_point() and buffer.dim() == 1:
                noise = torch.randn(buffer.shape, generator=draw)
                buffer.mul_(torch.exp(0.1 * noise)).add_(0.05 * torch.randn(buffer.shape, generator=draw).abs())


def attempt(architecture: Architecture, operation: str) -> dict[str, Any]:
    """Grow a fresh model once and judge it.

    Returns:
        Plain values: verdict (exact, within, refused or WRONG), problems, reason, difference, seconds and more.
    """
    import utils
    from utils.growth.edits import GrowthError, GrowthRefusedError

    model, optimizer = prepared(architecture)
    old, kept = copy.deepcopy(model), state(model, optimizer)
    operator, wish = operation.partition("@")[0], dict(OPERATIONS[operation])
    spec = None if architecture.example is None else utils.ModelSpec(example_inputs=architecture.example)
    cell: dict[str, Any] = {"operation": operation, "verdict": "", "problems": [], "skipped": []}
    seconds = 0.0
    while True:
        started = time.perf_counter()
        try:
            event = utils.grow(model, operator, optimizer=optimizer, spec=spec, **wish)
        except GrowthError as error:
            seconds += time.perf_counter() - started
            advised = advice(str(error), wish)
            if advised is not None:
                wish = advised
                continue
            cell |= {"verdict": "refused", "reason": str(error), "undone": not isinstance(error, GrowthRefusedError)}
            changed = differences(kept, state(model, optimizer))
            if changed:
                cell |= {"verdict": "WRONG", "problems": [f"refused, and yet {changed}"]}
            return cell | {"seconds": seconds}
        break
    cell |= {
        "seconds": seconds + time.perf_counter() - started, "event_seconds": event.seconds, "wish": wish,
        "promise": event.plan.promise, "plan": event.plan.describe(), "certificate": event.certificate.describe(),
        "numbers": [f"{e.owner}.{'.'.join(e.path)}" for e in event.plan.edits if e.kind == "number"][:12],
    }  # fmt: skip
    judge(architecture, operator, old, model, optimizer, event, cell)
    if cell["problems"]:
        cell["verdict"] = "WRONG"
    return cell


def prepared(architecture: Architecture) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build a model, move its weights, and train it for the optimizer to have a state."""
    model = architecture.build()
    perturb(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    train(model, optimizer, training_batch(model, architecture.family), WARM)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise ValueError("the weights are not finite after two steps")
    with torch.no_grad():
        # What a model keeps from its last pass is without a graph then, and the model can be copied.
        answer(model.eval(), training_batch(model, architecture.family))
    return model, optimizer


def advice(said: str, wish: dict[str, Any]) -> dict[str, Any] | None:
    """Return what to ask for instead when a refusal says so itself; None when it does not, or was heeded before."""
    multiple = re.search(r"Expected a multiple of (\d+)", said)
    if multiple and wish.get("amount") != int(multiple[1]):
        return {**wish, "amount": int(multiple[1])}
    name = re.search(r"named by `where`, such as ([\w.]*\w)", said)
    if name and "where" not in wish:
        return {**wish, "where": name[1]}
    return None


def judge(
    architecture: Architecture, operator: str, old: Any, new: Any, optimizer: Any, event: Any, cell: dict[str, Any]
) -> None:
    """Ask everything of a grown model; problems and the verdict go into the cell."""
    problems: list[str] = cell["problems"]
    same_answers(architecture, old, new, event.plan.outputs, cell)
    if event.plan.operator not in ("depth", "expert") and ties(old) != ties(new):
        problems.append("other weights are tied than before")
    if event.parameters_after != sum(p.numel() for p in new.parameters()) or event.parameters_after <= sum(
        p.numel() for p in old.parameters()
    ):
        problems.append("the event counts other parameters")
    if architecture.family in ("causal_lm", "seq2seq"):
        same_cache(old, new, operator, cell)
    replayed(architecture, new, event.plan, cell)
    problems += held(new, optimizer)
    problems += dead(architecture, operator, old, new, optimizer, event.plan)


def same_answers(architecture: Architecture, old: Any, new: Any, outputs: int | None, cell: dict[str, Any]) -> None:
    """Compare the answers in the models' own precision and in float64."""
    pairs = [("float32", old, new)]
    try:
        doubled = copy.deepcopy(old).double(), copy.deepcopy(new).double()
        with torch.no_grad():
            first = next(given for _, given in checks(old, architecture.family))
            for model in doubled:
                if answer(model, in_double(first)).dtype != torch.float64:
                    raise TypeError
        pairs.append(("float64", *doubled))
    except Exception:
        cell["skipped"].append("float64")
    equal, asked, worst = True, 0, {"float32": 0.0, "float64": 0.0}
    for precision, before, after in pairs:
        for name, given in checks(old, architecture.family):
            inputs = in_double(given) if precision == "float64" else given
            with torch.no_grad():
                try:
                    expected = answer(before, inputs)
                except Exception:
                    continue
                asked += 1
                try:
                    found = answer(after, inputs)
                except Exception as error:
                    cell["problems"].append(f"{name}: {type(error).__name__}: {str(error)[:160]}")
                    continue
            found = found if outputs is None else found[..., :outputs]
            difference = distance(expected, found)
            worst[precision] = max(worst[precision], difference)
            equal = equal and torch.equal(expected.nan_to_num(), found.nan_to_num())
            limit = BOUND if precision == "float64" or len(pairs) == 1 else 10 * BOUND
            if difference > limit:
                cell["problems"].append(f"{name} in {precision}: the answer changes by {difference:.1e} of its size")
    if not asked:
        cell["problems"].append("the model answers none of the questions")
    cell |= {
        "asked": asked,
        "difference": worst["float64" if len(pairs) == 2 else "float32"],
        "single": worst["float32"],
    }
    cell["verdict"] = "exact" if equal else "within"


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs with their real tensors in float64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def distance(old: Tensor, new: Tensor) -> float:
    """Return the largest change as a share of the spread of the old answer; infinite where they cannot be compared."""
    if old.shape != new.shape or not torch.equal(torch.isfinite(old), torch.isfinite(new)):
        return float("inf")
    finite = torch.isfinite(old)
    before, after = old[finite].double(), new[finite].double()
    if not before.numel():
        return 0.0
    return float((after - before).abs().max() / before.std(unbiased=False).clamp_min(1e-12))


def generated(model: Any, family_input: Tensor, cache: bool) -> tuple[Tensor, Tensor]:
    """Return greedily chosen tokens and the logits that they were chosen by."""
    settings = copy.deepcopy(model.generation_config)
    settings.update(max_new_tokens=7, max_length=None, min_length=0, do_sample=False, num_beams=1, use_cache=cache,
                    eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True)  # fmt: skip
    settings.forced_bos_token_id = settings.forced_eos_token_id = None
    torch.manual_seed(0)
    with torch.no_grad():
        made = model.generate(family_input, generation_config=settings)
    return made.sequences, torch.stack(made.logits)


def same_cache(old: Any, new: Any, operator: str, cell: dict[str, Any]) -> None:
    """Compare generation with a cache and without, of a model whose cache agreed with itself before."""
    if not getattr(old, "can_generate", lambda: False)():
        cell["skipped"].append("cache: the model does not generate")
        return
    prompt = torch.randint(3, vocabulary(old), (2, 5), generator=torch.Generator().manual_seed(1))
    before, after = copy.deepcopy(old).double(), copy.deepcopy(new).double()
    try:
        tokens, logits = generated(before, prompt, True)
        plain_tokens, plain = generated(before, prompt, False)
        if not torch.equal(tokens, plain_tokens) or distance(plain, logits) > CACHE_BOUND:
            raise ValueError(f"cached and uncached logits differ by {distance(plain, logits):.1e} before growth")
    except Exception as error:
        cell["skipped"].append(f"cache: {type(error).__name__}: {str(error)[:100]}")
        return
    try:
        cached_tokens, cached = generated(after, prompt, True)
        new_tokens, uncached = generated(after, prompt, False)
    except Exception as error:
        try:
            generated(type(new)(copy.deepcopy(new.config)).eval(), prompt, True)
        except type(error):
            cell["skipped"].append(f"cache: a model built with these settings fails too: {str(error)[:100]}")
            return
        cell["problems"].append(f"generation fails: {type(error).__name__}: {str(error)[:160]}")
        return
    if not torch.equal(cached_tokens, new_tokens) or distance(uncached, cached) > CACHE_BOUND:
        cell["problems"].append(f"with a cache the logits differ by {distance(uncached, cached):.1e}")
    if operator != "vocabulary" and not torch.equal(cached_tokens, tokens):
        cell["problems"].append("it generates other tokens than before")


def replayed(architecture: Architecture, new: Any, plan: Any, cell: dict[str, Any]) -> None:
    """Let a fresh model grow by the plan as it is read from JSON, and give it the weights."""
    from utils.growth.edits import Plan
    from utils.growth.surgery import Surgery

    try:
        read = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
        fresh = architecture.build().eval()
        Surgery(fresh, read)
        fresh.load_state_dict(new.state_dict(), strict=True)
    except Exception as error:
        cell["problems"].append(f"replay: {type(error).__name__}: {str(error)[:160]}")
        return
    if ties(fresh) != ties(new):
        cell["problems"].append("replay: other weights are tied")
    for name, given in checks(new, architecture.family):
        with torch.no_grad():
            try:
                expected = answer(new, given)
            except Exception:
                continue
            found = answer(fresh, given)
        if not torch.equal(expected.nan_to_num(), found.nan_to_num()):
            cell["problems"].append(f"replay: {name} has another answer")
            return


def held(new: Any, optimizer: Any) -> list[str]:
    """Check that an optimizer holds each parameter once, with a state of its shape."""
    mine = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    problems = []
    frozen = {id(p) for p in new.parameters() if not p.requires_grad}
    if sorted(set(mine) - frozen) != sorted(id(p) for p in new.parameters() if p.requires_grad) or len(set(mine)) < len(
        mine
    ):
        problems.append("the optimizer does not hold exactly the parameters of the model")
    for parameter, entry in optimizer.state.items():
        if id(parameter) not in mine or any(
            value.dim() and value.shape != parameter.shape for value in entry.values() if isinstance(value, Tensor)
        ):
            problems.append("the optimizer's state belongs to other parameters")
            break
    return problems


def train(model: Any, optimizer: Any, batch: dict[str, Any], steps: int) -> None:
    """Take steps on one batch with labels drawn at random."""
    model.train()
    for step in range(steps):
        logits = answer(model, batch, 40 + step)
        draw = torch.Generator().manual_seed(step)
        classes = torch.randint(0, logits.shape[-1], (logits[..., 0].numel(),), generator=draw)
        loss = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()


def dead(architecture: Architecture, operator: str, old: Any, new: Any, optimizer: Any, plan: Any) -> list[str]:
    """Train, and return which new entries stay where they are although the old ones beside them move."""
    from utils.growth.operators.expert import opening

    tensors = dict(new.named_parameters())
    with torch.no_grad():
        for name, first in opening(plan) if operator == "expert" else ():
            # The plan says that whoever trains has to open the router's door.
            values = {**tensors, **dict(new.named_buffers())}[name]
            values[first:] = values[:first].max()
    marks = fresh_entries(old, new, plan)
    grown = vocabulary(new) - vocabulary(old) if operator == "vocabulary" else 0
    batch = training_batch(new, architecture.family, grown)
    twin = finest(new, batch)
    try:
        train(new, optimizer, batch, STEPS)
    except Exception as error:
        return [f"training: {type(error).__name__}: {str(error)[:160]}"]
    finally:
        new.eval()
    problems = [f"{name} is not finite after training" for name, p in tensors.items() if not p.isfinite().all()]
    tensors = dict(twin.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in tensors.items()}
    given = in_double(batch) if next(iter(tensors.values())).dtype == torch.float64 else batch
    train(twin, torch.optim.AdamW(twin.parameters(), lr=RATE, eps=1e-10, weight_decay=0.0), given, STEPS)
    for name, mark in marks.items():
        moved = far(tensors[name], before[name])
        if not mark.any() or not tensors[name].requires_grad:
            continue
        model_block = modelled_on(name, plan)
        beside = moved[~mark] if not mark.all() else None
        if beside is None and model_block in tensors:
            beside = far(tensors[model_block], before[model_block])
        usual = 1.0 if beside is None else float(beside.float().mean())
        share = float(moved[mark].float().mean())
        if share < 0.2 * usual:
            problems.append(f"of the new entries of {name} {share:.0%} move in training, of the old ones {usual:.0%}")
    return problems


def finest(model: Any, batch: dict[str, Any]) -> Any:
    """Return a copy in float64 where it trains in it: there a gradient of rounding errors is far below any other."""
    twin = copy.deepcopy(model).double()
    try:
        answer(twin.train(), in_double(batch)).sum().backward()
        twin.zero_grad()
        return twin
    except Exception:
        return copy.deepcopy(model)


def far(now: Tensor, before: Tensor) -> Tensor:
    """Tell which entries moved by more than an optimizer moves on rounding errors alone."""
    return (now.detach() - before).abs() > 0.5 * RATE


def modelled_on(name: str, plan: Any) -> str:
    """Return the name, after growth, of the tensor on which one of a new block is modelled."""
    for edit in plan.edits:
        prefix = f"{edit.container}." if edit.kind in ("insert", "gate") and edit.container else ""
        if edit.kind == "insert":
            for number in range(len(plan.edits)):
                start = f"{prefix}{edit.index + number}."
                if name.startswith(start):
                    rest = name[len(start) :].removeprefix("block.")
                    return f"{prefix}{edit.source}.{rest}"
    return ""


def fresh_entries(old: Any, new: Any, plan: Any) -> dict[str, Tensor]:
    """Return which entries of which parameters are new, by the edits of a plan."""
    marks: dict[int, Tensor] = {}
    names = dict(new.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in reversed(list(names.items()))}
    shapes = dict(old.named_parameters(remove_duplicate=False))
    for edit in plan.edits:
        if edit.kind == "widen" and edit.name in shapes and edit.name in names:
            key = id(names[edit.name])
            mark = marks.get(key, torch.zeros(shapes[edit.name].shape, dtype=torch.bool))
            parts, start = [], 0
            for place, count in edit.places:
                size = list(mark.shape)
                size[edit.axis] = count
                parts += [mark.narrow(edit.axis, start, place - start), torch.ones(size, dtype=torch.bool)]
                start = place
            parts.append(mark.narrow(edit.axis, start, mark.shape[edit.axis] - start))
            marks[key] = torch.cat(parts, edit.axis)
        elif edit.kind in ("insert", "gate"):
            prefix = f"{edit.container}." if edit.container else ""
            for name, parameter in names.items():
                if name.startswith(f"{prefix}{edit.index}."):
                    marks[id(parameter)] = torch.ones(parameter.shape, dtype=torch.bool)
    return {first[key]: mark for key, mark in marks.items()}


def state(model: Any, optimizer: Any) -> dict[str, Any]:
    """Return what a refusal must leave alone."""
    config = getattr(model, "config", None)
    return {
        "the weights": [(name, tensor.clone()) for name, tensor in model.state_dict().items()],
        "the parts": [name for name, _ in model.named_modules()],
        "the config": json.dumps(config.to_dict(), default=str, sort_keys=True) if config is not None else "",
        "the mode": model.training,
        "the gradients": [p.grad is None for p in model.parameters()],
        "the optimizer": [
            (id(p), [v.clone() if isinstance(v, Tensor) else v for v in optimizer.state.get(p, {}).values()])
            for group in optimizer.param_groups
            for p in group["params"]
        ],
        "the random numbers": torch.get_rng_state(),
    }


def differences(before: Any, after: Any) -> str:
    """Say which of two states differ."""
    return ", ".join(f"{name} changed" for name in before if not _alike(before[name], after[name]))


def _alike(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.shape == right.shape and bool(((left == right) | ((left != left) & (right != right))).all())
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_alike, left, right))
    return bool(left == right)
