"""Stage 1: chat text -> premasked set -> teacher -> cache shards."""
