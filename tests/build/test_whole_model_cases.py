"""Whole models at sizes of a GPU, by the builders that measure them there, made small: every contender is right, and a
wrong one would not be admitted."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "bench" / "made_up.py").exists(), reason="the benchmarks are not in this tree"
)
pytest.importorskip("transformers")

MODULES = ("made_up", "embedder_gpu", "token_prepending_gpu", "multi_view_gpu", "latent_attention_head", "harness")
#: family, and how many cases of a GPU's size it has
FAMILIES = {"latent_attention_head": 2, "multi_view": 3, "embedder": 2, "token_prepending": 1}
CASES = [(family, place) for family, count in FAMILIES.items() for place in range(count)]


@pytest.fixture
def bench(monkeypatch):
    """The package of the benchmarks, which runs from the tree alone; nothing of it is compiled by torch here."""
    monkeypatch.syspath_prepend(str(ROOT))
    found = {name: importlib.import_module(f"bench.{name}") for name in (*MODULES, "run")}
    monkeypatch.setattr(found["latent_attention_head"], "compiled", lambda run: run)
    yield found
    for name in [name for name in sys.modules if name.split(".")[0] == "bench"]:
        del sys.modules[name]


def room(bench):
    return bench["harness"].Room(torch.device("cpu"), 1, True, 1)


def of_gpu(bench, family: str) -> list:
    return [case for case in bench["run"].cases_for(family, torch.device("cuda"), False) if case.where == "cuda"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_them_first(bench, family):
    found = of_gpu(bench, family)
    assert len(found) == FAMILIES[family]
    assert bench["run"].cases_for(family, torch.device("cuda"), False)[: len(found)] == found
    assert not [case for case in bench["run"].cases_for(family, torch.device("cpu"), False) if case.where == "cuda"]


@pytest.mark.parametrize(("family", "place"), CASES)
def test_small_ones_build_and_agree(bench, family, place):
    pytest.importorskip("sentence_transformers")
    case = of_gpu(bench, family)[place].small
    built = case.build(room(bench))
    assert built[0].role == "ours"
    admitted, refused = bench["harness"].admit([each for each in built if each.role != "ceiling"])
    assert not refused
    assert {each.name for each in admitted[1:]} == set(case.peers)
    # other inputs in every turn
    ours = admitted[0]
    first, second = (np.asarray(ours.call(turn), dtype=np.float64) for turn in range(2))
    assert first.shape == second.shape
    assert not np.allclose(first, second, atol=1e-3) or family == "latent_attention_head"  # whose copies are of memory


@pytest.mark.parametrize(("family", "place"), CASES)
def test_a_wrong_answer_is_not_admitted(bench, family, place):
    """A vector off by a twentieth of its length, or a score of its list's."""
    pytest.importorskip("sentence_transformers")
    built = of_gpu(bench, family)[place].small.build(room(bench))
    ours = built[0]
    answer = np.array(ours.call(0), dtype=np.float32)
    ours.verify(torch.from_numpy(answer.copy()) if family == "latent_attention_head" else answer.copy())
    answer[0, 3] += 0.05 * np.linalg.norm(answer[0])
    with pytest.raises(AssertionError):
        ours.verify(torch.from_numpy(answer) if family == "latent_attention_head" else answer)


def test_bfloat16_keeps_to_its_bounds_at_the_real_depth(bench):
    """What is measured is bfloat16, through all of a model's layers."""
    decoders, views = bench["embedder_gpu"], bench["multi_view_gpu"]
    shape = replace(decoders.MISTRAL.small(), width=256, inner=896, layers=8, heads=8)
    head = bench["latent_attention_head"]
    deep = replace(views._T5_BASE.small(), width=128, inner=512, layers=12)
    for built in (
        decoders._build_decoder(shape, torch.bfloat16, room(bench)),
        bench["token_prepending_gpu"]._build(shape, torch.bfloat16, room(bench)),
        decoders._build_encoder(replace(decoders.MINILM.small(), layers=6), torch.bfloat16, room(bench)),
        views._build(deep, torch.bfloat16, room(bench)),
        head._build_batch(head.Size(256, 64, 4, 128), 5, 40, False, torch.bfloat16, room(bench)),
    ):
        _, refused = bench["harness"].admit([each for each in built if each.role != "ceiling"])
        assert not refused


def test_copies_change_the_vectors_that_are_checked(bench):
    """Else nothing would tell whether the states were copied."""
    prepending, decoders, made_up = bench["token_prepending_gpu"], bench["embedder_gpu"], bench["made_up"]
    shape = decoders.MISTRAL.small()
    model, tokenizer = decoders.decoder(shape, torch.float32, torch.device("cpu"))
    texts = decoders.texts_of(shape)[0]
    plain = prepending._exact(shape, model, tokenizer, texts[:24], copy=False)
    copied = prepending._embedder(shape, model, tokenizer).encode(texts)
    for dtype in (torch.float32, torch.bfloat16):  # by the bounds of either
        with pytest.raises(AssertionError):
            made_up.near(plain, shape.texts, dtype)(copied)


def test_shapes_are_those_of_the_models_named(bench):
    """By their parameters, without memory for them."""
    from transformers import AutoModel, MistralConfig, T5Config

    decoders, views = bench["embedder_gpu"], bench["multi_view_gpu"]
    meta = torch.device("meta")
    with torch.device(meta):
        mistral = AutoModel.from_config(MistralConfig(num_hidden_layers=8))
        t5 = AutoModel.from_config(T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12))
    ours, _ = decoders.decoder(decoders.MISTRAL, torch.bfloat16, meta)
    assert sum(each.numel() for each in ours.parameters()) == sum(each.numel() for each in mistral.parameters())
    assert len(ours.layers) == 8
    assert sum(each.numel() for each in ours.layers[0].parameters()) == 218_112_000
    views_ = views._model(views._T5_BASE, torch.bfloat16, meta)
    assert sum(each.numel() for each in views_.parameters()) == sum(each.numel() for each in t5.parameters())
    counted = views._work(views._T5_BASE, torch.bfloat16)
    weights = sum(each.weight.numel() for each in views_.encoder.modules() if isinstance(each, torch.nn.Linear))
    assert counted.operations == 2 * 25_600 * weights


def test_lengths_have_the_mean_that_is_named(bench):
    made_up = bench["made_up"]
    words = made_up.lengths(4096, 80, 510)
    assert abs(words.mean() - 80) < 2
    assert words.max() > 300
    assert 4 <= words.min() < 20
    tokenizer = made_up.tokenizer(600, "[CLS] $A [SEP]")
    texts = made_up.texts([5, 1], 600)
    assert [len(ids) for ids in tokenizer(texts)["input_ids"]] == [7, 3]
    unknown = tokenizer.unk_token_id
    assert not any(unknown in ids for ids in tokenizer(texts)["input_ids"])
