"""Merges the K/V heads of a trained model without averaging what does not belong together.

The score of a rotary pair of a query and a key is Re(q k*), of complex numbers that rotate alike: so a key head may be
turned by any phase per pair if its queries are too, and a value head by any rotation that the output projection undoes.
Heads are thus brought into one gauge at no loss, in which those that are merged point the same way; what decides it is
E[h hᵀ] of the layer's input h (arXiv 2412.20677). A smaller choice starts as the means of aligned heads, and its keys
and values are then fitted by least squares: the residual stream after the layer's attention is to be that of the model,
where what comes in has passed through layers with all kinds of choices.

The gauge of a layer is the same for all of its choices, as is that of queries and output projection: its largest
choice computes what it did.

Shape suffixes: C K/V heads of the model, R query heads of each, d head width, P rotary pairs (d / 2), D model width,
E model width and one more for the bias, N tokens, n nodes (heads, or means of heads that were merged before).
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

from nas import console
from nas.model.decoder import Attention, Decoder, Rope
from nas.model.sharing import mix_heads, pooling
from nas.space import Vector

REVISION = 1  # of what `align` computes: a change of it must not find what an older one left in the cache
_FIT_STEPS = 60  # of L-BFGS
_ROUNDS = 30  # of fixing the gauge and the mean in turn, at most


@torch.no_grad()
def align(model: Decoder, choices: Sequence[Vector], tokens_BT: Tensor) -> dict[str, Tensor]:
    """Brings the heads of every layer of a plain model into one gauge, in place, and fits its smaller choices to it.

    ``choices`` are those of each layer, ``tokens_BT`` is text. Returns the weights and biases of all K and V
    projections, by their names in the model, with the heads of every choice in turn: as separate sharing stores them.
    """
    x_BTD, rope = model.model.embed_tokens(tokens_BT), model.rope(0, tokens_BT.shape[1])
    mixed_BTD, stored = x_BTD, {}  # mixed: the same text, each row at a vector of its own
    generator = torch.Generator().manual_seed(0)
    with console.progress_bar("Aligning the K/V heads of layers", len(choices)) as bar:
        for index, (layer, allowed) in enumerate(zip(model.model.layers, choices, strict=True)):
            h_BTD = layer.input_layernorm(x_BTD)
            _turn(layer.self_attn, allowed, h_BTD.flatten(0, 1))
            x_BTD = x_BTD + layer.self_attn(h_BTD, rope)
            h_BTD, target_BTD = layer.input_layernorm(mixed_BTD), x_BTD - mixed_BTD
            drawn_B = torch.randint(len(allowed), (len(tokens_BT),), generator=generator).to(x_BTD.device)
            fitted, mixed_BTD = [], mixed_BTD.clone()
            for choice, groups in enumerate(allowed):
                small, rows = Attention(model.shape.layer(groups)).to(x_BTD), drawn_B == choice
                fitted.append(_fit(small, layer.self_attn, h_BTD, target_BTD, rope))
                mixed_BTD[rows] += small(h_BTD[rows], rope)
            for name in fitted[0]:
                stored[f"model.layers.{index}.self_attn.{name}"] = torch.cat([own[name] for own in fitted])
            x_BTD, mixed_BTD = (x + layer.mlp(layer.post_attention_layernorm(x)) for x in (x_BTD, mixed_BTD))
            bar(index + 1)
    return stored


def _fit(small: Attention, whole: Attention, h_BTD: Tensor, target_BTD: Tensor, rope: Rope) -> dict[str, Tensor]:
    """Gives ``small`` the weights of ``whole``, its fewer heads fitted to the target; returns those of keys and values.

    They start as means of neighbours.
    """
    heads, groups = (attention.k_proj.out_features // attention.head_dim for attention in (whole, small))
    own = {name: parameter for name, parameter in small.named_parameters() if name.startswith(("k_proj", "v_proj"))}
    state = whole.state_dict()
    small.load_state_dict(state | {name: mix_heads(pooling(heads, groups), state[name]) for name in own})
    optimizer = torch.optim.LBFGS(own.values(), max_iter=_FIT_STEPS, history_size=20, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def error() -> Tensor:
        optimizer.zero_grad()
        relative: Tensor = (small(h_BTD, rope) - target_BTD).square().sum() / target_BTD.square().sum()
        relative.backward()
        return relative

    if groups < heads:
        optimizer.step(error)
    return {name: parameter.detach() for name, parameter in own.items()}


def _turn(attention: Attention, choices: Vector, h_ND: Tensor) -> None:
    """Reorders and turns a layer's heads, so that those that a choice merges lie side by side and in one gauge."""
    h_NE = torch.cat((h_ND, torch.ones_like(h_ND[:, :1])), dim=1).double()  # the ones meet the biases
    moment_EE = h_NE.T @ h_NE / len(h_NE)
    q_HdE, k_CdE, v_CdE = (
        _rows(linear).unflatten(0, (-1, attention.head_dim))
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    k_CPE = _complex(k_CdE)
    key_gram = torch.einsum("apE,bpE->pab", k_CPE @ moment_EE.to(k_CPE), k_CPE.conj())[..., None, None]
    value_gram = torch.einsum("aiE,bjE->abij", v_CdE @ moment_EE, v_CdE)[None]
    order, (key_turns, value_turns) = gauge([key_gram, value_gram], [_pairs_turn(attention), True], choices)

    phases_CP, turns_Cdd = key_turns[..., 0, 0].T, value_turns[0]  # in the new order
    q_CRPE = _complex(q_HdE).unflatten(0, (len(order), -1))[order] * phases_CP[:, None, :, None]
    _set_rows(attention.q_proj, _real(q_CRPE.flatten(0, 1)))
    _set_rows(attention.k_proj, _real(k_CPE[order] * phases_CP[..., None]))
    _set_rows(attention.v_proj, turns_Cdd @ v_CdE[order])
    o_DCRd = attention.o_proj.weight.double().unflatten(1, (len(order), -1, attention.head_dim))[:, order]
    attention.o_proj.weight.copy_(torch.einsum("DCRd,Ced->DCRe", o_DCRd, turns_Cdd).flatten(1))


def gauge(grams: Sequence[Tensor], turnable: Sequence[bool], choices: Vector) -> tuple[list[int], list[Tensor]]:
    """The order of C heads, and the unitary matrices that turn them, in that order, into one gauge.

    A gram (batch, C, C, i, i) holds the second moments of what i × i matrices turn: [:, a, b] is E[x_a x_bᴴ]. The
    matrices are (batch, C, i, i), those of a gram that is not ``turnable`` identities. Heads are merged step by step
    down the choices that divide each other, and into one in the end, so that all of them share the gauge.
    """
    heads = grams[0].shape[1]
    order, turns = list(range(heads)), [_identities(gram) for gram in grams]
    energies = [float(_energy(gram)) or 1.0 for gram in grams]
    for groups in (*reversed(choices), 1):
        nodes = grams[0].shape[1]
        if nodes == groups or nodes % groups:
            continue
        parts = _partition(nodes, groups, partial(_lost, grams, turnable, energies))
        moved = list(itertools.chain.from_iterable(parts))
        positions = [node * (heads // nodes) + head for node in moved for head in range(heads // nodes)]
        order, merged = [order[position] for position in positions], []
        for index, gram in enumerate(grams):
            own = [_turns(_between(gram, part), turnable[index]) for part in parts]
            turn = torch.cat(own, dim=1)
            gram = _turned(_between(gram, moved), turn).unflatten(2, (groups, -1)).unflatten(1, (groups, -1))
            merged.append(gram.mean((2, 4)))
            turns[index] = turn.repeat_interleave(heads // nodes, dim=1) @ turns[index][:, positions]
        grams = merged
    return order, turns


def _partition(nodes: int, groups: int, cost: Callable[[tuple[int, ...]], float]) -> list[tuple[int, ...]]:
    """Equal groups of nodes of little total cost: neighbours, improved by swaps until none helps any more."""
    parts, cost = [tuple(part) for part in torch.arange(nodes).view(groups, -1).tolist()], cache(cost)
    improved = True
    while improved:
        improved = False
        for a, b in itertools.combinations(range(groups), 2):
            for mine, other in itertools.product(parts[a], parts[b]):
                swap = {mine: other, other: mine}
                new = [tuple(sorted(swap.get(node, node) for node in parts[side])) for side in (a, b)]
                if sum(map(cost, new)) < cost(parts[a]) + cost(parts[b]) - 1e-9:
                    parts[a], parts[b] = new
                    improved = True
                    break
    return parts


def _lost(
    grams: Sequence[Tensor], turnable: Sequence[bool], energies: Sequence[float], members: tuple[int, ...]
) -> float:
    """The shares of all energy, added over the grams, that the members lose when they become their mean."""
    lost = 0.0
    for gram, may, energy in zip(grams, turnable, energies, strict=True):
        own = _between(gram, members)
        kept = _turned(own, _turns(own, may)).sum((1, 2)).diagonal(dim1=1, dim2=2).real.sum() / len(members)
        lost += float(_energy(own) - kept) / energy
    return lost


def _turns(gram: Tensor, may: bool) -> Tensor:
    """The unitary matrices that bring nodes closest to their mean, which stays in the first one's gauge."""
    turns, cross = _identities(gram), gram[:, 0]
    for _ in range(_ROUNDS if may else 0):  # the mean is fixed, then the matrices: orthogonal Procrustes problems
        before = turns
        left, _, right = torch.linalg.svd(cross)
        turns = left @ right
        if torch.allclose(turns, before):
            break
        cross = torch.einsum("bmij,bmnjk->bnik", turns, gram)
    return turns


def _turned(gram: Tensor, turns: Tensor) -> Tensor:
    return torch.einsum("bmij,bmnjk,bnlk->bmnil", turns, gram, turns.conj())


def _between(gram: Tensor, members: Sequence[int]) -> Tensor:
    return gram[:, members][:, :, members]


def _identities(gram: Tensor) -> Tensor:
    return torch.eye(gram.shape[-1]).to(gram).expand(*gram.shape[:2], -1, -1)


def _energy(gram: Tensor) -> Tensor:
    return torch.einsum("bmmii->", gram).real


def _pairs_turn(attention: Attention) -> bool:
    """Whether the phases of rotary pairs can change: norms of queries and keys must weigh both of a pair alike."""
    if not attention.qk_norm:
        return True
    halves = [norm.weight.chunk(2) for norm in (attention.q_norm, attention.k_norm)]
    return all(torch.equal(first, second) for first, second in halves)


def _rows(linear: nn.Linear) -> Tensor:
    """Weight and bias side by side, (outputs, E), in fp64."""
    bias = torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias
    return torch.cat((linear.weight, bias[:, None]), dim=1).double()


def _set_rows(linear: nn.Linear, heads: Tensor) -> None:
    rows = heads.flatten(0, 1)
    linear.weight.copy_(rows[:, :-1])
    if linear.bias is not None:
        linear.bias.copy_(rows[:, -1])


def _complex(heads_ndE: Tensor) -> Tensor:
    """The rotary pairs of heads, (n, P, E)."""
    return torch.complex(*heads_ndE.chunk(2, dim=1))


def _real(pairs_nPE: Tensor) -> Tensor:
    return torch.cat((pairs_nPE.real, pairs_nPE.imag), dim=1)
