"""How `multi_view_training.py` makes a reranker from nothing: tokenizer, first weights, lists to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sparse
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from embedding_kernels.models import MultiViewModel, MultiViewReranker
from embedding_kernels.models.multi_view_training import MultiViewTrainer

from .hypernyms import Task

SEED = 0
_VIEWS = 4
# coordinates of the residual stream that begin with a meaning: word or sink, rarity, of query or passage, the rarity
# where the other has the word too, and the mean of that
_KIND, _RARITY, _SIDE, _FOUND, _OVERLAP = range(5)
_COORDINATES, _SCORE_OF_EQUALS, _SCALE_OF_OVERLAP = 5, 30.0, 30.0


class Recipe(NamedTuple):
    """Sizes of the model and of its training."""

    vocabulary: int = 16_000
    width: int = 128
    heads: int = 4
    head_width: int = 32
    layers: int = 3
    decoder_layers: int = 1
    feed_forward: int = 512
    max_length: int = 128
    #: in all; where they are more than the queries, each of these comes again with other passages
    lists: int = 16_000
    lists_per_step: int = 16
    passages: int = 12
    #: the most of a list that are relevant
    relevant: int = 3
    learning_rate: float = 5e-4
    orthogonal_weight: float = 1.0
    target_temperature: float = 0.2


# ---- tokenizer ----


def make_tokenizer(texts: list[str], size: int) -> Any:
    """Pieces of lower-case words, with T5's conventions: padding 0, ``</s>`` at the end, sentinels."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    sentinels = [f"<extra_id_{view}>" for view in range(_VIEWS)]
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # no sign of where a word begins: the pieces of "dogs" are those of "dog" and one more
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>", *sentinels], unk_token="<unk>", show_progress=False
    )
    # what stands in every input besides is one piece each
    backend.train_from_iterator([*texts, *["| query: | context:"] * 2000], trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=sentinels, model_max_length=512,
    )  # fmt: skip


# ---- first weights ----


def make_reranker(tokenizer: Any, embeddings: Tensor, recipe: Recipe) -> MultiViewReranker:
    """A T5 with the embeddings given, and random weights but for what counts shared words at first."""
    torch.manual_seed(SEED)
    config = hf.T5Config(
        vocab_size=len(tokenizer), d_model=recipe.width, d_kv=recipe.head_width, d_ff=recipe.feed_forward,
        num_layers=recipe.layers, num_decoder_layers=recipe.decoder_layers, num_heads=recipe.heads, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    t5 = hf.T5Model(config)
    with torch.no_grad():
        t5.shared.weight.copy_(embeddings)
        _count_overlap(t5, tokenizer)
        for stack in (t5.encoder, t5.decoder):  # so that scores begin near ±1, not near ±width
            stack.final_layer_norm.weight.fill_(recipe.width**-0.25)
    return MultiViewReranker(MultiViewModel(t5, _VIEWS), tokenizer, max_length=recipe.max_length)


def first_embeddings(tokenizer: Any, texts: list[str], width: int, window: int = 8) -> Tensor:
    """``[V, width]``: the first half random, the second from which pieces stand near which, each of norm √(width / 2).

    The latter are the first singular vectors of positive pointwise mutual information (Levy and Goldberg, "Neural Word
    Embedding as Implicit Matrix Factorization", 2014; contexts to the power of 3/4), weighted by 1 / distance. One
    coordinate of the first half is the rarity of the piece, ln(texts / texts with it) / 3.
    """
    from sklearn.utils.extmath import randomized_svd

    torch.manual_seed(SEED)
    size = len(tokenizer)
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    # texts apart by more than the window
    ids = np.concatenate([np.concatenate((one.ids, np.full(window, -1))).astype(np.int64) for one in encoded])
    counts = sparse.csr_matrix((size, size))
    for distance in range(1, window + 1):
        left, right = ids[:-distance], ids[distance:]
        pairs = (left >= 0) & (right >= 0)
        weights = np.full(int(pairs.sum()), 1 / distance)
        near = sparse.coo_matrix((weights, (left[pairs], right[pairs])), shape=(size, size)).tocsr()
        counts = counts + near + near.T
    total = np.asarray(counts.sum(1)).ravel()
    context = total**0.75 / (total**0.75).sum()
    counts = counts.tocoo()
    information = np.log(counts.data / (total[counts.row] * context[counts.col]))
    positive = information > 0
    matrix = sparse.csr_matrix(
        (information[positive], (counts.row[positive], counts.col[positive])), shape=(size, size)
    )
    left, values, _ = randomized_svd(matrix, width // 2, n_iter=3, random_state=SEED)
    learned = torch.from_numpy(left * np.sqrt(values)).float()
    halves = (torch.randn(size, width - width // 2), learned)
    embeddings = torch.cat([functional.normalize(half, dim=1) * (width / 2) ** 0.5 for half in halves], 1)
    within = np.bincount(np.concatenate([np.unique(one.ids) for one in encoded]), minlength=size)
    embeddings[:, _RARITY] = torch.from_numpy(np.log(len(texts) / np.maximum(within, 1)) / 3)
    return embeddings


def _count_overlap(t5: Any, tokenizer: Any) -> None:
    """Make the model begin as what BM25 is at heart: a passage scores the rarity of its words that the query has.

    One head of each layer, which looks to the left. In the first, words behind "Context" see that they are. In the
    second, such a word looks for itself in the query (queries and keys are one projection) and writes its rarity; where
    it is not there, it looks at a sink: a sentinel, the end, a bar. In the third, another head takes the mean over all
    words, and the decoder's start token asks for it. From random weights such a circuit has to be found before anything
    about overlap can be learned. All of it is trained on.
    """
    words, heads = t5.shared.weight, [block.layer[0].SelfAttention for block in t5.encoder.block]
    sinks = [*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("|")]
    words[:, _KIND], words[:, _SIDE:_COORDINATES] = 2, 0
    words[sinks, _KIND], words[sinks, _RARITY] = -2, 0
    words[tokenizer.convert_tokens_to_ids("context"), _SIDE] = 3
    words[t5.config.pad_token_id, _OVERLAP] = 12
    for stack in (t5.encoder, t5.decoder):  # others write little at first, and nothing to these coordinates
        for name, parameter in stack.named_parameters():
            if name.endswith(("Attention.o.weight", "wo.weight")):
                parameter *= 0.25
                parameter[:_COORDINATES] = 0
    size, bias = heads[0].key_value_proj_dim, heads[0].relative_attention_bias.weight
    bias[0, 0], bias[bias.shape[0] // 2 :, 0] = -20, -20  # neither itself nor what is to its right
    for attention, head in zip(heads, (0, 0, 1), strict=False):
        rows = slice(head * size, (head + 1) * size)
        attention.q.weight[rows], attention.k.weight[rows] = 0, 0
        attention.v.weight[rows.start], attention.o.weight[:, rows.start] = 0, 0
    side, match, mean = heads[:3]
    side.q.weight[0, _KIND], side.k.weight[0, _SIDE] = 1, 2.5
    side.v.weight[0, _SIDE], side.o.weight[_SIDE, 0] = 1, 1
    own = slice(_COORDINATES, t5.config.d_model // 2)  # the random half of the embeddings, which tells words apart
    projection = torch.linalg.qr(torch.randn(own.stop - own.start, size - 2))[0].T
    projection *= (_SCORE_OF_EQUALS / (size - 2)) ** 0.5
    match.q.weight[2:size, own], match.k.weight[2:size, own] = projection, projection
    # sinks get 6 and words -6, those of the passage less; for words of the query sinks get 9 more and words 9 less
    match.q.weight[0, _KIND], match.k.weight[0, _KIND], match.k.weight[0, _SIDE] = 1.2, -1.2, -2
    match.q.weight[1, _KIND], match.q.weight[1, _SIDE], match.k.weight[1, _KIND] = 1.5, -1, -1.5
    match.v.weight[0, _RARITY], match.o.weight[_FOUND, 0] = 1, 1
    mean.q.weight[size, _KIND], mean.k.weight[size, _KIND] = -1, 1  # of words, asked for by sinks
    mean.v.weight[size, _FOUND], mean.o.weight[_OVERLAP, size] = 1, _SCALE_OF_OVERLAP


# ---- training ----


class TrainingLists(Dataset):
    """Lists of passages drawn for a query each: some that are relevant, all of rank 1, then some that are not, in
    BM25's order. All are of its first hundred, as those to be reranked will be. List i is the same whenever it is asked
    for, so that a run can be resumed.
    """

    def __init__(self, task: Task, recipe: Recipe) -> None:
        self.task, self.recipe = task, recipe
        self.queries = np.random.default_rng(SEED).permutation(task.training_queries())[: recipe.lists * 4 // 3]
        self.candidates = task.candidates(self.queries)
        self._keep_answerable()

    def _keep_answerable(self) -> None:
        """Queries to which BM25 found something relevant that may take part."""
        allowed, relevant = self.task.allowed, self.task.relevant
        kept = [
            bool((allowed[found] & np.isin(found, relevant[query])).any())
            for query, found in zip(self.queries, self.candidates, strict=True)
        ]
        self.queries, self.candidates = self.queries[kept], self.candidates[kept]

    def __len__(self) -> int:
        return self.recipe.lists

    def __getitem__(self, place: int) -> dict[str, Any]:
        draw = np.random.default_rng((SEED, place))
        row = place % len(self.queries)
        query, found = self.queries[row], self.candidates[row]
        found = found[self.task.allowed[found]]
        near = np.isin(found, self.task.relevant[query])
        # relevant ones that were not drawn are no negatives
        best, others = draw.permutation(found[near])[: self.recipe.relevant], found[~near]
        count = min(self.recipe.passages - len(best), len(others))
        others = others[np.sort(draw.choice(len(others), count, replace=False))]
        texts = self.task.texts
        return {
            "query": texts[query],
            "passages": [texts[one] for one in (*best, *others)],
            "ranks": [1] * len(best) + [*range(len(best) + 1, len(best) + count + 1)],
        }


def make_trainer(reranker: MultiViewReranker, lists: TrainingLists, directory: Path) -> MultiViewTrainer:
    """Writes checkpoints to ``directory``, twenty in a run, of which the last two are kept."""
    recipe = lists.recipe
    steps = -(-recipe.lists // recipe.lists_per_step)
    args = hf.TrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=recipe.lists_per_step, num_train_epochs=1,
        learning_rate=recipe.learning_rate, lr_scheduler_type="linear", warmup_steps=-(-steps // 20),
        bf16=True, use_cpu=not torch.cuda.is_available(), seed=SEED,
        logging_steps=max(1, steps // 100), save_steps=max(1, steps // 20), save_total_limit=2, report_to=[],
    )  # fmt: skip
    return MultiViewTrainer(
        reranker, args, lists, orthogonal_weight=recipe.orthogonal_weight, target_temperature=recipe.target_temperature
    )
