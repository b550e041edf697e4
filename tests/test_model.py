"""The decoder and the supernet: against transformers, and against each other."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from nas.errors import UserError
from nas.model import Decoder, Supernet
from nas.model.sharing import SHARING_RULES, pooling
from nas.quality import row_losses
from nas.shape import FEATURES, ModelShape
from nas.space import SearchSpace, Vector, load_space
from tests.conftest import logits_at, random_supernet
from tests.helpers import LINEAR, LLAMA3, YARN

SHAPE = ModelShape(
    num_hidden_layers=3,
    hidden_size=48,
    num_attention_heads=12,
    head_dim=8,
    intermediate_size=64,
    vocab_size=97,
    max_position_embeddings=24,
)
RULES = st.sampled_from(sorted(SHARING_RULES))


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Shapes with any of the features that Llama and its relatives have."""
    flags = {key: draw(st.booleans()) for key in FEATURES if key != "rope_scaling"}
    return dataclasses.replace(SHAPE, **flags, rope_scaling=draw(st.sampled_from([None, LINEAR, LLAMA3, YARN])))


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    """Spaces of 12 heads whose layers allow any sets of divisors, nested or not."""
    allowed = st.sets(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=3)
    return SearchSpace("drawn", draw(shapes()), tuple(tuple(sorted(draw(allowed))) for _ in range(3)))


def vectors_of(space: SearchSpace) -> st.SearchStrategy[Vector]:
    """Vectors of a space."""
    return st.tuples(*(st.sampled_from(allowed) for allowed in space.choices))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_row_of_a_mixed_batch_has_the_loss_of_its_extracted_sub_network(data: st.DataObject) -> None:
    space = data.draw(spaces())
    vectors = data.draw(st.lists(vectors_of(space), min_size=1, max_size=5))
    sharing = data.draw(RULES)
    rank = data.draw(st.sampled_from([0, 3])) if sharing == "separate" else 0
    supernet = random_supernet(space, data.draw(st.integers(0, 100)), sharing=sharing, output_rank=rank)
    tokens = torch.randint(SHAPE.vocab_size, (len(vectors), 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mixed = row_losses(logits_at(supernet, tokens[:, :-1], vectors), tokens[:, 1:])
        for row, vector in enumerate(vectors):
            alone = row_losses(supernet.extract(vector)(tokens[row : row + 1, :-1]), tokens[row : row + 1, 1:])
            torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-4, rtol=0)


def test_vectors_of_a_batch_really_differ(micro: SearchSpace) -> None:
    supernet = random_supernet(micro)
    tokens = torch.randint(micro.shape.vocab_size, (1, 12)).expand(3, -1)
    with torch.no_grad():
        logits = logits_at(supernet, tokens, [(1, 1, 1), (2, 2, 2), (4, 4, 4)])
    assert (logits[0] - logits[1]).abs().max() > 1e-2
    assert (logits[1] - logits[2]).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharing", ["sliced", "pooled"])
def test_the_largest_vector_equals_transformers_llama(tied: bool, sharing: str) -> None:
    shape = dataclasses.replace(SHAPE, tie_word_embeddings=tied)
    supernet = random_supernet(SearchSpace("nested", shape, ((1, 2, 4),) * 3), sharing=sharing)
    config = LlamaConfig(
        **{name: value for name, value in shape.to_dict().items() if name != "rope_theta"},
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
    )
    reference = LlamaForCausalLM(config).eval()
    reference.load_state_dict(supernet.decoder.state_dict())
    tokens = torch.randint(shape.vocab_size, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = logits_at(supernet, tokens, [supernet.space.largest] * 3)
        torch.testing.assert_close(ours, reference(tokens).logits, atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(shapes(), st.booleans(), st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=3, max_size=3))
def test_every_feature_is_counted_as_the_module_has_it(shape: ModelShape, tied: bool, vector: list[int]) -> None:
    shape = dataclasses.replace(shape, tie_word_embeddings=tied)
    assert sum(parameter.numel() for parameter in Decoder(shape, vector).parameters()) == shape.parameters(vector)


def test_fresh_norms_are_one_and_fresh_biases_zero() -> None:
    shape = dataclasses.replace(SHAPE, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)
    model = Decoder(shape, (1, 2, 4))
    model.initialise(torch.Generator().manual_seed(0))
    kinds = {name.split(".")[-2]: parameter for name, parameter in model.named_parameters() if parameter.dim() == 1}
    biases = {name: parameter for name, parameter in model.named_parameters() if name.endswith("bias")}
    assert {"q_norm", "k_norm", "input_layernorm", "post_attention_layernorm", "norm"} <= kinds.keys()
    assert len(biases) == 3 * 7
    assert all((parameter == 0).all() for parameter in biases.values())
    norms = [parameter for name, parameter in kinds.items() if "norm" in name]
    assert all((parameter == 1).all() for parameter in norms)


def test_a_large_published_shape_has_its_published_number_of_parameters() -> None:
    space = load_space("llama-2-7b")
    assert space.shape.parameters(space.largest) == 6_738_415_616  # Llama 2 7B as its checkpoint counts
    with torch.device("meta"):
        model = Decoder(space.shape, space.largest)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616


@settings(max_examples=60, deadline=None)
@given(st.sets(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1), RULES)
def test_every_sharing_rule_mixes_stored_heads_with_weights_that_sum_to_one(choices: set[int], rule: str) -> None:
    ascending = sorted(choices)
    stored = len(SHARING_RULES[rule].from_largest(ascending))
    for groups in ascending:
        mixture = SHARING_RULES[rule].mixture(ascending, groups)
        assert mixture.shape == (groups, stored)
        torch.testing.assert_close(mixture.sum(1), torch.ones(groups))
        assert torch.linalg.matrix_rank(mixture) == groups  # no two heads of a choice are the same


@pytest.mark.parametrize(
    ("rule", "picked"),
    [
        ("sliced", {1: [[0]], 2: [[0], [2]], 4: [[0], [1], [2], [3]]}),
        ("pooled", {1: [[0, 1, 2, 3]], 2: [[0, 1], [2, 3]], 4: [[0], [1], [2], [3]]}),
        ("separate", {1: [[0]], 2: [[1], [2]], 4: [[3], [4], [5], [6]]}),
    ],
)
def test_each_rule_reads_the_stored_heads_that_it_says(rule: str, picked: dict[int, list[list[int]]]) -> None:
    for groups, heads in picked.items():
        mixture = SHARING_RULES[rule].mixture([1, 2, 4], groups)
        assert [row.nonzero().flatten().tolist() for row in mixture] == heads
        assert all(row[row > 0].unique().numel() == 1 for row in mixture)  # a plain mean


def test_means_over_stretches_that_do_not_fit_the_heads_share_the_head_between_them() -> None:
    torch.testing.assert_close(pooling(3, 2), torch.tensor([[2, 1, 0], [0, 1, 2]]) / 3)
    torch.testing.assert_close(pooling(5, 3).sum(0), torch.full((5,), 3 / 5))  # every head counts the same


@settings(max_examples=60, deadline=None)
@given(st.sets(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1), RULES)
def test_a_trained_layer_loses_nothing_at_its_largest_choice(choices: set[int], rule: str) -> None:
    ascending = sorted(choices)
    stored = SHARING_RULES[rule].from_largest(ascending)
    for groups in ascending:
        entered = SHARING_RULES[rule].mixture(ascending, groups) @ stored
        if groups == ascending[-1]:
            torch.testing.assert_close(entered, torch.eye(groups))
        elif rule in ("pooled", "separate"):
            torch.testing.assert_close(entered, pooling(ascending[-1], groups))


def test_an_unknown_sharing_rule_is_refused(micro: SearchSpace) -> None:
    with pytest.raises(UserError, match=r"train.sharing is 'nonsense'; use auto, sliced"):
        Supernet(micro, "nonsense")


def test_a_correction_changes_nothing_at_first_and_the_largest_vector_never(micro: SearchSpace) -> None:
    supernet, vectors = random_supernet(micro, sharing="separate"), [micro.smallest, micro.largest]
    corrected = Supernet(micro, "separate", 2)
    corrected.decoder.load_state_dict(corrected.decoder.state_dict() | supernet.decoder.state_dict())
    tokens = torch.randint(micro.shape.vocab_size, (2, 8))
    with torch.no_grad():
        wanted = logits_at(supernet, tokens, vectors)
        assert torch.equal(logits_at(corrected, tokens, vectors), wanted)
        for name, parameter in corrected.named_parameters():
            parameter.add_(".correction." in name)
        smallest, largest = logits_at(corrected, tokens, vectors)
        assert torch.equal(largest, wanted[1])
        assert (smallest - wanted[0]).abs().max() > 1e-2


def test_gradients_reach_only_the_heads_that_a_batch_uses(micro: SearchSpace) -> None:
    supernet = random_supernet(micro)
    tokens = torch.randint(micro.shape.vocab_size, (2, 8))
    logits_at(supernet, tokens, [micro.smallest] * 2).sum().backward()
    weight = supernet.decoder.get_parameter("model.layers.0.self_attn.v_proj.weight")
    assert weight.grad is not None
    gradient = weight.grad.unflatten(0, (4, -1)).abs().sum((1, 2))
    assert gradient[0] > 0
    assert gradient[1:].sum() == 0


def test_one_compiled_graph_serves_all_layers_at_all_vectors(micro: SearchSpace) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    supernet = random_supernet(micro)
    for layer in supernet.decoder.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    tokens = torch.randint(micro.shape.vocab_size, (2, 8))
    for vectors in ([(1, 1, 1), (4, 4, 4)], [(4, 2, 1), (2, 2, 2)], [(1, 2, 4), (1, 2, 4)]):
        compiled = logits_at(supernet, tokens, vectors)
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(compiled, logits_at(supernet, tokens, vectors))
    assert len(graphs) == 1
