"""Hash routing: a fixed table names the experts of each token id, so that nothing has to be balanced or replayed.

Roller et al. (2021), arXiv:2106.04426, Sec. 3. The gates still come from scores, as in DeepSeek-V4.

Shapes: N tokens, V vocabulary, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import initialization as init

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.routers.protocol import RoutedTokens, RouterScores
from alignlab.models.routers.topk import TopKRouter


class HashRouter(TopKRouter):
    """A router whose choice depends on the token's id alone.

    Attributes:
        tid2eid: [V, K] int64, distinct experts of each id. Part of a checkpoint; a new model's is random.
    """

    tid2eid: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        shape = (config.vocab_size, config.num_experts_per_tok)
        self.register_buffer("tid2eid", torch.zeros(shape, dtype=torch.int64))

    def initialize(self) -> None:
        """Fill the table at random: a table of zeros would send every token to one expert."""
        super().initialize()
        init.copy_(self.tid2eid, random_table(self.config))

    def _ranked(self, scores: RouterScores, tokens: RoutedTokens) -> Tensor:
        """Return K for the first expert of a token's row in the table, less for each of the next, 0 for others.

        Raises:
            ConfigError: the pass has embeddings and no token ids.
        """
        if tokens.ids is None:
            raise ConfigError(
                "router_type is hash, which routes by token id, and the forward pass was given inputs_embeds without "
                "input_ids; give input_ids, or use router_type: topk"
            )
        num_chosen = self.config.num_experts_per_tok
        order = torch.arange(num_chosen, 0, -1, device=scores.logits.device, dtype=scores.logits.dtype)
        rows = self.tid2eid[tokens.ids]
        return torch.zeros_like(scores.logits).scatter(1, rows, order.expand(len(rows), num_chosen))


def random_table(config: PolicyConfig) -> Tensor:
    """Return distinct experts of every id, [V, K] int64, from torch's global generator.

    As many ids have an expert as any other, to within one, in every column.
    """
    experts, ids = config.num_experts, torch.randperm(config.vocab_size)
    shifts = torch.rand(config.vocab_size, experts - 1).argsort(dim=-1)[:, : config.num_experts_per_tok - 1] + 1
    first = ids[:, None] % experts
    return torch.cat([first, (first + shifts) % experts], dim=1)


def balanced_table(token_counts: Tensor, *, num_experts: int, num_chosen: int) -> Tensor:
    """Return a table [V, K] int64 that balances the experts on data with these counts of ids.

    The most frequent id comes first, and takes the K experts with the least tokens so far.

    Args:
        token_counts: [V], how often each id occurs.
        num_experts: E.
        num_chosen: K.

    Reference: Roller et al. (2021), arXiv:2106.04426, Sec. 3.1, balanced assignment.
    """
    loads = torch.zeros(num_experts, dtype=torch.float64)
    table = torch.zeros(len(token_counts), num_chosen, dtype=torch.int64)
    for token in token_counts.argsort(descending=True, stable=True).tolist():
        experts = loads.argsort(stable=True)[:num_chosen]
        table[token] = experts
        loads[experts] += float(token_counts[token])
    return table
