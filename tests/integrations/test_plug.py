"""What `plug_attention` refuses, what its guard catches, and that it can be undone, copied and compiled."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers as hf
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.llama.modeling_llama import LlamaAttention

from embedding_kernels import use_backend
from embedding_kernels.integrations import transformers as transformers_plug
from embedding_kernels.integrations.transformers import NAME, packed_forward, plug_attention, unplug_attention
from integrations.families import (
    FAMILIES,
    VOCABULARY,
    make,
    offsets,
    pad,
    relative_error,
    run_alone,
    run_packed,
    run_padded,
    texts,
)

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("name", ("MPNet", "Deberta", "DebertaV2"))
def test_models_without_the_interface_are_refused_by_name(name):
    model = getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**SMALL, intermediate_size=64))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"{name}Model cannot be plugged.*attention interface"):
        plug_attention(model)
    assert model.config._attn_implementation == before


def test_cross_attention_is_refused():
    bert = hf.BertModel(hf.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True))
    t5 = hf.T5Model(hf.T5Config(**FAMILIES["T5"].options))
    for model in (bert, t5):
        with pytest.raises(ValueError, match=f"{type(model).__name__} cannot be plugged.*cross attention"):
            plug_attention(model)
    plug_attention(t5.encoder)


def test_only_transformers_models_are_taken():
    with pytest.raises(ValueError, match="must be a transformers PreTrainedModel, got Linear"):
        plug_attention(torch.nn.Linear(2, 2))


class _OwnAttention(BertSelfAttention):
    """A layer that computes its attention itself."""

    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states), None


class _ForeignAttention(torch.nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states), None


def test_guard_catches_a_layer_that_does_not_come_through():
    model = make("BERT")
    model.encoder.layer[1].attention.self = _OwnAttention(model.config)
    plug_attention(model)
    with pytest.raises(RuntimeError, match=r"1 of 2 attention layers of BertModel.*encoder\.layer\.1\.attention\.self"):
        run_padded(model, "right", None)


def test_guard_catches_a_layer_changed_afterwards():
    model = plug_attention(make("BERT"))
    run_padded(model, "right", None)
    model.encoder.layer[0].attention.self = _ForeignAttention()
    with pytest.raises(RuntimeError, match="1 of 2 attention layers"):
        run_padded(model, "right", None)


class _Forgetful(BertSelfAttention):
    """A layer that drops the keywords of packed rows."""

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        return super().forward(hidden_states, attention_mask, past_key_values)


@pytest.mark.parametrize("compiled", (False, True))
def test_packed_rows_that_do_not_reach_a_layer_are_refused(compiled):
    model = make("BERT")
    model.encoder.layer[1].attention.self = _Forgetful(model.config)
    plug_attention(model.eval())
    run = torch.compile(packed_forward, backend="eager") if compiled else packed_forward
    with pytest.raises(NotImplementedError, match="_Forgetful was not handed its model's cu_seq_lens_q"):
        run(model, torch.cat(texts()), offsets(), 19)
    # nothing of it is left for the next forward
    run_padded(model, "right", None)
    run_padded(plug_attention(make("BERT")), "right", None)


class _Deaf(LlamaAttention):
    """A layer that hands on the keywords of packed rows alone."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        known = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        kwargs = {name: kwargs[name] for name in known}
        return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)


@pytest.mark.parametrize("compiled", (False, True))
def test_a_layer_that_does_not_hear_of_the_direction_is_refused(compiled):
    model = make("Llama")
    model.layers[1].self_attn = _Deaf(model.config, 1)
    plug_attention(model.eval())
    run = torch.compile(packed_forward, backend="eager") if compiled else packed_forward
    with pytest.raises(ValueError, match=r"bidirectional must be False for a model with _Deaf.*got True"):
        run(model, torch.cat(texts()), offsets(), 19, bidirectional=True)
    run_packed(model, None)


def test_the_direction_is_asked_for_once():
    model = plug_attention(make("Llama"))
    with pytest.raises(ValueError, match="is_causal must be None where bidirectional is True, got False"):
        packed_forward(model, torch.cat(texts()), offsets(), 19, is_causal=False, bidirectional=True)


@pytest.mark.parametrize("name", ("Mistral", "Gemma 2", "ModernBERT", "T5"))
def test_bidirectional_drops_windows(name):
    """As the model does whose window is wider than every text; and the next forward has its own again."""
    model, window = make(name), FAMILIES[name].window
    with torch.no_grad():
        own = run_alone(model, None)
        free = make(name, **({window: 1000} if window else {}))
        expected = run_alone(free, FAMILIES[name].directions[-1])
        plug_attention(model)
        got = packed_forward(model, torch.cat(texts()), offsets(), 19, bidirectional=True)
        assert relative_error(got, expected) < 1e-5
        assert relative_error(run_packed(model, None), own) < 1e-5


def test_bidirectional_survives_checkpointing():
    """Layers that run again in the backward are bidirectional there too."""
    gradients = []
    for checkpointed in (False, True):
        model = plug_attention(make("Mistral").train())
        if checkpointed:
            # the name before transformers 5.23
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        packed_forward(model, torch.cat(texts()), offsets(), 19, bidirectional=True).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_a_foreign_layer_is_refused():
    model = make("BERT")
    model.encoder.layer[1].attention.self = _ForeignAttention()
    with pytest.raises(ValueError, match=r"layer encoder\.layer\.1 does not go through"):
        plug_attention(model)


def test_an_error_in_a_forward_leaves_nothing_behind():
    model = plug_attention(make("BERT"))
    with pytest.raises(IndexError):
        model(torch.full((1, 4), VOCABULARY))
    run_padded(model, "right", None)


def test_unplug_restores_the_model():
    for name in ("BERT", "T5"):
        model = make(name)
        names = set(model.state_dict()), {key for key, _ in model.named_buffers()}
        before = run_padded(model, "right", None)
        assert plug_attention(model) is model
        assert plug_attention(model) is model, "plugging twice is plugging once"
        assert model.config._attn_implementation == NAME
        assert set(model.state_dict()) == names[0]
        assert unplug_attention(model) is model
        assert model.config._attn_implementation == "eager"
        assert (set(model.state_dict()), {key for key, _ in model.named_buffers()}) == names
        assert not model._forward_hooks and not model._forward_pre_hooks
        assert torch.equal(run_padded(model, "right", None), before)
        assert unplug_attention(model) is model


def test_a_plugged_model_can_be_copied_and_saved():
    model = plug_attention(make("T5"))
    before = run_packed(model, None)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run_packed(clone, None), before)
    file = io.BytesIO()
    torch.save(clone, file)
    file.seek(0)
    assert torch.equal(run_packed(torch.load(file, weights_only=False), None), before)
    unplug_attention(clone)
    assert relative_error(run_padded(clone, "right", None), before) < 1e-5


def test_what_cannot_be_computed_is_refused():
    bert, llama = plug_attention(make("BERT")), plug_attention(make("Llama"))
    ids, mask = pad(texts((5, 3)), "right", 0)
    with pytest.raises(NotImplementedError, match="BertSelfAttention got a mask of 4 dimensions"):
        bert(ids, attention_mask=torch.zeros(2, 1, 5, 5))
    with pytest.raises(ValueError, match="BertModel has no attention weights to return"):
        bert(ids, output_attentions=True)
    with pytest.raises(ValueError, match="BertSelfAttention was asked for is_causal=True"):
        bert(ids, attention_mask=mask, is_causal=True)
    packed = {"cu_seq_lens_q": offsets((5, 5)), "max_length_q": 5, "max_length_k": 5}
    with pytest.raises(ValueError, match=r"packed rows \(cu_seq_lens_q\) and a mask with padding"):
        bert(ids.flatten()[None], attention_mask=mask.flatten()[None], **packed)
    for extra in ("s_aux", "head_mask"):
        with pytest.raises(NotImplementedError, match=f"LlamaAttention passes {extra}"):
            llama(ids, attention_mask=mask, **{extra: torch.zeros(4)})
    with pytest.raises(NotImplementedError, match="adds a dense position bias"):
        llama(ids, attention_mask=mask, position_bias=torch.zeros(1, 4, 5, 5))


def test_dropout_in_training_is_refused():
    model = make("BERT")
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.1
    plug_attention(model).train()
    with pytest.raises(ValueError, match=r"BertSelfAttention asks for attention dropout 0\.1"):
        run_padded(model, "right", None)
    run_padded(model.eval(), "right", None)


@pytest.mark.parametrize("arguments", ({"attention_chunk_size": 4}, {}))
def test_masks_that_are_no_window_are_refused(arguments):
    from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

    model = plug_attention(make("Llama"))
    states = torch.zeros(2, 9, 64)
    if arguments:
        model.config.attention_chunk_size = 4
        with pytest.raises(NotImplementedError, match="chunked_overlay"):
            create_chunked_causal_mask(model.config, states, None, None)
    else:
        blocks = torch.zeros(2, 9, dtype=torch.long)
        with pytest.raises(NotImplementedError, match="blockwise_overlay"):
            create_causal_mask(model.config, states, None, None, block_sequence_ids=blocks)

        def prefix(batch, head, query, key):
            return key < 3

        with pytest.raises(NotImplementedError, match="prefix"):
            create_causal_mask(model.config, states, None, None, or_mask_function=prefix)


def test_packed_forward_refuses():
    model = make("BERT")
    ids = torch.cat(texts())
    with pytest.raises(ValueError, match="must have been given to plug_attention first, got BertModel"):
        packed_forward(model, ids, offsets(), 19)
    plug_attention(model)
    with pytest.raises(ValueError, match="input_ids must be"):
        packed_forward(model, ids[None], offsets(), 19)
    with pytest.raises(ValueError, match="cu_seqlens int32"):
        packed_forward(model, ids, offsets().long(), 19)
    head = plug_attention(hf.BertForMaskedLM(model.config))
    with pytest.raises(ValueError, match="must be a base model with a last hidden state, got BertForMaskedLM"):
        packed_forward(head, ids, offsets(), 19)


@pytest.mark.parametrize(
    ("name", "bidirectional"),
    [*((name, False) for name in ("BERT", "T5", "ModernBERT", "Mistral", "Gemma 2")), ("Mistral", True)],
)
def test_packed_forward_compiles_whole(name, bidirectional):
    """One graph for every batch of texts."""
    model = plug_attention(make(name))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(packed_forward, backend=counter, fullgraph=True, dynamic=True)
    counts = set()
    with torch.no_grad():
        for lengths in ((5, 9, 3), (8, 2, 11, 6), (12, 4)):
            arguments = torch.cat(texts(lengths)), offsets(lengths), max(lengths)
            outs = [run(model, *arguments, bidirectional=bidirectional) for run in (compiled, packed_forward)]
            assert relative_error(*outs) < 1e-6
            counts.add(counter.frame_count)
    assert len(counts) == 1


_MEMORY = """
    import torch
    from transformers import T5Config, T5EncoderModel
    from embedding_kernels.integrations.transformers import packed_forward, plug_attention

    torch.set_num_threads(2)
    config = T5Config(vocab_size=97, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    model = plug_attention(T5EncoderModel(config).eval())
    tokens = 25600
    ids = torch.randint(3, 97, (tokens,))
    cu_seqlens = torch.arange(0, tokens + 1, 256, dtype=torch.int32)
    with torch.no_grad():
        assert packed_forward(model, ids, cu_seqlens, 256).shape == (tokens, 64)
    # not ru_maxrss, which a child inherits from the process that started it
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_t5_packed_needs_no_dense_bias():
    """25,600 packed tokens in under 2 GB; one dense bias of four heads alone is 10 GB."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MEMORY)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) * 1024 < 2e9


def test_use_backend_reaches_the_layers():
    model = plug_attention(make("BERT"))
    with use_backend("cuda"), pytest.raises(ValueError, match="varlen_attention: backend must be one that runs on cpu"):
        run_packed(model, None)


def test_an_exception_ends_the_forward_for_the_guard():
    model = plug_attention(make("BERT"))
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.tensor([[1, 2, 3]]))
    handle.remove()
    assert id(getattr(model, transformers_plug._PLUG)) not in transformers_plug._forwards()
    model(torch.tensor([[1, 2, 3]]))
