"""The latent-attention module inside `SentenceTransformer`: features, files, training, and `Embedder` on its folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sentence_transformers = pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Normalize, Transformer  # noqa: E402

from embedding_kernels import Embedder  # noqa: E402
from embedding_kernels.integrations.sentence_transformers import LatentAttentionPooling  # noqa: E402
from models.conftest import HIDDEN, edit_json, save_bert, texts_of  # noqa: E402
from models.nv_embed_published import HEAD, Sizes, pool  # noqa: E402

SIZES = Sizes(width=HIDDEN, latents=5, cross_heads=2, cross_dim=12)
TEXTS = texts_of(11)
LENGTHS = (6, 1, 4)
TOLERANCE = 1e-5


def make_module(include_prompt: bool = True) -> LatentAttentionPooling:
    torch.manual_seed(0)
    module = LatentAttentionPooling(HIDDEN, latents=5, heads=2, head_dim=12, include_prompt=include_prompt)
    with torch.no_grad():  # fresh norms would hide a forgotten one
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module


def make_model(path: Path, include_prompt: bool = True, **options: Any) -> SentenceTransformer:
    transformer = Transformer(str(save_bert(path / "bert")))
    modules = [transformer, make_module(include_prompt), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu", **options)


@pytest.fixture
def model(tmp_path: Path) -> SentenceTransformer:
    return make_model(tmp_path)


def by_formula(module: LatentAttentionPooling, tokens: Tensor, kept: Tensor) -> Tensor:
    """The published head in float64 on padded tokens; ``kept`` are in the mean."""
    weights = module.head.state_dict()
    return pool(SIZES, lambda name: weights[name.removeprefix(HEAD)], tokens.double(), kept)[0]


def padded(side: str = "right") -> tuple[Tensor, Tensor]:
    """Token embeddings, and mask of the real ones, whose number is LENGTHS."""
    tokens = torch.randn(len(LENGTHS), max(LENGTHS), HIDDEN, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return tokens, (mask if side == "right" else mask.flip(1)).long()


def assert_close(ours: Any, theirs: Any) -> None:
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


# ---- features ----

grad = pytest.mark.parametrize("grad", [False, True], ids=["folded", "training"])


@grad
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded(grad: bool, side: str) -> None:
    module, (tokens, mask) = make_module(), padded(side)
    with torch.set_grad_enabled(grad):
        features = module({"token_embeddings": tokens, "attention_mask": mask})
    assert_close(features["sentence_embedding"], by_formula(module, tokens, mask))
    assert features["token_embeddings"] is tokens


def test_without_a_mask_every_token_counts() -> None:
    module, (tokens, mask) = make_module(), padded()
    vectors = module({"token_embeddings": tokens})["sentence_embedding"]
    assert_close(vectors, by_formula(module, tokens, torch.ones_like(mask)))


def flattened(tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """As sentence-transformers hands on what it did not pad."""
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return {"token_embeddings": tokens[mask.bool()][None], "cu_seq_lens_q": offsets}


@grad
def test_flattened(grad: bool) -> None:
    module, (tokens, mask) = make_module(), padded()
    with torch.set_grad_enabled(grad):
        vectors = module(flattened(tokens, mask))["sentence_embedding"]
    assert_close(vectors, by_formula(module, tokens, mask))


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "flattened"])
@pytest.mark.parametrize("length", [2, torch.tensor([2]), torch.tensor([2, 2, 2])], ids=["int", "one", "rows"])
def test_prompt_left_out(flat: bool, length: Any) -> None:
    tokens, mask = padded()
    features = flattened(tokens, mask) if flat else {"token_embeddings": tokens, "attention_mask": mask}
    kept = mask.clone()
    kept[:, :2] = 0
    module = make_module(include_prompt=False)
    vectors = module({**features, "prompt_length": length})["sentence_embedding"]
    expected = by_formula(module, tokens, kept)
    expected[1] = 0  # a text of the prompt alone has no vector
    assert_close(vectors, expected)
    with_prompt = make_module()({**features, "prompt_length": length})["sentence_embedding"]
    assert_close(with_prompt, by_formula(module, tokens, mask))
    assert_close(module(features)["sentence_embedding"], by_formula(module, tokens, mask))


def test_prompt_left_out_behind_padding_on_the_left() -> None:
    tokens, mask = padded("left")
    features = {"token_embeddings": tokens, "attention_mask": mask, "prompt_length": 2}
    kept = mask * (mask.cumsum(1) > 2)
    module = make_module(include_prompt=False)
    vectors = module(features)["sentence_embedding"]
    assert_close(vectors[::2], by_formula(module, tokens, kept)[::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_tokens_is_that_of_the_vectors(dtype: torch.dtype) -> None:
    module, (tokens, mask) = make_module(), padded()
    vectors = module({"token_embeddings": tokens.to(dtype), "attention_mask": mask})["sentence_embedding"]
    assert vectors.dtype == dtype
    expected = by_formula(module, tokens.to(dtype), mask)
    assert (vectors - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


# ---- files ----


def test_saved_and_loaded(model: SentenceTransformer, tmp_path: Path) -> None:
    expected = model.encode(TEXTS)
    model.save(str(tmp_path / "saved"))
    entries = json.loads((tmp_path / "saved" / "modules.json").read_text())
    place = "embedding_kernels.integrations.sentence_transformers.LatentAttentionPooling"
    assert entries[1]["type"] == place
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert isinstance(loaded[1], LatentAttentionPooling)
    np.testing.assert_array_equal(loaded.encode(TEXTS), expected)
    assert loaded.get_embedding_dimension() == HIDDEN
    state, again = model[1].state_dict(), loaded[1].state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_embedder_reads_the_directory(tmp_path: Path, include_prompt: bool) -> None:
    model = make_model(tmp_path, include_prompt, prompts={"query": "query: moon "})
    model.save(str(tmp_path / "saved"))
    embedder = Embedder.from_pretrained(tmp_path / "saved", device="cpu")
    assert "latent_attention" in repr(embedder) and "Normalize" in repr(embedder)
    assert embedder.get_embedding_dimension() == HIDDEN
    assert_close(embedder.encode(TEXTS), model.encode(TEXTS))
    prompted = model.encode(TEXTS, prompt_name="query")
    assert_close(embedder.encode(TEXTS, prompt_name="query"), prompted)
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    np.testing.assert_array_equal(loaded.encode(TEXTS, prompt_name="query"), prompted)


def test_embedder_replaces_the_head_by_another_pooling(model: SentenceTransformer, tmp_path: Path) -> None:
    model.save(str(tmp_path / "saved"))
    plain = Embedder.from_pretrained(tmp_path / "bert", pooling="mean", normalize=True)
    ours = Embedder.from_pretrained(tmp_path / "saved", pooling="mean")
    assert_close(ours.encode(TEXTS), plain.encode(TEXTS))


def test_embedder_refuses_a_damaged_head(model: SentenceTransformer, tmp_path: Path) -> None:
    model.save(str(tmp_path / "saved"))
    folder = next((tmp_path / "saved").glob("1_*"))
    for change, message in (
        (lambda config: config.update(latents=6), "does not fit its config.json"),
        (lambda config: config.update(width=0), "width must be at least 1"),
        (lambda config: config.update(depth=2), "depth"),
    ):
        kept = (folder / "config.json").read_text()
        edit_json(folder / "config.json", change)
        with pytest.raises(ValueError, match=message) as refusal:
            Embedder.from_pretrained(tmp_path / "saved")
        assert folder.name in str(refusal.value)
        (folder / "config.json").write_text(kept)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=folder.name):
        Embedder.from_pretrained(tmp_path / "saved")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="latent-attention"):
        Embedder.from_pretrained(tmp_path / "saved")


# ---- training ----


def loss_of(model: SentenceTransformer) -> Tensor:
    pairs = [model.preprocess(TEXTS[:5]), model.preprocess(TEXTS[5:10])]
    return MultipleNegativesRankingLoss(model)(pairs, torch.arange(5))


def test_gradients_reach_every_parameter(model: SentenceTransformer) -> None:
    loss_of(model).backward()
    without = [name for name, p in model[1].named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


def test_gradients_are_those_of_the_formula() -> None:
    module, (tokens, mask) = make_module(), padded()
    module({"token_embeddings": tokens, "attention_mask": mask})["sentence_embedding"].square().sum().backward()
    names = [name for name, _ in module.head.named_parameters()]
    weights = {name: p.detach().double().requires_grad_() for name, p in module.head.named_parameters()}
    vectors = pool(SIZES, lambda name: weights[name.removeprefix(HEAD)], tokens.double(), mask)[0]
    expected = torch.autograd.grad(vectors.square().sum(), [weights[name] for name in names])
    for (name, parameter), right in zip(module.head.named_parameters(), expected, strict=True):
        assert parameter.grad is not None, name
        assert (parameter.grad - right).abs().max() <= 1e-4 * right.abs().max(), name


def test_a_step_lowers_the_loss_and_folds_again(model: SentenceTransformer) -> None:
    before = model.encode(TEXTS)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.01)
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    assert loss_of(model).item() < loss.item()
    after = model.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-3
    with torch.enable_grad():  # as it is while training: nothing kept from before
        fresh = model(model.preprocess(TEXTS))["sentence_embedding"]
    assert_close(after, fresh.detach())


def test_every_parameter_counts_in_the_fold() -> None:
    module, (tokens, mask) = make_module(), padded()
    features = {"token_embeddings": tokens, "attention_mask": mask}
    for parameter in module.head.parameters():
        with torch.no_grad():
            module(dict(features))
            parameter.mul_(1.5)
            vectors = module(dict(features))["sentence_embedding"]
        assert_close(vectors, by_formula(module, tokens, mask))


def test_weights_loaded_or_replaced_are_folded_again() -> None:
    module, other, (tokens, mask) = make_module(), make_module(), padded()
    with torch.no_grad():
        other.head.latents.neg_()
        features = {"token_embeddings": tokens, "attention_mask": mask}
        module(dict(features))
        module.load_state_dict(other.state_dict())
        assert_close(module(dict(features))["sentence_embedding"], by_formula(other, tokens, mask))
        # to half precision and back: other values, perhaps where the first ones lay
        module.to(torch.bfloat16).to(torch.float32)
        assert_close(module(dict(features))["sentence_embedding"], by_formula(module, tokens, mask))


def test_copies_do_not_share_a_fold(model: SentenceTransformer) -> None:
    expected = model.encode(TEXTS)
    other = copy.deepcopy(model)
    np.testing.assert_array_equal(other.encode(TEXTS), expected)
    with torch.no_grad():
        other[1].head.latents.neg_()
    assert np.abs(other.encode(TEXTS) - expected).max() > 1e-3
    np.testing.assert_array_equal(model.encode(TEXTS), expected)


def test_folded_in_inference_mode(model: SentenceTransformer) -> None:
    # where `SentenceTransformer.encode` folds; later calls may record gradients or none
    with torch.inference_mode():
        inside = model(model.preprocess(TEXTS))["sentence_embedding"].clone()
    with torch.no_grad():
        assert_close(model(model.preprocess(TEXTS))["sentence_embedding"], inside)
    assert not any(parameter.is_inference() for parameter in model[1]._fold().parameters())
