"""Generation: a batch of prompts of one length, continued greedily or by sampling."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from nas.serving.runtime import Runner

_COLDEST = 1e-4  # temperature; below it softmax is the maximum, or overflows


def generate(
    runner: Runner,
    tokens_BT: Tensor,
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] = (),
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Continues prompts of one length, and returns what it added, BN.

    Temperature 0 takes the likeliest token each time; otherwise tokens are drawn by the seed. It ends when every row
    has produced a token to ``stop`` at; until then all go on with whatever follows. ``progress`` is called with the
    number of new tokens so far, after each one.
    """
    prompt = tokens_BT.shape[1]
    generator = torch.Generator(tokens_BT.device).manual_seed(seed)
    stop_ids = torch.tensor(list(stop), dtype=torch.int64, device=tokens_BT.device)
    stopped_B = torch.zeros(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)
    logits_BV, produced = runner.prefill(tokens_BT), []
    for step in range(new_tokens):
        if temperature < _COLDEST:
            tokens_B = logits_BV.argmax(-1)
        else:
            shares_BV = (logits_BV.float() / temperature).softmax(-1)
            tokens_B = torch.multinomial(shares_BV, 1, generator=generator)[:, 0]
        produced.append(tokens_B)
        stopped_B |= torch.isin(tokens_B, stop_ids)
        if progress:
            progress(step + 1)
        if step + 1 == new_tokens or bool(stopped_B.all()):
            break
        logits_BV = runner.decode(tokens_B, prompt + step)
    return torch.stack(produced, dim=1)
