"""The texts of a step: exchanged once, in the number format of the cache, and in slot order on every rank."""

import json
import sys
from pathlib import Path

from uniemox_dist.distributed.local_launcher import run_ranks

RANK = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from uniemox_dist.data.loader import MicroBatch
from uniemox_dist.data.origin import ReadCounts
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.train.pretrain import gather_texts

STREAMS, TURNS = 8, 3
world = World.from_env()
device = collectives.init(world, 60)
own = STREAMS // world.size
slots = [turn * STREAMS + world.rank * own + i for turn in range(TURNS) for i in range(own)]
texts = torch.tensor([[slot, slot / 7] for slot in slots]).half()
none = torch.empty(0)
batches = [
    MicroBatch(none, none, None, piece, None, None, (), (), (), ReadCounts()) for piece in texts.split(2)
]
sent = []
gather = dist.all_gather_into_tensor
dist.all_gather_into_tensor = lambda out, own: (sent.append([str(own.dtype), own.numel()]), gather(out, own))[1]
found = gather_texts(batches, STREAMS, world, device)
exact = torch.tensor([[slot, slot / 7] for slot in range(STREAMS * TURNS)]).half().float()
facts = {"sent": sent, "dtype": str(found.dtype), "exact": torch.equal(found, exact)}
Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(facts))
collectives.close()
"""


def test_the_texts_of_a_step_are_exchanged_once_in_fp16_and_are_exact_in_slot_order(tmp_path: Path) -> None:
    for ranks in (1, 4):
        assert run_ranks([sys.executable, "-c", RANK, str(tmp_path)], ranks, gpus=False) == 0
        for rank in range(ranks):
            facts = json.loads((tmp_path / f"{rank}.json").read_text())
            sent = [["torch.float16", 24 // ranks * 2]] if ranks > 1 else []
            assert facts == {"sent": sent, "dtype": "torch.float32", "exact": True}
