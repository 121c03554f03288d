"""`Embedder` on NV-Embed's layout against the published computation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from embedding_kernels import Embedder
from error_rule import assert_within_rule

from .conftest import edit_json, texts_of
from .nv_embed_published import (
    DECODER,
    HEAD,
    INSTRUCTION,
    TASK,
    Read,
    Sizes,
    decode,
    exact_decode,
    merging_tokenizer,
    pool,
    pooled_tokens,
    tensors_of,
    tokenize,
    transformers_decoder,
    word_tokenizer,
    write_directory,
)

TEXTS = [*texts_of(9), "", "sun"]
INDEX = "model.safetensors.index.json"
TOKENIZERS = {"words": word_tokenizer, "merging": merging_tokenizer}


@dataclass(frozen=True)
class Published:
    """A directory and what its published computation gives."""

    path: Path
    sizes: Sizes
    read: Read

    def encode(
        self,
        texts: list[str],
        instruction: str = "",
        compat: bool = False,
        dtype: torch.dtype = torch.float32,
        dim: int | None = None,
        normalize: bool = True,
        longest: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Vectors and, of the same scale, the mean of absolute values; in float64 by the formulas alone."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.path, config=transformers_decoder_config())
        ids, mask = tokenize(tokenizer, texts, instruction, longest)
        kept = pooled_tokens(tokenizer, texts, instruction, compat, mask)
        with torch.no_grad():
            if dtype == torch.float64:
                hidden = exact_decode(self.sizes, self.read, ids, mask)
            else:
                hidden = decode(transformers_decoder(self.sizes, self.read, dtype), ids, mask)
            vectors, magnitude = pool(self.sizes, self.read, hidden, kept)
        vectors = vectors[:, :dim]
        length = vectors.norm(dim=-1, keepdim=True) if normalize else 1.0
        return vectors / length, magnitude[:, :dim] / length


def transformers_decoder_config() -> Any:
    """Given to AutoTokenizer, which else asks whether it may run the directory's code."""
    from transformers import MistralConfig

    return MistralConfig()


def make(path: Path, tokenizer: Any, dtype: torch.dtype = torch.float32, **sizes: Any) -> Published:
    return Published(path, write_directory(path, Sizes(**sizes), tokenizer, dtype), tensors_of(path))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=TOKENIZERS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return make(tmp_path_factory.mktemp(request.param), TOKENIZERS[request.param]())


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return make(tmp_path_factory.mktemp("words"), word_tokenizer())


def assert_as_published(ours: np.ndarray, published: Published, texts: list[str], **options: Any) -> None:
    """Within the error rule of the published computation in float32, against its formulas in float64."""
    exact, magnitude = published.encode(texts, dtype=torch.float64, **options)
    plain, _ = published.encode(texts, **options)
    assert ours.dtype == np.float32
    assert_within_rule(torch.from_numpy(ours), exact, plain, magnitude)


# ---- vectors ----


def test_formulas_are_those_of_transformers(published: Published) -> None:
    # two statements of one computation, so that a slip in either shows
    exact, _ = published.encode(TEXTS, INSTRUCTION, dtype=torch.float64)
    plain, _ = published.encode(TEXTS, INSTRUCTION)
    assert (exact - plain).abs().max() < 1e-5


@pytest.mark.parametrize("compat", [False, True])
def test_queries_and_documents(published: Published, compat: bool) -> None:
    embedder = Embedder.from_pretrained(published.path, compat=compat)
    assert "packed decoder blocks" in repr(embedder) and "bidirectional" in repr(embedder)
    queries = embedder.encode_query(TEXTS, task=TASK)
    assert_as_published(queries, published, TEXTS, instruction=INSTRUCTION, compat=compat)
    documents = embedder.encode_document(TEXTS)
    assert_as_published(documents, published, TEXTS)
    assert np.abs(queries - documents).max() > 0.01
    np.testing.assert_array_equal(embedder.encode_document(TEXTS, task=TASK), queries)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-6)


def test_compat_differs_where_the_instruction_has_a_token_of_its_own_at_its_end(words: Published) -> None:
    as_described = Embedder.from_pretrained(words.path).encode_query(TEXTS, task=TASK)
    as_published = Embedder.from_pretrained(words.path, compat=True).encode_query(TEXTS, task=TASK)
    assert np.abs(as_described - as_published).max(1).min() > 1e-4


def test_a_prompt_is_left_out_as_an_instruction_is(words: Published) -> None:
    ours = Embedder.from_pretrained(words.path, prompts={"sun": "moon moon "})
    assert_as_published(ours.encode(TEXTS, prompt="moon moon "), words, TEXTS, instruction="moon moon ")
    assert_as_published(ours.encode(TEXTS, prompt_name="sun"), words, TEXTS, instruction="moon moon ")


def test_prompt_that_is_pooled(words: Published) -> None:
    ours = Embedder.from_pretrained(words.path, include_prompt=True).encode_query(TEXTS, task=TASK)
    assert_as_published(ours, words, [INSTRUCTION + text for text in TEXTS])


def test_neither_causal_nor_windowed(words: Published) -> None:
    # all words but the last alike, and far more of them than the window
    texts = ["sun " * 30 + last for last in ("sun", "moon")]
    tokens = Embedder.from_pretrained(words.path).encode(texts, output_value="token_embeddings")
    assert (tokens[0] - tokens[1]).abs().amax(1).min() > 1e-4


def test_padded_road(published: Published) -> None:
    embedder = Embedder.from_pretrained(published.path, attn_implementation="eager")
    assert "padded, eager attention" in embedder.road
    assert_as_published(embedder.encode_query(TEXTS, task=TASK), published, TEXTS, instruction=INSTRUCTION)


@pytest.mark.parametrize("dim", [1, 24, 64])
@pytest.mark.parametrize("normalize", [False, True])
def test_truncation_comes_before_normalisation(words: Published, dim: int, normalize: bool) -> None:
    embedder = Embedder.from_pretrained(words.path, normalize=normalize)
    ours = embedder.encode_query(TEXTS, task=TASK, truncate_dim=dim)
    assert_as_published(ours, words, TEXTS, instruction=INSTRUCTION, dim=dim, normalize=normalize)


def test_texts_past_the_limit_lose_their_end(words: Published) -> None:
    embedder = Embedder.from_pretrained(words.path, max_seq_length=12)
    ours = embedder.encode_query(TEXTS, task=TASK)
    exact, _ = words.encode(TEXTS, INSTRUCTION, dtype=torch.float64, longest=12)
    assert np.abs(ours - exact.numpy()).max() < 1e-5
    # nothing but the instruction fits, and a mean of no tokens is no vector
    embedder._texts.max_seq_length = 5
    assert not embedder.encode_query(["sun moon"], task=TASK).any()


def test_order_batches_and_single_texts(words: Published) -> None:
    embedder = Embedder.from_pretrained(words.path)
    expected = embedder.encode_query(TEXTS, task=TASK)
    for budget, batch_size in ((1, None), (40, None), (10_000, 3)):
        embedder.token_budget = budget
        got = embedder.encode_query(TEXTS, task=TASK, batch_size=batch_size)
        assert np.abs(got - expected).max() < 1e-6
    one = embedder.encode_query(TEXTS[0], task=TASK)
    assert one.shape == (64,) and np.abs(one - expected[0]).max() < 1e-6
    assert embedder.encode_query([], task=TASK).shape == (0, 64)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_weights_as_float32(tmp_path: Path, stored: torch.dtype) -> None:
    published = make(tmp_path, word_tokenizer(), stored)
    embedder = Embedder.from_pretrained(tmp_path, dtype=torch.float32)
    assert embedder.dtype == torch.float32
    assert_as_published(embedder.encode_query(TEXTS, task=TASK), published, TEXTS, instruction=INSTRUCTION)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_half_precision(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    published = make(tmp_path, word_tokenizer(), stored)
    embedder = Embedder.from_pretrained(tmp_path, dtype=dtype)
    assert embedder.dtype == dtype
    assert {parameter.dtype for parameter in embedder._pooler.latent_attention.parameters()} == {dtype}
    ours = torch.from_numpy(embedder.encode_query(TEXTS, task=TASK)).to(dtype)
    options: dict[str, Any] = {"instruction": INSTRUCTION}
    exact, magnitude = published.encode(TEXTS, dtype=torch.float64, **options)
    plain, _ = published.encode(TEXTS, dtype=dtype, **options)
    assert_within_rule(ours, exact, plain.to(dtype), magnitude)


def test_one_file_without_an_index(tmp_path: Path) -> None:
    published = make(tmp_path, word_tokenizer())
    expected = Embedder.from_pretrained(tmp_path).encode(TEXTS)
    from safetensors.torch import save_file

    weights = {name: published.read(name) for name in published.sizes.shapes()}
    for file in (*tmp_path.glob("model-*"), tmp_path / INDEX):
        file.unlink()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(Embedder.from_pretrained(tmp_path).encode(TEXTS), expected)


def test_dtype_of_the_weights_is_kept(tmp_path: Path) -> None:
    make(tmp_path, word_tokenizer(), torch.bfloat16)
    assert Embedder.from_pretrained(tmp_path).dtype == torch.bfloat16


# ---- refusals ----


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError) as refusal:
        Embedder.from_pretrained(path)
    for word in (str(path), *words):
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


def edit_weights(path: Path, name: str, change: Any) -> None:
    """Rewrite the shard of a tensor; ``change`` gets the shard's tensors by name."""
    from safetensors.torch import load_file, save_file

    file = path / json.loads((path / INDEX).read_text())["weight_map"][name]
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


NAMES = [f"{DECODER}layers.1.mlp.up_proj.weight", f"{HEAD}cross_attend_blocks.0.fn.to_kv.weight", f"{HEAD}latents"]
tensors = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    make(tmp_path, word_tokenizer())
    return tmp_path


@tensors
def test_missing_tensor(broken: Path, name: str) -> None:
    edit_weights(broken, name, lambda weights: weights.pop(name))
    refused(broken, "must hold", name)


@tensors
def test_missing_tensor_that_is_not_in_the_index_either(broken: Path, name: str) -> None:
    edit_weights(broken, name, lambda weights: weights.pop(name))
    edit_json(broken / INDEX, lambda index: (index["weight_map"].pop(name), None)[1])
    refused(broken, "must hold", name)


@tensors
def test_tensor_of_another_shape(broken: Path, name: str) -> None:
    edit_weights(broken, name, lambda weights: weights.update({name: weights[name][:, 1:].contiguous()}))
    refused(broken, name, f"{[*Sizes(vocabulary=1).shapes()[name]]} by config.json")


@tensors
def test_unknown_tensor(broken: Path, name: str) -> None:
    edit_weights(broken, name, lambda weights: weights.update({f"{name}_2": torch.zeros(3)}))
    refused(broken, "must not hold", f"{name}_2")


@tensors
def test_missing_shard(broken: Path, name: str) -> None:
    file = json.loads((broken / INDEX).read_text())["weight_map"][name]
    (broken / file).unlink()
    refused(broken, f"{file} is missing")


@tensors
def test_index_that_names_an_absent_file(broken: Path, name: str) -> None:
    edit_json(broken / INDEX, lambda index: index["weight_map"].update({name: "model-00009-of-00003.safetensors"}))
    refused(broken, "model-00009-of-00003.safetensors is missing")


@tensors
@pytest.mark.parametrize("kept", [0, 4, 100, -1000])
def test_truncated_shard(broken: Path, name: str, kept: int) -> None:
    file = broken / json.loads((broken / INDEX).read_text())["weight_map"][name]
    file.write_bytes(file.read_bytes()[:kept])
    refused(broken, f"{file.name} cannot be read")


def test_latents_of_another_width(broken: Path) -> None:
    edit_json(broken / "config.json", lambda config: config["latent_attention_config"].update(latent_dim=32))
    refused(broken, "latent_dim must be hidden_dim (64), got 32")


def test_head_of_another_width_than_the_decoder(broken: Path) -> None:
    edit_json(broken / "config.json", lambda config: config["text_config"].update(hidden_size=32))
    refused(broken, "hidden_dim must be the decoder's hidden_size (32), got 64")


def test_config_without_its_decoder(broken: Path) -> None:
    edit_json(broken / "config.json", lambda config: (config.pop("text_config"), None)[1])
    refused(broken, "config.json", "text_config")


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"weight_map": []}'])
def test_damaged_index(broken: Path, content: str) -> None:
    (broken / INDEX).write_text(content)
    refused(broken, INDEX)


# ---- loading ----


def run_python(code: str, *arguments: str) -> str:
    """Its standard output; it has no standard input, and must write nothing to standard error."""
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout


def test_loading_asks_nothing_and_says_nothing(words: Published) -> None:
    code = """
import sys
from embedding_kernels import Embedder
Embedder.from_pretrained(sys.argv[1]).encode_query(["sun"], task="moon")
"""
    assert run_python(code, str(words.path)) == ""


_PEAK = """
import json, sys, threading, time
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, MistralModel
from embedding_kernels import Embedder

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

peak, done = [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

Embedder.from_pretrained(sys.argv[1])  # so that nothing is imported any more
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
embedder = Embedder.from_pretrained(sys.argv[2])
done.set()
thread.join()
parts = (embedder.model, embedder._pooler.latent_attention)
held = anonymous() - before
print(json.dumps([peak[0] - before, held, sum(p.nbytes for part in parts for p in part.parameters())]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("dtype", "layers"), [(torch.float32, 16), (torch.bfloat16, 34)], ids=["float32", "bfloat16"])
def test_weights_are_held_once(words: Published, tmp_path: Path, dtype: torch.dtype, layers: int) -> None:
    # about 300 MB, of which the head has as large a part as in the released checkpoint
    large = Sizes(512, 1792, layers, 4, 1, 4096, 16_000, latents=64, cross_heads=8, cross_dim=512)
    write_directory(tmp_path, large, word_tokenizer(), dtype)
    peak, held, weights = json.loads(run_python(_PEAK, str(words.path), str(tmp_path)))
    assert weights > 240e6
    assert 0.9 * weights < peak < 1.35 * weights
    # what was folded is gone
    assert held < 1.08 * weights


# ---- the real sizes, and the real weights ----


#: the two questions and two passages of the model card, and the scores that it prints for them
CARD_TASK = "Given a question, retrieve passages that answer the question"
CARD_QUERIES = ["are judo throws allowed in wrestling?", "how to become a radiology technician in michigan?"]
CARD_PASSAGES = [
    "Since you're reading this, you are probably someone from a judo background or someone who is just wondering how "
    "judo techniques can be applied under wrestling rules. So without further ado, let's get to the question. Are Judo "
    "throws allowed in wrestling? Yes, judo throws are allowed in freestyle and folkstyle wrestling. You only need to "
    "be careful to follow the slam rules when executing judo throws. In wrestling, a slam is lifting and returning an "
    "opponent to the mat with unnecessary force.",
    "Below are the basic steps to becoming a radiologic technologist in Michigan:Earn a high school diploma. As with "
    "most careers in health care, a high school education is the first step to finding entry-level employment. Taking "
    "classes in math and science, such as anatomy, biology, chemistry, physiology, and physics, can help prepare "
    "students for their college studies and future careers.Earn an associate degree. Entry-level radiologic positions "
    "typically require at least an Associate of Applied Science. Before enrolling in one of these degree programs, "
    "students should make sure it has been properly accredited by the Joint Review Committee on Education in "
    "Radiologic Technology (JRCERT).Get licensed or certified in the state of Michigan.",
]
CARD_SCORES = [[87.43, 0.46], [0.97, 86.04]]
REAL = os.environ.get("EMBEDDING_KERNELS_NVEMBED")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="EMBEDDING_KERNELS_NVEMBED names no folder with NV-Embed-v2's weights")
def test_scores_of_the_model_card() -> None:
    embedder = Embedder.from_pretrained(str(REAL), compat=True)
    queries = embedder.encode_query(CARD_QUERIES, task=CARD_TASK)
    scores = 100 * queries @ embedder.encode_document(CARD_PASSAGES).T
    # the card does not say in which precision its own were computed
    np.testing.assert_allclose(scores, CARD_SCORES, atol=0.2)


@pytest.mark.slow
def test_real_sizes(tmp_path: Path) -> None:
    """Every size but the number of layers is the released checkpoint's; some 9 GB of memory."""
    sizes = Sizes(4096, 14336, 2, 32, 8, 4096, 32_000, latents=512, cross_heads=8, cross_dim=4096)
    texts = [*texts_of(2, longest=20), "sun"]
    torch.set_num_threads(2)
    try:
        write_directory(tmp_path, sizes, word_tokenizer(), torch.bfloat16)
        published = Published(tmp_path, sizes, tensors_of(tmp_path))
        embedder = Embedder.from_pretrained(tmp_path, dtype=torch.float32)
        ours = torch.from_numpy(embedder.encode_query(texts, task=TASK))
        model = embedder.model
        model.set_attn_implementation("eager")
        del embedder
        ids, mask = tokenize(word_tokenizer(), texts, INSTRUCTION)
        kept = pooled_tokens(word_tokenizer(), texts, INSTRUCTION, False, mask)
        with torch.no_grad():
            plain, _ = pool(sizes, published.read, decode(model, ids, mask), kept)
            del model
            exact, magnitude = pool(sizes, published.read, exact_decode(sizes, published.read, ids, mask), kept)
    finally:
        # pytest keeps the last three of its folders
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
    length = exact.norm(dim=-1, keepdim=True)
    assert_within_rule(ours, exact / length, functional.normalize(plain, dim=-1), magnitude / length)
