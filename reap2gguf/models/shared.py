"""What families share: a decoder described by tables of rules.

A family names its rules per layer, its experts' layout and its own header keys; a near-copy of
another family changes some of these.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import GGUFValueType

from reap2gguf.errors import UnknownTensorError
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.description import (
    MAX_VOCABULARY,
    MAX_WIDTH,
    Carried,
    Dropped,
    GgufTensor,
    HeaderValue,
    ModelFacts,
    Plain,
    Projection,
    Role,
    Router,
    Transform,
)
from reap2gguf.models.experts import INDEX, ExpertLayout
from reap2gguf.models.facts import (
    CHOSEN_KEY,
    COUNT_KEYS,
    FACT_KEYS,
    WIDTH_KEY,
    config_values,
    read_epsilon,
    read_facts,
    read_n_layers,
    refuse_contradictions,
    refuse_hidden_effects,
    rewritten,
)
from reap2gguf.models.header_entries import common_entries
from reap2gguf.models.quantized import leftover_caveats, without_quantization
from reap2gguf.models.rope import Rope, read_rope
from reap2gguf.models.rules import (
    EMBEDDING,
    HEAD,
    NORM,
    ROTARY_BUFFER,
    MtpLayout,
    TensorRule,
    fed_matrices,
    joined_parameters,
    nested,
    single,
    sizes_of,
)
from reap2gguf.models.tying import Tying, TyingKeys, read_tying, with_tying

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader
    from reap2gguf.checkpoint.safetensors_header import StoredTensor

Entry = tuple[str, Any, GGUFValueType]  # of a header; the value None is left out
UINT32, FLOAT32, ARRAY = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.ARRAY


class DecoderModel(MoeModel):
    """A model whose decoder layers are described by tables of rules."""

    outer: ClassVar[tuple[TensorRule, ...]] = (EMBEDDING, NORM, HEAD)  # outside the layers
    experts: ClassVar[ExpertLayout] = ExpertLayout()
    mtp: ClassVar[MtpLayout | None] = None
    count_keys: ClassVar[tuple[str, ...]] = ("num_experts", "num_local_experts")
    width_key: ClassVar[str] = WIDTH_KEY  # the config's name of an expert's width
    chosen_key: ClassVar[str] = CHOSEN_KEY  # and of the number of experts per token
    # the key of the activation of feed-forward layers, the only value, and what is computed by it
    activation: ClassVar[tuple[str, str, str]] = ("hidden_act", "silu", "SwiGLU")
    has_layer_sizes: ClassVar[bool] = False  # whether `per_layer_config` is read
    spellings: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # others of that and of the context's
    fact_keys: ClassVar[tuple[str, ...]] = FACT_KEYS  # may not be null, and have one value
    # transformers' values of absent keys, where they are not those of most families
    defaults: ClassVar[Mapping[str, int]] = {}
    epsilon: ClassVar[tuple[str, float]] = ("rms_norm_eps", 1e-6)  # of norms: key and default
    has_rotary: ClassVar[bool] = True  # whether anything is rotated by its position
    has_attention_biases: ClassVar[bool] = False  # whether `attention_bias` may be true
    default_theta: ClassVar[float] = 10_000.0  # of the rotary embedding
    tying_keys: ClassVar[TyingKeys] = TyingKeys()
    # keys of nested objects that lead to the text model's config, where a config has them
    text_sections: ClassVar[tuple[str, ...]] = ()
    carried_prefixes: ClassVar[tuple[str, ...]] = ()  # of names that no text model's GGUF holds
    head_prefix: ClassVar[str] = ""  # what the stored name of the output matrix begins with

    @abstractmethod
    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        """What a trunk layer is made of besides its experts, in the order of the GGUF file.

        A stored tensor of which GGUF makes several has a rule for each, with its part of the values
        as the transform, and its shape.
        """

    def sizes(self) -> Mapping[str, int]:
        """The sizes that the rules name."""
        facts = self.facts
        return {
            "H": facts.hidden_size,
            "V": facts.vocab_size,
            "E": facts.n_experts,
            "Q": facts.n_heads * facts.head_dim,  # queries
            "KV": facts.n_kv_heads * facts.head_dim,  # keys, and values
            "D": facts.head_dim,
        }

    def transform(self, rule: TensorRule) -> Transform | None:
        """What llama.cpp's converter does to a tensor besides renaming it."""
        return None

    # the config

    @cached_property
    def text(self) -> ConfigReader:
        """The text model's config, which may be nested."""
        found = self.reader
        for key in self.text_sections:
            if not (section := found.section(key)):
                break
            found = found.with_values(section)
        return found

    @property
    def is_nested(self) -> bool:
        """Whether the text model's config is a section of the config."""
        return self.text is not self.reader

    @cached_property
    def rope(self) -> Rope:
        """The rotary embedding."""
        return read_rope(self.text, default_theta=self.default_theta)

    @cached_property
    def tying(self) -> Tying:
        """Whether the output matrix is the token embedding."""
        embedding, head = self.embedding_name, self.own_head_name

        def head_is_copy() -> bool:
            if self.have_same_values is None or embedding not in self.names:
                return True
            return self.have_same_values(embedding, head)

        return read_tying(self.reader, self.text, head in self.names, head_is_copy, self.tying_keys)

    def refuse_common(self) -> None:
        """Refuse, by name, what no family here does, and a fact with two values."""
        read, section = self.text, ".".join(self.text_sections) if self.is_nested else ""
        refuse_contradictions(self.reader, read, section, self.fact_keys)
        key, value, name = self.activation
        read.expect(key, value, why=f"llama.cpp's {self.gguf_arch} computes {name}")
        if not self.has_attention_biases:
            read.expect("attention_bias", False, why="attention biases are not implemented")
        if read.values.get("pad_token_id") is not None:
            # transformers builds no embedding with a padding token outside of it
            vocab = read.integer("vocab_size", low=1, high=MAX_VOCABULARY)
            read.integer("pad_token_id", low=-vocab, high=vocab - 1)
        for reader in (self.reader, read):
            refuse_hidden_effects(reader, self.has_layer_sizes and reader is read)

    def common_facts(self, moe_layers: Sequence[int], has_mtp: bool = False) -> ModelFacts:
        """The facts, read from the keys under which most configs have them."""
        return read_facts(
            self.text,
            self.count_keys,
            self.defaults,
            self.width_key,
            self.chosen_key,
            self.spellings,
            architecture=str(self.config["architectures"][0]),
            gguf_arch=self.gguf_arch,
            moe_layers=tuple(moe_layers),
            tied_embeddings=self.tying.tied,
            has_mtp=has_mtp,
        )

    def config_values(self) -> dict[str, Any]:
        return {
            **config_values(self.facts, self.chosen_key),
            self.count_keys[0]: self.facts.n_experts,
            self.width_key: self.facts.expert_width,
            self.epsilon[0]: read_epsilon(self.text, *self.epsilon),
            **({"rope_parameters": self.rope.config_values()} if self.has_rotary else {}),
        }

    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        config = self.rewritten_config(dict.fromkeys(COUNT_KEYS, n_experts))
        sections = self.text_sections if self.is_nested else ()
        tied = self.facts.tied_embeddings
        return without_quantization(with_tying(config, sections, tied, self.tying_keys))

    def rewritten_config(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The config with other values under the keys that it has, the text model's included."""
        return rewritten(self.config, self.text_sections, changes)

    def caveats(self) -> tuple[str, ...]:
        tying = self.tying.caveat
        return (*((tying,) if tying else ()), *leftover_caveats(self.config))

    # the header

    def header(self) -> list[Entry]:
        """The architecture's own keys, rotary embedding apart, in the order of the file."""
        epsilon = read_epsilon(self.text, *self.epsilon)
        return common_entries(self.facts, self.dense_width(), epsilon)

    def dense_width(self) -> int | None:
        """The width of dense feed-forward layers; None where the config has none."""
        if self.text.values.get("intermediate_size") is None:
            return None
        return self.text.integer("intermediate_size", low=1, high=MAX_WIDTH)

    def gguf_metadata(self) -> tuple[HeaderValue, ...]:
        rotary = self.rope.metadata() if self.has_rotary else []
        return tuple(
            HeaderValue(key.format(arch=self.gguf_arch), value, value_type)
            for key, value, value_type in (*self.header(), *rotary)
            if value is not None
        )

    # the tensors

    @property
    def own_head_name(self) -> str:
        return HEAD.stored.format(head=self.head_prefix)

    @cached_property
    def mtp_prefix(self) -> str:
        """What the stored names of the MTP block begin with: those of one more decoder layer."""
        return f"{self.text_prefix}layers.{read_n_layers(self.text)}."

    def in_mtp(self, name: str) -> bool:
        """Whether a stored tensor is of an MTP block."""
        return self.mtp is not None and name.startswith(self.mtp_prefix)

    def block_prefix(self, layer: int) -> str:
        is_mtp = layer == self.facts.mtp_layer
        return self.mtp_prefix if is_mtp else f"{self.text_prefix}layers.{layer}."

    def layer_prefix(self, layer: int) -> str:
        """What the stored names of a decoder layer begin with, the MTP block's included."""
        inside = self.mtp.layer if self.mtp and layer == self.facts.mtp_layer else ""
        return self.block_prefix(layer) + inside

    def _block_rules(self, layer: int) -> tuple[TensorRule, ...]:
        """The rules of a decoder layer, named from its block's prefix on."""
        if self.mtp is None or layer != self.facts.mtp_layer:
            return self.rules(layer)
        return self.mtp_layer_rules(self.mtp)

    def mtp_layer_rules(self, mtp: MtpLayout) -> tuple[TensorRule, ...]:
        """The rules of the MTP block's decoder layer, or layers, named from its prefix on."""
        (template,) = self.mtp_templates()
        return nested(self.rules(template), mtp.layer, mtp.module)

    def rules_beside(self, layer: int) -> tuple[TensorRule, ...]:
        """The rules of what the MTP block has besides its decoder layer."""
        return self.mtp.rules if self.mtp and layer == self.facts.mtp_layer else ()

    # found once: every name is asked for its role by these
    @cached_property
    def _all_rules(self) -> tuple[tuple[TensorRule, ...], ...]:
        return tuple(
            self._block_rules(layer) + self.rules_beside(layer)
            for layer in range(self.facts.n_blocks)
        )

    @cached_property
    def _in_blocks(self) -> tuple[Mapping[str, TensorRule], ...]:
        """By stored name; the rules of one name differ in what GGUF makes of it alone."""
        return tuple({rule.stored: rule for rule in rules} for rules in self._all_rules)

    @cached_property
    def _outside(self) -> Mapping[str, TensorRule]:
        prefixes = {"text": self.text_prefix, "head": self.head_prefix}
        return {rule.stored.format(**prefixes): rule for rule in self.outer}

    @cached_property
    def sparse_layers(self) -> frozenset[int]:
        return frozenset(self.facts.moe_layers)

    @cached_property
    def _layer_name(self) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(self.text_prefix)}layers\.{INDEX}\.(.+)")

    def role(self, name: str) -> Role:
        found = self._roles.get(name)
        if found is None:
            found = self._roles[name] = self._role_or_error(name)
        return found

    # many stages ask for the role of each tensor, of which there may be 100,000
    @cached_property
    def _roles(self) -> dict[str, Role]:
        return {}

    def _role_or_error(self, name: str) -> Role:
        role = self._role(name)
        if role is None:
            file = f"{type(self).__module__.replace('.', '/')}.py"
            raise UnknownTensorError(
                f"tensor {name!r} has no meaning in {self.facts.architecture} with "
                f"{self.facts.n_layers} layers; nothing is skipped silently, so remove it or add "
                f"a rule for it to {file}"
            )
        return role

    def _role(self, name: str) -> Role | None:
        if name.startswith(self.carried_prefixes):
            return Carried()
        if not self.keep_mtp and self.in_mtp(name):
            return Dropped()
        if rule := self._outside.get(name):
            # a tied model's head is a copy of the embeddings, which nothing reads
            return Carried() if rule is HEAD and self.facts.tied_embeddings else Plain(None)
        layer, rest = self._place(name)
        if layer is None:
            return None
        if rest == ROTARY_BUFFER:
            return Carried()
        if rule := self._in_blocks[layer].get(rest):
            if (axis := rule.axis_of_experts) is not None:
                return Router(layer, axis)
            # no layer's module has the MTP block's own embedding and head
            return Plain(None if rule.replaces else layer)
        inside = self.layer_prefix(layer).removeprefix(self.block_prefix(layer))
        if layer not in self.sparse_layers or not rest.startswith(inside):
            return None
        return self.experts.role(layer, rest.removeprefix(inside))

    def _place(self, name: str) -> tuple[int | None, str]:
        """The block that a stored tensor is in, and its name below the block's prefix."""
        if self.facts.has_mtp and name.startswith(self.mtp_prefix):
            return self.facts.mtp_layer, name.removeprefix(self.mtp_prefix)
        match = self._layer_name.fullmatch(name)
        if match is None or int(match[1]) >= self.facts.n_layers:
            return None, name
        return int(match[1]), match[2]

    def _gguf_tensors(self, stored: Mapping[str, StoredTensor]) -> Iterator[GgufTensor]:
        for name, rule in self._outside.items():
            if not isinstance(self.role(name), Carried):
                yield from self.made_of(stored, name, rule, "")
        for layer in range(self.n_gguf_blocks):
            blk, prefix = f"blk.{layer}.", self.block_prefix(layer)
            for rule in self._block_rules(layer):
                yield from self.made_of(stored, prefix + rule.stored, rule, blk)
            if layer in self.sparse_layers:
                yield from self.expert_tensors(layer, stored).values()
                yield from self.experts.biases(stored, self.layer_prefix(layer), layer, self.facts)
            for rule in self.rules_beside(layer):
                yield from self.made_of(stored, prefix + rule.stored, rule, blk)

    def made_of(
        self, stored: Mapping[str, StoredTensor], name: str, rule: TensorRule, prefix: str
    ) -> tuple[GgufTensor, ...]:
        """The GGUF tensors that a stored tensor becomes: one, where a family does not split it.

        `prefix` begins their names. Raises CheckpointError if it is not stored.
        """
        shape = sizes_of(rule.gguf_shape, self.sizes()) if rule.gguf_shape else None
        transform = self.transform(rule)
        return (single(stored, name, prefix + rule.gguf, rule.always_f32, transform, shape),)

    def expert_tensors(
        self, layer: int, stored: Mapping[str, StoredTensor]
    ) -> Mapping[Projection, GgufTensor]:
        return self.experts.weights(stored, self.layer_prefix(layer), layer, self.facts)

    def expert_shapes(self, layer: int) -> Mapping[str, tuple[int, ...]]:
        return self.experts.shapes(self.layer_prefix(layer), self.facts)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        sizes = self.sizes()
        found = {name: sizes_of(rule.shape, sizes) for name, rule in self._outside.items()}
        for layer, rules in enumerate(self._in_blocks):
            prefix = self.block_prefix(layer)
            found |= {prefix + name: sizes_of(rule.shape, sizes) for name, rule in rules.items()}
        return found

    # what is observed

    def parameter(self, layer: int, name: str) -> str:
        rule = self._in_blocks[layer].get(name)
        return name if rule is None else rule.in_module

    def joined(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        return joined_parameters(self._all_rules[layer])

    def is_computed_in_f32(self, layer: int, name: str) -> bool:
        rule = self._in_blocks[layer].get(name)
        return rule is not None and rule.computed_in_f32

    @property
    def module_is_as_stored(self) -> bool:
        return self.experts.module_is_as_stored

    def experts_path(self, layer: int) -> str:
        inside = self.mtp.module if self.mtp and layer == self.facts.mtp_layer else ""
        return inside + self.experts.module

    def matrices(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        return fed_matrices(self._all_rules[layer], layer)

    def expert_matrices(self, layer: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.experts.matrices(layer)
