"""What defines a model, as data: a dataclass that travels through JSON and is checked when it is made."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from seqzoo.layers import Bidirectional
from seqzoo.mixer import SequenceMixer, create, nearest, registration
from seqzoo.models.parallel_mixers import ParallelMixers
from seqzoo.modules.mlp import MLPS
from seqzoo.modules.norm import EPS, NORMS
from seqzoo.version import __version__

FORMAT = 3
CHOICES = {"mlp": (*MLPS, "experts", "none"), "norm": tuple(NORMS), "norm_position": ("pre", "post")}

# what an entry of a pattern says of its block, beside its mixer
OF_BLOCK = ("mlp", "shared")

_Config = TypeVar("_Config", bound="BackboneConfig")


class Layer(NamedTuple):
    """What a block is built from.

    Attributes:
        mixer: A name, or a mapping that :func:`build_mixer` takes.
        mlp: The MLP.
        shared: The key under which this block's parameters are those of others too, or None.
    """

    mixer: str | dict[str, Any]
    mlp: str
    shared: str | None


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What the stack of blocks of a model is built from.

    Attributes:
        d_model: Width.
        n_layers: Blocks.
        pattern: The mixers: a registered name, or a list that repeats over the blocks, of names and of mappings with a
            name and options, ``["mamba", {"name": "attention", "n_heads": 4}]``. A mapping may say more of its block:

            * ``"parallel"``, in place of the name, a list of mixers beside one another
              (:class:`seqzoo.models.ParallelMixers`), ``{"parallel": ["attention", {"name": "mamba", "expand": 1}]}``;
            * ``"mlp"``, this block's, in place of the model's, ``{"name": "mamba", "mlp": "none"}``;
            * ``"shared"``, any word: all blocks of this word are one, with one set of parameters, at several depths,
              each with a state of its own, ``{"name": "attention", "shared": "global"}``.
        mlp: ``"gated"`` (SwiGLU), ``"plain"`` (GELU), ``"experts"`` (a mixture of gated ones, whose choices are hard:
            :class:`seqzoo.modules.experts.Experts`) or ``"none"``.
        mlp_ratio: Hidden units of the MLP, or of each expert, in multiples of ``d_model``, rounded up to a multiple of
            16; None means 8/3 for the gated ones and 4 for the plain one, which hold equally many weights.
        mlp_chunk_size: Tokens whose hidden units of the MLP exist at once, forward and backward, which computes them
            anew (https://arxiv.org/abs/2407.15892); None means all. Such a model compiles for fixed sizes alone
            (``dynamic=False``).
        n_experts: Experts of an MLP of experts.
        top_k: Experts that a token goes to, at most ``n_experts``.
        norm: ``"rms"``, ``"layer"``, or ``"batch"``, over all true tokens of a batch (whole sequences alone, no state).
        norm_eps: Epsilon of the norms.
        norm_position: ``"pre"``, before mixer and MLP, or ``"post"``, after the residual.
        residual_in_fp32: Whether a model of float16 or bfloat16 parameters sums its branches in float32; with
            ``norm_position="pre"`` alone.
        dropout: Probability with which the outputs of mixers and MLPs are dropped in training.
        checkpoint_blocks: Whether training keeps of each block its inputs alone and computes the block anew in the
            backward pass (https://arxiv.org/abs/1604.06174), with the same dropout.
        max_positions: Longest sequence of a model with learned positions; None means without.
        auxiliary_weight: Factor of the auxiliary losses of mixers and experts in the loss.
        format: Version of this description; an older one becomes the present.

    Raises:
        TypeError: If a value has the wrong type, or a mixer lacks an option.
        ValueError: If a value is out of range, or there is no mixer of that name.
    """

    d_model: int
    n_layers: int
    pattern: str | list[str | dict[str, Any]]
    mlp: str = "gated"
    mlp_ratio: float | None = None
    mlp_chunk_size: int | None = None
    n_experts: int = 8
    top_k: int = 2
    norm: str = "rms"
    norm_eps: float = EPS
    norm_position: str = "pre"
    residual_in_fp32: bool = False
    dropout: float = 0.0
    checkpoint_blocks: bool = False
    max_positions: int | None = None
    auxiliary_weight: float = 0.01
    format: int = FORMAT

    def __post_init__(self) -> None:
        _check_format(self.format)
        object.__setattr__(self, "format", FORMAT)
        for name in ("d_model", "n_layers", "n_experts", "top_k"):
            _check_integer(name, getattr(self, name))
        for name in ("max_positions", "mlp_chunk_size"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name))
        for name, known in CHOICES.items():
            _check_choice(name, getattr(self, name), known)
        for name in ("residual_in_fp32", "checkpoint_blocks"):
            _check_flag(name, getattr(self, name))
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k must be at most n_experts, {self.n_experts}, got {self.top_k}")
        if self.norm == "batch" and (self.mlp_chunk_size is not None or self.checkpoint_blocks):
            # its statistics are those of all tokens, and each run moves its averages
            raise ValueError(
                "mlp_chunk_size and checkpoint_blocks compute anew, which norm='batch' would count twice; use "
                "norm='rms' or 'layer'"
            )
        if self.residual_in_fp32 and self.norm_position != "pre":
            raise ValueError(
                f"residual_in_fp32 needs norm_position='pre', got {self.norm_position!r}, whose residual is a norm's "
                "output"
            )
        _check_number("dropout", self.dropout, below=1.0)
        _check_number("auxiliary_weight", self.auxiliary_weight)
        _check_number("norm_eps", self.norm_eps)
        if self.norm_eps == 0:
            raise ValueError("norm_eps must be positive, got 0, which makes a token of zeros not a number")
        if self.mlp_ratio is not None:
            _check_number("mlp_ratio", self.mlp_ratio)
            if self.mlp_ratio == 0:
                raise ValueError("mlp_ratio must be positive, got 0; mlp='none' leaves the MLP out")
        # a copy, which the caller's changes do not reach; lists for tuples, which JSON does not have
        object.__setattr__(self, "pattern", _plain(self.pattern))
        self._check_pattern()

    def _check_pattern(self) -> None:
        if not self.pattern:
            raise ValueError(f"pattern must name at least one mixer, got {self.pattern!r}")
        entries = self.entries()
        first: dict[str, tuple[Layer, Any]] = {}
        # on the meta device a mixer costs nothing, and its own checks see every option
        with torch.device("meta"):
            for entry in entries:
                layer = self._layer(entry)
                build_mixer(layer.mixer, self.d_model)
                if layer.shared is None:
                    continue
                other, words = first.setdefault(layer.shared, (layer, entry))
                if other != layer:
                    raise ValueError(
                        f"entries of pattern with shared={layer.shared!r} are one block and must agree, got {words!r} "
                        f"and {entry!r}; make them equal, or give one another word"
                    )

    def entries(self) -> list[str | dict[str, Any]]:
        """The pattern as a list, once."""
        if not isinstance(self.pattern, (str, list)):
            raise TypeError(f"pattern must be a name or a list, got {self.pattern!r}")
        return [self.pattern] if isinstance(self.pattern, str) else self.pattern

    def layers(self) -> list[Layer]:
        """What every block is built from."""
        layers = [self._layer(entry) for entry in self.entries()]
        return [layers[index % len(layers)] for index in range(self.n_layers)]

    def mixers(self) -> list[SequenceMixer]:
        """Builds the mixer of every block; blocks that are shared have the same one."""
        shared: dict[str, SequenceMixer] = {}
        mixers = []
        for layer in self.layers():
            mixer = shared.get(layer.shared) if layer.shared is not None else None
            if mixer is None:
                mixer = self._build_mixer(layer)
            if layer.shared is not None:
                shared[layer.shared] = mixer
            mixers.append(mixer)
        return mixers

    def _build_mixer(self, layer: Layer) -> SequenceMixer:
        return build_mixer(layer.mixer, self.d_model)

    def _layer(self, entry: Any) -> Layer:
        """Divides an entry of the pattern into what concerns its block and what its mixer."""
        if not isinstance(entry, Mapping):
            return Layer(entry, self.mlp, None)
        mixer = {name: value for name, value in entry.items() if name not in OF_BLOCK}
        mlp, shared = entry.get("mlp", self.mlp), entry.get("shared")
        _check_choice("mlp", mlp, CHOICES["mlp"])
        if "shared" in entry and not (isinstance(shared, str) and shared):
            raise TypeError(f"shared must be a word that blocks have in common, got {shared!r}")
        return Layer(mixer["name"] if mixer.keys() == {"name"} else mixer, mlp, shared)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which :meth:`from_dict` takes."""
        return {field.name: copy.deepcopy(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def to_json(self) -> str:
        """JSON text, which :meth:`from_json` takes."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """Builds from plain data; ``format`` may be left out.

        Raises:
            TypeError: If a value is missing, or has the wrong type.
            ValueError: If a name is unknown, a value out of range, or the format newer than this version reads.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a {cls.__name__} is made of names and values, a JSON object, got {type(values).__name__}")
        # first, since a newer format is what explains names that are unknown here
        _check_format(values.get("format", FORMAT))
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ValueError(f"{cls.__name__} has no {name!r}; {nearest(name, fields)}")
        missing = [name for name, field in fields.items() if _required(field) and name not in values]
        if missing:
            raise TypeError(f"{cls.__name__} needs {', '.join(missing)}")
        return cls(**values)

    @classmethod
    def from_json(cls: type[_Config], text: str) -> _Config:
        """Builds from JSON text.

        Raises:
            TypeError: If the text is not an object of names and values, or as :meth:`from_dict` does.
            ValueError: If the text is not JSON, or as :meth:`from_dict` does.
        """
        return cls.from_dict(json.loads(text))


@dataclass(frozen=True, kw_only=True)
class ModelConfig(BackboneConfig):
    """What a language model is built from: :class:`BackboneConfig`, and

    Attributes:
        vocab_size: Tokens of the vocabulary.
        tie_embeddings: Whether the output layer is the embedding's matrix.
    """

    vocab_size: int
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_integer("vocab_size", self.vocab_size)
        _check_flag("tie_embeddings", self.tie_embeddings)


POOLINGS = ("mean", "last", "first")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(BackboneConfig):
    """What a classifier of sequences is built from: :class:`BackboneConfig`, and

    Attributes:
        n_classes: Classes.
        vocab_size: Tokens of the vocabulary, where sequences are of tokens; else None.
        n_features: Numbers that every position holds, where sequences are of those; else None.
        pooling: What of a sequence's outputs is classified: their ``"mean"``, the ``"last"`` or the ``"first"``.
        bidirectional: Whether every mixer runs from both ends, as the sum of two (:class:`seqzoo.Bidirectional`).
    """

    n_classes: int
    vocab_size: int | None = None
    n_features: int | None = None
    pooling: str = "mean"
    bidirectional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_integer("n_classes", self.n_classes)
        if (self.vocab_size is None) == (self.n_features is None):
            raise ValueError(
                "a classifier reads tokens or numbers: give vocab_size or n_features, one of them, got "
                f"{self.vocab_size} and {self.n_features}"
            )
        for name in ("vocab_size", "n_features"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name))
        _check_choice("pooling", self.pooling, POOLINGS)
        _check_flag("bidirectional", self.bidirectional)

    def _build_mixer(self, layer: Layer) -> SequenceMixer:
        mixer = super()._build_mixer(layer)
        return Bidirectional(mixer) if self.bidirectional else mixer


def build_mixer(entry: str | Mapping[str, Any], d_model: int) -> SequenceMixer:
    """Builds the mixer that an entry of a pattern describes, or several in parallel.

    Raises:
        TypeError: If the entry is neither a name nor a mapping, or the mixer has no such option.
        ValueError: If there is no mixer of that name, an option's value does not fit, or fewer than 2 are in parallel.
    """
    if isinstance(entry, str):
        return create(entry, d_model=d_model)
    if not isinstance(entry, Mapping):
        raise TypeError(f"an entry of pattern is a name or a mapping with a name and options, got {entry!r}")
    options = dict(entry)
    if "parallel" in options:
        branches = options.pop("parallel")
        if options:
            raise ValueError(
                f"an entry of pattern with 'parallel' has beside it {' and '.join(map(repr, OF_BLOCK))} alone, got "
                f"{', '.join(map(repr, options))}; {nearest(str(next(iter(options))), OF_BLOCK)}"
            )
        if not isinstance(branches, list | tuple) or len(branches) < 2:
            raise ValueError(f"parallel must be a list of at least 2 mixers, got {branches!r}")
        for branch in branches:
            wrong = [name for name in OF_BLOCK if isinstance(branch, Mapping) and name in branch]
            if wrong:
                raise ValueError(f"{wrong[0]!r} belongs beside 'parallel', not into it, got {dict(branch)!r}")
        return ParallelMixers([build_mixer(branch, d_model) for branch in branches])
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"an entry of pattern needs a name, or 'parallel', got {dict(entry)!r}")
    if "d_model" in options:
        raise ValueError(f"d_model belongs to the model, not to the entry {name!r} of pattern")
    known = [*inspect.signature(registration(name).mixer).parameters, *OF_BLOCK]
    for option in options:
        if option not in known:
            raise TypeError(f"{name} has no option {option!r}; {nearest(str(option), known)}")
    return create(name, d_model=d_model, **options)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _check_format(value: Any) -> None:
    _check_integer("format", value)
    if value > FORMAT:
        raise ValueError(
            f"format {value} is newer than {FORMAT}, the newest that seqzoo {__version__} reads; "
            "upgrade with pip install -U seqzoo"
        )


def _check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")


def _check_number(name: str, value: Any, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= value < below:
        raise ValueError(f"{name} must be at least 0 and below {below}, got {value}")


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a name, got {value!r}")
    if value not in known:
        raise ValueError(f"there is no {name} {value!r}; {nearest(value, known)}")
