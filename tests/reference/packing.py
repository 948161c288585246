"""The slow twin of packing: sequences read back out of packs, one token at a time."""

from collections.abc import Sequence

from alignlab.types import Experience


def unpack(packs: Sequence[Experience]) -> dict[int, list[tuple[int, bool]]]:
    """By sequence id, its (token, in the mask) pairs, a shared prompt's tokens first."""
    sequences: dict[int, list[tuple[int, bool]]] = {}
    for pack in packs:
        table = pack.segments
        assert sum(table.lengths) == pack.tokens.shape[0] == pack.completion_mask.shape[0]
        spans = []
        for start, length in zip(table.starts, table.lengths, strict=True):
            spans.append([(int(pack.tokens[i]), bool(pack.completion_mask[i])) for i in range(start, start + length)])
        for span, prefix, sequence_id in zip(spans, table.prefixes, table.sequence_ids, strict=True):
            if sequence_id == -1:
                continue
            assert sequence_id not in sequences, "a sequence is in one place only"
            sequences[sequence_id] = (spans[prefix] if prefix >= 0 else []) + span
    return sequences
