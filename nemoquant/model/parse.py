"""Reads a ``config.json`` of ``model_type: nemotron_h`` into canonical names.

The family's configs spell the layer schedule in three ways and several scalars in two; these spellings are
read only here (those of a layer kind stand in its record). Nothing here reads weights.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemoquant.errors import ConfigError, brief, listing
from nemoquant.files import MOST_SETTINGS, read_json
from nemoquant.model.blocks import (
    BLOCK_TYPE,
    BLOCKS,
    MTP_BLOCKS,
    blocks_of,
    differing,
    largest,
    merged,
    one_of_list,
)
from nemoquant.model.config import LayerKind, NemotronHConfig
from nemoquant.model.kinds import KINDS
from nemoquant.model.nested import MODEL_TYPES, PREFIX, language_section, with_values

PATTERN_LETTERS: dict[str, LayerKind] = {kind.letter: name for name, kind in KINDS.items()}
BLOCK_NAMES: dict[str, LayerKind] = {name: name for name in KINDS} | {
    spelling: name for name, kind in KINDS.items() for spelling in kind.spellings
}

# canonical name -> other spellings found in published configs
ALIASES: dict[str, tuple[str, ...]] = {
    "n_groups": ("mamba_n_groups",),
    "conv_kernel": ("mamba_d_conv",),
    "use_conv_bias": ("mamba_conv_bias",),
    "chunk_size": ("mamba_chunk_size",),
    "ssm_state_size": ("mamba_d_state", "mamba_state_dim"),
    "mamba_num_heads": ("mamba_n_heads",),
    "mamba_head_dim": ("mamba_d_head",),
    "time_step_limit": ("mamba_dt_limit",),
    "time_step_min": ("mamba_dt_min",),
    "head_dim": ("attention_head_dim",),
    "n_routed_experts": ("num_local_experts",),
    "layer_norm_epsilon": ("norm_eps", "rms_norm_eps"),
    "layers_block_type": ("layer_types",),
}

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, beside an adapter

# Bounds far above every published model, so that a config can't ask for a table that fills the memory: Super
# has 88 layers, 512 experts and 42,683 tensors, of which the largest dimension is 131,072.
MOST_LAYERS = 4096  # those of all multi-token-prediction modules too
MOST_EXPERTS = 1 << 16
MOST_SIZE = (1 << 31) - 1
MOST_TENSORS = 1 << 19


def layer_pattern(layers: Sequence[LayerKind]) -> str:
    """A schedule in the letters of ``hybrid_override_pattern``."""
    return "".join(KINDS[kind].letter for kind in layers)


def load_config(path: Path) -> tuple[NemotronHConfig, dict[str, Any]]:
    """Read ``config.json``, or the one in a folder: the parsed config, and the raw keys of the file.

    Raises:
        ConfigError: the file is missing, is not JSON, or does not describe a Nemotron-H model.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = read_json(file, MOST_SETTINGS)
    except FileNotFoundError:
        adapter = (
            ", and this is an adapter of PEFT: load it on its base model, call merge_and_unload(), save that"
            if (file.parent / ADAPTER_CONFIG).exists()
            else ""
        )
        raise ConfigError(
            f"{file} does not exist; expected a Nemotron-H checkpoint folder or its config.json{adapter}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read as JSON ({error}); expected a Nemotron-H config.json"
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{file} holds a JSON {type(raw).__name__}, expected an object with `model_type: nemotron_h`"
        )
    return parse_config(raw, str(file)), raw


def parse_config(raw: Mapping[str, Any], source: str = "config.json") -> NemotronHConfig:
    """Interpret the keys of a config; ``source`` names it in messages.

    Raises:
        ConfigError: names the key, what it held, and what was expected.
    """
    section = language_section(raw, source)
    if section is None:
        return _Parser(raw, source).parse()
    return replace(_Parser(raw[section], f"{source}: `{section}`").parse(), prefix=PREFIX)


def without_mtp(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for a checkpoint that lacks the multi-token-prediction modules that ``raw`` names."""
    return with_values(raw, num_nextn_predict_layers=0)


def plain_value(value: Any) -> Any:
    """A value in one spelling; in a list, every element.

    ``{"__float__": "Infinity"}`` becomes the number, and layer kinds get our names.
    """
    return [_one(v) for v in value] if isinstance(value, list | tuple) else _one(value)


def _one(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"__float__"}:
        value = value["__float__"]
    if isinstance(value, str):
        return math.inf if value.lower() in ("inf", "infinity") else BLOCK_NAMES.get(value, value)
    return value


class _Parser:
    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source

    def fail(self, message: str) -> ConfigError:
        return ConfigError(f"{self.source}: {message}")

    def find(self, name: str) -> Any:
        """The value under the canonical name or one of its aliases; None when absent.

        Two values that differ are an error.
        """
        given = {
            key: self.raw[key] for key in (name, *ALIASES.get(name, ())) if self.raw.get(key) is not None
        }
        values = [plain_value(value) for value in given.values()]
        if any(v != values[0] for v in values[1:]):
            shown = ", ".join(f"{key!r}: {brief(value)}" for key, value in given.items())
            raise self.fail(f"{{{shown}}} contradict each other; expected one value, remove the wrong key")
        return values[0] if values else None

    def integer(
        self, name: str, default: int | None = None, minimum: int = 1, maximum: int = MOST_SIZE
    ) -> int:
        value = self.find(name)
        if value is None:
            if default is None:
                raise self.fail(f"`{name}` is missing; expected an integer of at least {minimum}")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.fail(f"`{name}` is {brief(value)}; expected an integer of at least {minimum}")
        if value > maximum:
            raise self.fail(f"`{name}` is {brief(value)}; expected an integer of at most {maximum:,}")
        return value

    def number(self, name: str, default: float, *, infinite: bool = False) -> float:
        value = self.find(name)
        if value is None:
            return default
        try:
            result = float(value) if isinstance(value, int | float | str) else math.nan
        except (ValueError, OverflowError):
            result = math.nan
        if isinstance(value, bool) or math.isnan(result):
            raise self.fail(f"`{name}` is {brief(value)}; expected a number")
        if not infinite and math.isinf(result):
            raise self.fail(f"`{name}` is {brief(value)}; expected a finite number")
        return result

    def flag(self, name: str, default: bool) -> bool:
        value = self.find(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(f"`{name}` is {brief(value)}; expected true or false")
        return value

    def schedule(self, pattern_key: str, list_key: str, blocks_key: str) -> tuple[LayerKind, ...] | None:
        pattern, blocks = self.raw.get(pattern_key), self.find(list_key)
        own = [_one(block[BLOCK_TYPE]) for block in blocks_of(self.raw, blocks_key, MOST_LAYERS, self.source)]
        if own and blocks is None:
            blocks, list_key = own, f"{blocks_key}`'s `{BLOCK_TYPE}"
        elif own and blocks != own:
            raise self.fail(
                f"`{list_key}` and `{blocks_key}` describe different layers; expected the same schedule, "
                f"remove the wrong one"
            )
        if pattern is None and blocks is None:
            return None
        for key, value in ((pattern_key, pattern), (list_key, blocks)):
            if isinstance(value, str | list) and len(value) > MOST_LAYERS:
                raise self.fail(f"`{key}` has {len(value):,} layers; expected at most {MOST_LAYERS:,}")
        spelled: list[tuple[LayerKind, ...]] = []
        if pattern is not None:
            if not isinstance(pattern, str) or not pattern:
                raise self.fail(
                    f"`{pattern_key}` is {brief(pattern)}; expected a string of the letters "
                    f"{' '.join(PATTERN_LETTERS)}"
                )
            unknown = sorted(set(pattern) - PATTERN_LETTERS.keys())
            if unknown:
                place = pattern.index(unknown[0])
                *first, last = (f"{kind.letter} ({kind.title})" for kind in KINDS.values())
                raise self.fail(
                    f"`{pattern_key}` has the unknown layer letter {unknown[0]!r} at layer {place}; expected "
                    f"{', '.join(first)} or {last}"
                )
            spelled.append(tuple(PATTERN_LETTERS[letter] for letter in pattern))
        if blocks is not None:
            bad = (
                [b for b in blocks if not isinstance(b, str) or b not in BLOCK_NAMES]
                if isinstance(blocks, list)
                else blocks
            )
            if bad or not blocks:
                raise self.fail(
                    f"`{list_key}` has the unknown layer kind {brief(bad)}; expected a list of "
                    f"{listing(list(BLOCK_NAMES), 9)}"
                )
            spelled.append(tuple(BLOCK_NAMES[b] for b in blocks))
        if len(set(spelled)) > 1:
            raise self.fail(
                f"`{pattern_key}` and `{list_key}` describe different layers; expected the same schedule, "
                f"remove the wrong one"
            )
        return spelled[0]

    def time_step_limit(self) -> tuple[float, float]:
        value = self.find("time_step_limit")
        if value is None:
            return 0.0, math.inf
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise self.fail(f"`time_step_limit` is {brief(value)}; expected a pair of numbers")
        low, high = (
            default
            if v is None
            else _Parser({"time_step_limit": v}, self.source).number(
                "time_step_limit", default, infinite=True
            )
            for v, default in zip(value, (0.0, math.inf), strict=True)
        )
        if not 0 <= low < high:
            raise self.fail(f"`time_step_limit` is [{low}, {high}]; expected 0 <= low < high")
        return low, high

    def parse(self) -> NemotronHConfig:
        if self.raw.get("model_type") not in MODEL_TYPES:
            raise self.fail(
                f"`model_type` is {brief(self.raw.get('model_type'))}, expected 'nemotron_h'; nemoquant "
                f"quantizes the Nemotron-H family only, at the top or in a section such as `llm_config`"
            )
        layers = self.schedule("hybrid_override_pattern", "layers_block_type", BLOCKS)
        if layers is None:
            raise self.fail(
                f"no layer schedule; expected `hybrid_override_pattern`, `layers_block_type` or `{BLOCKS}`"
            )
        declared = self.raw.get("num_hidden_layers")
        if declared is not None and declared != len(layers):
            raise self.fail(
                f"`num_hidden_layers` is {brief(declared)}, but the layer schedule has {len(layers)} layers; "
                f"expected the same"
            )
        for key in ("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias"):
            if self.raw.get(key):
                raise self.fail(
                    f"`{key}` is {brief(self.raw[key])}, expected false; no published model of this family "
                    f"has biases in its projections"
                )
        for key, expected in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")):
            if self.raw.get(key, expected) != expected:
                raise self.fail(
                    f"`{key}` is {brief(self.raw[key])}, expected {expected!r}, the only one that this "
                    f"family has"
                )
        if self.raw.get("sliding_window") is not None:
            raise self.fail(
                f"`sliding_window` is {brief(self.raw['sliding_window'])}, expected null; this family "
                f"attends to the whole context"
            )
        modules = self.integer("num_nextn_predict_layers", 0, minimum=0, maximum=MOST_LAYERS)
        mtp = self.schedule("mtp_hybrid_override_pattern", "mtp_layers_block_type", MTP_BLOCKS)
        mtp = (mtp or ("attention", "moe")) if modules else ()
        if len(mtp) * modules > MOST_LAYERS:
            raise self.fail(
                f"`num_nextn_predict_layers` is {modules:,}, of {len(mtp):,} layers each; expected at most "
                f"{MOST_LAYERS:,} layers in all"
            )
        kinds = set(layers) | set(mtp)
        of_layers, of_mtp = self.sizes_of(layers, BLOCKS), self.sizes_of(mtp, MTP_BLOCKS)
        model = largest(of_mtp) | largest(of_layers)  # of the main model where it has the kind
        whole = _Parser(self.without_sizes() | model, self.source)
        config = NemotronHConfig(
            layers=layers,
            mtp_layers=mtp,
            mtp_modules=modules,
            vocab_size=self.integer("vocab_size"),
            hidden_size=self.integer("hidden_size"),
            norm_eps=self.number("layer_norm_epsilon", 1e-5),
            tie_word_embeddings=self.flag("tie_word_embeddings", False),
            max_position_embeddings=self.integer("max_position_embeddings", 4096),
            **whole.mamba("mamba" in kinds),
            **whole.experts("moe" in kinds),
            **whole.attention("attention" in kinds),
            **whole.mlp("mlp" in kinds),
            bos_token_id=next(iter(self.token_ids("bos_token_id")), None),
            eos_token_ids=self.token_ids("eos_token_id"),
            layer_sizes=differing(of_layers, model),
            mtp_layer_sizes=differing(of_mtp, model),
        )
        self.check_divisibility(config)
        self.check_count(config)
        return config

    def without_sizes(self) -> dict[str, Any]:
        """The keys that no single layer may have for itself."""
        sizes = {size for kind in KINDS.values() for size in kind.sizes}
        spellings = sizes | {alias for size in sizes for alias in ALIASES.get(size, ())}
        return {key: value for key, value in self.raw.items() if key not in spellings}

    def sizes_of(self, layers: Sequence[LayerKind], key: str) -> list[tuple[LayerKind, dict[str, Any]]]:
        """Kind and sizes of each layer; ``key`` is that of their blocks."""
        blocks, counts, seen = self.raw.get(key) or (), Counter(layers), Counter[LayerKind]()
        result = []
        for i, kind in enumerate(layers):
            where = f"{self.source}: layer {i} of `{key}`" if blocks else self.source
            fields = merged(self.raw, blocks[i] if blocks else {}, kind, ALIASES, where)
            fields = one_of_list(fields, "intermediate_size", seen[kind], counts[kind], where)
            seen[kind] += 1
            result.append((kind, _Parser(fields, where).sizes(kind)))
        return result

    def sizes(self, kind: LayerKind) -> dict[str, Any]:
        """The fields that a layer of a kind has for itself."""
        found = {
            **self.mamba(kind == "mamba"),
            **self.experts(kind == "moe"),
            **self.attention(kind == "attention"),
            **self.mlp(kind == "mlp"),
        }
        return {size: found[size] for size in KINDS[kind].sizes}

    def mlp(self, present: bool) -> dict[str, Any]:
        return {"intermediate_size": self.integer("intermediate_size") if present else 0}

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.raw.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= MOST_SIZE for i in ids):
            raise self.fail(f"`{name}` is {brief(value)}; expected a token id or a list of them")
        return tuple(ids)

    def attention(self, present: bool) -> dict[str, Any]:
        if not present:
            return {"num_attention_heads": 0, "num_key_value_heads": 0, "head_dim": 0}
        heads = self.integer("num_attention_heads")
        return {
            "num_attention_heads": heads,
            "num_key_value_heads": self.integer("num_key_value_heads", heads),
            "head_dim": self.integer("head_dim", max(1, self.integer("hidden_size") // heads)),
        }

    def mamba(self, present: bool) -> dict[str, Any]:
        sizes = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel")
        dtype = self.raw.get("mamba_ssm_cache_dtype") or "float32"
        dtype = "float32" if dtype == "auto" else dtype  # engines read "auto" as float32
        if dtype not in ("float32", "float16", "bfloat16"):
            raise self.fail(
                f"`mamba_ssm_cache_dtype` is {brief(dtype)}; expected float32, float16 or bfloat16"
            )
        return {
            **{name: self.integer(name) if present else 0 for name in sizes},
            "use_conv_bias": self.flag("use_conv_bias", True),
            "chunk_size": self.integer("chunk_size", 128),
            "time_step_limit": self.time_step_limit(),
            "time_step_min": self.number("time_step_min", 0.001),
            "mamba_ssm_cache_dtype": dtype,
        }

    def experts(self, present: bool) -> dict[str, Any]:
        shared = self.integer("n_shared_experts", 1, minimum=0) if present else 0
        return {
            "n_routed_experts": self.integer("n_routed_experts", maximum=MOST_EXPERTS) if present else 0,
            "num_experts_per_tok": self.integer("num_experts_per_tok") if present else 0,
            "n_shared_experts": shared,
            "moe_latent_size": self.integer("moe_latent_size", 0, minimum=0) if present else 0,
            "moe_intermediate_size": self.integer("moe_intermediate_size") if present else 0,
            "moe_shared_expert_intermediate_size": self.integer("moe_shared_expert_intermediate_size")
            if shared
            else 0,
            "routed_scaling_factor": self.number("routed_scaling_factor", 1.0),
            "norm_topk_prob": self.flag("norm_topk_prob", True),
            "n_group": self.integer("n_group", 1),
            "topk_group": self.integer("topk_group", 1),
        }

    def check_divisibility(self, config: NemotronHConfig) -> None:
        layers = [config.of_layer(i) for i in range(len(config.layers))]
        layers += [config.of_mtp_layer(j) for j in range(len(config.mtp_layers))]
        for own in dict.fromkeys(layers):
            self.check_layer(own)

    def check_layer(self, c: NemotronHConfig) -> None:
        for whole, part, a, b in (
            ("num_attention_heads", "num_key_value_heads", c.num_attention_heads, c.num_key_value_heads),
            ("mamba_num_heads", "n_groups", c.mamba_num_heads, c.n_groups),
            ("n_routed_experts", "n_group", c.n_routed_experts, c.n_group),
        ):
            if b and a % b:
                raise self.fail(
                    f"`{whole}` is {a}, which `{part}` = {b} does not divide; expected a multiple"
                )
        if c.num_experts_per_tok > c.n_routed_experts:
            raise self.fail(
                f"`num_experts_per_tok` is {c.num_experts_per_tok}, more than the {c.n_routed_experts} "
                f"experts of a layer"
            )
        open_experts = c.topk_group * (c.n_routed_experts // c.n_group)
        if c.n_routed_experts and (c.topk_group > c.n_group or c.num_experts_per_tok > open_experts):
            raise self.fail(
                f"`topk_group` is {c.topk_group} of `n_group` = {c.n_group} groups, which hold "
                f"{open_experts} experts for "
                f"`num_experts_per_tok` = {c.num_experts_per_tok}; expected enough of them"
            )

    def check_count(self, c: NemotronHConfig) -> None:
        """The number of tensors, counted without making the table of them."""
        layers = Counter((kind, c.of_layer(i)) for i, kind in enumerate(c.layers))
        layers.update((kind, c.of_mtp_layer(j)) for j, kind in enumerate(c.mtp_layers * c.mtp_modules))
        total = 0
        for (kind, own), count in layers.items():
            total += count * (1 + sum(1 for _ in KINDS[kind].tensors(own)))
            if total > MOST_TENSORS:  # at once: every layer may have other sizes, and 65,536 experts
                raise self.fail(
                    f"its {layers.total():,} layers would have more than {MOST_TENSORS:,} tensors "
                    f"(`n_routed_experts` is {own.n_routed_experts:,}); expected that many at most"
                )
