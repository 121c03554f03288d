"""Published embedders whose directories do not say how they are used, against transformers' padded eager attention."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embedding_kernels import Embedder
from embedding_kernels.models.presets import PRESETS
from integrations.families import make as make_model

from .conftest import WORDS, edit_json, make_tokenizer, texts_of
from .nv_embed_published import word_tokenizer

TEXTS = texts_of(13)
TASK = "find the sun"
KALM_QUERY = f"Instruct: {TASK} \n Query: "
#: on our own blocks, and on the plug
PACKED = {
    "Llama": "packed decoder blocks",
    "Mistral": "packed decoder blocks",
    "Qwen2": "packed decoder blocks",
    "Gemma 2": "packed decoder blocks",
    "Phi": "with our attention",
    "Phi-3": "with our attention",
}
families = pytest.mark.parametrize("family", PACKED)
POOLINGS = ("mean", "weightedmean", "lasttoken", "cls")
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _one_thread_and_no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked whether it may run a directory's code"))


def byte_tokenizer() -> Any:
    """Qwen2's tokenizer, with the tests' words: its class builds byte pairs whatever the directory holds."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    words = [space + word for word in WORDS for space in ("Ġ", "")]
    prefixes = [word[:length] for word in words for length in range(2, len(word) + 1)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: place for place, piece in enumerate(["<|endoftext|>", *letters, *dict.fromkeys(prefixes)])}
    merges = list(dict.fromkeys((prefix[:-1], prefix[-1]) for prefix in prefixes))
    return Qwen2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=512)


def save(path: Path, family: str, tokenizer: Any = None) -> Path:
    """A directory of transformers alone, with a random model whose direction and windows show."""
    tokenizer = tokenizer or (byte_tokenizer() if family == "Qwen2" else make_tokenizer(special=False))
    model = make_model(family, vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def save_kalm(path: Path) -> Path:
    """As KaLM's repository: sentence-transformers' layout, and code of its own that is not needed."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    base = save(path / "base", "Qwen2")
    modules = [Transformer(str(base)), Pooling(64, "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(path / "model"))
    code = {"AutoModel": "modeling.Qwen2Model", "AutoConfig": "configuration.Qwen2Config"}
    edit_json(path / "model" / "config.json", lambda config: config.update(auto_map=code))
    return path / "model"


class Peer:
    """The directory's model on padded batches, whose mask is of padding alone; with eager attention, or its own."""

    def __init__(self, path: Path, attention: str | None = "eager") -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path, attn_implementation=attention, trust_remote_code=False).eval()

    def hidden(self, texts: list[str], bidirectional: bool = True) -> tuple[Tensor, Tensor]:
        batch = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        mask = batch["attention_mask"]
        seen = mask
        if bidirectional:
            seen = torch.where(mask.bool(), 0.0, torch.finfo(torch.float32).min)
            seen = seen[:, None, None].expand(-1, 1, mask.shape[1], -1)
        with torch.no_grad():
            return self.model(input_ids=batch["input_ids"], attention_mask=seen).last_hidden_state, mask

    def encode(self, texts: list[str], pooling: str = "mean", left_out: int = 0, bidirectional: bool = True) -> Tensor:
        """Vectors of length 1; ``left_out`` tokens at the start of each text are not pooled."""
        hidden, mask = self.hidden(texts, bidirectional)
        places = torch.arange(mask.shape[1])
        weights = mask * (places >= left_out)
        if pooling == "weightedmean":
            weights = weights * (places + 1)
        elif pooling == "lasttoken":
            weights = weights * (places == mask.sum(1, keepdim=True) - 1)
        elif pooling == "cls":
            weights = weights * (places == left_out)
        vectors = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        return torch.nn.functional.normalize(vectors, dim=-1)


def assert_close(ours: np.ndarray, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs.numpy()).max() <= TOLERANCE


# ---- KaLM ----


@pytest.fixture(scope="module")
def kalm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kalm(tmp_path_factory.mktemp("kalm"))


def test_kalm_queries_are_instructed_and_documents_are_not(kalm: Path) -> None:
    embedder, peer = Embedder.from_pretrained(kalm, preset="kalm-v2"), Peer(kalm)
    assert "bidirectional" in repr(embedder) and "packed decoder blocks" in repr(embedder)
    queries = peer.encode([KALM_QUERY + text for text in TEXTS])  # the prompt is pooled too
    assert_close(embedder.encode_query(TEXTS, task=TASK), queries)
    assert_close(embedder.encode_document(TEXTS), peer.encode(TEXTS))
    assert_close(embedder.encode_document(TEXTS, task=TASK), queries)  # both sides of a symmetric task
    assert_close(embedder.encode_query(TEXTS), peer.encode(TEXTS))
    assert (queries - peer.encode(TEXTS)).abs().max() > 0.01


def test_kalm_is_bidirectional(kalm: Path) -> None:
    one_way = Peer(kalm).encode(TEXTS, bidirectional=False)
    assert_close(Embedder.from_pretrained(kalm).encode(TEXTS), one_way)
    ours = Embedder.from_pretrained(kalm, preset="kalm-v2").encode(TEXTS)
    assert np.abs(ours - one_way.numpy()).max() > 0.01


@pytest.mark.parametrize("dim", [1, 16, 64])
def test_kalm_vectors_have_length_1_at_every_width(kalm: Path, dim: int) -> None:
    embedder = Embedder.from_pretrained(kalm, preset="kalm-v2")
    assert embedder.matryoshka_dims == (896, 512, 256, 128, 64)
    cut = torch.nn.functional.normalize(Peer(kalm).encode(TEXTS)[:, :dim], dim=-1)
    assert_close(embedder.encode(TEXTS, truncate_dim=dim), cut)
    stored = Embedder.from_pretrained(kalm, preset="kalm-v2", truncate_dim=dim)
    assert_close(stored.encode(TEXTS), cut)


def test_kalm_instruction_is_the_published_text(kalm: Path) -> None:
    embedder = Embedder.from_pretrained(kalm, preset="kalm-v2")
    expected = embedder.encode(TEXTS, prompt="Instruct: a {b} task \n Query: ")
    np.testing.assert_array_equal(embedder.encode_query(TEXTS, task="a {b} task"), expected)


# ---- ULLME ----


@pytest.fixture(scope="module")
def ullme(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def path(family: str) -> Path:
        if family not in made:
            made[family] = save(tmp_path_factory.mktemp("decoder"), family)
        return made[family]

    return path


@families
@pytest.mark.parametrize("pooling", POOLINGS)
def test_ullme_poolings(ullme: Callable[[str], Path], family: str, pooling: str) -> None:
    path = ullme(family)
    embedder, peer = Embedder.from_pretrained(path, preset="ullme", pooling=pooling), Peer(path)
    assert PACKED[family] in embedder.road
    assert_close(embedder.encode(TEXTS), peer.encode(TEXTS, pooling))
    prompt = "moon moon query: "
    assert_close(embedder.encode(TEXTS, prompt=prompt), peer.encode([prompt + text for text in TEXTS], pooling))


@families
@pytest.mark.parametrize("pooling", POOLINGS)
def test_ullme_without_the_prompt(ullme: Callable[[str], Path], family: str, pooling: str) -> None:
    path, prompt, peer = ullme(family), "moon moon query: ", Peer(ullme(family))
    embedder = Embedder.from_pretrained(path, preset="ullme", pooling=pooling, include_prompt=False)
    texts = [f"{text} sun" for text in TEXTS]  # the first word of a text may have merged with the prompt's last space
    left_out = len(peer.tokenizer(prompt)["input_ids"])
    expected = peer.encode([prompt + text for text in texts], pooling, left_out)
    assert_close(embedder.encode(texts, prompt=prompt), expected)


def test_ullme_pools_the_mean_of_all_tokens_by_default(tmp_path: Path) -> None:
    path = save(tmp_path, "Llama")
    edit_json(path / "config.json", lambda config: config.update(architectures=["LlamaForCausalLM"]))
    prompted = [f"query: {text}" for text in TEXTS]
    peer = Peer(path)
    ours = Embedder.from_pretrained(path, preset="ullme").encode(TEXTS, prompt="query: ")
    assert_close(ours, peer.encode(prompted))
    # which is neither the pooling nor the direction that the directory asks for
    ours = Embedder.from_pretrained(path, normalize=True).encode(TEXTS)
    assert_close(ours, peer.encode(TEXTS, "lasttoken", bidirectional=False))


@families
def test_ullme_on_the_padded_road(ullme: Callable[[str], Path], family: str) -> None:
    path = ullme(family)
    for attention in ("eager", "sdpa"):
        if (family, attention) == ("Gemma 2", "sdpa"):
            continue  # transformers has none
        embedder = Embedder.from_pretrained(path, preset="ullme", attn_implementation=attention)
        assert f"padded, {attention} attention" in embedder.road
        assert_close(embedder.encode(TEXTS), Peer(path).encode(TEXTS))


def causal_output(embedder: Embedder, peer: Peer) -> Tensor:
    batch = peer.tokenizer(TEXTS, padding=True, padding_side="right", return_tensors="pt").to(embedder.model.device)
    with torch.no_grad():
        hidden = embedder.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return hidden[batch["attention_mask"].bool()].cpu()


@families
@pytest.mark.parametrize("attention", [None, "eager"], ids=["packed", "padded"])
def test_the_model_keeps_its_own_direction(
    ullme: Callable[[str], Path], family: str, attention: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ullme(family)
    embedder, peer = Embedder.from_pretrained(path, preset="ullme", attn_implementation=attention), Peer(path)
    # Gemma 2's differs from eager attention where transformers gives it SDPA, which has no softcap
    own, mask = Peer(path, attention).hidden(TEXTS, bidirectional=False)
    both, _ = peer.hidden(TEXTS)
    assert (own - both)[mask.bool()].abs().max() > 0.1, "a model whose direction does not show would prove nothing"

    def assert_own_direction() -> None:
        got, expected = causal_output(embedder, peer), own[mask.bool()]
        assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()

    assert_own_direction()
    embedder.encode(TEXTS)
    assert_own_direction()
    with monkeypatch.context() as context:
        _break_attention(context, after=1)
        with pytest.raises(RuntimeError, match="broken amid the model"):
            embedder.encode(TEXTS)
    assert_own_direction()
    assert_close(embedder.encode(TEXTS), peer.encode(TEXTS))


def _break_attention(context: pytest.MonkeyPatch, after: int) -> None:
    """Let every road's attention fail from the second layer on."""
    from embedding_kernels.integrations import transformers as plug
    from embedding_kernels.models.backbones import decoder

    calls = []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def attend(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) > after:
                raise RuntimeError("broken amid the model")
            return real(*arguments, **options)

        return attend

    for module in (decoder, plug):
        context.setattr(module, "varlen_attention", counted(module.varlen_attention))
    softmax = torch.nn.functional.softmax
    context.setattr(torch.nn.functional, "softmax", counted(softmax))  # that of eager attention


# ---- arguments ----


def test_unknown_preset(kalm: Path) -> None:
    with pytest.raises(ValueError, match=r"^from_pretrained: preset must be one of .*, got 'kalm'$") as refusal:
        Embedder.from_pretrained(kalm, preset="kalm")
    assert all(name in str(refusal.value) for name in PRESETS)


@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
def test_task_without_a_template(kalm: Path, method: str) -> None:
    embedder = Embedder.from_pretrained(kalm)
    with pytest.raises(ValueError, match=r"^encode: task must be None for a model without a template .*, got 'find"):
        getattr(embedder, method)(TEXTS, task=TASK)


@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
@pytest.mark.parametrize("option", ["prompt", "prompt_name"])
def test_task_beside_a_prompt(kalm: Path, method: str, option: str) -> None:
    embedder = Embedder.from_pretrained(kalm, preset="kalm-v2", prompts={"sun": "sun: "})
    with pytest.raises(ValueError, match=r"^encode: prompt and prompt_name must be None beside a task, got"):
        getattr(embedder, method)(TEXTS, task=TASK, **{option: "sun"})


@pytest.mark.parametrize("preset", [None, "kalm-v2", "ullme"])
def test_compat_changes_nothing_elsewhere(tmp_path: Path, preset: str | None) -> None:
    # with a beginning-of-text token, which NV-Embed's published code forgets to count
    path = save(tmp_path, "Llama", word_tokenizer())
    options: dict[str, Any] = {"preset": preset, "include_prompt": False}
    plain, compat = (Embedder.from_pretrained(path, compat=each, **options) for each in (False, True))
    np.testing.assert_array_equal(plain.encode(TEXTS, prompt="query: "), compat.encode(TEXTS, prompt="query: "))


def test_arguments_go_before_the_preset(kalm: Path) -> None:
    peer = Peer(kalm)
    one_way = Embedder.from_pretrained(kalm, preset="kalm-v2", bidirectional=False)
    assert_close(one_way.encode(TEXTS), peer.encode(TEXTS, bidirectional=False))
    assert "bidirectional" not in repr(one_way)
    last = Embedder.from_pretrained(kalm, preset="kalm-v2", pooling="lasttoken")
    assert_close(last.encode(TEXTS), peer.encode(TEXTS, "lasttoken"))
    raw = Embedder.from_pretrained(kalm, preset="kalm-v2", normalize=False).encode(TEXTS)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(lengths - 1).min() > 0.01
    assert_close(raw / lengths, peer.encode(TEXTS))
    unprompted = Embedder.from_pretrained(kalm, preset="kalm-v2", include_prompt=False)
    prompt_tokens = len(peer.tokenizer(KALM_QUERY)["input_ids"])
    texts = [f"{text} sun" for text in TEXTS]
    expected = peer.encode([KALM_QUERY + text for text in texts], left_out=prompt_tokens)
    assert_close(unprompted.encode_query(texts, task=TASK), expected)


def test_bidirectional_without_a_preset(kalm: Path) -> None:
    assert_close(Embedder.from_pretrained(kalm, bidirectional=True).encode(TEXTS), Peer(kalm).encode(TEXTS))


@pytest.mark.parametrize("preset", ["nv-embed-v1", "nv-embed-v2"])
def test_nv_embed_preset_wants_the_head(kalm: Path, preset: str) -> None:
    with pytest.raises(ValueError, match="latent_attention"):
        Embedder.from_pretrained(kalm, preset=preset)
