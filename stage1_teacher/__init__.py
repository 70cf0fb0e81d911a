"""Stage 1: chat text -> premasked set -> teacher -> cache shards."""

from tide_cache.quiet import quiet_libraries

quiet_libraries()  # before anything imports transformers
