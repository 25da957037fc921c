"""Both directions from any causal mixer."""

from __future__ import annotations

import copy
from typing import Literal, cast

import torch
from torch import Tensor, nn

from seqzoo.mixer import Mixed, SequenceMixer, State, StateSpec
from seqzoo.modules.convolution import ConvolutionMixer
from seqzoo.packing import Packing


class Bidirectional(SequenceMixer):
    """Runs one mixer forward in time and one backward, inside each sequence, and merges their outputs.

    "Bidirectional Recurrent Neural Networks" (Schuster and Paliwal, 1997). It reads the future, so it neither decodes
    nor takes or returns a state.

    The sum of two convolutions (S4, S4D, DSS, LongConv) is one with a kernel of two sides. It is made before the map
    that follows them, which is ``mixer``'s, as in S4 (https://arxiv.org/abs/2111.00396); the other one then has none.

    Args:
        mixer: Reads from the first token to the last.
        mixer_reverse: Reads from the last to the first. None means a copy of ``mixer`` with parameters of its own,
            newly initialised; pass ``mixer`` itself to share them. Beside a convolution in a sum, one made with
            ``output="none"``.
        merge: ``"sum"``; ``"concat"``, a linear map of both, ``(2 D) -> (D)``; or ``"gate"``, ``g f + (1 - g) r`` with
            ``g = sigmoid(W [f, r])``.
    """

    limits = {  # noqa: RUF012 - constant
        "step": "an output depends on the tokens after it",
        "state": "an output depends on the tokens after it, so no state of a prefix continues it",
        "causal": "the reverse direction reads the future",
    }
    packs = True

    def __init__(
        self,
        mixer: SequenceMixer,
        mixer_reverse: SequenceMixer | None = None,
        merge: Literal["sum", "concat", "gate"] = "sum",
    ) -> None:
        super().__init__(mixer.d_model)
        if merge not in ("sum", "concat", "gate"):
            raise ValueError(f"merge must be sum, concat or gate, got {merge!r}")
        convolves = merge == "sum" and isinstance(mixer, ConvolutionMixer)
        if mixer_reverse is None:
            mixer_reverse = copy.deepcopy(mixer)
            if convolves and isinstance(mixer_reverse, ConvolutionMixer):
                mixer_reverse.remove_map()
            mixer_reverse.reset_parameters()
        if mixer_reverse.d_model != mixer.d_model:
            raise ValueError(f"both mixers need one d_model, got {mixer.d_model} and {mixer_reverse.d_model}")
        for one in (mixer, mixer_reverse):
            if "causal" in one.limits:
                raise ValueError(f"{type(one).__name__} is not causal: {one.limits['causal']}")
        self.joint = convolves and isinstance(mixer_reverse, ConvolutionMixer)
        if self.joint and mixer_reverse is not mixer and mixer_reverse.output != "none":
            raise ValueError(
                f"two convolutions are summed before a map, which is the first one's: build mixer_reverse with "
                f"output='none', got {mixer_reverse.output!r}, or choose another merge"
            )
        self.mixer, self.mixer_reverse, self.merge = mixer, mixer_reverse, merge
        self.merge_proj = nn.Identity() if merge == "sum" else nn.Linear(2 * self.d_model, self.d_model)

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Both directions, merged."""
        if self.joint and isinstance(self.mixer, ConvolutionMixer):
            return Mixed(self.mixer.mix_both(cast("ConvolutionMixer", self.mixer_reverse), x, packing))
        forward = self._one(self.mixer, x, packing)
        turned = self._one(self.mixer_reverse, _reverse(x, packing), packing)
        backward = _reverse(turned.y, packing)
        losses = [loss for loss in (forward.auxiliary, turned.auxiliary) if loss is not None]
        return Mixed(self._merge(forward.y, backward), None, torch.stack(losses).sum() if losses else None)

    @staticmethod
    def _one(mixer: SequenceMixer, x: Tensor, packing: Packing | None) -> Mixed:
        y, _, auxiliary = mixer(x, cu_seqlens=packing, return_auxiliary=True)
        return Mixed(y, None, auxiliary)

    def _merge(self, forward: Tensor, backward: Tensor) -> Tensor:
        if self.merge == "sum":
            return forward + backward
        merged = self.merge_proj(torch.cat((forward, backward), dim=-1))
        if self.merge == "concat":
            return merged
        # under autocast the map may be narrower than what it weighs
        return torch.lerp(backward, forward, torch.sigmoid(merged).to(forward.dtype))

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """Nothing is carried."""
        return {}

    def reset_parameters(self) -> None:
        """Both mixers' initialisation, and PyTorch's for the merging map."""
        for mixer in dict.fromkeys((self.mixer, self.mixer_reverse)):
            mixer.reset_parameters()
        if isinstance(self.merge_proj, nn.Linear):
            self.merge_proj.reset_parameters()


def _reverse(x: Tensor, packing: Packing | None) -> Tensor:
    return x.flip(1) if packing is None else x[:, packing.reversal()]
