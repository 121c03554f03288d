"""Plugged models against their own eager attention: outputs, windows, gradients, caches."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from embedding_kernels.integrations.transformers import packed_forward, plug_attention
from integrations.families import (
    CASES,
    FAMILIES,
    LENGTHS,
    WINDOWED,
    case_name,
    eager_and_plugged,
    make,
    offsets,
    pad,
    pad_id_of,
    relative_error,
    run_alone,
    run_packed,
    run_padded,
    texts,
)

# Of the largest value. Both sides are float32 and differ in the order of their sums: a few roundings (6e-8) a layer,
# which norms and softmax carry on. The worst seen is 4e-6, of T5, whose scores are not scaled down.
TOLERANCE = 1e-5
# of the largest gradient of a parameter: the same roundings, carried back through every layer
GRADIENT_TOLERANCE = 5e-5

cases = pytest.mark.parametrize(("name", "is_causal"), CASES, ids=case_name)


@cases
@pytest.mark.parametrize("side", ("right", "left", "holes"))
def test_padded(kernel, name, is_causal, side):
    assert eager_and_plugged(name, partial(run_padded, side=side, is_causal=is_causal)) <= TOLERANCE


@cases
def test_packed(kernel, name, is_causal):
    """Against each text alone, so that nothing may pass from one text to another."""
    packed, alone = (partial(run, is_causal=is_causal) for run in (run_packed, run_alone))
    assert eager_and_plugged(name, packed, alone) <= TOLERANCE


@pytest.mark.parametrize(("name", "is_causal"), WINDOWED, ids=case_name)
def test_windows_of_these_tests_matter(name, is_causal):
    """One key more or less in the window is far outside the tolerance."""
    family = FAMILIES[name]
    model = make(name)
    with torch.no_grad():
        hidden = run_alone(model, is_causal)
        for step in (-family.step, family.step):
            other = make(name, **{family.window: family.options[family.window] + step})
            assert relative_error(run_alone(other, is_causal), hidden) > 100 * TOLERANCE


@pytest.mark.parametrize(("name", "is_causal"), [case for case in CASES if case[1] is False], ids=case_name)
def test_direction_matters(name, is_causal):
    model = make(name)
    with torch.no_grad():
        assert relative_error(run_alone(model, False), run_alone(model, None)) > 100 * TOLERANCE


def assert_same_gradients(eager, theirs, plugged, ours):
    """Backward through both outputs; returns the plugged model's gradients."""
    weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2))
    (theirs * weight).sum().backward()
    (ours * weight).sum().backward()
    wanted = {name: parameter.grad for name, parameter in eager.named_parameters() if parameter.grad is not None}
    got = {name: parameter.grad for name, parameter in plugged.named_parameters() if parameter.grad is not None}
    assert wanted.keys() == got.keys()
    # the keys' bias has gradient 0 but for rounding, so small gradients are held to the largest of all
    largest = max(grad.abs().max() for grad in wanted.values())
    for parameter, grad in wanted.items():
        scale = torch.maximum(grad.abs().max(), 1e-3 * largest)
        assert (got[parameter] - grad).abs().max() <= GRADIENT_TOLERANCE * scale, parameter
    return got


@cases
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
def test_gradients(kernel, name, is_causal, packed):
    """Of every parameter, T5's table of relative positions among them."""
    eager = make(name).train()
    plugged = plug_attention(copy.deepcopy(eager))
    theirs = run_alone(eager, is_causal) if packed else run_padded(eager, "left", is_causal)
    ours = run_packed(plugged, is_causal) if packed else run_padded(plugged, "left", is_causal)
    got = assert_same_gradients(eager, theirs, plugged, ours)
    if name.startswith(("T5", "MT5", "UMT5")):
        assert any("relative_attention_bias" in parameter and grad.abs().max() > 0 for parameter, grad in got.items())


def checkpointed(model, reentrant):
    # the name before transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    return model


@pytest.mark.parametrize("name", ("BERT", "Mistral", "T5"))
def test_gradient_checkpointing(name):
    eager = make(name).train()
    plugged = checkpointed(plug_attention(copy.deepcopy(eager)), False)
    runs = (run_padded(model, "right", None) for model in (eager, plugged))
    assert_same_gradients(eager, next(runs), plugged, next(runs))


def test_reentrant_checkpointing_is_never_wrong_in_silence():
    """It copies the mask of models that hand it on by position, and what the mask carries is lost."""
    model = checkpointed(plug_attention(make("BERT").train()), True)
    model.enable_input_require_grads()
    with pytest.raises(NotImplementedError, match=r"re-entrant checkpointing.*use_reentrant=False"):
        run_padded(model, "right", None).sum().backward()


@pytest.mark.parametrize("cache", ("DynamicCache", "StaticCache"))
@pytest.mark.parametrize("name", ("Llama", "Mistral", "Qwen2", "Gemma 2", "Gemma 3", "Phi-3"))
def test_generation_with_a_cache(name, cache):
    """A prompt with left padding, then single tokens and a chunk, past the window."""
    import transformers

    def run(model):
        ids, mask = pad(texts((15, 11)), "left", pad_id_of(model))
        kind = getattr(transformers, cache)
        options = {"max_cache_len": 20} if cache == "StaticCache" else {}
        past = kind(config=model.config, **options)
        outs = [
            model(
                input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=past, use_cache=True
            ).last_hidden_state
            for start, end in ((0, 9), (9, 10), (10, 13), (13, 14), (14, 15))
        ]
        return torch.cat(outs, 1)[mask.bool()]

    assert eager_and_plugged(name, run) <= TOLERANCE


@pytest.mark.parametrize("name", ("Llama", "Mistral", "Gemma 3"))
def test_rows_packed_by_position_ids_alone(name):
    """transformers separates such texts for eager attention, so the plug must."""

    def run(model):
        positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
        return model(input_ids=torch.cat(texts())[None], position_ids=positions, use_cache=False).last_hidden_state

    assert eager_and_plugged(name, run) <= TOLERANCE


def test_no_padding_and_no_mask():
    ids = torch.stack(texts((11, 11)))
    for mask in (None, torch.ones_like(ids)):
        for name in ("BERT", "Mistral", "T5"):
            assert (
                eager_and_plugged(name, lambda model, mask=mask: model(ids, attention_mask=mask).last_hidden_state)
                <= TOLERANCE
            )


def test_packed_batch_may_hold_no_text_and_empty_texts():
    model = plug_attention(make("BERT"))
    text = texts((5,))[0]
    with torch.no_grad():
        alone = packed_forward(model, text, offsets((5,)), 5)
        with_empty = packed_forward(model, text, offsets((0, 5, 0)), 5)
    assert torch.equal(alone, with_empty)


def test_packed_rows_may_be_longer_than_the_positions_of_the_model():
    """BERT's buffers of token types and positions end at max_position_embeddings; the rows of a batch do not."""
    model = make("BERT", max_position_embeddings=24)
    ids = texts((20,) * 10)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=text[None]).last_hidden_state[0] for text in ids])
        packed = packed_forward(plug_attention(model), torch.cat(ids), offsets((20,) * 10), 20)
    assert relative_error(packed, alone) <= TOLERANCE


def test_token_types_and_positions_can_be_given():
    model = make("BERT")
    text = texts((9,))[0]
    types, positions = torch.arange(9) % 2, torch.arange(9).flip(0)
    with torch.no_grad():
        alone = model(text[None], token_type_ids=types[None], position_ids=positions[None]).last_hidden_state[0]
        packed = packed_forward(
            plug_attention(model), text, offsets((9,)), 9, position_ids=positions, token_type_ids=types
        )
    assert relative_error(packed, alone) <= TOLERANCE


def test_autocast():
    model = plug_attention(make("Llama"))
    with torch.no_grad():
        exact = run_packed(model, False)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = run_packed(model, False)
    # bfloat16 rounds at 4e-3, in each of two layers
    assert relative_error(narrow.float(), exact) <= 0.05
