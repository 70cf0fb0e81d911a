"""Stage 2: a student trained from cached shards, without the teacher in memory."""

from tide_cache.quiet import quiet_libraries

quiet_libraries()  # before anything imports transformers
