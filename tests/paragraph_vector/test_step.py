"""The step against its definition; the definition's gradients against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import embedding_kernels as ek
from embedding_kernels import reference
from embedding_kernels.ops._registry import OPERATORS
from embedding_kernels.reference import paragraph_vector as definition
from error_rule import assert_within_rule
from paragraph_vector.samples import SAMPLES, step

NAMES = OPERATORS["paragraph_vector_step"].argument_names
LEARNED = ("documents", "words", "bias", "projection", "context")
SQUARES = {"documents": "document_squares", "words": "word_squares", "bias": "word_squares"}
SQUARES |= {name: f"{name}_squares" for name in ("projection", "context")}

CASES = {
    **SAMPLES["paragraph_vector_step"],
    "long": step(width=32, lengths=(300, 1, 0, 120), vocabulary=5000, negatives=64),
    "hits": step(width=19, lengths=(40, 40), vocabulary=6, negatives=20),
    "wide": step(width=150, lengths=(20, 9), negatives=33),
    "one_bit": step(width=1),
    "nothing": step(lengths=()),
    "empty": step(lengths=(0, 0)),
    "dm_real_binary": step(width=25, code=18, context_width=9, lengths=(30, 2, 1)),
    "dm_real": step(width=13, binary=False, context_width=20, update_words=False),
    "dm_hits": step(context_width=5, lengths=(30, 12), vocabulary=4, negatives=9),
}
by_case = pytest.mark.parametrize("case", CASES)


def arguments(case: str, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    torch.manual_seed(0)
    values = dict(zip(NAMES, CASES[case](), strict=True))
    z = values["documents"] if values["projection"] is None else values["documents"] @ values["projection"]
    assert not values["binary"] or z.abs().min() > 1e-5, "a bit depends on rounding"
    return {name: a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for name, a in values.items()}


def stepped(case: str, backend: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, object]]:
    values = arguments(case, dtype)
    return ek.paragraph_vector_step(**values, backend=backend), values


def magnitudes(values: dict[str, object]) -> tuple[Tensor, definition.Gradients]:
    """Loss and gradients with every term's absolute value. An error of a logit is a relative error of probabilities, so
    these count as often as the logits are large."""
    documents, words, context, projection = (values[name] for name in ("documents", "words", "context", "projection"))
    tokens, negatives, cu_seqlens = values["tokens"].long(), values["negatives"].long(), values["cu_seqlens"]
    rows = documents[values["rows"]]
    z, size_of_z = (rows, rows.abs()) if projection is None else (rows @ projection, rows.abs() @ projection.abs())
    codes, slopes = definition.binary_code(z) if values["binary"] else (z, torch.ones_like(z))
    sizes = codes.abs() if values["binary"] else size_of_z
    document_of = torch.repeat_interleave(torch.arange(len(rows)), cu_seqlens.diff().long())
    features, feature_sizes = codes[document_of], sizes[document_of]
    if context is not None:
        near = definition.context_weights(cu_seqlens, values["window"], torch.float64)
        features = torch.cat([features, near @ context[tokens]], dim=1)
        feature_sizes = torch.cat([feature_sizes, near @ context.abs()[tokens]], dim=1)
    shift, shift_size = values["bias"] - values["log_expected"], values["bias"].abs() + values["log_expected"].abs()
    _, missing, probabilities = definition.sampled_softmax(
        (features * words[tokens]).sum(1) + shift[tokens],
        features @ words[negatives].T + shift[negatives],
        tokens[:, None] == negatives[None],
    )
    both = torch.cat([tokens[:, None], negatives.expand(len(tokens), -1)], dim=1)
    logits = (torch.einsum("tf,tkf->tk", feature_sizes, words.abs()[both]) + shift_size[both]).amax(1, keepdim=True)
    missing, probabilities = missing.abs()[:, None] * (1 + logits), probabilities * (1 + logits)
    features_gradient = missing * words.abs()[tokens] + probabilities @ words.abs()[negatives]
    bits = codes.shape[1]
    codes_gradient = slopes * torch.zeros_like(codes).index_add(0, document_of, features_gradient[:, :bits])
    of_words = torch.zeros_like(words).index_add(0, tokens, missing * feature_sizes)
    of_words.index_add_(0, negatives, probabilities.T @ feature_sizes)
    of_bias = torch.zeros_like(words[:, 0]).index_add(0, tokens, missing[:, 0])
    of_bias.index_add_(0, negatives, probabilities.sum(0))
    return torch.zeros_like(z[:, 0]).index_add(0, document_of, logits[:, 0]), definition.Gradients(
        codes_gradient if projection is None else codes_gradient @ projection.abs().T,
        of_words,
        of_bias,
        None if projection is None else rows.abs().T @ codes_gradient,
        None if context is None
        else torch.zeros_like(context).index_add(0, tokens, near.T @ features_gradient[:, bits:]),
    )  # fmt: skip


def as_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor[:, None]


@by_case
def test_step_is_the_definition(case):
    exact_loss, exact = stepped(case, "reference", torch.float64)
    plain_loss, plain = stepped(case, "reference")
    loss, got = stepped(case, "cpu")
    before = arguments(case, torch.float64)
    loss_size, gradient_sizes = magnitudes(before)
    assert_within_rule(as_rows(loss), as_rows(exact_loss), as_rows(plain_loss), as_rows(loss_size))
    for name in LEARNED:
        if before[name] is None:
            continue
        size = as_rows(getattr(gradient_sizes, name))
        squares = SQUARES[name]
        if name == "documents":
            size = torch.zeros_like(before[name]).index_add(0, before["rows"], size)
        if name in ("words", "bias"):  # one row to AdaGrad
            size = torch.cat([gradient_sizes.words, as_rows(gradient_sizes.bias)], dim=1).amax(1, keepdim=True)
        # the row's error, and that of the sum of squares by which it is divided
        moved = 2 * before["learning_rate"] * size / (exact[squares][:, None] + definition.SQUARES_FLOOR).sqrt()
        reach = as_rows(before[name]).abs() + moved.amax(1, keepdim=True)
        assert_within_rule(*(as_rows(values[name]) for values in (got, exact, plain)), reach)
        reach = as_rows(exact[squares]) + 2 * size.square().amax(1, keepdim=True)
        assert_within_rule(*(as_rows(values[squares]) for values in (got, exact, plain)), reach)


@by_case
def test_only_what_takes_part_changes(case):
    """To the bit: rows that no document, token or negative names, and with frozen words every table."""
    before, (_, after) = arguments(case), stepped(case, "cpu")
    words = torch.cat([before["tokens"], before["negatives"]]).long()
    touched = {"documents": before["rows"], "words": words, "bias": words, "context": before["tokens"].long()}
    for name in LEARNED:
        if before[name] is None or name == "projection":
            continue
        same = torch.ones(len(before[name]), dtype=torch.bool)
        if before["update_words"] or name == "documents":
            same[touched[name]] = False
        assert torch.equal(after[name][same], before[name][same])
        assert torch.equal(after[SQUARES[name]][same], before[SQUARES[name]][same])


def straight_through(z: Tensor) -> Tensor:
    """2 round(sigmoid(z)) - 1 whose gradient is that of 2 sigmoid(z) - 1."""
    smooth = 2 * torch.sigmoid(z) - 1
    return smooth + (torch.where(z > 0, 1.0, -1.0) - smooth).detach()


def loss_for_autograd(values: dict[str, object]) -> Tensor:
    """The summed loss, token by token, as one would write it for autograd."""
    documents, words, context, projection = (values[name] for name in ("documents", "words", "context", "projection"))
    losses = []
    for i, row in enumerate(values["rows"].tolist()):
        z = documents[row] if projection is None else documents[row] @ projection
        code = straight_through(z) if values["binary"] else z
        start, end = values["cu_seqlens"][i : i + 2].tolist()
        tokens = values["tokens"][start:end].tolist()
        for place, token in enumerate(tokens):
            features = code
            if context is not None:
                low = max(place - values["window"], 0)
                near = tokens[low:place] + tokens[place + 1 : place + 1 + values["window"]]
                mean = context[near].mean(0) if near else torch.zeros_like(context[0])
                features = torch.cat([code, mean])
            candidates = [token, *(k for k in values["negatives"].tolist() if k != token)]
            logits = words[candidates] @ features + (values["bias"] - values["log_expected"])[candidates]
            losses.append(functional.cross_entropy(logits, torch.tensor(0)))
    return torch.stack(losses).sum() if losses else documents.sum() * 0


@pytest.mark.parametrize("case", [case for case in CASES if case != "long"])  # token by token, which takes long
def test_gradients_of_the_definition_are_those_of_autograd(case):
    values = arguments(case, torch.float64)
    learned = {name: values[name].requires_grad_() for name in LEARNED if values[name] is not None}
    total = loss_for_autograd(values)
    expected = dict(zip(learned, torch.autograd.grad(total, learned.values(), allow_unused=True), strict=True))
    names = definition.loss_and_gradients.__code__.co_varnames[:12]
    loss, gradients = definition.loss_and_gradients(**{name: values[name] for name in names})
    torch.testing.assert_close(loss.sum(), total)
    for name, wanted in expected.items():
        got = getattr(gradients, name)
        if wanted is None:
            assert not got.any()
            continue
        torch.testing.assert_close(got, wanted[values["rows"]] if name == "documents" else wanted)


def test_a_first_update_is_learning_rate_times_the_gradient_over_its_size():
    values = arguments("dbow", torch.float64)
    before = values["documents"].clone()
    values["document_squares"].zero_()
    names = definition.loss_and_gradients.__code__.co_varnames[:12]
    _, gradients = definition.loss_and_gradients(**{name: values[name] for name in names})
    reference.paragraph_vector_step(**values)
    gradient = gradients.documents
    size = gradient.square().mean(1, keepdim=True).add(definition.SQUARES_FLOOR).sqrt()
    moved = values["documents"][values["rows"]] - before[values["rows"]]
    torch.testing.assert_close(moved, -values["learning_rate"] * gradient / size)


@by_case
def test_same_bits_for_any_thread_count(case):
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        loss, values = stepped(case, "cpu")
        results.append([loss, *(values[name] for name in NAMES if isinstance(values[name], Tensor))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_extreme_logits_stay_finite():
    values = arguments("dbow")
    values["words"][:] *= 300
    loss, after = ek.paragraph_vector_step(**values), values
    assert loss.isfinite().all() and (loss >= 0).all()
    assert all(after[name].isfinite().all() for name in ("documents", "words", "bias"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rows", lambda r: r.index_fill(0, torch.tensor([1]), 12), r"rows must be from 0 to 11 .*, got 12"),
        ("rows", lambda r: torch.full_like(r, 3), r"rows must be distinct, got 3 twice"),
        ("tokens", lambda t: t - 100, r"tokens must be from 0 to 39 \(the rows of words\), got -"),
        ("negatives", lambda n: n + 40, r"negatives must be from 0 to 39"),
        ("negatives", lambda n: n[:0], r"the size of negatives must be at least 1, got 0"),
        ("words", lambda w: w[:, 1:], r"words must be of size 21 in dimension 1"),
        ("learning_rate", lambda x: -x, r"learning_rate must be a finite number of at least 0, got -0.1"),
        ("window", lambda x: 3, r"window must be from 0 to 0, got 3"),
    ],
)
@pytest.mark.parametrize("kernel", ("reference", "cpu"))
def test_bad_values_are_refused_before_anything_is_written(name, change, message, kernel):
    values = arguments("dbow")
    values[name] = change(values[name])
    before = {key: a.clone() for key, a in values.items() if isinstance(a, Tensor)}
    with pytest.raises(ValueError, match=f"paragraph_vector_step: {message}"):
        ek.paragraph_vector_step(**values, backend=kernel)
    assert all(torch.equal(values[key], a) for key, a in before.items())


def test_other_backends_are_refused():
    with pytest.raises(ValueError, match="backend must be 'cpu' or 'reference'"):
        ek.paragraph_vector_step(**arguments("dbow"), backend="triton")
    with pytest.raises(ValueError, match="backend must be one that runs on cpu"):
        ek.paragraph_vector_step(**arguments("dbow"), backend="cuda")
