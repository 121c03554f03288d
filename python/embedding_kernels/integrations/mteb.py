"""`Embedder` and `MultiViewReranker` in mteb's benchmarks: an encoder and a cross-encoder of its protocols, with
metadata of the model's own."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt
from mteb.models.model_meta import ScoringFunction
from mteb.types import OutputDType, PromptType

from ..models import Embedder, MultiViewReranker
from ._reranking import load_reranker

logger = logging.getLogger(__name__)

# what mteb passes to every encoder
_OPTIONS = ("batch_size", "show_progress_bar", "precision")
_BITS = ("binary", "ubinary")
_OUTPUT_TYPES = {torch.bfloat16: OutputDType.BF16, torch.float16: OutputDType.FLOAT16}
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


class MtebEmbedder(AbsEncoder):
    """An `Embedder` that mteb evaluates: ``mteb.evaluate(MtebEmbedder("path/to/model"), tasks)``.

    Queries go through `Embedder.encode_query`, documents through `Embedder.encode_document`, what is neither through
    `Embedder.encode`. A prompt is looked for in ``instructions`` under, first to last, "task name-query" (or
    "-document"), the task's name, "task type-query", the task's type, "query" or "document"; where none is found, the
    prompts stored with the model apply. mteb asks for 32 texts a batch where it is told nothing, which is few for
    short texts: pass ``encode_kwargs={"batch_size": 1024}``; the token budget still bounds a batch.

    Args:
        model: an `Embedder`, or the directory or the Hub name of a model.
        revision: what tells apart versions of the model in mteb's results; it does not choose what is loaded. By
            default the Hub's, or a hash of the directory's files.
        device: where a model given by name is loaded.
        name: "organisation/model" in mteb's results; by default the Hub's, else "local/" and the directory's.
        instructions: prompts by task or kind of text, put before the texts as they are.
        embed_dim: leading dimensions to keep.
        metadata: fields of `ModelMeta` beside, or in place of, what the model itself tells: languages, license,
            training_datasets, ...
        options: passed to `Embedder.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: see `Embedder.from_pretrained`.
        ValueError: an unknown field of ``metadata``; options for a model that is loaded already.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        model: str | Path | Embedder,
        revision: str | None = None,
        device: str | None = None,
        *,
        name: str | None = None,
        instructions: Mapping[str, str] | None = None,
        embed_dim: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        options = {**options, "device": device, "truncate_dim": embed_dim}
        options = {option: value for option, value in options.items() if value is not None}
        if isinstance(model, Embedder) and options:
            raise ValueError(f"MtebEmbedder: options are for a model to load, got an Embedder and {', '.join(options)}")
        self.model = model if isinstance(model, Embedder) else Embedder.from_pretrained(model, **options)
        self.model_prompts = dict(instructions) if instructions else None
        # results of other options are other results: mteb keeps them apart by these
        experiment = {option: str(value) for option, value in options.items() if option != "device"}
        if instructions:
            experiment["instructions"] = str(sorted(instructions.items()))
        source = self.model.model.config.name_or_path if isinstance(model, Embedder) else str(model)
        told = {
            "max_tokens": self.model.max_seq_length,
            "embed_dim": self.model.get_embedding_dimension(),
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": bool(instructions) or any(self.model.prompts.values()),
            "output_dtypes": _OUTPUT_TYPES.get(self.model.dtype),
            "experiment_kwargs": experiment or None,
        }
        given = {"name": name, "revision": revision, **(metadata or {})}
        self.mteb_model_meta = _metadata(self, self.model.model, source, told, given)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: PromptType | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Vectors of the texts of ``inputs``, in their order.

        Args:
            inputs: batches with a list of texts under "text", as mteb's data loaders give them.
            task_metadata: says the task's name and type, by which ``instructions`` are chosen.
            prompt_type: whether these are queries or documents.
            options: batch_size, show_progress_bar and precision, as `Embedder.encode` takes them; others are passed
                over with a warning.

        Returns:
            float32 ``[N, D]``; int8 or uint8 for these precisions; for "binary" and "ubinary" int8, -1 and 1, whose
            cosines are in the order of Hamming distances.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        kept = _known_options("Embedder.encode", options, _OPTIONS)
        bits = kept.get("precision") in _BITS
        if bits:
            kept["precision"] = "ubinary"
        prompt = get_prompt(self.model_prompts, task_metadata, prompt_type)
        encoders = {PromptType.query: self.model.encode_query, PromptType.document: self.model.encode_document}
        encode = self.model.encode if prompt_type is None else encoders[prompt_type]
        vectors = encode(texts, prompt=prompt, **kept)
        return _signs(vectors, self.model.get_embedding_dimension()) if bits else vectors


class MtebReranker:
    """A `MultiViewReranker` that mteb evaluates: ``mteb.evaluate(MtebReranker("path/to/model"), tasks)``.

    For tasks that bring their candidates: reranking, and retrieval after ``task.convert_to_reranking(predictions)``.
    All candidates of a query are scored together. mteb asks for 32 texts a batch where it is told nothing, which is few
    for short texts: pass ``encode_kwargs={"batch_size": 1024}``; the token budget still bounds a batch.

    Args:
        model: a `MultiViewReranker`, or the directory or the Hub name of a model.
        revision: what tells apart versions of the model in mteb's results; it does not choose what is loaded. By
            default the Hub's, or a hash of the directory's files.
        device: where a model given by name is loaded.
        name: "organisation/model" in mteb's results; by default the Hub's, else "local/" and the directory's.
        metadata: fields of `ModelMeta` beside, or in place of, what the model itself tells: languages, license,
            training_datasets, ...
        options: passed to `MultiViewReranker.from_pretrained`: max_length, which is published by dataset, dtype, ...

    Raises:
        FileNotFoundError, ValueError: see `MultiViewReranker.from_pretrained`.
        ValueError: an unknown field of ``metadata``; options for a model that is loaded already.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        model: str | Path | MultiViewReranker,
        revision: str | None = None,
        device: str | None = None,
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.model = load_reranker("MtebReranker", model, {**options, "device": device})
        # results of another length are other results, as are those of other options
        experiment = {option: str(value) for option, value in options.items() if value is not None}
        experiment["max_length"] = str(self.model.max_length)
        t5 = self.model.model.t5
        told = {
            "model_type": ["cross-encoder"],
            "max_tokens": self.model.max_length,
            "use_instructions": False,
            "experiment_kwargs": experiment,
        }
        given = {"name": name, "revision": revision, **(metadata or {})}
        source = t5.config.name_or_path if isinstance(model, MultiViewReranker) else str(model)
        self.mteb_model_meta = _metadata(self, t5, source, told, given)

    def predict(
        self,
        inputs1: Iterable[Mapping[str, Any]],
        inputs2: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: PromptType | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Scores of pairs, in their order.

        Args:
            inputs1: batches with the pairs' queries under "text", as mteb's data loaders give them. Pairs of one query
                are scored together; queries are told apart by "id", where there is one, and by their text.
            inputs2: batches with the pairs' passages under "text", which mteb makes of title and text.
            task_metadata, hf_split, hf_subset, prompt_type: unused; they belong to mteb's protocol.
            options: batch_size and show_progress_bar, as `MultiViewReranker.rank` takes them; others are passed over
                with a warning.

        Returns:
            float32 ``[N]``.

        Raises:
            ValueError: queries and passages are not as many.
        """
        queries = [
            query for batch in inputs1 for query in zip(batch.get("id", batch["text"]), batch["text"], strict=True)
        ]
        passages = [text for batch in inputs2 for text in batch["text"]]
        if len(queries) != len(passages):
            raise ValueError(
                f"predict: inputs2 must be as many as inputs1, got {len(passages)} passages and {len(queries)} queries"
            )
        kept = _known_options("MultiViewReranker.rank", options, ("batch_size", "show_progress_bar"))
        places: dict[tuple[Any, str], list[int]] = {}
        for place, query in enumerate(queries):
            places.setdefault(query, []).append(place)
        held = [[passages[place] for place in group] for group in places.values()]
        scores = np.empty(len(queries), np.float32)
        scored = self.model.score_batch([text for _, text in places], held, **kept)
        for group, part in zip(places.values(), scored, strict=True):
            scores[group] = part
        return scores


def _known_options(op: str, options: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    surplus = sorted(set(options) - set(known))
    if surplus:
        logger.warning("Passed over, because %s has no such arguments: %s", op, ", ".join(surplus))
    return {option: options[option] for option in known if option in options}


def _signs(codes: np.ndarray, dim: int) -> np.ndarray:
    """Codes uint8 ``[N, ceil(dim / 8)]`` as int8 ``[N, dim]``, -1 and 1: packed bytes have no cosine."""
    return np.unpackbits(codes, axis=1, count=dim).astype(np.int8) * 2 - 1


def _metadata(adapter: Any, model: Any, source: str, told: Mapping[str, Any], given: Mapping[str, Any]) -> ModelMeta:
    """What transformers' ``model`` and its adapter tell, where it came from and, before these, what the caller gave."""
    given = {field: value for field, value in given.items() if value is not None}
    unknown = sorted(set(given) - set(ModelMeta.model_fields))
    if unknown:
        raise ValueError(
            f"{type(adapter).__name__}: metadata must have fields of mteb's ModelMeta, got {', '.join(unknown)}"
        )
    weights = list(model.parameters())
    common: dict[str, Any] = {
        "n_parameters": sum(weight.numel() for weight in weights),
        "n_embedding_parameters": model.get_input_embeddings().weight.numel(),
        "memory_usage_mb": round(sum(weight.numel() * weight.element_size() for weight in weights) / 2**20),
        "open_weights": True,  # they have just been read
        "framework": ["PyTorch", "Transformers", "safetensors"],
    }
    empty = ModelMeta.create_empty().model_dump()
    return ModelMeta(**{**empty, **common, **told, **_identity(source, type(adapter)), **given})


def _identity(source: str, loader: Any) -> dict[str, Any]:
    """Name and revision of a model, and how to load it by that name; the Hub's where it came from there."""
    path = Path(source).expanduser()
    if path.parent.name == "snapshots":  # the Hub's cache: models--organisation--model/snapshots/revision
        hub_name = path.parent.parent.name.removeprefix("models--").replace("--", "/")
        return {"name": hub_name, "revision": path.name, "loader": loader}
    if source and path.is_dir():
        return {"name": f"local/{path.resolve().name}", "revision": _fingerprint(path)}
    return {"name": source if "/" in source else f"local/{source or 'unnamed'}", "loader": loader}


def _fingerprint(path: Path) -> str:
    """A short hash of a model directory's configs and of samples of its weights."""
    digest = hashlib.sha256()
    for file in sorted(other for other in path.rglob("*") if other.suffix in (".json", ".safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with file.open("rb") as opened:
            for sample in range(_SAMPLES):
                opened.seek(sample * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
