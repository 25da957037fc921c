"""Published families of models: what of transformers' ``config.json`` and tensors is what of a ``LanguageModel``.

A family is one entry of ``FAMILIES``, which serves reading and writing.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from seqzoo.mixer import registration
from seqzoo.models.config import ModelConfig
from seqzoo.modules.heads import count_heads
from seqzoo.modules.options import scaled_width

# keys that what a trained model computes does not depend on
IGNORED = frozenset(
    (
        # about the file; the tensors have their own dtypes
        *("model_type", "architectures", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash"),
        *("dtype", "torch_dtype"),
        # initialisation
        *("initializer_range", "rescale_prenorm_residual", "time_step_scale", "time_step_init_scheme"),
        # which of its implementations transformers takes, and in which form it answers
        *("use_cache", "use_mambapy", "use_falcon_mambapy", "use_associative_scan", "_attn_implementation_autoset"),
        *("output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder"),
        "chunk_size",
        # tokens, generation, other heads
        *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "unk_token_id", "tokenizer_class"),
        *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty"),
        *("id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task"),
        # of the format from which the first weights were converted
        *("fused_add_norm", "pad_vocab_size_multiple"),
    )
)
# of Mamba-2: the range of steps that limits none, and the width of a head where none is given
NO_LIMIT = [0.0, math.inf]
HEAD = 64
KINDS = {bool: "true or false", int: "an integer", float: "a number"}


class Obstacle(ValueError):
    """Raised for what the other side cannot express; its arguments are all that is in the way, in words."""

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


@dataclass(frozen=True, kw_only=True)
class Family:
    """The models of one ``model_type``.

    Attributes:
        architecture: The class of transformers.
        mixer: The registered name of the mixer of every block.
        fields: Keys of config.json that are fields of ModelConfig: the field, and the value of an absent key.
        options: Keys that are options of the mixer: the option, and the value of an absent key.
        implied_fields: Fields of ModelConfig that every model of the family has.
        implied_options: Options of the mixer that every model of the family has.
        combined: Keys that are options only together, with the values of absent ones.
        combine: The options that those keys are, of all keys.
        divide: Those keys, of all fields and all options; an Obstacle where they have no equal.
        implied: Keys that may have these values alone; an absent one has the first.
        repeated: Keys that repeat another one.
        names: Patterns of the model's tensor names, and what those are in the file.
        aliases: Names that tensors have in some files.
    """

    architecture: str
    mixer: str
    fields: Mapping[str, tuple[str, Any]]
    options: Mapping[str, tuple[str, Any]]
    implied_fields: Mapping[str, Any]
    implied_options: Mapping[str, Any]
    combined: Mapping[str, Any]
    combine: Callable[[Mapping[str, Any]], dict[str, Any]]
    divide: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    implied: Mapping[str, tuple[Any, ...]]
    repeated: Mapping[str, str]
    names: tuple[tuple[str, str], ...]
    aliases: Mapping[str, str]

    def rename(self, name: str) -> str:
        """The name in the file of a tensor of the model."""
        for pattern, other in self.names:
            match = re.fullmatch(pattern, name)
            if match is not None:
                return match.expand(other)
        raise Obstacle(f"{self.architecture} has no tensor {name}")

    def read(self, values: Mapping[str, Any]) -> ModelConfig:
        """The configuration of the model that a config.json describes.

        Raises:
            Obstacle: If a key or a value has no equal.
        """
        keys = {**self.fields, **self.options}
        defaults = {key: default for key, (_, default) in keys.items()} | dict(self.combined)
        known = {*defaults, *self.implied, *self.repeated, *IGNORED}
        problems = [f"{key} = {value!r} has no equal here" for key, value in values.items() if key not in known]
        for key, (_, default) in keys.items():
            if key in values and not _is_like(values[key], default):
                problems.append(f"{key} must be {KINDS[type(default)]}, got {values[key]!r}")
        for key, allowed in self.implied.items():
            if values.get(key, allowed[0]) not in allowed:
                problems.append(f"{key} = {values[key]!r} has no equal here, {key} = {allowed[0]!r} has")
        for key, other in self.repeated.items():
            if key in values and values[key] != values.get(other, values[key]):
                problems.append(f"{key} = {values[key]!r} contradicts {other} = {values[other]!r}")
        if problems:
            raise Obstacle(*problems)
        complete = {**defaults, **values}
        options = {option: complete[key] for key, (option, _) in self.options.items()}
        entry = {"name": self.mixer, **self.implied_options, **options, **self.combine(complete)}
        fields = {field: complete[key] for key, (field, _) in self.fields.items()}
        try:
            return ModelConfig(**self.implied_fields, **fields, pattern=[entry])
        except (TypeError, ValueError) as error:
            # whose words are our names
            named = [f"{key} is {own} here" for key, (own, _) in keys.items() if re.search(rf"\b{own}\b", str(error))]
            raise Obstacle("; ".join([str(error), *named])) from error

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The contents of config.json for the model of a configuration.

        Raises:
            Obstacle: If a field or an option has no equal.
        """
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        problems = [
            f"{field}={fields[field]!r} instead of {value!r}"
            for field, value in self.implied_fields.items()
            if fields[field] != value
        ]
        described = config.layers()
        if any(one.shared is not None for one in described):
            raise Obstacle(*problems, "shared blocks instead of one a layer")
        if any(isinstance(one.mixer, Mapping) and "parallel" in one.mixer for one in described):
            raise Obstacle(*problems, "mixers in parallel instead of one a block")
        problems += [
            f"mlp={one.mlp!r} of a block instead of {self.implied_fields['mlp']!r}"
            for one in described
            if one.mlp not in (self.implied_fields["mlp"], config.mlp)
        ][:1]
        layers = [_resolved(one.mixer) for one in described]
        others = sorted({name for name, _ in layers if name != self.mixer})
        if others:
            raise Obstacle(*problems, f"pattern with {', '.join(others)} instead of {self.mixer} alone")
        options = layers[0][1]
        for option, value in options.items():
            different = [other[option] for _, other in layers if other[option] != value]
            if different:
                problems.append(f"{option}={value!r} and {different[0]!r} instead of one value for all blocks")
        problems += [
            f"{option}={options[option]!r} instead of {value!r}"
            for option, value in self.implied_options.items()
            if options[option] != value
        ]
        values: dict[str, Any] = {"architectures": [self.architecture]}
        for given, keys in ((fields, self.fields), (options, self.options)):
            for key, (own, default) in keys.items():
                if _is_like(given[own], default):
                    values[key] = type(default)(given[own])
                else:
                    problems.append(f"{own}={given[own]!r} instead of {KINDS[type(default)]}")
        try:
            values |= self.divide(fields, options)
        except Obstacle as obstacle:
            problems += obstacle.args
        if problems:
            raise Obstacle(*problems)
        return values


def find_family(values: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        Obstacle: If it is none of those known.
    """
    name = values.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    if name is None and "model" in values:
        raise Obstacle("it is one of seqzoo's own, which from_pretrained reads")
    raise Obstacle(f"model_type = {name!r} has no equal here, known are {', '.join(sorted(FAMILIES))}")


def publish(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that a model belongs to, and the contents of its config.json.

    Raises:
        Obstacle: If it belongs to none; the arguments are those of the nearest.
    """
    obstacles: dict[str, Obstacle] = {}
    for name, family in FAMILIES.items():
        try:
            return family, {"model_type": name, **family.write(config)}
        except Obstacle as obstacle:
            obstacles[name] = obstacle
    entry = config.layers()[0].mixer
    first = entry if isinstance(entry, str) else entry.get("name")
    nearest = min(obstacles, key=lambda name: (FAMILIES[name].mixer != first, len(obstacles[name].args)))
    raise Obstacle(f"no published format holds this model; in the way of the nearest, {nearest}: {obstacles[nearest]}")


def _resolved(entry: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of an entry of a pattern, defaults included."""
    given = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = given.pop("name")
    parameters = inspect.signature(registration(name).mixer).parameters.values()
    return name, {one.name: one.default for one in parameters if one.name != "d_model"} | given


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a default; integers are numbers, truth values are not."""
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def _combine_mamba(values: Mapping[str, Any]) -> dict[str, Any]:
    expand, inner, rank = values["expand"], values["intermediate_size"], values["time_step_rank"]
    if values["hidden_size"] < 1:
        raise Obstacle(f"hidden_size must be at least 1, got {values['hidden_size']}")
    if inner is None:
        if not _is_like(expand, 1.0):
            raise Obstacle(f"expand must be a number, got {expand!r}")
    elif not _is_like(inner, 1):
        raise Obstacle(f"intermediate_size must be an integer, got {inner!r}")
    else:
        # where the two disagree, as in falcon-mamba-7b, the tensors have the intermediate size
        expand = inner / values["hidden_size"]
    if rank != "auto" and not _is_like(rank, 1):
        raise Obstacle(f"time_step_rank must be an integer or 'auto', got {rank!r}")
    return {
        "expand": int(expand) if expand == int(expand) else expand,
        "dt_rank": -(-values["hidden_size"] // 16) if rank == "auto" else rank,
    }


def _divide_mamba(fields: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    d_model, rank = fields["d_model"], options["dt_rank"]
    return {
        # transformers takes integers alone, and the intermediate size where the two disagree
        "expand": max(1, round(options["expand"])),
        "intermediate_size": scaled_width(d_model, "expand", options["expand"]),
        "time_step_rank": -(-d_model // 16) if rank is None else rank,
    }


def _combine_mamba2(values: Mapping[str, Any]) -> dict[str, Any]:
    heads, size, expand, width = (values[key] for key in ("num_heads", "head_dim", "expand", "hidden_size"))
    problems = [
        f"{key} must be an integer, got {values[key]!r}"
        for key in ("num_heads", "head_dim", "expand")
        if not _is_like(values[key], 1)
    ]
    low, high = _limit(values["time_step_limit"])
    if not problems and heads * size != expand * width:
        problems.append(f"num_heads * head_dim = {heads * size} contradicts expand * hidden_size = {expand} * {width}")
    if not problems and values["intermediate_size"] not in (None, expand * width):
        problems.append(f"intermediate_size = {values['intermediate_size']!r} contradicts expand * hidden_size")
    if problems:
        raise Obstacle(*problems)
    norm_eps = values["layer_norm_epsilon"]
    return {"n_heads": heads, "head_dim": size, "expand": expand, "dt_limit": [low, high], "norm_eps": norm_eps}


def _divide_mamba2(fields: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    expand, problems = options["expand"], []
    if expand != int(expand):
        problems.append(f"expand={expand!r} instead of an integer")
    if options["norm_eps"] != fields["norm_eps"]:
        problems.append(f"norm_eps={options['norm_eps']!r} of the mixer instead of {fields['norm_eps']!r}, the model's")
    if problems:
        raise Obstacle(*problems)
    heads, size = count_heads(int(expand * fields["d_model"]), options["n_heads"], options["head_dim"], HEAD)
    values = {"expand": int(expand), "num_heads": heads, "head_dim": size}
    limit = [float(end) for end in options["dt_limit"]]
    # absent where there is none: versions of transformers write an infinity each in its own way
    return values if limit == NO_LIMIT else {**values, "time_step_limit": limit}


def _limit(value: Any) -> tuple[float, float]:
    """The range of steps; JSON has no infinity, which is Python's word for it or, in newer files, a tag."""
    ends = list(value) if isinstance(value, list | tuple) else []
    ends = [math.inf if end == {"__float__": "Infinity"} else end for end in ends]
    if len(ends) != 2 or not all(_is_like(end, 1.0) for end in ends):
        raise Obstacle(f"time_step_limit must be two numbers, got {value!r}")
    return float(ends[0]), float(ends[1])


_MAMBA = Family(
    architecture="MambaForCausalLM",
    mixer="mamba",
    fields={
        "vocab_size": ("vocab_size", 50280),
        "hidden_size": ("d_model", 768),
        "num_hidden_layers": ("n_layers", 32),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "residual_in_fp32": ("residual_in_fp32", True),
        "tie_word_embeddings": ("tie_embeddings", True),
    },
    options={
        "state_size": ("d_state", 16),
        "conv_kernel": ("d_conv", 4),
        "use_bias": ("bias", False),
        "use_conv_bias": ("conv_bias", True),
        "time_step_min": ("dt_min", 0.001),
        "time_step_max": ("dt_max", 0.1),
        "time_step_floor": ("dt_init_floor", 1e-4),
    },
    implied_fields={"mlp": "none", "norm": "rms", "norm_position": "pre", "max_positions": None},
    implied_options={"norm_eps": None},
    combined={"expand": 2, "intermediate_size": None, "time_step_rank": "auto"},
    combine=_combine_mamba,
    divide=_divide_mamba,
    implied={"hidden_act": ("silu", "swish"), "rms_norm": (True,), "ssm_cfg": ({},)},
    repeated={"d_model": "hidden_size", "n_layer": "num_hidden_layers", "d_inner": "intermediate_size"},
    names=(
        (r"embedding\.(.*)", r"backbone.embeddings.\1"),
        (r"backbone\.blocks\.(\d+)\.mixer_norm\.(.*)", r"backbone.layers.\1.norm.\2"),
        (r"backbone\.blocks\.(\d+)\.mixer\.(.*)", r"backbone.layers.\1.mixer.\2"),
        (r"backbone\.norm\.(.*)", r"backbone.norm_f.\1"),
        (r"head\.(.*)", r"lm_head.\1"),
    ),
    aliases={"backbone.embedding.weight": "backbone.embeddings.weight"},
)

FAMILIES: dict[str, Family] = {
    "mamba": _MAMBA,
    "falcon_mamba": dataclasses.replace(
        _MAMBA,
        architecture="FalconMambaForCausalLM",
        options={**_MAMBA.options, "mixer_rms_eps": ("norm_eps", 1e-6)},
        implied_options={},
    ),
    "mamba2": dataclasses.replace(
        _MAMBA,
        architecture="Mamba2ForCausalLM",
        mixer="mamba2",
        fields={
            **_MAMBA.fields,
            "vocab_size": ("vocab_size", 32768),
            "hidden_size": ("d_model", 4096),
            "num_hidden_layers": ("n_layers", 64),
            "tie_word_embeddings": ("tie_embeddings", False),
        },
        options={**_MAMBA.options, "state_size": ("d_state", 128), "n_groups": ("n_groups", 8)},
        implied_options={},
        combined={
            "num_heads": 128,
            "head_dim": 64,
            "expand": 2,
            "intermediate_size": None,
            "time_step_limit": NO_LIMIT,
            # without effect: Mamba-2 projects to a step a head, and always gates before the norm
            "time_step_rank": "auto",
            "norm_before_gate": False,
        },
        combine=_combine_mamba2,
        divide=_divide_mamba2,
        implied={"hidden_act": ("silu", "swish"), "rms_norm": (True,)},
    ),
}
