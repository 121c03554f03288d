"""`MultiViewTrainer`: the loss by hand, lists that are learned, interrupts at any time, checkpoints, bad input."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from embedding_kernels import MultiViewReranker
from embedding_kernels.models import MultiViewModel
from embedding_kernels.models.multi_view_training import MultiViewTrainer, RankedListCollator, last_checkpoint
from embedding_kernels.nn import listnet, listnet_double, orthogonality, rank_targets

from .conftest import WORDS, texts_of
from .multi_view import make_t5, make_t5_tokenizer


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_reranker(**options) -> MultiViewReranker:
    tokenizer = make_t5_tokenizer()
    return MultiViewReranker(MultiViewModel(make_t5(len(tokenizer), **options), 4), tokenizer, max_length=64)


def make_lists(count: int, seed: int = 0) -> list[dict]:
    """The best passage holds the word that the query asks for; in the order of the others there is nothing to learn."""
    draw = random.Random(seed)
    lists = []
    for _ in range(count):
        word, *others = draw.sample(WORDS, 6)
        passages = [f"{draw.choice(others)} {one}" for one in (word, *others[: draw.randint(2, 4)])]
        lists.append({"query": word, "passages": passages, "ranks": [1] + [2] * (len(passages) - 1)})
    return lists


def make_trainer(directory, reranker=None, lists=None, callbacks=(), options=None, **arguments) -> MultiViewTrainer:
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    args = hf.TrainingArguments(output_dir=str(directory), **(settings | arguments))
    lists = make_lists(10) if lists is None else lists
    return MultiViewTrainer(reranker or make_reranker(), args, lists, callbacks=list(callbacks), **(options or {}))


class InterruptAfter(hf.TrainerCallback):
    """Ctrl-C once so many steps are done, before anything is saved of the last one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights_of(trainer: MultiViewTrainer) -> dict[str, torch.Tensor]:
    return trainer.reranker.model.state_dict()


def losses_of(trainer: MultiViewTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(left: MultiViewTrainer, right: MultiViewTrainer) -> None:
    for name, weight in weights_of(left).items():
        assert torch.equal(weight, weights_of(right)[name]), name


# ---- the loss ----


def test_collator_packs_as_the_reranker_reads():
    reranker, lists = make_reranker(), make_lists(3)
    del lists[1]["ranks"]
    batch = RankedListCollator(reranker)(lists)
    ids, cu_seqlens, longest, cu_passages = reranker.tokenize(
        [one["query"] for one in lists], [one["passages"] for one in lists]
    )
    assert torch.equal(batch["input_ids"], ids)
    assert torch.equal(batch["cu_seqlens"], cu_seqlens)
    assert torch.equal(batch["cu_passages"], cu_passages)
    assert batch["max_seqlen"] == longest
    sentinels = reranker.tokenizer("<extra_id_0><extra_id_1><extra_id_2><extra_id_3>")["input_ids"][:4]
    assert all(ids[start : start + 4].tolist() == sentinels for start in cu_seqlens[:-1])
    expected = [rank for one in lists for rank in one.get("ranks", range(1, len(one["passages"]) + 1))]
    assert batch["ranks"].tolist() == expected


@pytest.mark.parametrize("name", ("listnet", "listnet_double"))
@pytest.mark.parametrize("weight", (0.0, 0.5))
def test_loss_is_the_sum_of_its_parts(tmp_path, name, weight):
    options = {"loss": name, "orthogonal_weight": weight, "temperature": 0.7, "target_temperature": 0.3}
    trainer = make_trainer(tmp_path, options=options)
    batch = trainer.data_collator(make_lists(4))
    loss, output = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    offsets = batch["cu_passages"]
    own = {"listnet": listnet, "listnet_double": listnet_double}[name]
    targets = rank_targets(batch["ranks"], offsets, temperature=0.3)
    expected = own(output.scores, targets, offsets, temperature=0.7) + weight * orthogonality(output.anchors)
    assert torch.equal(loss, expected)
    loss.backward()
    # what a softmax over one key, the decoder's start token, leaves without a gradient
    without = {n for n, p in trainer.model.named_parameters() if p.grad is None}
    assert all(".layer.0.SelfAttention." in name and "decoder" in name for name in without)


def test_both_parts_are_logged(tmp_path):
    trainer = make_trainer(
        tmp_path, lists=make_lists(16), options={"orthogonal_weight": 0.5}, logging_steps=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["list_loss"] + 0.5 * entry["orthogonal_loss"], rel=1e-3)


def test_gradients_accumulate_to_those_of_one_batch(tmp_path):
    """Four queries at once, and two and two: one step of plain gradient descent."""
    trained = []
    for place, (size, parts) in enumerate(((4, 1), (2, 2))):
        trainer = make_trainer(
            tmp_path / str(place), lists=make_lists(4), max_steps=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=parts, optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
        )  # fmt: skip
        trainer.train()
        trained.append(weights_of(trainer))
    start = make_reranker().model.state_dict()
    for name, weight in trained[0].items():
        step = (weight - start[name]).abs().max()
        assert (weight - trained[1][name]).abs().max() <= 1e-4 * step + 1e-7, name


# ---- training ----


def test_lists_are_learned_and_reloaded(tmp_path):
    """Eight lists by heart: the best passage comes first in all, which by chance it does in one of four."""
    reranker, lists = make_reranker(), make_lists(8)
    queries, passages = [one["query"] for one in lists], [one["passages"] for one in lists]

    def found() -> int:
        return sum(best[0]["corpus_id"] == 0 for best in reranker.rank_batch(queries, passages, top_k=1))

    assert found() < 6
    trainer = make_trainer(
        tmp_path, reranker, lists, max_steps=150, per_device_train_batch_size=8, save_strategy="no", logging_steps=20,
        options={"target_temperature": 0.1}, learning_rate=2e-3, weight_decay=0.0,
    )  # fmt: skip
    trainer.train()
    assert not reranker.model.training
    assert found() == 8
    trainer.save_model()
    loaded = MultiViewReranker.from_pretrained(tmp_path, max_length=64, device="cpu")
    assert loaded.model.views == 4
    assert loaded.rank("moon", texts_of(20, 10)) == reranker.rank("moon", texts_of(20, 10))


def test_dropout_is_turned_off(tmp_path):
    reranker = make_reranker(dropout_rate=0.1)
    make_trainer(tmp_path, reranker).train()
    saved = MultiViewReranker.from_pretrained(last_checkpoint(tmp_path), device="cpu")
    assert saved.model.t5.config.dropout_rate == 0.0


def test_products_in_bfloat16(tmp_path):
    lists, losses = make_lists(1), {}
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path / str(bf16), lists=lists, max_steps=1, bf16=bf16)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses[bf16] = trainer.compute_loss(trainer.model, trainer.data_collator(lists)).item()
        trainer.train()
        assert losses_of(trainer) == [losses[bf16]]
        assert {weight.dtype for weight in weights_of(trainer).values()} == {torch.float32}
    assert losses[True] != losses[False]


def test_best_checkpoint(tmp_path):
    trainer = make_trainer(
        tmp_path, learning_rate=0.3, max_steps=3, save_steps=1, eval_steps=1, eval_strategy="steps",
        load_best_model_at_end=True, options={"eval_dataset": make_lists(8, seed=5)},
    )  # fmt: skip
    trainer.train()
    found = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(found, key=found.get)
    assert best < 3  # at such a rate training only does harm
    saved = MultiViewReranker.from_pretrained(tmp_path / f"checkpoint-{best}", device="cpu")
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, saved.model.state_dict()[name]), name
    # what was found amid training was that of the weights of its step
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found[best], rel=1e-6)


# ---- interrupts ----


@pytest.mark.parametrize("bf16", (False, True))
def test_resumed_is_uninterrupted_to_the_bit(tmp_path, bf16):
    """Amid an epoch: of three batches each, one was done when the last checkpoint was written."""
    whole = make_trainer(tmp_path / "whole", bf16=bf16)
    whole.train()
    stopped = make_trainer(tmp_path / "parts", callbacks=[InterruptAfter(5)], bf16=bf16)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert not stopped.reranker.model.training
    assert last_checkpoint(tmp_path / "parts").name == "checkpoint-4"
    resumed = make_trainer(tmp_path / "parts", make_reranker(seed=8), bf16=bf16)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed, whole)
    assert losses_of(resumed) == losses_of(whole)
    ours, theirs = (load_file(tmp_path / name / "checkpoint-6/model.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("where", ("_save_optimizer_and_scheduler", "_save_rng_state", "_save"))
def test_an_interrupt_while_saving_leaves_the_last_whole_one(tmp_path, monkeypatch, where):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    original, calls = getattr(MultiViewTrainer, where), []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        original(self, *args, **kwargs)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MultiViewTrainer, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path / "parts").train()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["checkpoint-2"]
    resumed = make_trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize("state", (None, '{"epoch": 1, "glob'))
def test_what_a_killed_process_left_is_passed_over(tmp_path, state):
    make_trainer(tmp_path, max_steps=2).train()
    partial = tmp_path / "checkpoint-4"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    if state is not None:
        (partial / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-old").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_only_so_many_checkpoints_are_kept(tmp_path):
    make_trainer(tmp_path, save_total_limit=2).train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-6"}


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of listnet, listnet_double, got 'hinge'"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"target_temperature": -1.0}, "target_temperature must be a positive number, got -1.0"),
        ({"orthogonal_weight": -0.1}, "orthogonal_weight must be 0 or more, got -0.1"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=rf"^MultiViewTrainer: {message}$"):
        make_trainer(tmp_path, options=options)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        ({"query": "moon"}, r'RankedListCollator: a list must have "query" and "passages", got \'query\''),
        (["moon", []], r'RankedListCollator: a list must have "query" and "passages", got list'),
        ({"query": "moon", "passages": ["a"], "ranks": [1, 2]}, r'"ranks" must be as many as "passages" \(1\), got 2'),
        ({"query": 3, "passages": ["a"]}, "query must be a string, got int"),
        ({"query": "moon", "passages": "a"}, "documents must be a sequence of passages, got str"),
    ],
)
def test_bad_lists(one, message):
    with pytest.raises(ValueError, match=message):
        RankedListCollator(make_reranker())([one])


def test_bad_ranks(tmp_path):
    trainer = make_trainer(tmp_path, lists=[{"query": "moon", "passages": ["a", "b"], "ranks": [0, 1]}])
    with pytest.raises(ValueError, match=r"^rank_targets: ranks must be at least 1 everywhere, got 0\.0$"):
        trainer.train()


def test_nothing_to_resume_from(tmp_path):
    assert last_checkpoint(tmp_path / "absent") is None
    with pytest.raises(ValueError, match=rf"^train: {tmp_path} must hold a checkpoint to resume from, got none$"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert not any(Path(tmp_path).iterdir())
