"""Mixture of memories: a router sends every token to a few of several matrix states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.mixer import Mixed, SequenceMixer, State, StateSpec, create, list_mixers, nearest, register, registration
from seqzoo.modules.heads import HeadMixer
from seqzoo.modules.options import check_count, check_flags
from seqzoo.modules.routing import Columns, PartLinear, Router, Streams
from seqzoo.packing import Packing

# children of a core that all memories share
SHARED = ("in_proj", "conv1d", "gate_proj", "norm", "out_proj")


@register(
    "mixture_of_memories", paper="MoM: Linear Sequence Modeling with Mixture-of-Memories", arxiv="2502.13685", year=2025
)
class MixtureOfMemories(SequenceMixer):
    """Mixture of memories, "MoM", https://arxiv.org/abs/2502.13685, section 3.

    With M memories of any core, as the gated delta rule, and ``p_t = softmax(W_r x_t)``::

        chosen_t = the top_k memories of greatest p_t        w_t = p_t over its sum over chosen_t
        S^m_t = Phi^m(S^m_{t-1}, x_t) for m in chosen_t, else S^m_{t-1}: neither written nor decayed
        o_t = sum over chosen m of w_t^m (q_t S^m_t), plus q_t S^shared_t, the memory that every token goes to
        y_t = W_o (norm(o_t) gate(x_t))

    Each memory has its own keys, values and gates: the core's linear maps of x, of a gate of several maps the first.
    Everything else is shared: queries, the convolution's taps, the output's norm, gate and projection, the constants of
    the decay. A memory sees its own tokens as a sequence without gaps: the convolution runs along that, and positions
    (RetNet) count it, as in the authors' code.

    With ``top_k=1`` the weight is 1 whatever the router says, which then learns from the auxiliary loss alone.

    Auxiliary loss: for each sequence of T tokens ``M sum_m f_m P_m``, f_m the share of its choices that fell on memory
    m and P_m the mean of p^m, section 2.2 of https://arxiv.org/abs/2101.03961; the mean over sequences, weighted by
    their tokens. It is 1 where all memories have the same share. The shared memory takes no part.

    State: that of the core, each tensor with a dimension of the memories behind the batch, the shared one last:
    ``{"S": (B, M + 1, H, K, V)}``, and ``"conv"`` where the core has one.

    Args:
        d_model: Width of inputs and outputs.
        core: A registered mixer with q, k and v of every head, or a mapping of its name and options,
            ``{"name": "gla", "n_heads": 4}``.
        n_memories: M.
        top_k: Memories that a token goes to, at most M.
        shared_memory: Whether there is one more memory that all tokens go to.

    Raises:
        TypeError: If the core is neither a name nor a mapping, or has no such option.
        ValueError: If the core has no keys and values of its own, or ``top_k`` exceeds ``n_memories``.
    """

    packs = True
    discontinuous = True
    variants = (
        {"core": {"name": "gated_deltanet", "n_heads": 2}, "n_memories": 3},
        {"core": {"name": "retnet", "n_heads": 2, "d_conv": 2, "bias": True}, "top_k": 3, "shared_memory": False},
        {"core": {"name": "kda", "n_heads": 4, "d_conv": None}, "n_memories": 2, "top_k": 2},
    )

    def __init__(
        self,
        d_model: int,
        *,
        core: str | Mapping[str, Any] = "gated_deltanet",
        n_memories: int = 4,
        top_k: int = 2,
        shared_memory: bool = True,
    ) -> None:
        super().__init__(d_model)
        check_flags(shared_memory=shared_memory)
        check_count("n_memories", n_memories)
        self.router = Router(d_model, n_memories, top_k)
        self.n_memories, self.shared_memory = n_memories, shared_memory
        self.n_parts = n_memories + shared_memory
        made = build_core(core, d_model)
        keys, _, values = made.widths
        self.key_values, bias = keys + values, made.in_proj.bias is not None
        self.q_proj = nn.Linear(d_model, keys, bias=bias)
        self.core, gates = without_projections(made)
        self.memory_proj = PartLinear(d_model, self.key_values + gates, self.n_parts, bias=bias)
        names = tuple(f"core.{name}" for name in made.fp32_parameters)
        self.fp32_parameters = names  # pyright: ignore - each mixture has those of its core
        self.reset_parameters()

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Routes, runs all memories over their tokens as packed sequences, adds up, reads."""
        batch, total = x.shape[:2]
        if packing is None:
            # a batch of none is one sequence without tokens, whose state is not handed out
            sequences = max(batch, 1)
            sequence = torch.arange(batch, device=x.device)[:, None].expand(batch, total).flatten()
        else:
            sequences, sequence = packing.n_sequences, packing.sequence_index
        tokens = x.flatten(0, 1)
        choices, weights, probabilities = self.router(tokens)
        if self.shared_memory:
            choices, weights = F.pad(choices, (0, 1), value=self.n_memories), F.pad(weights, (0, 1), value=1.0)
        streams = Streams.of(choices, self.n_parts, sequence, sequences)
        q = streams.spread(self.q_proj(tokens))
        key_values, gates = self.memory_proj(tokens, streams).tensor_split((self.key_values,), dim=-1)
        rows = None
        if state is not None and (packing is not None or batch > 0):
            rows = {name: value.transpose(0, 1).flatten(0, 1) for name, value in state.items()}
        o, after = self.core.remember(gates[None], torch.cat((q, key_values), dim=-1)[None], rows, streams.packing)
        o = streams.gather(o[0].flatten(1), weights).to(o.dtype).view(batch, total, *o.shape[2:])
        after = {name: value.unflatten(0, (self.n_parts, -1)).transpose(0, 1) for name, value in after.items()}
        if packing is None:
            after = {name: value[:batch] for name, value in after.items()}
        if "conv" in after:
            # under autocast the projections are narrower than x, whose dtype the state of a convolution has
            after["conv"] = after["conv"].to(x.dtype)
        return Mixed(self.core.read(x, o), after, self.imbalance(probabilities, sequence, streams.packing.lengths))

    def imbalance(self, probabilities: Tensor, sequence: Tensor, lengths: Tensor) -> Tensor:
        """The auxiliary loss.

        Args:
            probabilities: ``(N, M)``.
            sequence: int64 ``(N,)``.
            lengths: ``(P S,)``, the tokens of every memory and sequence, those of one memory behind one another.
        """
        counts = lengths.unflatten(0, (self.n_parts, -1))[: self.n_memories].T.to(probabilities.dtype)
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        return self.n_memories * (probabilities * shares[sequence]).sum() / max(probabilities.shape[0], 1)

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """The core's state of every memory."""
        spec = self.core.state_spec(batch_size, dtype)
        return {name: ((batch_size, self.n_parts, *shape[1:]), kind) for name, (shape, kind) in spec.items()}

    def flops(self, length: int) -> int:
        """2 a matrix weight and token, a memory's for its own tokens alone."""
        idle = (self.n_memories - self.router.top_k) / self.n_parts
        return super().flops(length) - int(2 * length * idle * self.memory_proj.weight.numel())

    def reset_parameters(self) -> None:
        """Those of the core; every memory's maps as PyTorch's linear layers, with zero biases."""
        for part in (self.router, self.q_proj, self.memory_proj, self.core):
            part.reset_parameters()
        if self.q_proj.bias is not None:
            nn.init.zeros_(self.q_proj.bias)


def build_core(core: str | Mapping[str, Any], d_model: int) -> HeadMixer:
    """Builds the mixer whose recurrence the memories have.

    Raises:
        TypeError: If it is neither a name nor a mapping with a name, or the mixer has no such option.
        ValueError: If there is no such mixer, it is none with q, k and v of every head, or an option does not fit.
    """
    if not isinstance(core, str | Mapping):
        raise TypeError(f"core must be a name or a mapping with a name and options, got {core!r}")
    options = {"name": core} if isinstance(core, str) else dict(core)
    name = options.pop("name", None)
    # one with a way of its own to mix (prefix linear attention) would lose what is not in its recurrence
    mixers = {one: registration(one).mixer for one in list_mixers()}
    known = [one for one, mixer in mixers.items() if issubclass(mixer, HeadMixer) and mixer.mix is HeadMixer.mix]
    if name not in known:
        raise ValueError(
            f"core must be a mixer with keys and values of every head, got {name!r}; {nearest(str(name), known)}"
        )
    if "d_model" in options:
        raise ValueError("d_model belongs to the mixture, not to its core")
    return cast(HeadMixer, create(name, d_model=d_model, **options))


def without_projections(core: HeadMixer) -> tuple[HeadMixer, int]:
    """Takes a core's linear maps of the tokens away: what they give comes as columns of x, whose number is returned.

    The maps are those that :meth:`HeadMixer.remember` names.
    """
    width = 0
    for name, child in list(core.named_children()):
        if name in SHARED:
            continue
        first = child[0] if isinstance(child, nn.Sequential) else child
        if not isinstance(first, nn.Linear):
            continue
        columns = Columns(width, width + first.out_features)
        width = columns.end
        if isinstance(child, nn.Sequential):
            child[0] = columns
        else:
            setattr(core, name, columns)
    del core.in_proj
    return core, width
