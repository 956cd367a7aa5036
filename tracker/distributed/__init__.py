"""Several processes: replicas that change together, and models that are spread over them."""

from tracker.distributed.ranks import Ranks, renew
from tracker.distributed.sharded import gather_sharded, shard_anew

__all__ = ["Ranks", "gather_sharded", "renew", "shard_anew"]
