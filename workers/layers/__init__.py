"""Layers that models are made of; each knows its shard, none knows of batching."""
