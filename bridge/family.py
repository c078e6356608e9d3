"""A model family: which Hugging Face tensors make which canonical ones, as a table that is written down, not computed.

A family's file in ``families/`` names its configs (``model_type``) and lists lines: canonical name, rule, names on disk.
Numbers are filled in here, once for all families: ``{l}`` is the layer, ``{e}`` the expert.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .errors import BridgeError
from .mapping import QKV, Copy, DeltaNet, Gated, GatedQKV, MinusOne, Rule, Stacked, Vocab

Config = Mapping[str, Any]
_MTP = "num_nextn_predict_layers"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table. ``rule`` makes the rule from the config; ``when`` tells whether the model has the tensor.

    Names are those within the layer; a name in ``hf`` that begins with / is whole.
    """

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
class Support:
    """Whether Megatron-Core computes a model: as it is, only when changed, or not at all; ``reason`` says what to know."""

    kind: Literal["stock", "needs_patch", "none"]
    reason: str = ""


def stock(_: Config) -> Support:
    """Megatron-Core as it is computes the model."""
    return Support("stock")


def since(version: str, reason: str) -> Callable[[Config], Support]:
    """Megatron-Core as it is computes the model from a version on."""
    return lambda _: Support("stock", f"for Megatron-Core {version} or newer: {reason}")


def needs_patch(reason: str, when: Callable[[Config], bool] = lambda _: True) -> Callable[[Config], Support]:
    """Names and shapes fit, but Megatron-Core computes otherwise where ``when`` holds, until its attention is changed."""
    return lambda config: Support("needs_patch", reason) if when(config) else stock(config)


def none(reason: str, when: Callable[[Config], bool] = lambda _: True) -> Callable[[Config], Support]:
    """Nothing computes the model from a Megatron checkpoint where ``when`` holds."""
    return lambda config: Support("none", reason) if when(config) else stock(config)


@dataclass(frozen=True, slots=True)
class Family:
    """A table by place: once in the model, in every layer, in layers with one MLP, in layers with experts, an expert.

    Where layers differ in their attention, ``kind`` tells from config and number which lines of ``attention`` a layer has.
    ``sparse`` tells so whether it has experts, ``experts`` are keys of their count. ``mtp`` are the lines of a layer that
    predicts further tokens, beside those of a layer; these layers follow the others, or lie under ``mtp_prefix`` with
    numbers of their own. ``mtp_copies`` are its tensors that repeat others: (name in the layer, name of the other).
    ``computed`` are endings of tensors that hold nothing learnt. ``keys`` are other names of common keys of a config,
    ``implied`` what it need not say. ``support`` is asked before a Megatron checkpoint is read or written.
    ``aliases`` are names that others give the family. ``spellings`` are parts of names on disk that some releases of a
    model write otherwise: (theirs, that of the table).
    """

    name: str
    model_types: tuple[str, ...]
    top: Sequence[Line]
    layer: Sequence[Line]
    dense: Sequence[Line] = ()
    attention: Mapping[str, Sequence[Line]] = field(default_factory=dict[str, Sequence[Line]])
    kind: Callable[[Config, int], str] = lambda config, layer: ""  # noqa: ARG005
    moe: Sequence[Line] = ()
    expert: Sequence[Line] = ()
    sparse: Callable[[Config, int], bool] = lambda config, layer: False  # noqa: ARG005
    experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    mtp: Sequence[Line] = ()
    mtp_copies: Sequence[tuple[str, str]] = ()
    computed: tuple[str, ...] = ("rotary_emb.inv_freq",)
    prefix: str = "model.layers.{l}."
    aliases: tuple[str, ...] = ()
    tower: Tower | None = None
    spellings: Sequence[tuple[str, str]] = ()
    mtp_prefix: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict[str, str])
    implied: Mapping[str, Any] = field(default_factory=dict[str, Any])
    support: Callable[[Config], Support] = stock

    def rows(self, config: Config) -> Iterator[Row]:
        """Every canonical tensor of a model of this config, in order."""
        config = of_text(config)
        for name in self.tower.names(config) if self.tower else ():
            yield Row(name, Copy(), (name,))
        yield from _filled(self.top[:1], config)
        for layer in range(int(config["num_hidden_layers"])):
            yield from self._layer(config, layer, ("decoder.layers.{l}.", layer), (self.prefix, layer))
        yield from _filled(self.top[1:], config)
        theirs = self.mtp_prefix or self.prefix
        for depth, layer in enumerate(self._mtp_layers(config)):
            number = depth if self.mtp_prefix else layer
            yield from _filled(self.mtp, config, "mtp.layers.{l}.", theirs, own=depth, l=number)
            yield from self._layer(config, layer, ("mtp.layers.{l}.transformer_layer.", depth), (theirs, number))

    def plain(self, config: Config) -> dict[str, Any]:
        """The config with common names and with what it need not say. Raises BridgeError when a value differs by layer."""
        config = of_text(config)
        renamed = {ours: _one(config, theirs) for ours, theirs in self.keys.items() if theirs in config}
        return {**self.implied, **config, **renamed}

    def as_stored(self, config: Config, names: Iterable[str], *, hf: bool) -> dict[str, Any]:
        """The config with as many layers that predict further tokens as the files hold.

        transformers saves a model without them and leaves the config as it was; a config may keep silent about one.
        """
        if not self.mtp:
            return dict(config)
        own = "mtp." if self.mtp_prefix else self.prefix.format(l=config["num_hidden_layers"])
        found = any(name.startswith(own if hf else "mtp.") for name in names)
        if not found and config.get(_MTP):
            return {**config, _MTP: 0}
        return {**config, _MTP: 1} if found and config.get(_MTP) is None else dict(config)

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
        layers, count = int(config["num_hidden_layers"]), int(config.get(_MTP) or 0) if self.mtp else 0
        if count > 1 and self.mtp_prefix:
            raise BridgeError(f"config.json: {_MTP} {count}: {self.name} has tensors for one such layer")
        return range(layers, layers + count)

    def _count(self, config: Config, layer: int) -> int:
        """Experts of a layer."""
        found = next((key for key in self.experts if key in config), None)
        if found is None:
            raise BridgeError(f"config.json: none of {', '.join(self.experts)}, the number of experts")
        return int(at(config[found], layer))

    def _layer(self, config: Config, layer: int, ours: tuple[str, int], theirs: tuple[str, int]) -> Iterator[Row]:
        """The rows of a layer; ``ours`` and ``theirs`` are the begin of its names and its number there."""
        sparse = self.sparse(config, layer)
        (start, own), (other, number) = ours, theirs
        for lines in (self.layer, self.attention.get(self.kind(config, layer), ()), self.moe if sparse else self.dense):
            yield from _filled(lines, config, start, other, own=own, l=number)
        for expert in range(self._count(config, layer) if sparse else 0):
            yield from _filled(self.expert, config, start, other, own=own, l=number, e=expert)


def _filled(
    lines: Sequence[Line], config: Config, ours: str = "", theirs: str = "", *, own: int = 0, **numbers: int
) -> Iterator[Row]:
    for line in lines:
        if line.when(config):
            mcore = (ours + line.mcore).format(**{**numbers, "l": own})
            names = (name.removeprefix("/") if name.startswith("/") else theirs + name for name in line.hf)
            yield Row(mcore, line.rule(config), tuple(name.format(**numbers) for name in names))


def at(value: Any, layer: int) -> Any:
    """What a config says of a layer: a value for all, or a list with one for each."""
    return value[min(layer, len(value) - 1)] if isinstance(value, list) else value


def _one(config: Config, key: str) -> Any:
    """A value that must be the same in all layers, for Megatron-Core has one for all."""
    value = config[key]
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise BridgeError(f"config.json: {key} differs by layer: {sorted(set(value))}; Megatron-Core has one for all")
    return value[0]


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
    return _qkv(config)


def one_qkv(config: Config) -> Rule:
    """Query, key and value by query group, of one tensor with all queries, then all keys, then all values."""
    rule = _qkv(config)
    keys = rule.groups * rule.head_dim
    return Stacked(rule, (rule.heads * rule.head_dim, keys, keys))


def _qkv(config: Config) -> QKV:
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    if heads % groups:
        raise BridgeError(f"config.json: {heads} attention heads cannot share {groups} key-value heads")
    return QKV(heads, groups, head_dim(config))


def gated_qkv(config: Config) -> Rule:
    """Query with its gate, key and value by query group."""
    plain = qkv(config)
    assert isinstance(plain, QKV)
    return GatedQKV(plain.heads, plain.groups, plain.head_dim)


def delta_net(config: Config) -> Rule:
    """The input projection of a gated delta net."""
    return DeltaNet(
        *(
            int(config[f"linear_{key}"])
            for key in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
        )
    )


def minus_one(_: Config) -> Rule:
    """A norm around one that Megatron-Core keeps around zero."""
    return MinusOne()


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


def listed(kinds: str = "mlp_layer_types", sparse: str = "sparse") -> Callable[[Config, int], bool]:
    """The layers that are ``sparse`` in the list ``kinds``, and those after its end; without a list as ``from_layer``."""

    def has_experts(config: Config, layer: int) -> bool:
        types: Sequence[str] | None = config.get(kinds)
        if types is None:
            return from_layer()(config, layer)
        return layer >= len(types) or types[layer] == sparse

    return has_experts


def shared_experts(place: str = "mlp.shared_experts", count: str = "n_shared_experts") -> tuple[Line, Line]:
    """Experts that every token sees, stored as one below ``place``, where the config has some under ``count``."""
    ours, names = "mlp.shared_experts", (f"{place}.gate_proj.weight", f"{place}.up_proj.weight")
    return (
        Line(f"{ours}.linear_fc1.weight", gated, names, has(count)),
        Line(f"{ours}.linear_fc2.weight", copy, (f"{place}.down_proj.weight",), has(count)),
    )


def expert_bias(
    name: str = "mlp.gate.e_score_correction_bias", when: Callable[[Config], bool] = lambda _: True
) -> Line:
    """What is added to an expert's score when it is chosen, stored under ``name``."""
    return Line("mlp.router.expert_bias", copy, (name,), when)


def further(norm: str) -> tuple[Line, ...]:
    """What a layer that predicts further tokens has beside a layer; ``norm`` is its last norm on disk."""
    names = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "final_layernorm": norm}
    return tuple(Line(f"{ours}.weight", copy, (f"{theirs}.weight",)) for ours, theirs in names.items())


def renamed(lines: Iterable[Line], names: Mapping[str, str]) -> tuple[Line, ...]:
    """The lines with other names on disk: old name -> new name."""
    return tuple(replace(line, hf=tuple(names.get(name, name) for name in line.hf)) for line in lines)


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
