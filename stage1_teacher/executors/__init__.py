"""Engines that run shard tasks: one rule (publish if absent), several ways to get workers."""
