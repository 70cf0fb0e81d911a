"""Stage 2: a student trained from cached shards, without the teacher in memory."""
