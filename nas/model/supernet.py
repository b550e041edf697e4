"""The supernet: one set of weights that runs any vector of a search space, a different one in every row of a batch.

K/V heads are linear in the layer's input, so running row b at ``g`` groups is a small selection matrix applied to the
projected K and V. Rows differ only in the values of that matrix, never in a tensor's shape: one ordinary forward
pass trains or evaluates many vectors at once. Every layer presents as many K/V heads as the least common multiple of
its choices, each smaller choice repeating its own; attention over repeated heads equals attention over fewer heads.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import Tensor, nn

from nas.errors import UserError, in_short
from nas.files import read_json, write_atomically, write_json
from nas.model.decoder import Decoder, OutputCorrection, untied
from nas.model.sharing import DEFAULT_SHARING, SHARING_RULES, mix_heads, pooling
from nas.run import FinishedRun
from nas.space import SearchSpace, Vector, space_from_dict

_WEIGHTS, _CONFIG = "supernet.safetensors", "supernet.json"


class Supernet(nn.Module):
    """Elastic decoder over a search space, by the sharing rule of this name.

    With an ``output_rank``, which needs separate heads, each smaller choice of a layer has a correction of that rank.
    """

    def __init__(self, space: SearchSpace, sharing: str = DEFAULT_SHARING, output_rank: int = 0) -> None:
        super().__init__()
        if sharing not in SHARING_RULES:
            raise UserError(f"train.sharing is '{sharing}'; use auto, {', '.join(SHARING_RULES)}")
        self.space, self.rule = space, SHARING_RULES[sharing]
        self.decoder = Decoder(space.shape, [len(self.rule.from_largest(choices)) for choices in space.choices])
        for index, (choices, layer) in enumerate(zip(space.choices, self.decoder.model.layers, strict=True)):
            heads = math.lcm(*choices)
            mixtures = [self.rule.mixture(choices, g).repeat_interleave(heads // g, dim=0) for g in choices]
            self.register_buffer(f"mixtures_{index}", torch.stack(mixtures), persistent=False)  # (choices, G, S)
            if output_rank and len(choices) > 1:
                layer.self_attn.correction = OutputCorrection(layer.self_attn.o_proj, choices, output_rank)

    def forward(self, tokens_BT: Tensor, choices_BL: Tensor) -> Tensor:
        """Logits BTV; row b runs the vector that has the `SearchSpace.choice_indices` ``choices_BL[b]``."""
        if len(set(self.space.choices)) == 1:  # one look-up for all layers, as each is a kernel to launch
            selections: Sequence[Tensor] = self.get_buffer("mixtures_0")[choices_BL].unbind(1)
        else:
            columns = enumerate(choices_BL.unbind(1))
            selections = [self.get_buffer(f"mixtures_{layer}")[choices_B] for layer, choices_B in columns]
        return self.decoder(tokens_BT, selections)  # type: ignore[no-any-return]

    def shared_losses(self, windows_NT: Tensor, vectors: Sequence[Vector]) -> Tensor:
        """Mean loss (V, N), nats per token, of each of V vectors on the same N windows of T + 1 ids, in one pass.

        Vectors with the same first layers share their computation: layer l runs once for every distinct beginning of
        l + 1 entries. Of vectors that are neighbours in lexicographic order, most of the work is shared.
        """
        texts, decoder = len(windows_NT), self.decoder
        beginning = np.zeros(len(vectors), dtype=int)  # number of each vector's beginning, among the distinct ones
        steps: list[npt.NDArray[np.intp]] = []  # by layer: of each distinct beginning the shorter one, and its choice
        for layer, choices in enumerate(np.array(self.space.choice_indices(vectors)).T):
            options = len(self.space.choices[layer])
            distinct, beginning = np.unique(beginning * options + choices, return_inverse=True)
            steps += np.divmod(distinct, options)
        together = torch.from_numpy(np.concatenate([*steps, beginning])).to(windows_NT.device, non_blocking=True)
        indices = together.split([*map(len, steps), len(vectors)])
        x_BTD, rope = decoder.model.embed_tokens(windows_NT[:, :-1]), decoder.rope(0, windows_NT.shape[1] - 1)
        for layer, block in enumerate(decoder.model.layers):
            if not np.array_equal(steps[2 * layer], np.arange(len(x_BTD) // texts)):  # else a copy for nothing
                x_BTD = x_BTD.unflatten(0, (-1, texts))[indices[2 * layer]].flatten(0, 1)
            selection_VGS = self.get_buffer(f"mixtures_{layer}")[indices[2 * layer + 1]]
            x_BTD = block(x_BTD, rope, selection_VGS[:, None].expand(-1, texts, -1, -1).flatten(0, 1))
        targets_BT = windows_NT[:, 1:].repeat(len(x_BTD) // texts, 1)
        return decoder.row_losses(x_BTD, targets_BT).view(-1, texts)[indices[-1]]

    @torch.no_grad()
    def extract(self, vector: Vector) -> Decoder:
        """The sub-network at ``vector`` as a plain model of its own, with copied weights."""
        plain = Decoder(self.space.shape, self.space.check(vector)).to(self.decoder.rope_cos.device)
        mixtures = [self.rule.mixture(*layer) for layer in zip(self.space.choices, vector, strict=True)]
        state = with_mixed_heads(self.decoder.state_dict(), mixtures)
        plain.load_state_dict({name: state[name] for name in plain.state_dict()})
        for own, folded, mixture in zip(self.decoder.model.layers, plain.model.layers, mixtures, strict=True):
            if own.self_attn.correction is not None:
                folded.self_attn.o_proj.weight += own.self_attn.correction.matrix(mixture)
        return plain

    @torch.no_grad()
    def load_plain(self, state: Mapping[str, Tensor], kv_heads: Sequence[int]) -> None:
        """Takes over the weights of a plain model of this shape.

        Its K/V heads become means of neighbours where they are more than a layer's largest choice, and then enter the
        store as the sharing rule says. So the largest vector computes what the model computes, if it has as many.
        ``kv_heads`` are those of the model's layers, at least as many as each layer's largest choice.
        """
        assert all(heads >= groups for heads, groups in zip(kv_heads, self.space.largest, strict=True))
        layers = zip(self.space.choices, kv_heads, strict=True)
        mixtures = (self.rule.from_largest(choices) @ pooling(heads, choices[-1]) for choices, heads in layers)
        self.decoder.load_state_dict(self.decoder.state_dict() | with_mixed_heads(state, mixtures))

    def initialise(self, generator: torch.Generator) -> None:
        """Draws fresh weights: those that the plain largest model draws, whatever the sharing rule."""
        plain = Decoder(self.space.shape, self.space.largest)
        plain.initialise(generator)
        self.load_plain(plain.state_dict(), plain.kv_heads)


def save_supernet(
    space: SearchSpace, sharing: str, output_rank: int, state: Mapping[str, Tensor], folder: Path
) -> None:
    """Writes weights and config into ``folder``; ``state`` is the decoder's."""
    kept = {name: tensor.cpu().contiguous() for name, tensor in untied(space.shape, state).items()}
    write_atomically(folder / _WEIGHTS, lambda path: save_file(kept, path))
    config = {"name": space.name, "space": space.to_dict(), "sharing": sharing, "output_rank": output_rank}
    write_json(folder / _CONFIG, config)


def load_supernet(run: FinishedRun, device: torch.device) -> Supernet:
    """Loads the supernet of a finished train run."""
    weights, config = run.artifact(_WEIGHTS), read_json(run.artifact(_CONFIG))
    try:
        space, rank = space_from_dict(config["name"], config["space"]), config.get("output_rank", 0)
        supernet = Supernet(space, config["sharing"], rank)
        load_model(supernet.decoder, weights)  # which lacks a tied head
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"supernet {run.path} is corrupt ({in_short(error)}); train it again") from None
    return supernet.to(device)


def with_mixed_heads(state: Mapping[str, Tensor], mixtures: Iterable[Tensor]) -> dict[str, Tensor]:
    """A state dict whose K/V heads are mixed, with a mixture per layer."""
    mixed = dict(state)
    for layer, mixture in enumerate(mixtures):
        for tensor in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
            name = f"model.layers.{layer}.self_attn.{tensor}"
            if name in state:
                mixed[name] = mix_heads(mixture, state[name])
    return mixed
