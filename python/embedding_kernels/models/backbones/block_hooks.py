"""What only hooks can do to transformers' own forward: stop it after a block, change rows between its blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ...ops.norm import token_prepend

# their blocks hand on [tokens, texts, H]
_TOKENS_FIRST = ("xlnet",)


class _StopForward(Exception):  # noqa: N818 - no error: it carries the result out of the forward
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def block_stack(model: Any) -> nn.ModuleList:
    """The model's blocks: its one outermost `nn.ModuleList` of ``config.num_hidden_layers`` modules.

    Raises:
        ValueError: there is none (ALBERT's blocks share their weights), or several.
    """
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    found: list[nn.ModuleList] = []
    inside: set[int] = set()
    for module in model.modules():  # owners come before what they own
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) not in inside:
            found.append(module)
            inside |= {id(part) for part in module.modules()}
    if len(found) != 1 or config.model_type in _TOKENS_FIRST:
        raise ValueError(
            f"encode: layer must be None for {type(model).__name__}, whose blocks are not one list of {count} modules "
            f"in the order in which they run, each from [texts, tokens, H] to the same"
        )
    return found[0]


def layer_count(model: Any) -> int:
    """N, the layers whose outputs can be read; ValueError as `block_stack`."""
    return len(block_stack(model))


def hidden_after(model: Any, layer: int, forward: Callable[[], Any]) -> Tensor:
    """What block ``layer`` of ``model`` gives while ``forward`` runs; what comes after it does not run.

    Args:
        model: a transformers model.
        layer: 0 to N: transformers' ``output_hidden_states[layer]``, but never after the model's last norm. 0 is what
            the first block is given.
        forward: runs the model in this thread; forwards of other threads are left alone.

    Returns:
        The block's hidden states, in the shape that it gave them.

    Raises:
        ValueError: the model has no one stack of blocks, or its blocks hand on no tensor.
    """
    blocks = block_stack(model)

    def stop(hidden: Tensor) -> Tensor:
        raise _StopForward(hidden)

    try:
        with _changed_input(blocks[0], stop) if layer == 0 else _changed_output(blocks[layer - 1], stop):
            forward()
    except _StopForward as stopped:
        return stopped.hidden
    raise ValueError(f"encode: layer must be None for {type(model).__name__}, whose forward leaves out block {layer}")


@contextmanager
def rows_changed(
    model: Any, targets: Tensor, values: Tensor, sources: Tensor | None, start: int, stop: int
) -> Iterator[None]:
    """Token prepending inside a packed forward of this thread, ``[1, T, H]``.

    Args:
        model: a transformers model.
        targets: int64 ``[S]``, rows whose embeddings become ``values``.
        values: ``[H]``, or ``[S, H]``.
        sources: int64 ``[S]``, rows that are copied over the targets before block j, counted from 0, for start <= j <
            stop; None copies nothing.
        start: see ``sources``.
        stop: see ``sources``.
    """

    def embed(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[0, targets] = values.to(hidden.dtype)
        return hidden

    def copy(hidden: Tensor) -> Tensor:
        assert sources is not None
        return token_prepend(hidden[0], sources, targets)[None]

    with ExitStack() as stack:
        stack.enter_context(_changed_output(model.get_input_embeddings(), embed))
        for block in block_stack(model)[start:stop] if sources is not None else ():
            stack.enter_context(_changed_input(block, copy))
        yield


@contextmanager
def _changed_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """``module`` is given ``change`` of its hidden states, in this thread's forwards."""
    thread = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != thread:
            return None
        if args:
            return (change(_tensor(args[0], module)), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(_tensor(kwargs.get("hidden_states"), module))}

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        yield


@contextmanager
def _changed_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """``module`` gives ``change`` of its hidden states, in this thread's forwards."""
    thread = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        if isinstance(output, tuple) and output:
            return (change(_tensor(output[0], module)), *output[1:])
        return change(_tensor(output, module))

    with module.register_forward_hook(hook):
        yield


def _tensor(hidden: Any, module: nn.Module) -> Tensor:
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"encode: the model must hand hidden states from block to block as a tensor, got {type(hidden).__name__} "
            f"at {type(module).__name__}"
        )
    return hidden
