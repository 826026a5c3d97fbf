"""Slots or pages: one layer's decode attention over a view of contiguous slots, or over blocks gathered from a pool.

    python benchmarks/cache_layout.py

Prints, for batches of sequences at several lengths, milliseconds for each layout (median, the two measured in turn),
the share of the paged time that is gathering, and the ratio.
"""

from __future__ import annotations

import statistics
import time

import torch

from topkapi.model.attention import KEY_BLOCK, block_attention

KV_HEADS, GROUP, HEAD_DIM, CAPACITY = 12, 1, 64, 1024


def main() -> None:
    torch.manual_seed(0)
    print("sequences  tokens  slots ms  pages ms  gathering  pages / slots")
    for sequences in (1, 8, 32):
        keys = torch.randn(sequences, KV_HEADS, CAPACITY // KEY_BLOCK, HEAD_DIM, KEY_BLOCK)
        values = torch.randn(sequences, KV_HEADS, CAPACITY, HEAD_DIM)
        pages = sequences * CAPACITY // KEY_BLOCK
        key_pool = torch.randn(pages, KV_HEADS, HEAD_DIM, KEY_BLOCK)
        value_pool = torch.randn(pages, KV_HEADS, KEY_BLOCK, HEAD_DIM)
        order = torch.randperm(pages)
        q = torch.randn(sequences, KV_HEADS, GROUP, HEAD_DIM)
        for length in (128, 512, 1024):
            table = order[: sequences * length // KEY_BLOCK]
            hidden = torch.zeros(sequences, 1, 1, length, dtype=torch.bool)

            def gather(
                table: torch.Tensor = table,
                length: int = length,
                key_pool: torch.Tensor = key_pool,
                value_pool: torch.Tensor = value_pool,
            ) -> tuple[torch.Tensor, torch.Tensor]:
                found = [pool.index_select(0, table).unflatten(0, (-1, length // KEY_BLOCK)) for pool in
                         (key_pool, value_pool)]  # fmt: skip
                blocks = [part.transpose(1, 2).contiguous() for part in found]
                return blocks[0], blocks[1].flatten(2, 3)

            times: dict[str, list[float]] = {"slots": [], "pages": [], "gather": []}
            for _ in range(15):
                began = time.perf_counter()
                block_attention(q, keys, values[:, :, :length], hidden)
                done = time.perf_counter()
                paged_keys, paged_values = gather()
                gathered = time.perf_counter()
                block_attention(q, paged_keys, paged_values, hidden)
                times["slots"].append(done - began)
                times["gather"].append(gathered - done)
                times["pages"].append(time.perf_counter() - done)
            median = {name: statistics.median(values) * 1e3 for name, values in times.items()}
            print(
                f"{sequences:9}  {length:6}  {median['slots']:8.2f}  {median['pages']:8.2f}"
                f"  {median['gather'] / median['pages']:8.0%}  {median['pages'] / median['slots']:13.2f}"
            )


if __name__ == "__main__":
    main()
