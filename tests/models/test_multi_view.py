"""The multi-view model against the published computation: padded, eager, unfolded, every key and value projected."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from itertools import pairwise

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

from embedding_kernels import use_backend
from embedding_kernels.models import MultiViewModel
from embedding_kernels.models.backbones import T5Backbone, packed_backbone
from error_rule import assert_within_rule

from .conftest import texts_of
from .multi_view import make_reranker, make_t5, published_scores, with_exact_norms

QUERIES = ["moon sunlight", "river", "stone Bird", "tree"]
DOCUMENTS = [texts_of(7, 60, 1), [], texts_of(33, 30, 2), texts_of(1, 5, 3)]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def inputs(views: int = 4):
    """ids, cu_seqlens, longest, cu_passages; and the rows one by one."""
    packed = make_reranker(views).tokenize(QUERIES, DOCUMENTS)
    return packed, [packed[0][start:end] for start, end in pairwise(packed[1].tolist())]


def exact_scores(rows, cu_passages, views, dtype=torch.float32, **options):
    """[P, m] in float64, of the weights as they are in ``dtype``."""
    t5 = with_exact_norms(make_t5(len(make_reranker().tokenizer), dtype, **options).double())
    return published_scores(t5, rows, cu_passages, views, 64)


def model_of(dtype=torch.float32, views=4, **options) -> MultiViewModel:
    return MultiViewModel(make_t5(len(make_reranker().tokenizer), dtype, **options), views).eval()


@pytest.mark.parametrize("views", range(1, 7))
@pytest.mark.parametrize("feed_forward", ("relu", "gated-gelu"))
@pytest.mark.parametrize("grad", (False, True))
def test_float64_is_the_published_computation(views, feed_forward, grad):
    packed, rows = inputs(views)
    model = model_of(torch.float64, views, feed_forward_proj=feed_forward)
    with torch.set_grad_enabled(grad), use_backend("reference"):
        out = model(*packed)
    with torch.no_grad():
        expected = exact_scores(rows, packed[3], views, torch.float64, feed_forward_proj=feed_forward)
    assert out.scores.dtype == torch.float64
    assert out.anchors.shape == (4, views, 64)
    assert out.views.shape == (41, views, 64)
    torch.testing.assert_close(out.scores.detach(), expected.mean(1), rtol=0, atol=1e-10)


# the rule's row is everything that several models give: the largest of few errors of a deep sum is luck
SEEDS = range(4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("grad", (False, True))
def test_error_is_within_the_rule(dtype, grad):
    packed, rows = inputs()
    query = torch.arange(4).repeat_interleave(packed[3].diff().long())
    vocabulary = len(make_reranker().tokenizer)
    results = []
    for seed in SEEDS:
        with torch.set_grad_enabled(grad):
            out = model_of(dtype, seed=seed)(*packed)
        with torch.no_grad():
            exact = exact_scores(rows, packed[3], 4, dtype, seed=seed).mean(1)
            plain = published_scores(make_t5(vocabulary, dtype, seed), rows, packed[3], 4, 64).float().mean(1)
            magnitude = (out.views.double().abs() * out.anchors.double().abs()[query]).sum(-1).mean(1)
        results.append((out.scores.detach(), exact, plain, magnitude))
    assert_within_rule(*(torch.cat(parts)[None] for parts in zip(*results, strict=True)))


def _gradients(model, packed, weights):
    out = model(*packed)
    loss = (out.scores * weights.to(out.scores.dtype)).sum() + out.anchors.square().mean().to(out.scores.dtype)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.t5.named_parameters()}


def _published_gradients(t5, rows, cu_passages, weights):
    """The same loss by the published way; anchors are recomputed beside the scores."""
    ids = torch.zeros(len(rows), 64, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
    hidden = t5.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, :4]
    scores, anchors = [], []
    for start, end in pairwise(cu_passages.tolist()):
        own = hidden[start:end].transpose(0, 1)
        token = t5.shared.weight[0].view(1, 1, -1).expand(4, 1, -1)
        if start == end:  # attention over nothing is 0
            own = hidden.new_zeros(4, 1, hidden.shape[-1])
        anchor = t5.decoder(inputs_embeds=token, encoder_hidden_states=own).last_hidden_state[:, 0]
        anchors.append(anchor)
        if start < end:
            scores.append(torch.einsum("bh,bph->bp", anchor, own).mean(0))
    ((torch.cat(scores) * weights.to(hidden.dtype)).sum() + torch.stack(anchors).square().mean()).backward()
    return {name: parameter.grad for name, parameter in t5.named_parameters()}


def test_gradients_of_every_parameter():
    packed, rows = inputs()
    torch.manual_seed(1)
    weights = torch.randn(41)
    vocabulary = len(make_reranker().tokenizer)
    exact = _published_gradients(with_exact_norms(make_t5(vocabulary, torch.float64)), rows, packed[3], weights)
    plain = _published_gradients(make_t5(vocabulary), rows, packed[3], weights)
    with use_backend("reference"):
        same = _gradients(model_of(torch.float64), packed, weights)
    ours = _gradients(model_of(), packed, weights)
    assert set(ours) == set(exact)
    for name, expected in exact.items():
        if ".layer.0.SelfAttention" in name and name.startswith("decoder") and name.split(".")[-2] not in ("v", "o"):
            # a softmax over one key: no gradient reaches queries, keys and bias
            assert ours[name] is None or not ours[name].any()
            continue
        scale = expected.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(same[name], expected, rtol=0, atol=float(1e-10 * scale))
        error = (ours[name].double() - expected).abs().max()
        assert error <= 2 * (plain[name].double() - expected).abs().max() + 2**-23 * scale, name


def test_the_fold_follows_the_weights():
    packed, _ = inputs()
    model = model_of()
    with torch.no_grad():
        first = model(*packed).scores
        for parameter in (model.t5.decoder.block[0].layer[0].SelfAttention.v.weight, model.t5.shared.weight):
            parameter.mul_(1.5)
            changed = model(*packed).scores
            fresh = MultiViewModel(model.t5).eval()(*packed).scores
            assert not torch.equal(changed, first)
            assert torch.equal(changed, fresh)
            first = changed


def test_training_mode_wants_no_dropout():
    packed, _ = inputs()
    model_of(dropout_rate=0.0).train()(*packed)
    with pytest.raises(ValueError, match=r"T5Backbone: model must be in evaluation mode .* dropout_rate 0.1"):
        model_of().train()(*packed)


def test_what_is_no_plain_t5_is_refused():
    encoder = hf.T5EncoderModel(make_t5(50).config)
    with pytest.raises(ValueError, match=r"t5 must be a transformers T5Model .* got T5EncoderModel"):
        MultiViewModel(encoder)
    hooked = make_t5(50)
    hooked.encoder.block[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="without adapters, hooks"):
        MultiViewModel(hooked)
    with pytest.raises(ValueError, match="views must be at least 1, got 0"):
        MultiViewModel(make_t5(50), 0)
    adapted = model_of()
    adapted.t5.encoder.block[0].layer[0].SelfAttention.q = torch.nn.Linear(64, 64)
    with pytest.raises(ValueError, match="layers that it was made with"):
        adapted(*inputs()[0])


# ---- the encoder alone ----


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("lengths", ([5, 130, 1, 17], [300], [1, 1, 2]))
@pytest.mark.parametrize("feed_forward", ("relu", "gated-gelu"))
def test_encoder(dtype, lengths, feed_forward):
    """Every row of packed texts, some past the reach of the bias, as the eager model gives it text by text."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    bounds = [*pairwise(cu_seqlens.tolist())]
    rows = torch.cat([torch.arange(start, min(start + 4, end)) for start, end in bounds])
    offsets = torch.tensor([0, *(min(4, length) for length in lengths)]).cumsum(0).int()
    whole, trimmed = [], []
    for seed in SEEDS:
        model = make_t5(50, dtype, seed, feed_forward_proj=feed_forward).encoder
        exact_model = with_exact_norms(make_t5(50, dtype, seed, feed_forward_proj=feed_forward).double().encoder)
        backbone = packed_backbone(model)
        assert isinstance(backbone, T5Backbone)
        ids = torch.randint(50, (int(cu_seqlens[-1]),))
        with torch.no_grad():
            exact, plain = (
                torch.cat([each(ids[None, start:end]).last_hidden_state[0] for start, end in bounds])
                for each in (exact_model, model)
            )
            hidden = backbone(ids, cu_seqlens, max(lengths))
            kept = backbone(ids, cu_seqlens, max(lengths), last_rows=(rows, offsets))
        whole.append((hidden, exact, plain, exact.abs()))
        trimmed.append((kept, exact[rows], plain[rows], exact[rows].abs()))
    for results in (whole, trimmed):
        assert_within_rule(*(torch.cat(parts)[None] for parts in zip(*results, strict=True)))


def test_float16_goes_through_the_plug():
    """Where transformers clamps, and keeps second linear layers in float32."""
    assert not isinstance(packed_backbone(make_t5(50, torch.float16).encoder), T5Backbone)


# ---- cost ----


def base_on_meta() -> MultiViewModel:
    """t5-base, its weights nowhere: operations can be counted without being done."""
    with torch.device("meta"):
        config = hf.T5Config(
            d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12, dropout_rate=0.0
        )
        t5 = hf.T5Model(config)
    return MultiViewModel(t5).eval()


def count(call) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_operations_of_the_published_size():
    """100 passages of 256 tokens: 4.604 TFLOP, of which the trimmed last layer saves 6.9 %, the fold the decoder's."""
    model = base_on_meta()
    ids = torch.empty(25_600, dtype=torch.int64, device="meta")
    cu_seqlens = torch.empty(101, dtype=torch.int32, device="meta")
    cu_passages = torch.empty(2, dtype=torch.int32, device="meta")
    whole = count(lambda: model._encoder(ids, cu_seqlens, 256))
    trimmed = count(lambda: model.encode(ids, cu_seqlens, 256))
    states = torch.empty(4, 100, 768, device="meta")
    token = torch.empty(4, 1, 768, device="meta")
    eager = model.t5.decoder
    eager.config._attn_implementation = "eager"
    published = count(lambda: eager(inputs_embeds=token, encoder_hidden_states=states))
    assert whole + published == pytest.approx(4.604e12, rel=0.01)
    assert 1 - trimmed / whole == pytest.approx(0.069, abs=0.001)
    views = torch.empty(100, 4, 768, device="meta")
    with torch.no_grad():
        model.anchors(views, cu_passages)  # which folds
    assert count(lambda: model.anchors(views, cu_passages)) < published / 10


_MEMORY = """
import torch, transformers as hf
from embedding_kernels.models import MultiViewModel
from embedding_kernels.models.batching import default_token_budget
torch.set_num_threads(2)
config = hf.T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=1, num_heads=12, vocab_size=99)
model = MultiViewModel(hf.T5Model(config).to({dtype})).eval()
budget = {budget} or default_token_budget(model.t5)
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
with torch.inference_mode():
    before = status("VmRSS")
    views = []
    for start in range(0, 100, budget // 256):
        rows = min(100, start + budget // 256) - start
        offsets = torch.arange(rows + 1, dtype=torch.int32) * 256
        views.append(model.encode(torch.randint(99, (256 * rows,)), offsets, 256))
    assert torch.cat(views).shape == (100, 4, 768)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("budget", (0, 25_600))
def test_memory_of_an_encode(budget):
    """100 passages of 256 tokens at t5-base in under 2 GB, at once and in batches; eager scores alone are 315 MB."""
    code = textwrap.dedent(_MEMORY).format(dtype="torch.bfloat16", budget=budget)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) * 1024 < 2e9


def test_autocast():
    """Products in bfloat16: no worse than with the weights rounded to it."""
    packed, rows = inputs()
    model = model_of()
    with torch.no_grad():
        exact = exact_scores(rows, packed[3], 4).mean(1)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(*packed).scores
        rounded = model_of(torch.bfloat16)(*packed).scores
    assert scores.dtype == torch.float32
    assert (scores - exact).norm() <= 2 * (rounded - exact).norm()
