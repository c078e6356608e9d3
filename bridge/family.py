"""A model family: which Hugging Face tensors make which canonical ones, as a table that is written down, not computed.

A family's file in ``families/`` names its configs (``model_type``) and lists lines: canonical name, rule, names on disk.
Numbers are filled in here, once for all families: ``{l}`` is the layer, ``{e}`` the expert.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import BridgeError
from .mapping import QKV, Copy, Gated, Rule, Vocab

Config = Mapping[str, Any]
_MTP = "num_nextn_predict_layers"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table. ``rule`` makes the rule from the config; ``when`` tells whether the model has the tensor."""

    mcore: str
    rule: Callable[[Config], Rule]
    hf: tuple[str, ...]
    when: Callable[[Config], bool] = lambda _: True


@dataclass(frozen=True, slots=True)
class Row:
    """A line with its numbers filled in: one canonical tensor and the parts that Hugging Face stores."""

    mcore: str
    rule: Rule
    hf: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision tower, whose tensors are carried under their own names: ``once`` in the model and ``each`` in its layers.

    ``sizes`` are the keys in the config of the tower's part and of its number of layers.
    """

    once: Sequence[str]
    each: Sequence[str]
    sizes: tuple[str, str]
    when: Callable[[Config, str], bool] = lambda config, name: True  # noqa: ARG005

    def names(self, config: Config) -> Iterator[str]:
        """Its tensors by name."""
        part, key = self.sizes
        names = [*self.once, *(name.format(l=layer) for layer in range(int(config[part][key])) for name in self.each)]
        return (name for name in names if self.when(config, name))


@dataclass(frozen=True, slots=True)
class Family:
    """A table by place: once in the model, in every layer, in layers with one MLP, in layers with experts, an expert.

    ``sparse`` tells from config and number whether a layer has experts, ``experts`` are keys of their count. ``mtp`` are
    the lines of a layer that predicts further tokens, beside those of a layer; ``mtp_copies`` its tensors that repeat
    others: (name in the layer, name of the other). ``computed`` are endings of tensors that hold nothing learnt. ``tower``
    is what the model has beside its language model. ``spellings`` are parts of names on disk that some releases of a
    model write otherwise: (theirs, that of the table).
    """

    name: str
    model_types: tuple[str, ...]
    top: Sequence[Line]
    layer: Sequence[Line]
    dense: Sequence[Line] = ()
    moe: Sequence[Line] = ()
    expert: Sequence[Line] = ()
    sparse: Callable[[Config, int], bool] = lambda config, layer: False  # noqa: ARG005
    experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    mtp: Sequence[Line] = ()
    mtp_copies: Sequence[tuple[str, str]] = ()
    computed: tuple[str, ...] = ("rotary_emb.inv_freq",)
    prefix: str = "model.layers.{l}."
    tower: Tower | None = None
    spellings: Sequence[tuple[str, str]] = ()

    def rows(self, config: Config) -> Iterator[Row]:
        """Every canonical tensor of a model of this config, in order."""
        config = of_text(config)
        for name in self.tower.names(config) if self.tower else ():
            yield Row(name, Copy(), (name,))
        yield from _filled(self.top[:1], config)
        for layer in range(int(config["num_hidden_layers"])):
            yield from self._layer(config, layer, "decoder.layers.{l}.", layer)
        yield from _filled(self.top[1:], config)
        for depth, layer in enumerate(self._mtp_layers(config)):
            yield from _filled(self.mtp, config, "mtp.layers.{l}.", self.prefix, own=depth, l=layer)
            yield from self._layer(config, layer, "mtp.layers.{l}.transformer_layer.", depth)

    def _count(self, config: Config) -> int:
        """Experts of a layer."""
        found = next((key for key in self.experts if key in config), None)
        if found is None:
            raise BridgeError(f"config.json: none of {', '.join(self.experts)}, the number of experts")
        return int(config[found])

    def without_mtp(self, config: Config, names: Iterable[str], *, hf: bool) -> dict[str, Any]:
        """The config of a model whose files lack the layers that predict further tokens, as transformers saves it."""
        first = f"{self.prefix.format(l=of_text(config)['num_hidden_layers'])}" if hf else "mtp."
        if not self._mtp_layers(config) or any(name.startswith(first) for name in names):
            return dict(config)
        return {**config, _MTP: 0}

    def copies(self, config: Config) -> dict[str, str]:
        """Tensors on disk that repeat another one: name -> name of the other."""
        return {
            self.prefix.format(l=layer) + name: other
            for layer in self._mtp_layers(config)
            for name, other in self.mtp_copies
        }

    def tied(self, config: Config) -> dict[str, str]:
        """The head that a model without one of its own may store all the same: its name -> that of the embedding."""
        names = {line.mcore: line.hf[0] for line in self.top}
        tied = of_text(config).get("tie_word_embeddings") and "output_layer.weight" in names
        return {names["output_layer.weight"]: names["embedding.word_embeddings.weight"]} if tied else {}

    def spelled(self, name: str) -> str:
        """A name on disk as the table has it."""
        for theirs, ours in self.spellings:
            name = name.replace(theirs, ours)
        return name

    def _mtp_layers(self, config: Config) -> range:
        config = of_text(config)
        layers = int(config["num_hidden_layers"])
        return range(layers, layers + (int(config.get(_MTP) or 0) if self.mtp else 0))

    def _layer(self, config: Config, layer: int, ours: str, own: int) -> Iterator[Row]:
        yield from _filled(self.layer, config, ours, self.prefix, own=own, l=layer)
        if not self.sparse(config, layer):
            yield from _filled(self.dense, config, ours, self.prefix, own=own, l=layer)
            return
        yield from _filled(self.moe, config, ours, self.prefix, own=own, l=layer)
        for expert in range(self._count(config)):
            yield from _filled(self.expert, config, ours, self.prefix, own=own, l=layer, e=expert)


def _filled(
    lines: Sequence[Line], config: Config, ours: str = "", theirs: str = "", *, own: int = 0, **numbers: int
) -> Iterator[Row]:
    for line in lines:
        if line.when(config):
            mcore = (ours + line.mcore).format(**{**numbers, "l": own})
            yield Row(mcore, line.rule(config), tuple((theirs + name).format(**numbers) for name in line.hf))


# ---- what many families share


def of_text(config: Config) -> Config:
    """The config of the language model, which a model with a vision tower keeps under ``text_config``."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    own = {"model_type": config.get("model_type"), "tie_word_embeddings": tied}
    return {key: value for key, value in {**config, **text, **own}.items() if key != "text_config"}


def head_dim(config: Config) -> int:
    """Size of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def copy(_: Config) -> Rule:
    """The tensor as it is."""
    return Copy()


def gated(_: Config) -> Rule:
    """Gate and up projection."""
    return Gated()


def vocab(config: Config) -> Rule:
    """Rows by token."""
    return Vocab(int(config["vocab_size"]))


def qkv(config: Config) -> Rule:
    """Query, key and value by query group."""
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    if heads % groups:
        raise BridgeError(f"config.json: {heads} attention heads cannot share {groups} key-value heads")
    return QKV(heads, groups, head_dim(config))


def untied(config: Config) -> bool:
    """Whether the output embedding is a tensor of its own."""
    return not config.get("tie_word_embeddings", False)


def has(key: str) -> Callable[[Config], bool]:
    """Whether the config has a value under ``key`` that is not 0, false or null."""
    return lambda config: bool(config.get(key))


def lacks(key: str) -> Callable[[Config], bool]:
    """The opposite of ``has``."""
    return lambda config: not config.get(key)


def every(step: str = "decoder_sparse_step", dense: str = "mlp_only_layers") -> Callable[[Config, int], bool]:
    """Every ``step``-th layer has experts, except those listed under ``dense`` (Qwen's rule)."""

    def sparse(config: Config, layer: int) -> bool:
        return layer not in (config.get(dense) or ()) and (layer + 1) % int(config.get(step) or 1) == 0

    return sparse


def from_layer(first: str = "first_k_dense_replace") -> Callable[[Config, int], bool]:
    """All layers from the one that ``first`` numbers on have experts (DeepSeek's rule)."""
    return lambda config, layer: layer >= int(config.get(first) or 0)


TOP = (
    Line("embedding.word_embeddings.weight", vocab, ("model.embed_tokens.weight",)),
    Line("decoder.final_layernorm.weight", copy, ("model.norm.weight",)),
    Line("output_layer.weight", vocab, ("lm_head.weight",), untied),
)
_Q, _K, _V = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
ATTENTION = (
    Line("self_attention.linear_qkv.layer_norm_weight", copy, ("input_layernorm.weight",)),
    Line("self_attention.linear_qkv.weight", qkv, (f"{_Q}.weight", f"{_K}.weight", f"{_V}.weight")),
    Line("self_attention.linear_proj.weight", copy, ("self_attn.o_proj.weight",)),
)
QKV_BIAS = Line("self_attention.linear_qkv.bias", qkv, (f"{_Q}.bias", f"{_K}.bias", f"{_V}.bias"))
QK_NORM = (
    Line("self_attention.q_layernorm.weight", copy, ("self_attn.q_norm.weight",)),
    Line("self_attention.k_layernorm.weight", copy, ("self_attn.k_norm.weight",)),
)
MLP = (
    Line("mlp.linear_fc1.layer_norm_weight", copy, ("post_attention_layernorm.weight",)),
    Line("mlp.linear_fc1.weight", gated, ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    Line("mlp.linear_fc2.weight", copy, ("mlp.down_proj.weight",)),
)
MOE = (
    Line("pre_mlp_layernorm.weight", copy, ("post_attention_layernorm.weight",)),
    Line("mlp.router.weight", copy, ("mlp.gate.weight",)),
)
_E = "mlp.experts.{e}"
EXPERT = (
    Line("mlp.experts.local_experts.{e}.linear_fc1.weight", gated, (f"{_E}.gate_proj.weight", f"{_E}.up_proj.weight")),
    Line("mlp.experts.local_experts.{e}.linear_fc2.weight", copy, (f"{_E}.down_proj.weight",)),
)
