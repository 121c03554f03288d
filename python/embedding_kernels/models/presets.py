"""How published embedders are used, where their directories do not say: data for `Embedder.from_pretrained`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Fields of a `DirectorySpec` that a published embedder fixes; None leaves what the directory says."""

    pooling: tuple[str, ...]
    #: every token attends to every token of its text, without causal mask or sliding window
    bidirectional: bool = True
    normalize: bool = True
    #: whether the prompt's tokens are pooled too
    include_prompt: bool | None = None
    #: how many tokens count as the prompt's: see `TextTokenizer.prompt_tokens`
    prompt_length: str | None = None
    #: prompt of a query, or of both sides of a symmetric task; `{task}` stands for the task's description
    instruction: str | None = None
    #: the end-of-text token after each text
    append_eos: bool | None = None
    #: widths at which the vectors were trained to be cut
    matryoshka_dims: tuple[int, ...] | None = None

    def changes(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


_NV_EMBED = Preset(
    pooling=("latent_attention",),
    include_prompt=False,
    prompt_length="shared",
    instruction="Instruct: {task}\nQuery: ",
    append_eos=True,
)

#: name -> preset. NV-Embed: Lee et al., 2024; both versions are one computation. KaLM: the model card of
#: KaLM-embedding-multilingual-mini-instruct-v2. ULLME: Man et al., "ULLME", 2024, at its last published state; pooling
#: and `include_prompt` are options there too.
PRESETS: dict[str, Preset] = {
    "nv-embed-v1": _NV_EMBED,
    "nv-embed-v2": _NV_EMBED,
    "kalm-v2": Preset(
        pooling=("mean",),
        instruction="Instruct: {task} \n Query: ",
        matryoshka_dims=(896, 512, 256, 128, 64),
    ),
    "ullme": Preset(pooling=("mean",), include_prompt=True),
}


def preset_named(name: str) -> Preset:
    """The preset of that name; ValueError lists the names."""
    if name not in PRESETS:
        raise ValueError(f"from_pretrained: preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
